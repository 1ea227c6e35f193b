"""Models whose heads or experts share a subspace by construction: what sharing gains shows in their logits.

Every stack is of 8 matrices of 64 × 48: an expert's maps, or a head's. At equal bits they are replaced by a pair for each, or
by Tucker's form; the gain is how much nearer to the model's own logits the second is.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.extending import harness
from tests.models import filled
from weft.compress.diagnosis import predicted_gain, ranks_within
from weft.compress.numerics import bits, svd, tucker
from weft.compress.planted import KINDS, SHAPE, Kind, PlantedStack, correlation_by_group, planted_stack
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.decoder import Decoder
from weft.model.forward import logits, place
from weft.model.parameters import name_of
from weft.sharding.mesh import MeshConfig

BUDGET = 0.3 * bits.dense(SHAPE)
EXACT = 1e-6  # a relative error of logits below it is rounding
HEADS = ModelConfig(
    vocabulary=96,
    layers=2,
    model_dim=64,
    attention=AttentionConfig(heads=8, head_dim=48),
    mlp=MLPConfig(dim=64),
)
EXPERTS = dataclasses.replace(HEADS, attention=AttentionConfig(heads=4), moe=MoEConfig(experts=8, top_k=2, mlp_dim=48))
MAPS = {
    EXPERTS: ('mlp.gate.w_EIO', 'mlp.up.w_EIO', 'mlp.down.w_EOI'),  # each [experts, 64, 48]
    HEADS: ('attention.q.w_IO', 'attention.k.w_IO', 'attention.v.w_IO', 'attention.o.w_OI'),  # each [64, heads × 48]
}


class Planted(NamedTuple):
    """A model, and what sharing gains on it: log(error of pairs / error of Tucker's form)."""

    kind: Kind
    degree: float
    seed: int
    predicted: float  # the mean over its stacks, of their weights
    real: float  # of logits


@functools.cache
def measured(c: ModelConfig) -> list[Planted]:
    """Of 24 models: 1,152 matrices of experts, or 1,536 of heads."""
    with harness.on(MeshConfig()):
        model, rows = filled(c), place(harness.batch_of(0))
        run = jax.jit(lambda model: logits(model, rows.tokens_BT, rows.position_BT, rows.segment_BT))
        answer = lambda stacks: np.asarray(run(with_stacks(model, stacks)))
        return [
            measure(c, kind, degree, seed, answer) for kind in KINDS for degree in (0, 0.75, 1) for seed in range(2)
        ]


def measure(c: ModelConfig, kind: Kind, degree: float, seed: int, answer) -> Planted:
    stacks = [
        planted_stack(PlantedStack(kind, degree, 100 * seed + n, dims=12 + n % 5)) for n in range(2 * len(MAPS[c]))
    ]
    stacks = [w / w.std() / 8 for w in stacks]
    ranks = [ranks_within(w, BUDGET) for w in stacks]
    pairs = [svd.rebuild(svd.truncated(w, r.pair)) for w, r in zip(stacks, ranks, strict=True)]
    shared = [tucker.rebuild(tucker.hooi(w, r.tucker)) for w, r in zip(stacks, ranks, strict=True)]
    own = answer(stacks)
    by_pairs, by_sharing = (np.linalg.norm(answer(w) - own) / np.linalg.norm(own) for w in (pairs, shared))
    assert by_pairs > 0.05
    predicted = np.mean([predicted_gain(w, BUDGET).tucker for w in stacks])
    return Planted(kind, degree, seed, float(predicted), float(np.log(by_pairs / max(by_sharing, EXACT))))


def with_stacks(model: Decoder, stacks: list[np.ndarray]) -> Decoder:
    """The model with other experts, or heads: of each map those of its two layers."""

    def take(path, value):
        name = name_of(path)
        for n, end in enumerate(MAPS[model.config]):
            if name.endswith(end):
                w_LEIO = np.stack(stacks[2 * n : 2 * n + 2])
                new = w_LEIO if value.ndim == 4 else w_LEIO.swapaxes(1, 2).reshape(value.shape)
                return jax.device_put(new.astype(np.float32), value.sharding)
        return value

    return jax.tree_util.tree_map_with_path(take, model)


@pytest.mark.parametrize('c', [EXPERTS, HEADS], ids=['experts', 'heads'])
def test_sharing_wins_on_models_that_share_and_loses_on_others_and_the_diagnosis_predicts_it(c):
    """By rank, with the interval of drawing kinds and seeds anew."""
    rows = measured(c)
    for one in rows:
        if one.degree != 0.75:
            assert (one.real > 0) == (one.predicted > 0) == (one.degree == 1), one
    groups = [10 * KINDS.index(one.kind) + one.seed for one in rows]
    found = correlation_by_group([one.predicted for one in rows], [one.real for one in rows], groups)
    assert found.of == 24
    assert found.low > 0.8
