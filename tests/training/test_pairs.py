"""An encoder–decoder learns a mapping from pairs, and goes on where it stopped; every mesh gives the same."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import P

from tests.models import filled
from tests.scripts.runs import rows, run
from weft.data.examples import reversed_digits
from weft.data.pairs import Pair, pack_pairs
from weft.data.tokenizer import Tokenizer
from weft.inference.generate import generate
from weft.inference.run import open_run
from weft.inference.sampling import Sampling
from weft.model.config import changed
from weft.runtime.errors import UserError
from weft.sharding.mesh import BATCH, MeshConfig, make_mesh
from weft.training.config import load_config
from weft.training.loss import loss_and_gradient

CONFIG = Path(__file__).parents[2] / 'configs' / 'reverse.yaml'


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('pairs')
    (folder / 'reverse.tsv').write_text(''.join(f'{a}\t{b}\n' for a, b in reversed_digits(4000)))
    return folder


@pytest.fixture(scope='module')
def trained(place) -> Path:
    jax.devices()  # those of the tests, before `open_run` asks for fewer
    as_users = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '0', 'XLA_FLAGS': ''}
    run(place, 'train', str(CONFIG), 'training.steps=200', **as_users)
    run(place, 'train', str(CONFIG), 'training.steps=210', 'mesh.data=2')
    return place


def test_a_small_model_learns_to_reverse_strings_that_it_has_never_seen(trained):
    figures = rows(trained, 'reverse')
    assert figures[-1]['validation_loss'] < 0.1
    opened = open_run(trained / 'runs' / 'reverse')
    known = {source for source, _ in reversed_digits(4000)}
    fresh = [pair for pair in reversed_digits(400, seed=1) if pair[0] not in known]
    assert len(fresh) > 100
    with jax.set_mesh(opened.mesh):
        found = generate(opened.model, opened.tokenizer, [source for source, _ in fresh], Sampling(), 20, context=32)
    right = [one.text == target for one, (_, target) in zip(found, fresh, strict=True)]
    assert np.mean(right) >= 0.95, np.mean(right)
    assert all(one.finish_reason == 'stop' for one in found[:10])


def test_the_scripts_read_sources(trained):
    (trained / 'more.tsv').write_text('1 2 3\t3 2 1\n4 5\t5 4\n')
    done = run(trained, 'decode', 'runs/reverse', '--prompt', '1 2 3 4', '--prompt', '9 8', '--beams', '3', '--json')
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one['text'] for one in found] == ['4 3 2 1', '8 9']
    assert all(-0.5 < one['score'] < 0 for one in found)
    assert run(trained, 'decode', 'runs/reverse', '--prompt', '7 0 7').stdout == '7 0 7\t7 0 7\n'
    figures = json.loads(run(trained, 'evaluate', 'runs/reverse', '--data', 'more.tsv', '--json').stdout)
    assert figures['bytes'] == len('3 2 1' + '5 4')
    assert figures['nats_per_token'] < 0.5
    opened = open_run(trained / 'runs' / 'reverse')
    source, target = (opened.tokenizer.encode_batch([text])[0] for text in ('1 2 3', '3 2 1'))
    np.save(trained / 'tokens.npy', np.array([[opened.tokenizer.bos, *target]] * 2))
    np.save(
        trained / 'sources.npy', np.array([[*source, opened.tokenizer.eos, -1], [*source, opened.tokenizer.eos, -1]])
    )
    asked = ('runs/reverse', '--tokens', 'tokens.npy', '--logits', 'logits.npy')
    run(trained, 'score', *asked, '--sources', 'sources.npy')
    best = np.load(trained / 'logits.npy').argmax(-1)
    assert best.tolist() == [[*target, opened.tokenizer.eos]] * 2
    assert '--sources FILE' in run(trained, 'score', *asked, code=2).stderr
    mistake = run(trained, 'decode', 'runs/reverse', '--prompt', '1', '--beams', '2', '--temperature', '1', code=2)
    assert '--beams 2: it chooses by itself; leave out --temperature' in mistake.stderr
    mistake = run(trained, 'decode', 'runs/reverse', '--prompt', '1 ' * 40, code=2)
    assert 'and the context is 32: at most 32 work' in mistake.stderr


VARIANTS = {
    'relative': {},
    'as in 2017': {
        'positions.kind': 'sinusoidal',
        'positions.max': 32,
        'norm.kind': 'layernorm',
        'norm.order': 'post',
        'mlp.activation': 'relu',
        'attention.o_bias': True,
        'mlp.bias': True,
        'norm.bias': True,
        'attention.qkv_bias': True,
        'head.bias': True,
    },
    'rotary, sandwich, grouped': {'positions.kind': 'rotary', 'norm.order': 'sandwich', 'attention.kv_heads': 2},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_mesh_gives_the_same_loss_and_gradient(variant):
    config = load_config(CONFIG)
    fields = {
        'vocabulary': 300,
        'layers': 1,
        'model_dim': 32,
        'attention.head_dim': 8,
        'mlp.dim': 48,
        'dropout': 0.2,
        **VARIANTS[variant],
    }
    config = dataclasses.replace(config, model=changed(config.model, fields))
    pairs = [Pair(*pair) for pair in reversed_digits(400)]
    packed, _ = pack_pairs(Tokenizer.train((side for pair in pairs for side in pair), 300), pairs, 32)
    batch, found = packed.take(range(8)), []
    for mesh in (MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)):
        with jax.set_mesh(make_mesh(mesh)):
            model = filled(config.model)
            on = jax.tree.map(lambda array: jax.device_put(array, P(BATCH)), batch)
            (loss, _), gradient = jax.jit(loss_and_gradient)(model, on, jax.random.key(3))
            found.append((float(loss), jax.tree.map(np.asarray, gradient)))
    (loss, gradient), (other, same) = found
    assert abs(loss - other) < 1e-5 * loss
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), same, gradient)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('mesh.context=2', 'mesh.context is 2 and the number of parts that an encoder–decoder can be split into'),
        ('mesh.stage=2', 'mesh.stage is 2 and the number of parts'),
        ('mesh.tensor=8', r'mesh.tensor is 8 and model.attention.heads is 4'),
        ('model.positions={kind: sinusoidal, max: 0}', 'model.positions.max is 0: sinusoidal positions need a table'),
        ('model.causal=false', 'model.causal is false and model.encoder is given'),
        ('model.moe={experts: 4, mlp_dim: 8}', 'model.moe is given and model.encoder too'),
        ('model.encoder.kv_heads=3', 'model.encoder.kv_heads is 3 and model.encoder.heads 4'),
    ],
)
def test_what_an_encoder_decoder_cannot_be_is_refused_before_anything_is_compiled(override, message):
    with pytest.raises(UserError, match=message) as found:
        load_config(CONFIG, [override]).check_sizes()
    assert '\n' not in str(found.value)
