"""What instruments say of models of many kinds, against the model's own logits and against edits of weights made by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models import filled, on
from weft.interpret.xray import cells, compare, contributions, programs
from weft.interpret.xray.frozen import freeze, layer_norm
from weft.interpret.xray.lens import decided, lens, residuals
from weft.interpret.xray.observed import ALWAYS
from weft.interpret.xray.patching import (
    ATTENTION,
    CELLS,
    EXPERTS,
    HEADS,
    RESIDUAL,
    Change,
    Patches,
    column,
    everywhere,
    unit,
)
from weft.model.config import model_of
from weft.model.forward import logits, place
from weft.sharding.mesh import MeshConfig

SMALL = {'vocabulary': 40, 'layers': 2, 'model_dim': 16, 'attention.heads': 4, 'mlp.dim': 24}
GROUPED = {**SMALL, 'attention.kv_heads': 2}
LAYER_NORM = {'norm.kind': 'layernorm', 'norm.bias': True}
MIXTURE = {'moe.experts': 4, 'moe.top_k': 2, 'moe.mlp_dim': 8, 'moe.first_dense_layers': 1}
LATENT = {
    'attention.kind': 'mla',
    'attention.kv_lora_rank': 8,
    'attention.qk_nope_head_dim': 4,
    'attention.qk_rope_head_dim': 4,
}
LATENT |= {'attention.v_head_dim': 6}
BIASED = {
    'attention.qkv_bias': True,
    'attention.o_bias': True,
    'mlp.bias': True,
    'head.bias': True,
    'mlp.activation': 'gelu',
}
KINDS = {
    'pre': {**GROUPED, **LAYER_NORM, **BIASED},
    'sandwich': {
        **GROUPED,
        'norm.order': 'sandwich',
        'norm.offset': 1.0,
        'attention.softcap': 20.0,
        'head.softcap': 10.0,
        'head.scale': 0.7,
        'embedding.tied': False,
    },
    'post': {**GROUPED, **LAYER_NORM, **BIASED, 'norm.order': 'post', 'positions.kind': 'learned', 'positions.max': 32},
    'output': {**GROUPED, **MIXTURE, 'norm.order': 'output', 'attention.qk_norm': True},
    'latent': {**SMALL, **MIXTURE, **LATENT, 'moe.shared_experts': 1},
}
MESHES = {'one': MeshConfig(), 'eight': MeshConfig(data=2, context=2, tensor=2)}
IDS = [3, 17, 4, 29, 8, 3, 17, 11, 2]
CASES = [*((kind, 'one') for kind in KINDS), ('pre', 'eight'), ('latent', 'eight')]


class Looked:
    """A model and all that was captured of one text."""

    def __init__(self, kind: str) -> None:
        self.model = filled(model_of(KINDS[kind]), gain=2.0)
        rows = programs.padded(self.model.config, [IDS], programs.columns_for(len(IDS)))
        names = [name for name in (*ALWAYS, HEADS, CELLS, 'logits') if name in programs.offered(self.model, rows)]
        taps = programs.captured(self.model, names, rows)
        T = len(IDS)
        self.taps = {name: a[0, :T] if name in ('embedding', 'logits') else a[:, 0, :T] for name, a in taps.items()}
        self.logit_TV = self.taps.pop('logits')


@pytest.fixture(scope='module', params=CASES, ids='-'.join)
def looked(request):
    kind, mesh = request.param
    with on(MESHES[mesh]):
        yield Looked(kind)


def test_the_last_row_of_the_lens_is_what_the_model_says(looked):
    answer_T = looked.logit_TV.argmax(-1)
    x_LTD = residuals(looked.taps)
    found = programs.read(looked.model, x_LTD[-1], answer_T)
    at = np.take_along_axis(looked.logit_TV, found.top_Nk, -1)
    np.testing.assert_allclose(found.logit_Nk, at, atol=1e-5)
    np.testing.assert_array_equal(found.top_Nk[:, 0], answer_T)
    sums = np.log(np.exp(looked.logit_TV.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(found.log_sum_N, sums, atol=1e-5)
    chance = np.exp(looked.logit_TV - sums[:, None])
    np.testing.assert_allclose(found.entropy_N, -(chance * np.log(chance)).sum(-1), atol=1e-5)
    assert (found.rank_N == 1).all()
    other_T = looked.logit_TV.argsort(-1)[:, -4]
    assert (programs.read(looked.model, x_LTD[-1], other_T).rank_N == 4).all()
    rows = lens(looked.model, x_LTD, answer_T)
    np.testing.assert_allclose(rows.answer_LT[-1], np.take_along_axis(chance, answer_T[:, None], -1)[:, 0], atol=1e-5)
    assert rows.top_LTk.shape == (3, len(IDS), programs.TOLD)


def test_contributions_add_up_to_the_logit(looked):
    c = looked.model.config
    token_T = looked.logit_TV.argsort(-1)[:, -2]
    frozen = freeze(looked.model, looked.taps)
    found = contributions.contributions(looked.model, looked.taps, frozen, token_T)
    logit_T = np.take_along_axis(looked.logit_TV, token_T[:, None], -1)[:, 0]
    if c.head.softcap:
        logit_T = c.head.softcap * np.arctanh(logit_T / c.head.softcap)
    np.testing.assert_allclose(found.total_T, logit_T, atol=2e-5)
    for layer in range(c.layers):
        heads = contributions.of_heads(looked.model, frozen, found.directions, layer, looked.taps[HEADS][layer])
        whole_T = heads.answer_NT.sum(0) + heads.rest_T
        np.testing.assert_allclose(whole_T, found.attention_LT[layer], atol=2e-5)
        # What the LM head gets of a head is its share of the logit, too, but for the scale, which `along` has not.
        d_TD = programs.head_vectors(looked.model, token_T)
        shares_TN = contributions.along(heads.read_TND, d_TD[:, None])
        np.testing.assert_allclose(shares_TN.T, heads.answer_NT, atol=2e-5)


def test_cells_add_up_to_what_the_feed_forward_part_writes(looked):
    c = looked.model.config
    F = c.mlp.dim
    value_FD = cells.values(looked.model, 0, range(F), F)
    bias_D = programs.layer_weight(looked.model, 0, 'mlp', 'down', 'b_O')
    sum_TD = looked.taps[CELLS][0] @ value_FD + (0 if bias_D is None else bias_D)
    if name := {'sandwich': 'mlp_out_norm', 'output': 'mlp_norm'}.get(c.norm.order):  # it norms their sum
        sum_TD = layer_norm(looked.model, 0, name, sum_TD).forward(sum_TD)
    np.testing.assert_allclose(sum_TD, looked.taps['mlp.output'][0], atol=2e-5)


def test_patching_a_head_equals_the_model_without_its_weights(looked):
    model, layer, number = looked.model, 1, 2
    heads = looked.taps[HEADS]
    patches = Patches(model, IDS, {HEADS: np.zeros_like(heads[:, :1])})
    changed = Change(HEADS, layer, unit(number, heads.shape[2]))
    log_CV = patches.log_probabilities([None, changed])
    np.testing.assert_allclose(log_CV[0], log_softmax(looked.logit_TV[-1]), atol=2e-5)
    group, at = programs.place_of(model.config, layer)
    w = model.groups[group].attention.o.w_OI
    keep = np.ones(w.shape, np.float32)
    H = heads.shape[3]
    keep[at, :, number * H : (number + 1) * H] = 0
    expected = with_weights(model, lambda without: without.groups[group].attention.o.w_OI, w, keep)
    np.testing.assert_allclose(log_CV[1], log_softmax(expected), atol=2e-5)
    assert np.abs(log_CV[1] - log_CV[0]).max() > 1e-3


def test_passing_over_an_expert_equals_its_weights_at_zero(looked):
    model, layer = looked.model, 1
    if not model.config.moe:
        assert not any(spec.experts for spec in model.config.layer_specs)
        return
    E = model.config.moe.experts
    patches = Patches(model, IDS, {EXPERTS: np.zeros((2, 1, E, 1), np.float32)})
    log_CV = patches.log_probabilities([None, *(Change(EXPERTS, layer, unit(expert, E)) for expert in range(E))])
    np.testing.assert_allclose(log_CV[0], log_softmax(looked.logit_TV[-1]), atol=2e-5)
    group, at = programs.place_of(model.config, layer)
    w = model.groups[group].mlp.down.w_EOI
    for expert in range(E):
        keep = np.ones(w.shape, np.float32)
        keep[at, expert] = 0
        expected = with_weights(model, lambda without: without.groups[group].mlp.down.w_EOI, w, keep)
        np.testing.assert_allclose(log_CV[1 + expert], log_softmax(expected), atol=2e-5)
    # In the last layer those alone count that the last token has chosen.
    changed = np.abs(log_CV[1:] - log_CV[0]).max(-1) > 1e-3
    assert changed.sum() == model.config.moe.top_k


def with_weights(model, find, w, keep: np.ndarray) -> np.ndarray:
    """The logits after the last token [V] of a model one of whose weights is multiplied by a mask."""
    without = jax.tree.map(lambda a: a, model)
    find(without)[...] = w[...] * jax.device_put(keep, w[...].sharding)
    rows = programs.padded(model.config, [IDS], programs.columns_for(len(IDS)))
    return np.asarray(jax.jit(logits)(without, *place(tuple(rows))))[0, len(IDS) - 1]


def test_values_of_another_text_patched_in_whole_give_its_answer(looked):
    other = [*IDS[:3], 30, *IDS[4:]]
    values = {RESIDUAL: looked.taps[RESIDUAL], ATTENTION: looked.taps[ATTENTION]}
    last = len(IDS) - 1
    T = len(IDS)
    changes = [
        None,
        Change(RESIDUAL, 1, column(last, T)),
        Change(RESIDUAL, 1, column(0, T)),
        Change(ATTENTION, 0, everywhere()),
    ]
    log_CV = Patches(looked.model, other, values).log_probabilities(changes)
    own = log_softmax(looked.logit_TV[-1])
    assert np.abs(log_CV[0] - own).max() > 1e-3  # the texts differ
    np.testing.assert_allclose(log_CV[1], own, atol=2e-5)
    np.testing.assert_allclose(log_CV[2], log_CV[0], atol=2e-5)  # the last layer's first token says nothing to the last
    assert np.abs(log_CV[3] - log_CV[0]).max() > 1e-4


def log_softmax(logit_V: np.ndarray) -> np.ndarray:
    """Log-probabilities."""
    return logit_V - np.log(np.exp(logit_V.astype(np.float64)).sum())


def test_where_an_answer_is_decided():
    first_LT = np.array([[5, 1, 3], [2, 1, 3], [5, 2, 3], [5, 1, 3]])
    np.testing.assert_array_equal(decided(first_LT, np.array([5, 1, 3])), [2, 3, 0])


def test_tokens_of_two_texts_are_aligned():
    assert compare.align([1, 2, 3, 4], [1, 9, 3, 4]) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert compare.align([1, 2, 3], [1, 3]) == [(0, 0), (1, None), (2, 1)]
    assert compare.align([1, 2], [1, 7, 8, 2]) == [(0, 0), (None, 1), (None, 2), (1, 3)]
    rng = np.random.default_rng(0)
    one_LTD = rng.standard_normal((3, 2, 8))
    other_LTD = one_LTD.copy()
    other_LTD[2, 1] = -one_LTD[2, 1]
    found = compare.compare(([1, 2], [1, 2]), (one_LTD, other_LTD))
    assert found.parted == [None, 2]
    np.testing.assert_allclose(found.cosine_LA, [[1, 1], [1, 1], [1, -1]], atol=1e-6)
    assert compare.differing(([1, 2, 3, 4, 5], [1, 7, 3, 8, 5]), 8) == [1, 2, 3, 4]
    assert compare.differing(([1, 2, 3, 4, 5], [1, 7, 3, 8, 5]), 2) == [1, 4]
    log = np.log(np.array([0.6, 0.3, 0.1]))
    assert compare.answers(log, log[::-1]) == (0, 2)
    assert compare.answers(log, np.log(np.array([0.6, 0.1, 0.3]))) == (1, 2)
    assert dataclasses
