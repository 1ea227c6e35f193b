"""Each family against transformers: logits, greedy continuations, decoding, and configs there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.families import cases
from tests.families.encoder_cases import ENCODERS, live, masked
from tests.families.loading import GOLDENS, generated, golden, read
from weft.hub.families import ADDED, Fields, families
from weft.hub.tensor_table import array_shapes
from weft.inference.score import score
from weft.inference.step import decode, empty_cache, encode, prefill
from weft.model.batch import Source
from weft.model.cost import parameters
from weft.model.forward import hidden_states, logits, mtp_logits, place
from weft.sharding.mesh import MeshConfig, make_mesh

TOLERANCE, KL = 1e-5, 1e-8
MARGIN = 1e-4  # of a greedy choice, over the largest |logit|: below it another choice is not wrong
MESHES = [MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)]
PATHS = sorted(GOLDENS.glob('*.npz'))
HEADLESS = [path for path in PATHS if cases.headless(cases.CASES[path.stem])]
MASKED = [path for path in PATHS if cases.family(path.stem) in ENCODERS and path not in HEADLESS]
DECODERS = [path for path in PATHS if path not in (*MASKED, *HEADLESS)]


def whole(model, ids_BT, live_BT=None, kind_BT=None, source_BS=None, run=None):
    """Logits, or hidden states where there is no LM head, of rows that are one document each."""
    position_BT = np.broadcast_to(np.arange(ids_BT.shape[1], dtype=np.int32), ids_BT.shape)
    segment_BT = np.ones_like(ids_BT) if live_BT is None else live_BT.astype(np.int32)
    source = None if source_BS is None else Source(source_BS, position_BT, live().astype(np.int32))
    more = () if kind_BT is None and source is None else (kind_BT, source)
    if not model.config.head:
        run, more = _hidden, more[:1]
    return np.asarray((run or _whole)(model, *place((ids_BT, position_BT, segment_BT, *more))))


def of_golden(model, known):
    """Logits of a golden's rows."""
    live_BT = None if known.kinds is None else live()
    return whole(model, known.ids, live_BT, known.kinds, known.source)


_whole, whole_ahead, _hidden = jax.jit(logits), jax.jit(mtp_logits), jax.jit(hidden_states)


@jax.jit
def continued(model, prompt_BT, length_B, source=None):
    """Greedy tokens [steps, B] after each row's prompt, by prefill and decoding, and the logits that chose them."""
    read = encode(model, *source) if source else None
    cache = empty_cache(model, prompt_BT.shape[0], cases.PROMPT + cases.NEW, read)
    logit_BV, cache = prefill(model, cache, prompt_BT, length_B)

    def step(carry, _):
        logit_BV, cache, position_B = carry
        token_B = logit_BV.argmax(-1).astype(jnp.int32)
        after_BV, cache = decode(model, cache, token_B, position_B)
        return (after_BV, cache, position_B + 1), (token_B, logit_BV)

    return lax.scan(step, (logit_BV, cache, length_B), length=cases.NEW)[1]


def error(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def divergence(found, expected) -> float:
    """The largest Kullback–Leibler divergence of the next token, in nats."""
    log = lambda x: x - np.logaddexp.reduce(x, -1, keepdims=True)
    p, q = log(expected.astype(np.float64)), log(found.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(-1).max())


@pytest.mark.parametrize('mesh', MESHES, ids=str)
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_logits_are_those_of_transformers(path, mesh):
    known = golden(path)
    family, c = read(known.config)
    with jax.set_mesh(make_mesh(mesh)):
        model = generated(known.name, family, c, known.seed)
        found = of_golden(model, known)[known.at[:, 0], known.at[:, 1]]
    assert error(found, known.logits) <= TOLERANCE
    assert not c.head or divergence(found, known.logits) <= KL


@pytest.mark.parametrize('path', MASKED, ids=lambda path: path.stem)
def test_masked_tokens_are_those_of_transformers(path):
    known = golden(path)
    family, c = read(known.config)
    with jax.set_mesh(make_mesh(MeshConfig())):
        logit_BTV = of_golden(generated(known.name, family, c, known.seed), known)
    asked = masked(known.ids)
    same = logit_BTV[asked].argmax(-1) == known.greedy
    assert len(same) > 50
    assert (same | (known.margins < MARGIN)).all()


@pytest.mark.parametrize('mesh', [*MESHES, MeshConfig(context=4, tensor=2)], ids=str)
@pytest.mark.parametrize('path', [path for path in PATHS if golden(path).ahead is not None], ids=lambda path: path.stem)
def test_logits_further_ahead_are_those_of_transformers(path, mesh):
    known = golden(path)
    family, c = read(known.config)
    with jax.set_mesh(make_mesh(mesh)):
        model = generated(known.name, family, c, known.seed)
        found = whole(model, known.ids, run=whole_ahead)
    for k in range(c.mtp.layers):
        rows, places = known.at[known.at[:, 1] < known.ids.shape[1] - 1 - k].T
        expected = known.ahead[k][known.at[:, 1] < known.ids.shape[1] - 1 - k]
        assert len(rows) > cases.KEPT / 2
        assert error(found[k][rows, places], expected) <= TOLERANCE
        assert divergence(found[k][rows, places], expected) <= KL


@pytest.mark.parametrize('path', DECODERS, ids=lambda path: path.stem)
def test_greedy_tokens_are_those_of_transformers_and_decoding_is_the_full_forward_pass(path):
    known = golden(path)
    family, c = read(known.config)
    lengths = np.array([cases.PROMPT, 13, 9, cases.PROMPT], np.int32)
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = generated(known.name, family, c, known.seed)
        source = None if known.source is None else (known.source, live().sum(1, dtype=np.int32))
        tokens, chose = map(np.asarray, continued(model, *place((known.ids[:, : cases.PROMPT], lengths, source))))
        rows, written = np.zeros_like(known.ids), np.zeros_like(known.ids, bool)
        for b, length in enumerate(lengths):
            rows[b, :length], rows[b, length : length + cases.NEW] = known.ids[b, :length], tokens[:, b]
            written[b, : length + cases.NEW] = True
        full = whole(model, rows, written, source_BS=known.source)
    same = tokens[:, 0] == known.greedy
    ends = len(same) if same.all() else int(np.argmin(same))
    assert same.all() or known.margins[ends] < MARGIN, f'token {ends}: margin {known.margins[ends]}'
    if is_steady(c):
        for b, length in enumerate(lengths):
            assert error(chose[:, b], full[b, length - 1 : length - 1 + cases.NEW]) <= TOLERANCE


@pytest.mark.parametrize('name', ['llama-dynamic-scaling-long', 'phi3-longrope-long', 'llama-yarn'])
def test_padding_makes_no_row_longer(name):
    """Some scalings go by a row's length: padding of prompts and of rows that a mesh splits is no part of it."""
    known = golden(GOLDENS / f'{name}.npz')
    family, c = read(known.config)
    lengths = np.array([100, 50, 129, 70], np.int32)
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = generated(known.name, family, c, known.seed)
        cache = empty_cache(model, 4, cases.LENGTH)
        found, _ = jax.jit(prefill)(model, cache, *place((known.ids, lengths)))
        for b, length in enumerate(lengths):
            alone = whole(model, known.ids[b : b + 1, :length])
            assert error(np.asarray(found)[b], alone[0, -1]) <= TOLERANCE
        scores = [next(score(model, known.ids[:, :97]))[1][:1]]
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        model = generated(known.name, family, c, known.seed)
        scores.append(np.concatenate([logit_BTV for _, logit_BTV in score(model, known.ids[:1, :97])]))
    assert error(scores[1], scores[0]) <= TOLERANCE


def is_steady(c) -> bool:
    """Whether a token's keys are the same however long the row becomes: not with dynamic scaling, beyond the old context."""
    s = c.rope_scaling
    return s is None or s.kind not in ('dynamic', 'longrope') or s.original_positions >= cases.PROMPT + cases.NEW


@pytest.mark.parametrize('name', cases.CASES)
def test_parameters_by_formula_are_those_by_shapes(name):
    _, c = read(cases.CASES[name])
    with jax.set_mesh(make_mesh(MeshConfig())):
        shapes = array_shapes(c)
    assert sum(parameters(c).values()) == sum(shape.size for shape in shapes.values())


@pytest.mark.parametrize('name', cases.CASES)
def test_a_config_comes_back_from_what_is_written_of_it(name):
    family, c = read(cases.CASES[name])
    fields = Fields(family.config(c))
    assert family.model(fields) == c
    fields.finish()


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_a_config_means_the_same_as_transformers_saves_it(path):
    known = golden(path)
    assert read(known.saved) == read(known.config)


def test_every_family_has_three_cases_and_every_case_its_golden():
    for family in (family for family in families() if family not in ADDED):
        mine = [name for name in cases.CASES if cases.family(name) == family.name]
        assert len(mine) >= 3, family.name
    assert {path.stem for path in PATHS} == set(cases.CASES)
    assert {path.stem for path in HEADLESS} == {'bert-headless', 'qwen3-headless'}
    assert sum(path.stat().st_size for path in PATHS) < 4 * 2**20


def test_a_field_that_nothing_reads_is_an_error():
    from weft.runtime.errors import UserError

    config = cases.CASES['llama-grouped'] | {'rope_thetta': 3}
    with pytest.raises(UserError, match=r'rope_thetta is 3.*did you mean .rope_theta'):
        read(config)
