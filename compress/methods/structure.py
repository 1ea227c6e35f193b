"""Pruning of whole parts: layers, experts, groups of heads, hidden units. What is left is a smaller model of the same kind.

Each layer loses as many. Scores: ShortGPT's of layers (arXiv:2403.03853), REAP's of experts (arXiv:2510.13999), of heads and
hidden units what they add to the residual stream of calibration text. Letters: D model, F hidden units, H query heads, K KV
heads, E experts, L layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from weft.compress.activations import InputStatistics
from weft.compress.numerics.pruning import head_scores, hidden_unit_scores, highest, reap_scores
from weft.compress.weights import Arrays
from weft.model.config import ModelConfig
from weft.model.decoder import weights_of
from weft.model.parts.attention import AttentionConfig
from weft.runtime.errors import UserError


class Smaller(NamedTuple):
    """A model without some of its parts."""

    config: ModelConfig
    arrays: Arrays


def kept_layers(c: ModelConfig, arrays: Arrays, count: int, statistics: InputStatistics) -> Smaller:
    """The layers that turn the residual stream the most, in their order."""
    keep = np.sort(highest(1 - statistics.cosine_L, count))
    found = {name: w for name, w in arrays.items() if not name.startswith('layers.')}
    for new, old in enumerate(keep):
        prefix = f'layers.{old}.'
        found |= {
            f'layers.{new}.{name.removeprefix(prefix)}': w for name, w in arrays.items() if name.startswith(prefix)
        }
    return Smaller(dataclasses.replace(c, layers=count), found)


def kept_experts(c: ModelConfig, arrays: Arrays, count: int, statistics: InputStatistics) -> Smaller:
    """Of each mixture the experts that add the most to their tokens; the router chooses among those."""
    assert c.moe is not None
    found = dict(arrays)
    for layer, use in statistics.experts.items():
        keep = np.sort(highest(reap_scores(use.contribution_E, use.count_E), count))
        for name, w in arrays.items():
            if not name.startswith(f'layers.{layer}.mlp.') or '.shared' in name:
                continue
            if name.endswith(('.w_EIO', '.w_EOI', '.b_EO', '.correction_E', '.router.b_O')):
                found[name] = w[keep]
            elif name.endswith('.router.w_IO'):
                found[name] = w[:, keep]
    return Smaller(dataclasses.replace(c, moe=dataclasses.replace(c.moe, experts=count)), found)


def kept_heads(c: ModelConfig, arrays: Arrays, count: int, statistics: InputStatistics) -> Smaller:
    """So many KV heads with the query heads that use them: those whose outputs add the most."""
    a = c.attention
    assert isinstance(a, AttentionConfig), 'others have been refused'
    per_group, size = a.heads // a.kv_heads, a.head_dim
    found = dict(arrays)
    for layer in range(c.layers):
        prefix = f'layers.{layer}.attention.'
        gram = statistics.map(f'layers.{layer}.attention.o').gram
        w_HDO = np.asarray(arrays[f'{prefix}o.w_OI'], np.float64).T.reshape(a.heads, size, -1)
        group_K = head_scores(w_HDO, gram).reshape(a.kv_heads, per_group).sum(1)
        keep = np.sort(highest(group_K, count))
        units = (keep[:, None] * size + np.arange(size)).reshape(-1)
        heads = (keep[:, None] * per_group + np.arange(per_group)).reshape(-1)
        query = (heads[:, None] * size + np.arange(size)).reshape(-1)
        for name, places, dim in (
            ('q.w_IO', query, 1),
            ('q.b_O', query, 0),
            ('k.w_IO', units, 1),
            ('k.b_O', units, 0),
            ('v.w_IO', units, 1),
            ('v.b_O', units, 0),
            ('o.w_OI', query, 1),
            ('sink_N', heads, 0),
            ('q_scale_N', query, 0),
            ('k_scale_M', units, 0),
        ):
            if prefix + name in arrays:
                found[prefix + name] = arrays[prefix + name].take(places, dim)
    smaller = dataclasses.replace(a, heads=count * per_group, kv_heads=count, head_dim=size)
    return Smaller(dataclasses.replace(c, attention=smaller), found)


def kept_units(c: ModelConfig, arrays: Arrays, count: int, statistics: InputStatistics) -> Smaller:
    """Of each MLP, or of each expert, so many hidden units: those that add the most to the residual stream."""
    found = dict(arrays)
    for layer in range(c.layers):
        prefix = f'layers.{layer}.mlp.'
        leaf = 'w_EOI' if f'{prefix}down.w_EOI' in arrays else 'w_OI'
        w_EFO = np.asarray(arrays[f'{prefix}down.{leaf}'], np.float64).swapaxes(-1, -2)
        inputs = statistics.map(f'layers.{layer}.mlp.down')
        moment = np.diagonal(inputs.gram, axis1=-2, axis2=-1)
        if leaf == 'w_OI':
            places = [np.sort(highest(hidden_unit_scores(w_EFO, moment), count))]
        else:
            both = zip(w_EFO, moment, strict=True)
            places = [np.sort(highest(hidden_unit_scores(w_FO, moment_F), count)) for w_FO, moment_F in both]
        for name in arrays:
            if name.startswith(prefix) and '.router.' not in name and '.shared' not in name:
                w, back = arrays[name], '.down.' in name
                if back and name.endswith(('.b_O', '.b_EO')):
                    continue
                rows = w[None] if leaf == 'w_OI' else w
                cut = np.stack([row.take(mine, -1) for row, mine in zip(rows, places, strict=True)])
                found[name] = cut[0] if leaf == 'w_OI' else cut
    if leaf == 'w_OI':
        return Smaller(dataclasses.replace(c, mlp=dataclasses.replace(c.mlp, dim=count)), found)
    assert c.moe is not None
    return Smaller(dataclasses.replace(c, moe=dataclasses.replace(c.moe, mlp_dim=count)), found)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A kind of part that models can lose: how many there are, and the fewest that can stay."""

    keep: Callable[[ModelConfig, Arrays, int, InputStatistics], Smaller]
    about: str
    count: Callable[[ModelConfig], int]
    least: Callable[[ModelConfig], int]


def _layers(c: ModelConfig) -> int:
    if len(set(c.layer_specs)) > 1:
        raise UserError(
            '--method layers: layers of this model are of several kinds, which only their places tell apart'
        )
    return c.layers


def _one(c: ModelConfig) -> int:
    return 1


def _visited(c: ModelConfig) -> int:
    assert c.moe is not None
    return c.moe.top_k


def _experts(c: ModelConfig) -> int:
    if c.moe is None:
        raise UserError('--method experts: the model has none; for example --method hidden-units')
    return c.moe.experts


def _heads(c: ModelConfig) -> int:
    if not isinstance(c.attention, AttentionConfig):
        raise UserError(f'--method heads: model.attention.kind is {c.attention.kind}, whose heads share what they read')
    return c.attention.kv_heads


def _units(c: ModelConfig) -> int:
    kinds = {spec.experts for spec in c.layer_specs}
    if len(kinds) > 1 or (c.moe and c.moe.shared_experts):
        raise UserError(
            '--method hidden-units: some layers have an MLP and others experts: one number does not count both'
        )
    return c.moe.mlp_dim if c.moe else c.mlp.dim


STRUCTURES = {
    'layers': Structure(kept_layers, 'whole layers, those that turn the residual stream least', _layers, _one),
    'experts': Structure(kept_experts, "whole experts, by REAP's score", _experts, _visited),
    'heads': Structure(kept_heads, 'KV heads with their query heads', _heads, _one),
    'hidden-units': Structure(kept_units, 'hidden units of MLPs or experts', _units, _one),
}


def smaller(
    c: ModelConfig, arrays: Arrays, method: str, budget: float | None, statistics: InputStatistics | None
) -> Smaller:
    """The model with as many parts of a kind as the budget allows."""
    structure = STRUCTURES[method]
    most, least = structure.count(c), structure.least(c)
    assert statistics is not None, 'the caller measures what these methods need'
    if budget is None or not 0 < budget <= 1:
        raise UserError(
            f'--budget {budget}: {method} needs the share of all bits that may be left, above 0 and at most 1'
        )
    before = numbers(c)
    fit = [count for count in range(least, most + 1) if numbers(_counted(c, method, count)) <= budget * before]
    if not fit:
        share = math.ceil(numbers(_counted(c, method, least)) / before * 1e3) / 1e3
        raise UserError(
            f'--budget {budget}: with {least} of {most} {method} {share} is left; nearest that works: {share}'
        )
    return structure.keep(c, arrays, fit[-1], statistics)


def numbers(c: ModelConfig) -> int:
    """Of all weights of a model."""
    return sum(math.prod(weight.global_shape) for weight in weights_of(c).values())


def _counted(c: ModelConfig, method: str, count: int) -> ModelConfig:
    """The config with so many parts."""
    if method == 'layers':
        return dataclasses.replace(c, layers=count)
    if method == 'experts' and c.moe:
        return dataclasses.replace(c, moe=dataclasses.replace(c.moe, experts=count))
    if method == 'heads':
        a = c.attention
        assert isinstance(a, AttentionConfig), '`STRUCTURES` refuses others'
        heads = dataclasses.replace(a, heads=count * (a.heads // a.kv_heads), kv_heads=count, head_dim=a.head_dim)
        return dataclasses.replace(c, attention=heads)
    if c.moe:
        return dataclasses.replace(c, moe=dataclasses.replace(c.moe, mlp_dim=count))
    return dataclasses.replace(c, mlp=dataclasses.replace(c.mlp, dim=count))
