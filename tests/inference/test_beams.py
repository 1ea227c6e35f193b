"""Beam search: against every continuation there is, and against transformers."""

import itertools

import jax
import numpy as np
import pytest

from tests.families import cases
from tests.families.encoder_cases import live
from tests.families.loading import GOLDENS, generated, golden, read
from tests.models import filled
from weft.inference.beams import RowSearch, beam_search
from weft.inference.prompts import Prompts
from weft.model.batch import Source
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import EncoderConfig, ModelConfig, model_of
from weft.model.decoder import Decoder
from weft.model.forward import logits, place
from weft.sharding.mesh import MeshConfig, make_mesh

EOS, V, MOST = 2, 4, 4
TINY = {'vocabulary': V, 'layers': 2, 'model_dim': 16, 'attention.heads': 4, 'mlp.dim': 16, 'embedding.tied': False}
MODELS = {
    'decoder': model_of(TINY),
    'windows': model_of(TINY | {'attention.window': 3, 'attention.window_pattern': (True, False)}),
    'encoder–decoder': model_of(TINY | {'positions.kind': 'relative', 'encoder': EncoderConfig(layers=1)}),
}
PROMPTS = Prompts(np.array([[1, 3, 0, 1], [3, 1, 0, 0]], np.int32), np.array([4, 2], np.int32))
SOURCE = (np.array([[3, 0, 1, 1], [0, 3, 3, 2]], np.int32), np.array([4, 3], np.int32))


def prompts(c: ModelConfig) -> Prompts:
    return PROMPTS._replace(source=SOURCE) if c.encoder else PROMPTS


def model_of(c: ModelConfig, compute: ComputeConfig = DEFAULT) -> Decoder:
    """A model that prefers some tokens much: its weights are larger than at birth."""
    return filled(c, compute, seed=3, gain=2)


def continuations():
    """All of at most MOST tokens, that end before or there."""
    others = [token for token in range(V) if token != EOS]
    for length in range(1, MOST + 1):
        for tokens in itertools.product(others, repeat=length - 1):
            yield [*tokens, EOS]
    yield from (list(tokens) for tokens in itertools.product(others, repeat=MOST))


def scores_of_all(model: Decoder, row: int, penalty: float) -> list[tuple[float, list[int]]]:
    """Every continuation of a prompt with its score, by the full forward pass."""
    read = prompts(model.config)
    prompt = read.tokens_BT[row, : read.length_B[row]].tolist()
    all_of = list(continuations())
    T = len(prompt) + MOST
    rows = np.zeros((-(-len(all_of) // 8) * 8, T), np.int32)
    for at, tokens in enumerate(all_of):
        rows[at, : len(prompt) + len(tokens)] = prompt + tokens
    position = np.broadcast_to(np.arange(T, dtype=np.int32), rows.shape)
    source = None
    if read.source:
        repeated, length = np.repeat(read.source[0][row : row + 1], len(rows), 0), read.source[1][row]
        place_S = np.broadcast_to(np.arange(repeated.shape[1], dtype=np.int32), repeated.shape)
        source = Source(repeated, place_S, (place_S < length).astype(np.int32))
    logit_BTV = np.asarray(
        jax.jit(logits)(model, *place((rows, position, np.ones_like(rows), None, source))), np.float64
    )
    log_BTV = logit_BTV - np.logaddexp.reduce(logit_BTV, -1, keepdims=True)
    found = []
    for at, tokens in enumerate(all_of):
        total = sum(log_BTV[at, len(prompt) - 1 + n, token] for n, token in enumerate(tokens))
        found.append((total / len(tokens) ** penalty, tokens))
    return sorted(found, reverse=True)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('penalty', [0.0, 1.0, 2.0])
@pytest.mark.parametrize('name', MODELS)
def test_a_beam_as_wide_as_all_prefixes_finds_what_an_exhaustive_search_finds(name, penalty):
    c = MODELS[name]
    width = sum(1 for _ in continuations())
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = model_of(c, ComputeConfig(dtype='float64'))
        found, _ = beam_search(model, prompts(c), width, frozenset([EOS]), [MOST, MOST], penalty, 32)
        for row, of_row in enumerate(found):
            expected = scores_of_all(model, row, penalty)
            assert len(of_row) == len(expected)
            for one, (score, tokens) in zip(of_row[:20], expected, strict=False):
                assert abs(one.score - score) < 1e-5
                assert [*one.tokens, EOS][: len(tokens)] == tokens
                assert one.ended == (tokens[-1] == EOS)


@pytest.mark.parametrize('name', MODELS)
def test_every_mesh_finds_the_same_and_one_beam_is_greedy(name):
    c, found = MODELS[name], []
    for mesh in (MeshConfig(), MeshConfig(data=2, tensor=2)):
        with jax.set_mesh(make_mesh(mesh)):
            model = model_of(c)
            found.append(
                [beam_search(model, prompts(c), beams, frozenset([EOS]), [7, 5], 1.0, 32)[0] for beams in (1, 3)]
            )
    for one, other in zip(itertools.chain(*found[0]), itertools.chain(*found[1]), strict=True):
        assert [f.tokens for f in one] == [f.tokens for f in other]
        assert np.allclose([f.score for f in one], [f.score for f in other], atol=1e-5)
    assert all(len(of_row[0].tokens) <= most for of_row, most in zip(found[0][1], [7, 5], strict=True))


@pytest.mark.parametrize('name', cases.BEAMS)
def test_beams_are_those_of_transformers(name):
    known = golden(GOLDENS / f'{name}.npz')
    family, c = read(known.config)
    tokens_BT = known.ids[:, : cases.PROMPT].copy()
    source = None
    if c.encoder:
        tokens_BT[:, 0] = c.encoder.start_token
        source = (known.source, live().sum(1, dtype=np.int32))
    ready = Prompts(tokens_BT, np.full(cases.ROWS, cases.PROMPT, np.int32), source)
    most = known.beams.shape[1]
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = generated(name, family, c, known.seed)
        found, _ = beam_search(
            model, ready, 4, frozenset([int(known.eos)]), [most] * cases.ROWS, 1.0, cases.PROMPT + most
        )
    ends = []
    for of_row, tokens, score in zip(found, known.beams.tolist(), known.beam_scores, strict=True):
        best = of_row[0]
        mine = [*best.tokens, int(known.eos)] if best.ended else best.tokens
        assert mine == [token for token in tokens if token >= 0]
        assert abs(best.score - score) < 1e-4
        ends.append(best.ended)
    assert {True, False} == set(ends)


def test_a_beam_ends_at_any_of_several_ends_and_others_go_on():
    one = RowSearch(2, frozenset([0, 1]), 5, 1.0)
    assert one.step([-0.1, -0.2, -0.3, -0.9], [0] * 4, [0, 1, 2, 3]) == [0, 0]
    assert [found.tokens for found in one.finished] == [[], []]
    assert [found.score for found in one.finished] == [-0.1, -0.2]
    assert [tokens for _, tokens in one.running] == [[2], [3]]
    assert not one.open, 'what goes on is worse already'
