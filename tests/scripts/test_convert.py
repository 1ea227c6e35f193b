"""A run that is exported and imported again is the same model, to be decoded, scored and trained on."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.families import folders
from tests.scripts.runs import ROOT, everything, refused, rows, run, workplace
from weft.data.examples import reversed_digits
from weft.data.pairs import prompts as sources_of
from weft.hub.published_folder import SINGLE
from weft.inference.run import open_run
from weft.model.config import AttentionConfig, LearnedConfig, MLPConfig, ModelConfig
from weft.runtime.device_memory import human_bytes
from weft.runtime.errors import UserError
from weft.scripts.score import check_ids
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage.checkpoint import Checkpoints
from weft.training.config import load_config
from weft.training.exporting import export_run
from weft.training.importing import import_run
from weft.training.loop import train
from weft.training.state import restore_imported, restore_model

DENSE = ('model.moe=null', 'mesh.expert=1', 'mesh.data=1', 'training.steps=2', 'optimizer.learning_rate=1e-3')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp('convert'))
    run(folder, 'train', 'tiny.yaml', *DENSE)
    run(folder, 'convert', 'export', 'runs/tiny', 'published')
    run(folder, 'convert', 'import', 'published', 'runs/again', '--mesh', 'data=2,expert=2')
    return folder


def test_the_same_text_and_logits(place):
    np.save(place / 'ids.npy', np.random.default_rng(0).integers(0, 300, (3, 32)).astype(np.int32))
    found = []
    for name in ('tiny', 'again'):
        done = run(place, 'decode', f'runs/{name}', '--prompt', 'def f1', '--max-new-tokens', '8', '--json')
        run(place, 'score', f'runs/{name}', '--tokens', 'ids.npy', '--logits', 'out.npy')
        found.append((json.loads(done.stdout)['tokens'], np.load(place / 'out.npy', allow_pickle=False)))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5 * np.abs(found[0][1]).max())


def test_training_begins_from_imported_weights(place):
    run(place, 'train', 'runs/again/config.yaml', 'data.source=text', 'training.steps=2', 'training.batch=8')
    ours, theirs = rows(place, 'tiny'), rows(place, 'again')
    assert theirs[0]['loss'] < ours[0]['loss'] - 0.01, 'it has learnt something already'
    tokenizers = [(place / 'runs' / 'again' / name) for name in ('tokenizer.json', 'checkpoints/2/tokenizer.json')]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes() == (place / 'published/tokenizer.json').read_bytes()
    done = run(place, 'train', 'runs/again/config.yaml', 'model.mlp.dim=64', code=2)
    assert 'model.mlp.dim is 64 and was 32' in done.stderr


@pytest.mark.parametrize('more', [['name=other'], ['--fresh'], ['--runs', 'elsewhere']], ids=' '.join)
def test_an_imported_model_never_begins_from_random_weights_unsaid(place, more):
    before = everything(place)
    assert 'is an imported model' in refused(place, 'train', 'runs/again/config.yaml', *more)
    assert everything(place).keys() == before.keys()


def test_small_steps_are_not_lost_in_narrow_weights(place):
    export_run(place / 'runs' / 'tiny', place / 'narrow', 'bfloat16', say=str)
    import_run(place / 'narrow', place / 'runs' / 'narrow', MeshConfig(data=2), say=str)
    export_run(place / 'runs' / 'narrow', place / 'untouched', say=str)
    assert (place / 'untouched' / SINGLE).read_bytes() == (place / 'narrow' / SINGLE).read_bytes()
    few = ['training.steps=3', 'training.batch=4', 'training.sequence_length=32', 'optimizer.warmup_steps=0']
    few.append(f'data.source={place / "text"}')
    config = load_config(place / 'runs' / 'narrow' / 'config.yaml', few)
    with pytest.raises(UserError, match=r'weight_dtype is float16 and the imported weights are bfloat16.*=float32'):
        train(
            load_config(place / 'runs' / 'narrow' / 'config.yaml', [*few, 'compute.weight_dtype=float16']),
            place / 'runs',
        )
    out = io.StringIO()
    train(config, place / 'runs', console=Console(file=out, width=200))
    assert 'narrow, in float32: small steps would be lost in bfloat16' in out.getvalue()
    checkpoints = Checkpoints(place / 'runs' / 'narrow')
    with jax.set_mesh(make_mesh(config.mesh)):
        before = jax.tree.leaves(restore_imported(Checkpoints(place / 'runs' / 'narrow'), config))
        after = jax.tree.leaves(restore_model(checkpoints, 3, config))
    assert {x.dtype for x in after} == {np.dtype(np.float32)}
    rounded = [x.astype(jnp.bfloat16) == y.astype(jnp.bfloat16) for x, y in zip(before, after, strict=True)]
    assert np.concatenate([np.ravel(same) for same in rounded]).mean() > 0.9, 'bfloat16 would have rounded them away'
    moved = [np.asarray(x != y) for x, y in zip(before, after, strict=True)]
    assert np.concatenate([np.ravel(one) for one in moved[1:]]).mean() > 0.9  # the embedding has rows of no token
    said = []
    export_run(place / 'runs' / 'narrow', place / 'trained', say=said.append)
    assert 'rounded from float32 to bfloat16' in said[-1]
    assert {x.dtype for x in folders.stored(place / 'trained').values()} == {np.dtype(jnp.bfloat16)}


def test_an_encoder_decoder_is_exported_as_a_t5(place):
    pairs = ''.join(f'{source}\t{target}\n' for source, target in reversed_digits(200))
    (place / 'pairs.tsv').write_text(pairs, encoding='utf-8')
    changes = ['model.attention.scale=1.0', 'model.embedding.tied=false', 'model.layers=1', 'model.encoder.layers=1']
    changes += [f'data.source={place / "pairs.tsv"}', 'training.steps=1', 'training.batch=4']
    train(load_config(str(ROOT / 'configs/reverse.yaml'), changes), place / 'runs', console=Console(file=io.StringIO()))
    export_run(place / 'runs' / 'reverse', place / 't5', say=str)
    import_run(place / 't5', place / 'runs' / 't5', MeshConfig(), say=str)
    ours, again = (open_run(place / 'runs' / name) for name in ('reverse', 't5'))
    export_run(place / 'runs' / 't5', place / 't5-again', say=str)
    assert (place / 't5' / SINGLE).read_bytes() == (place / 't5-again' / SINGLE).read_bytes()
    assert again.config.model.encoder.start_token == ours.tokenizer.bos
    read = lambda opened: sources_of(opened.tokenizer, ['1 2 3', '40 5'])
    assert read(ours) == read(again)


MISTAKES = {
    'no folder': (['import', 'nowhere', 'runs/new'], ['nowhere', 'no such folder']),
    'a run that is there': (['import', 'published', 'runs/tiny'], ['runs/tiny', 'exists already']),
    'a folder that is there': (['export', 'runs/tiny', 'published'], ['published', 'exists already']),
    'no run': (['export', 'runs/none', 'new'], ['runs/none', 'not a run']),
    'a name that is none': (['import', 'published', 'runs/a b'], ["'a b'", "'a-b'"]),
    'a mesh that does not fit': (['import', 'published', 'runs/new', '--mesh', 'tensor=3'], ['mesh.tensor is 3']),
    'no such field to ignore': (
        ['import', 'published', 'runs/new', '--ignore', 'hiden_size'],
        ['--ignore hiden_size', "did you mean 'hidden_size'"],
    ),
    'no such family': (['export', 'runs/tiny', 'new', '--family', 'lama'], ['lama', "did you mean 'llama'"]),
    'another family': (
        ['export', 'runs/tiny', 'new', '--family', 'gpt2'],
        ['gpt2, which would need model.', 'model.mlp.activation=gelu'],
    ),
}


AS_A_PROCESS = ('a run that is there', 'another family')  # an import and an export, as a user sees them


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line_and_touches_nothing(place, name):
    arguments, words = MISTAKES[name]
    before = everything(place)
    if name in AS_A_PROCESS:
        (line,) = run(place, 'convert', *arguments, code=2).stderr.strip().splitlines()
    else:
        line = refused(place, 'convert', *arguments)
    assert everything(place).keys() == before.keys()
    assert all(word in line for word in words), line


def test_an_import_has_no_validation_split(place):
    import_run(place / 'published', place / 'runs' / 'bare', MeshConfig(), say=str)
    line = refused(place, 'evaluate', 'runs/bare')
    assert 'runs/bare is an imported model' in line
    assert '--data PATH' in line


@pytest.mark.parametrize(('size', 'told'), [(7, '7 bytes'), (41_256, '41.26 kB'), (16_060_522_496, '16.06 GB')])
def test_sizes_are_told_in_a_unit_that_suits_them(size, told):
    assert human_bytes(size) == told


def test_rows_longer_than_the_table_of_positions_are_not_scored():
    c = ModelConfig(
        vocabulary=9,
        layers=1,
        model_dim=8,
        attention=AttentionConfig(heads=1),
        mlp=MLPConfig(dim=8),
        positions=LearnedConfig(max=16),
    )
    check_ids('--tokens', 'ids.npy', np.zeros((1, 16), np.int32), 0, c)
    with pytest.raises(UserError, match='rows of 17 tokens: this run has 16 positions'):
        check_ids('--tokens', 'ids.npy', np.zeros((1, 17), np.int32), 0, c)
