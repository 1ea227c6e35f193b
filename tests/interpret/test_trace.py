"""Traces as notebooks ask for them: the page's example, texts of different lengths, decoding, and each mistake in one line."""

import re
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest

import weft
from tests.house import ROOT
from tests.inference.test_session import Bytes
from tests.models import filled
from weft.inference.run import TrainedRun
from weft.inference.session import Session
from weft.interpret import trace as tracing
from weft.interpret.edits import add, force, mean, replace, scale, zero
from weft.interpret.trace import trace
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import RunConfig, TrainingConfig

TEXTS = ['ab', 'abcde']


class Letters(Bytes):
    """Ids that are bytes, and the text of each."""

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors='replace')


def opened(c: ModelConfig, mesh: MeshConfig) -> TrainedRun:
    """A run as `open_run` gives it, of weights that nobody trained."""
    devices, reading = make_mesh(mesh), Future()
    with jax.set_mesh(devices):
        reading.set_result((filled(c), 1))
    config = RunConfig(name='x', model=c, mesh=mesh, training=TrainingConfig(steps=1, batch=8, sequence_length=64))
    return TrainedRun(Path('runs/x'), config, devices, Letters(), reading.result()[0], reading, 64)


@pytest.fixture(scope='module')
def run() -> TrainedRun:
    """Layers: an MLP, then two mixtures."""
    return opened(
        ModelConfig(
            vocabulary=256,
            layers=3,
            model_dim=16,
            attention=AttentionConfig(heads=4, kv_heads=2),
            mlp=MLPConfig(dim=32),
            moe=MoEConfig(experts=4, mlp_dim=16, first_dense_layers=1),
        ),
        MeshConfig(data=2, tensor=2),
    )


def test_the_page_runs(run):
    page = (ROOT / 'docs' / 'interpret.md').read_text(encoding='utf-8').partition('## Names')[0]
    first, *blocks = re.findall(r'^```python\n(.*?)^```$', page, re.DOTALL | re.MULTILINE)
    names = first.splitlines()[1]
    dense = opened(
        ModelConfig(vocabulary=256, layers=2, model_dim=16, attention=AttentionConfig(heads=4), mlp=MLPConfig(dim=32)),
        MeshConfig(),
    )
    here = {'weft': weft, 'run': dense}
    exec(names, here)
    for block in blocks:
        exec(block, here)
    clean, patched, L = here['clean'], here['patched'], here['L']
    assert (L, here['B'], here['T'], here['D']) == (2, 2, 24, 16)
    # After the last layer nothing mixes tokens: each text's last token says what the other's did.
    np.testing.assert_allclose(patched.logits_BTV[0, 23], clean.logits_BTV[1, 23], atol=1e-4)
    assert not np.allclose(here['without'].logits_BTV, clean.logits_BTV)
    assert len(here['steered'].tokens[0]) == 28


def test_names_of_the_page_are_those_that_are_offered(run):
    page = (ROOT / 'docs' / 'interpret.md').read_text(encoding='utf-8').partition('## Names')[2].partition('## ')[0]
    named = {
        name for row in re.findall(r'^\| (`.*?) \|', page, re.MULTILINE) for name in re.findall(r'`([\w.]+)`', row)
    }
    offered = set(trace(run, 'ab', ['*']).arrays)
    latent = {'attention.query_latent', 'attention.latent', 'attention.rotary_key'}
    others = {'cross.output', 'residual.after_cross', 'shared_experts.hidden_units'}
    assert offered | latent | others == named


def test_texts_of_different_lengths_layers_and_tokens(run, monkeypatch):
    whole = trace(run, TEXTS, ['router.*', 'mlp.hidden_units', 'attention.pattern', 'logits'])
    assert whole.layers['router.scores'] == (1, 2)
    assert whole.layers['mlp.hidden_units'] == (0,)
    assert whole['attention.pattern'].shape == (3, 2, 5, 4, 5)
    assert whole['router.choices'].dtype == np.int32
    assert whole.pieces == [['a', 'b'], ['a', 'b', 'c', 'd', 'e']]
    np.testing.assert_allclose(whole['attention.pattern'][:, 1].sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(whole['logits'], whole.logits_BTV)
    last = trace(run, TEXTS, {'router.*': [2], 'attention.pattern': range(2)}, tokens=-1)
    assert last.column_Bt.tolist() == [[1], [4]]
    for text, length in enumerate([2, 5]):
        np.testing.assert_array_equal(last['router.scores'][0, text, 0], whole['router.scores'][1, text, length - 1])
        np.testing.assert_array_equal(
            last['attention.pattern'][:, text, 0], whole['attention.pattern'][:2, text, length - 1]
        )
    alone = trace(run, [97, 98], ['router.scores'])  # as ids
    np.testing.assert_allclose(alone['router.scores'], whole['router.scores'][:, :1, :2], atol=1e-5)
    with jax.set_mesh(run.mesh):
        session = trace(Session(run.model, Letters(), 64), 'ab', ['router.scores'])
    np.testing.assert_array_equal(session['router.scores'], alone['router.scores'])


def test_edits_are_numbers_of_one_program(run, monkeypatch):
    calls, capture = [], tracing.capture
    monkeypatch.setattr(tracing, 'capture', lambda *args, **more: calls.append(1) or capture(*args, **more))
    for layer, head in ((0, 1), (2, 3)):
        found = trace(
            run, TEXTS, ['attention.head_outputs'], [zero('attention.head_outputs', layers=layer, heads=head)]
        )
        heads = found['attention.head_outputs'][:, 1]
        assert not heads[layer, :, head].any()
        assert np.count_nonzero(heads) == heads.size - 5 * 4
    assert len(calls) == 1


def test_what_edits_put_there(run):
    names = ['mlp.output', 'router.*', 'experts.outputs', 'mlp.hidden_units']
    clean = trace(run, TEXTS, names)
    averaged = trace(run, TEXTS, ['mlp.output'], [mean('mlp.output', layers=0)])
    tokens = np.concatenate([clean['mlp.output'][:, 0, :2], clean['mlp.output'][:, 1]], 1)
    np.testing.assert_allclose(averaged['mlp.output'][0, 1, 3], tokens[0].mean(0), atol=1e-6)
    edits = [
        scale('mlp.hidden_units', 0.5, units=[3, 7], texts=1, tokens=[-1]),
        add('mlp.output', np.arange(16.0), layers=0, texts=0, tokens=1),
        replace('router.scores', clean['router.scores'] * 0.5, layers=2),
        force([3, 0], layers=2, texts=1),
        zero('experts.outputs', layers=1, experts=2),
    ]
    found = trace(run, TEXTS, names, edits)
    halved = clean['mlp.hidden_units'].copy()
    halved[:, 1, 4, [3, 7]] /= 2
    np.testing.assert_allclose(found['mlp.hidden_units'], halved, atol=1e-6)
    moved = (found['mlp.output'] - clean['mlp.output'])[0]
    np.testing.assert_allclose(moved[0, 1], np.arange(16), atol=1e-5)
    np.testing.assert_allclose(moved[0, 0], 0, atol=1e-6)
    np.testing.assert_allclose(found['router.scores'][1, 1], clean['router.scores'][1, 1] / 2, atol=1e-6)
    assert found['router.choices'][1, 1].tolist() == [[3, 0]] * 5
    np.testing.assert_array_equal(found['router.choices'][1, 0, 0], clean['router.choices'][1, 0, 0])
    scores = found['router.scores'][1, 1][:, [3, 0]]
    np.testing.assert_allclose(found['router.weights'][1, 1], scores / scores.sum(-1, keepdims=True), atol=1e-6)
    before, after = (one['experts.outputs'][0, 1, :4] for one in (clean, found))  # tokens that no edit before reaches
    chose = clean['router.choices'][0, 1, :4] == 2
    assert chose.any()
    assert not chose.all()
    assert not after[chose].any()
    np.testing.assert_allclose(after[~chose], before[~chose], atol=1e-5)


def test_decoding_is_traced_as_one_pass_over_what_it_wrote(run):
    edits = [
        scale('attention.head_outputs', 2.0, layers=1, heads=2),
        zero('attention.pattern', layers=0, tokens=-1, keys=0),
    ]
    names = ['attention.pattern', 'residual.after_mlp', 'router.choices', 'embedding']
    found = trace(run, TEXTS, names, edits, new_tokens=3)
    assert [len(row) for row in found.tokens] == [5, 8]
    whole = trace(run, found.tokens, names, edits)
    for text, (length, all_) in enumerate([(2, 5), (5, 8)]):
        assert np.isnan(found.logits_BTV[text, : length - 1]).all()
        np.testing.assert_allclose(
            found.logits_BTV[text, length - 1 : all_], whole.logits_BTV[text, length - 1 : all_], atol=1e-4
        )
        said = found.logits_BTV[text, length - 1 : all_ - 1].argmax(-1).tolist()
        assert found.tokens[text][length:] == said
        for name in names:
            here, there = (
                (one[name] if name == 'embedding' else one[name].swapaxes(0, 1))[text] for one in (found, whole)
            )
            at = (slice(all_),) if name == 'embedding' else (slice(None), slice(all_))
            np.testing.assert_allclose(here[at], there[at], atol=1e-4, err_msg=name)


MISTAKES = [
    (
        {'taps': ['residual.aftr_mlp']},
        r"'residual\.aftr_mlp': no layer offers .*; did you mean 'residual\.after_mlp'\?",
    ),
    ({'taps': {'mlp.output': 3}}, r"layers of 'mlp\.output': there is no 3; they are 0 to 2, the nearest is 2"),
    ({'taps': {'router.scores': [0]}}, r"layers of 'router\.scores': there is no 0; they are 1 to 2, the nearest is 1"),
    ({'edits': [zero('mlp.outputs')]}, r"'mlp\.outputs': no layer offers .*; did you mean 'mlp\.output'\?"),
    ({'edits': [zero('mlp.output', layers=3)]}, r'there is no 3; they are 0 to 2, the nearest is 2'),
    ({'edits': [zero('embedding', layers=0)]}, r"layers at 'embedding': it belongs to no layer; leave layers out"),
    ({'edits': [zero('attention.keys', heads=2)]}, r"heads at 'attention\.keys': there is no 2; they are 0 to 1, .* 1"),
    (
        {'edits': [zero('mlp.output', heads=0)]},
        r"heads at 'mlp\.output': it has none; it can be chosen by layers, texts, tok",
    ),
    (
        {'edits': [zero('mlp.output', hedas=0)]},
        r"'hedas': an edit is at no such part; known: layers, texts, tokens, units",
    ),
    ({'edits': [zero('mlp.hidden_units', units=[1, 32])]}, r'there is no 32; they are 0 to 31, the nearest is 31'),
    ({'edits': [zero('experts.outputs', experts=4)]}, r'there is no 4; they are 0 to 3, the nearest is 3'),
    ({'edits': [zero('mlp.output', tokens=2)]}, r'tokens of text 0: there is no 2; they are 0 to 1, the nearest is 1'),
    ({'edits': [zero('mlp.output', texts=2)]}, r'texts: there is no 2; they are 0 to 1, the nearest is 1'),
    ({'edits': [zero('attention.pattern', keys=5)]}, r"keys at 'attention\.pattern': there is no 5; they are 0 to 4"),
    (
        {'edits': [zero('router.choices')]},
        r"zero at 'router\.choices': numbers of experts are forced; use force\(experts\)",
    ),
    ({'edits': [force([1])]}, r'force\(\[1\]\): a token visits 2 different experts; give as many'),
    ({'edits': [force([1, 7])]}, r'experts of force: there is no 7; they are 0 to 3, the nearest is 3'),
    ({'edits': [mean('experts.outputs')]}, r"mean at 'experts\.outputs': what stands there differs"),
    (
        {'edits': [add('mlp.output', np.ones(3))]},
        r'a value of shape \[3\] does not broadcast .*; give \[3, 2, 5, 16\], or',
    ),
    ({'edits': [add('mlp.output', np.nan)]}, r"add at 'mlp\.output': the value has numbers that are not finite"),
    ({'tokens': 2}, r'tokens of text 0: there is no 2; they are 0 to 1, the nearest is 1'),
    ({'tokens': slice(1, None)}, r'the texts have different numbers of them; give places that all texts have'),
    ({'tokens': 1.5}, r'tokens of text 0: 1\.5 is not a whole number; numbers are from 0 to 1'),
    ({'new_tokens': 60}, r'text 1 has 5 tokens, and the context leaves room for 4: cut it'),
    ({'new_tokens': -1}, r'new_tokens is -1: it must be at least 0'),
    ({'texts': []}, r'texts: none is given; give at least one'),
    ({'texts': [[256]]}, r'text 0: 256 is no token; ids are from 0 to 255'),
]


@pytest.mark.parametrize(('given', 'message'), MISTAKES, ids=[message[:24] for _, message in MISTAKES])
def test_a_mistake_is_one_line(run, given, message):
    with pytest.raises(UserError, match=message) as error:
        trace(run, given.pop('texts', TEXTS), **given)
    assert '\n' not in str(error.value)
