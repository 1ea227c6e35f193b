"""Perplexity, KL and cloze accuracy are those of plain NumPy, on any mesh, and their intervals mean what they say."""

import dataclasses
import functools
import json
import math
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tests.extending import harness
from tests.inference.test_session import Bytes
from tests.interpret.test_trace import opened
from tests.models import filled
from weft.compress import scoring, texts
from weft.compress.blocks import per_token
from weft.compress.cloze import CANDIDATES, CHANCE, CONTEXT, EACH, cloze_items
from weft.compress.quality import Reference, measure, measured_reference, model_quality, model_reference
from weft.compress.texts import DOCS, HELD_OUT, Text, held_out_source, sampled_text, study_texts
from weft.data import sources
from weft.data.config import DataConfig
from weft.data.packing import Rows, pack_documents
from weft.data.prepare import prepare
from weft.data.tokenizer import Tokenizer
from weft.inference.run import TrainedRun
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.decoder import Decoder
from weft.model.forward import logits, place
from weft.runtime.errors import Diverged, UserError
from weft.sharding.mesh import MeshConfig
from weft.training.config import RunConfig, TrainingConfig
from weft.training.evaluation import evaluate, spread

T = 64
ONE = MeshConfig()
VOCABULARY = 1200


@functools.cache
def docstrings() -> list[str]:
    return texts.documentation()


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(docstrings()[:100], VOCABULARY)


@functools.cache
def packed() -> Rows:
    return pack_documents(tokenizer(), docstrings()[100:140], T)


@functools.cache
def text(rows: int = 25) -> Text:
    """Not a multiple of what a device scores at once."""
    return sampled_text('some', 'docstrings', packed(), tokenizer(), rows * T)


DENSE = ModelConfig(
    vocabulary=VOCABULARY, layers=2, model_dim=16, attention=AttentionConfig(heads=4, kv_heads=2), mlp=MLPConfig(dim=32)
)
MIXTURE = dataclasses.replace(DENSE, layers=1, moe=MoEConfig(experts=4, mlp_dim=16))
CASES = [
    pytest.param(DENSE, ONE, id='dense-1'),
    pytest.param(MIXTURE, MeshConfig(expert=2, context=2, tensor=2), id='mixture-8'),
]


def noisy(model: Decoder, size: float) -> Decoder:
    """With noise of a relative size on every matrix."""
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda w: (
            w + jax.device_put(size * np.std(w) * random.standard_normal(w.shape), w.sharding).astype(w.dtype)
            if w.ndim > 2
            else w
        ),
        model,
    )


def in_numpy(model: Decoder, some: Text) -> np.ndarray:
    """float64 [R, T, V]: log-probabilities, of the logits that scripts/score.py gives."""
    rows = some.rows
    count = -(-len(rows.tokens_BT) // 8) * 8
    arrays = (rows.tokens_BT, rows.position_BT, rows.segment_BT)
    padded = [np.pad(a, ((0, count - len(a)), (0, 0))) for a in arrays]
    logit = np.asarray(jax.jit(logits)(model, *place(padded)), np.float64)[: len(rows.tokens_BT)]
    top = logit.max(-1, keepdims=True)
    return logit - top - np.log(np.exp(logit - top).sum(-1, keepdims=True))


@pytest.mark.parametrize(('c', 'mesh'), CASES)
def test_each_number_is_that_of_evaluate_and_of_numpy(c, mesh):
    some = text()
    with harness.on(mesh):
        model = filled(c, gain=2.0)
        other = noisy(model, 0.3)
        read = evaluate(other, tokenizer(), packed(), spread(25, len(packed())), 8)
        log_q, log_p = in_numpy(model, some), in_numpy(other, some)
        found = model_quality(other, [some], model_reference(model, [some])).on('some')
        alone = model_quality(other, [some]).on('some')
    live = some.rows.segment_BT > 0
    assert found.tokens == read.tokens == live.sum()
    np.testing.assert_allclose(found.nats.value, read.nats_per_token, rtol=1e-5)
    np.testing.assert_allclose(found.perplexity.value, math.exp(read.nats_per_token), rtol=1e-4)
    assert (alone.kl, alone.excess, alone.perplexity_cost, alone.cloze_change) == (None,) * 4
    np.testing.assert_allclose(alone.nats[:3], found.nats[:3], rtol=1e-6)
    assert alone.cloze == found.cloze
    kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)[live].mean()
    assert kl > 0.01
    np.testing.assert_allclose(found.kl.value, kl, rtol=1e-4)
    next_q, next_p = (
        np.take_along_axis(log, some.rows.target_BT[..., None], -1)[..., 0][live] for log in (log_q, log_p)
    )
    np.testing.assert_allclose(found.excess.value, (next_q - next_p).mean(), atol=1e-5)
    np.testing.assert_allclose(found.perplexity_cost.value, np.exp((next_q - next_p).mean()) - 1, atol=1e-5)
    items = some.cloze
    right = [
        [int(log[row, column, candidates].argmax() == at) for row, column, candidates, at in zip(*items, strict=True)]
        for log in (log_q, log_p)
    ]
    assert found.cloze.of == len(right[0]) > 30
    np.testing.assert_allclose(found.cloze.value, np.mean(right[1]))
    np.testing.assert_allclose(found.cloze_change.value, np.mean(right[1]) - np.mean(right[0]))


def test_more_damage_is_more_divergence_and_none_is_none():
    some = text()
    with harness.on(ONE):
        model = filled(DENSE, gain=2.0)
        beside = model_reference(model, [some])
        found = [model_quality(noisy(model, size), [some], beside).on('some') for size in (0, 0.01, 0.03, 0.1, 0.3)]
    same, *worse = found
    assert abs(same.kl.value) <= 1e-6
    assert (same.excess.value, same.excess.low, same.excess.high, same.cloze_change.value) == (0, 0, 0, 0)
    for less, more in zip(found, worse, strict=False):
        assert more.kl.low > less.kl.high
    assert all(one.kl.low < one.kl.value < one.kl.high for one in worse)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Blocks differ in how hard they are, and tokens within them; the reference is as hard, and 0.02 nats better."""
    random = np.random.default_rng(0)
    R, runs = 60, 2000
    held, widths = np.zeros(2), np.zeros((runs, 2))
    live_RT = np.ones((R, 8), bool)
    live_RT[::7, 5:] = False
    for run in range(runs):
        hard_R1 = random.gamma(20, 3 / 20, (R, 1))
        reference_RT = hard_R1 * random.exponential(1, (R, 8)) * live_RT
        excess_RT = random.normal(0.02, 0.1, (R, 8)) * live_RT
        nats, excess = per_token([reference_RT + excess_RT, excess_RT], live_RT, block=8)
        held += nats.low <= 3.02 <= nats.high, excess.low <= 0.02 <= excess.high
        widths[run] = nats.high - nats.low, excess.high - excess.low
    assert ((held / runs > 0.93) & (held / runs < 0.965)).all(), held / runs
    assert widths[:, 1].mean() < widths[:, 0].mean() / 10, 'pairs tell more'


def test_blocks_are_cut_from_rows_and_count_by_their_tokens():
    live_RT = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    (found,) = per_token([np.array([[1.0, 2, 3, 4], [5, 0, 0, 0]])], live_RT, block=2)
    assert found.of == 3, 'one of the four blocks is padding alone'
    assert found.value == 3
    assert 1.5 <= found.low < 3 < found.high <= 5
    (same,) = per_token([2.0 * live_RT], live_RT, block=2)
    np.testing.assert_allclose(same[:3], 2)


def test_a_model_that_is_surely_wrong_has_no_perplexity():
    """Its cross-entropy is a number all the same, and JSON has no infinity."""
    some = text()
    with harness.on(ONE):
        model = filled(DENSE)
        wrong = jax.tree.map(
            lambda w: 1e4 * w if w.ndim == 2 else w, model
        )  # of its embedding, which is tied to the head
        found = model_quality(wrong, [some], model_reference(model, [some]))
    one = found.on('some')
    assert 709 < one.nats.value < math.inf
    assert one.perplexity.value == one.perplexity_cost.value == math.inf
    figures = json.loads(json.dumps(found.figures(), allow_nan=False))['some']
    assert (figures['perplexity']['value'], figures['nats']['value']) == (None, one.nats.value)


def test_a_model_that_gives_no_number_is_told():
    with harness.on(ONE):
        broken = jax.tree.map(lambda w: w * np.nan if w.ndim > 2 else w, filled(DENSE))
        with pytest.raises(Diverged, match='the some text: the model gives no finite number'):
            model_quality(broken, [text()])


@functools.cache
def whole() -> Text:
    """As the study reads it, with a small vocabulary."""
    return sampled_text(DOCS, '', pack_documents(tokenizer(), docstrings(), 256), tokenizer(), texts.TOKENS)


def test_cloze_items_are_whole_words_with_text_before_them():
    some, pieces = whole(), tokenizer().pieces
    items = some.cloze
    assert len(items.right_N) >= 300
    assert items.candidate_NC.shape == (len(items.right_N), CANDIDATES)
    right_N = items.candidate_NC[np.arange(len(items.right_N)), items.right_N]
    np.testing.assert_array_equal(right_N, some.rows.target_BT[items.row_N, items.column_N])
    assert max(Counter(right_N.tolist()).values()) <= EACH
    read = tokenizer().decode
    for row, column, candidates, _ in zip(*items, strict=True):
        words = {pieces[token].strip() for token in candidates}
        assert len(words) == CANDIDATES, 'no candidate is the right one, nor another'
        assert all(word.isalpha() and len(word) >= 3 for word in words)
        assert len({pieces[token][:1] == b' ' for token in candidates}) == 1
        segment_T = some.rows.segment_BT[row]
        assert (segment_T[column - CONTEXT + 1 : column + 2] == segment_T[column]).all()
        before, after = (read(some.rows.target_BT[row, [at]].tolist()) for at in (column - 1, column + 1))
        assert not after[:1].isalnum(), 'the word ends here'
        assert pieces[candidates[0]][:1] == b' ' or not before[-1:].isalnum(), 'and begins here'


def test_the_cloze_set_is_the_same_each_time_and_each_place_is_as_often_right():
    items = whole().cloze
    for again, first in zip(cloze_items(whole().rows, tokenizer()), items, strict=True):
        np.testing.assert_array_equal(again, first)
    times = np.bincount(items.right_N, minlength=CANDIDATES)
    assert times.max() - times.min() <= 1
    assert len(set(map(tuple, zip(items.row_N, items.column_N, strict=True)))) == len(items.row_N)


def test_who_does_not_read_has_one_in_four_right():
    """Neither who finds all candidates alike, nor who knows how often each occurs in the text, does better than chance."""
    some = whole()
    items = some.cloze
    assert abs(items.is_right(np.zeros(items.candidate_NC.shape)).mean() - CHANCE) < 0.01
    count_V = np.bincount(some.rows.target_BT[some.rows.segment_BT > 0], minlength=VOCABULARY)
    for sign in 1, -1:
        right = items.is_right(sign * count_V[items.candidate_NC]).mean()
        assert abs(right - CHANCE) < 0.07, right


def test_a_text_without_words_has_no_items_and_no_accuracy():
    """Ids that are bytes: no token is a word."""
    byte_by_byte = Bytes()
    byte_by_byte.model = b'bytes'
    some = sampled_text('bytes', '', pack_documents(byte_by_byte, ['some words ' * 30], T), byte_by_byte, 4 * T)
    assert some.cloze.candidate_NC.shape == (0, CANDIDATES)
    with harness.on(ONE):
        model = filled(DENSE)
        found = model_quality(model, [some], model_reference(model, [some])).on('bytes')
    assert (found.cloze, found.cloze_change) == (None, None)
    assert found.kl.value == 0


def test_the_documentation_is_that_of_the_pinned_version():
    if optax.__version__ != '0.2.8':
        pytest.skip(f'optax {optax.__version__}: the hash is that of 0.2.8')
    assert texts.digest_of(docstrings()) == texts.DOCUMENTATION
    assert sum(map(len, docstrings())) > 300_000


# ---- runs


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> Path:
    """The folder of a run that learns from a small standard library, `stdlib` beside it."""
    place = tmp_path_factory.mktemp('runs')
    (place / 'stdlib').mkdir()
    for number in range(24):
        name = 'os' if number == 0 else f'module{number}'
        (place / 'stdlib' / f'{name}.py').write_text('\n\n'.join(docstrings()[6 * number : 6 * number + 6]))
    (place / 'stdlib' / 'copy.py').write_bytes((place / 'stdlib' / 'module7.py').read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.sysconfig, 'get_path', lambda name: str(place / 'stdlib'))
        prepare(DATA, place / 'run', T, lambda line: None, tokenizer=tokenizer())
    return place


DATA = DataConfig(vocabulary=VOCABULARY, validation_share=0.25)


def run_of(folder: Path, c: ModelConfig = DENSE, mesh: MeshConfig = ONE, data: DataConfig = DATA) -> TrainedRun:
    found = opened(c, mesh)
    training = TrainingConfig(steps=1, batch=8, sequence_length=T)
    config = RunConfig(name='x', model=c, mesh=mesh, data=data, training=training)
    return dataclasses.replace(found, folder=folder, config=config, tokenizer=tokenizer())


def test_a_run_is_measured_on_its_validation_rows_and_on_the_documentation(prepared):
    run = run_of(prepared / 'run')
    held, docs = study_texts(run, 16 * T)
    assert (held.name, docs.name) == (HELD_OUT, DOCS)
    data = texts.load(prepared / 'run')
    np.testing.assert_array_equal(held.rows.target_BT, data.validation.take(spread(16, len(data.validation))).target_BT)
    assert held.tokens <= 16 * T
    found = measure(run, run, tokens=16 * T)
    for one in found.texts:
        assert one.kl.value == 0
        assert one.nats.low < one.nats.value < one.nats.high
        assert one.nats.of == 16
    assert found.on(DOCS).sha256 == docs.sha256 != held.sha256 == found.on(HELD_OUT).sha256
    figures = json.loads(json.dumps(found.figures()))
    assert figures[HELD_OUT]['nats'] == found.on(HELD_OUT).nats._asdict()
    assert figures[DOCS]['perplexity_cost']['value'] == 0


def test_runs_are_held_to_a_reference_that_read_the_texts_once(prepared, tmp_path, monkeypatch):
    """A compressed run may have no data of its own."""
    run = run_of(prepared / 'run')
    beside = measured_reference(run, tokens=8 * T)
    assert isinstance(beside, Reference)
    other = run_of(tmp_path)
    worse: Future[tuple[Decoder, int]] = Future()
    worse.set_result((noisy(run.model, 0.2), 1))
    other = dataclasses.replace(other, reading=worse)
    programs = scoring._hidden, scoring._answers
    compiled = [program._cache_size() for program in programs]
    found, at_once = measure(other, beside), measure(other, run, tokens=8 * T)
    assert [program._cache_size() for program in programs] == compiled, (
        'both texts and all models of a shape share them'
    )
    assert found == at_once
    assert all(one.kl.low > 0 for one in found.texts)
    read: list[str] = []
    real = scoring._hidden
    monkeypatch.setattr(scoring, '_hidden', lambda *args: read.append('once') or real(*args))
    measure(other, beside)
    rows = sum(len(some.rows.target_BT) for some in beside.texts)
    assert len(read) <= rows, 'the reference is not read again'


def test_an_imported_model_reads_what_a_run_of_the_study_holds_out(prepared, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, 'get_path', lambda name: str(prepared / 'stdlib'))
    data = texts.load(prepared / 'run')
    assert ''.join(held_out_source(0.25)).encode() == data.validation_bytes()


MISTAKES = [
    ({'tokens': 100}, r'tokens is 100: an interval needs two rows, of 64 here; nearest that works: 128'),
    ({'mesh': True}, r'the mesh is data=2 and the reference’s one device: open both on the same'),
    ({'tokenizer': True}, r'its tokenizer is not the reference’s, .*: give the run that this one was made of'),
    ({'vocabulary': True}, r'model\.vocabulary is 1280 and the reference’s 1200'),
    ({'data': True}, r"its text, data\.source='notes/', is not in its folder"),
]


@pytest.mark.parametrize(('wrong', 'message'), MISTAKES, ids=[next(iter(wrong)) for wrong, _ in MISTAKES])
def test_mistakes_have_one_clear_line(prepared, tmp_path, wrong, message):
    run, reference, tokens = run_of(prepared / 'run'), run_of(prepared / 'run'), wrong.get('tokens', 2 * T)
    if 'mesh' in wrong:
        run = run_of(prepared / 'run', mesh=MeshConfig(data=2))
    if 'tokenizer' in wrong:
        run = dataclasses.replace(run, tokenizer=Tokenizer.train(docstrings()[:3], 300))
    if 'vocabulary' in wrong:
        run = run_of(prepared / 'run', dataclasses.replace(DENSE, vocabulary=1280))
    if 'data' in wrong:
        run = reference = run_of(tmp_path, data=dataclasses.replace(DATA, source='notes/'))
    with pytest.raises(UserError, match=message):
        measure(run, reference, tokens)
