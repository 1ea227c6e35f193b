"""Pairs: a matrix as the product of two thin ones, for the weight, for each slice, or with one side shared by all slices.

`svd` is plain (Eckart and Young 1936) or whitened by the inputs (SVD-LLM, arXiv:2403.07378), as the objective says.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from weft.compress.methods.base import Compressed, Options, gram_for, register, root_of, unchanged
from weft.compress.numerics import bits
from weft.compress.numerics.quantised_pair import quantised_pair
from weft.compress.numerics.quantised_pair import rebuild as rebuilt_pair
from weft.compress.numerics.svd import Pair, balanced, shared_basis, truncated, whitened
from weft.compress.weights import Target
from weft.model.forms.rounded import packed
from weft.model.parts.linear_forms import LowRankConfig
from weft.runtime.errors import UserError


def fitted(target: Target, rank: int, options: Options) -> Pair:
    """The best pair of the weight, [D, R] and [R, F], or of each expert."""
    gram = gram_for(target, options)
    pair = balanced(truncated(target.w_IO, rank) if gram is None else whitened(target.w_IO, gram, rank))
    if not target.weight.out_first:
        return pair
    return Pair(pair.second.swapaxes(-1, -2), pair.first.swapaxes(-1, -2))


@register('svd', 'a pair A B for each matrix, and for each expert')
def svd(target: Target, budget: float, options: Options) -> Compressed:
    *experts, D, F = target.w.shape
    count = experts[0] if experts else 1
    rank = bits.rank_within(lambda r: count * bits.pair(D, F, r), budget, min(D, F))
    pair = fitted(target, rank, options)
    arrays = {'first.w': pair.first.astype(np.float32), 'second.w': pair.second.astype(np.float32)}
    form = LowRankConfig(rank=rank, compute=options.compute)
    return Compressed(form, arrays, count * bits.pair(D, F, rank), pair.first @ pair.second)


@register('svd-slices', 'a pair for each head of attention, and for each expert')
def svd_slices(target: Target, budget: float, options: Options) -> Compressed:
    if target.experts or not target.slices:
        return svd(target, budget, options)
    w_HDK = target.stack
    H, D, K = w_HDK.shape
    rank = bits.rank_within(lambda r: H * bits.pair(D, K, r), budget, min(D, K))
    pair = balanced(weighted_slices(target, options, functools.partial(truncated, rank=rank)))
    arrays = {'first.w': pair.first.astype(np.float32), 'second.w': pair.second.astype(np.float32)}
    form = LowRankConfig(rank=rank, slices='heads', compute=options.compute)
    return Compressed(form, arrays, H * bits.pair(D, K, rank), target.of_stack(pair.first @ pair.second))


def weighted_slices(target: Target, options: Options, fit: Callable[[np.ndarray], Pair]) -> Pair:
    """A fit of [S, D, K] with the mean Gram matrix of the inputs on the dim that they have, where the objective asks for it."""
    root = root_of(target, options)
    if root is None:
        return fit(target.stack)
    there, back = root
    if target.weight.out_first:  # the units are the inputs
        pair = fit(target.stack @ there.T)
        return Pair(pair.first, pair.second @ back.T)
    pair = fit(there @ target.stack)
    return Pair(back @ pair.first, pair.second)


@register(
    'svd-shared',
    'pairs of heads or experts that share one side, of the two the better; a pair for other matrices',
)
def svd_shared(target: Target, budget: float, options: Options) -> Compressed:
    if not target.slices:
        return svd(target, budget, options)
    S, D, K = target.stack.shape
    found = list[tuple[Literal['model', 'hidden'], int, int, Pair]]()
    sides: dict[Literal['in', 'out'], Literal['model', 'hidden']] = {'in': 'model', 'out': 'hidden'}
    for side, shared in sides.items():
        most = min(D, S * K) if side == 'in' else min(S * D, K)
        size = functools.partial(bits.shared_basis, S, D, K, side=side)
        if size(rank=1) > budget:
            continue
        # Bits grow by the same with each rank.
        rank = min(int(budget // size(rank=1)), most)
        basis = functools.partial(shared_basis, rank=rank, side=side)
        pair = balanced(weighted_slices(target, options, basis))
        found.append((shared, rank, size(rank=rank), pair))
    if not found:
        raise too_small(target, budget)
    loss = [np.linalg.norm(weigh(target, options, target.stack - pair.first @ pair.second)) for *_, pair in found]
    kind, rank, taken, pair = found[int(np.argmin(loss))]
    arrays = {'first.w': pair.first.astype(np.float32), 'second.w': pair.second.astype(np.float32)}
    w = target.of_stack(pair.first @ pair.second)
    if target.experts:
        return Compressed(LowRankConfig(rank=rank, shared=kind, compute=options.compute), arrays, taken, w)
    if kind == 'hidden':
        form = LowRankConfig(rank=rank, slices='heads', shared='hidden', compute=options.compute)
        return Compressed(form, arrays, taken, w)
    # Heads that share the model's side are one pair of the whole matrix.
    arrays['second.w'] = pair.second.swapaxes(0, 1).reshape(rank, -1).astype(np.float32)
    return Compressed(LowRankConfig(rank=rank, compute=options.compute), arrays, taken, w)


def weigh(target: Target, options: Options, w_SDK: np.ndarray) -> np.ndarray:
    """Slices as the objective sees them."""
    root = root_of(target, options)
    if root is None:
        return w_SDK
    return w_SDK @ root[0].T if target.weight.out_first else root[0] @ w_SDK


def too_small(target: Target, budget: float) -> UserError:
    """For a budget in which no rank fits."""
    return UserError(f'{target.name}: {budget:.0f} bits: not even rank 1 fits')


def rounded_pairs(width: Literal[8, 4]) -> Callable[[Target, float, Options], Compressed]:
    """The method of pairs whose factors are int8 or int4."""

    def fit(target: Target, budget: float, options: Options) -> Compressed:
        w_IO = target.w_IO if target.experts else target.w_IO[None]
        gram = gram_for(target, options)
        E, I, O = w_IO.shape
        step = 1 if width == 8 else 8
        # Groups of int4 go into the inputs of both factors, which are the map's and the ranks.
        group_of = lambda r: divisor(math.gcd(I, r), options.group) if width == 4 else options.group
        size = lambda r: E * bits.quantised_pair(I, O, r, width, group_of(r))
        # Of int4 a higher rank may take fewer bits, where its groups are larger.
        rank = max((r for r in range(step, min(I, O) + 1, step) if size(r) <= budget), default=0)
        if not rank:
            raise too_small(target, budget)
        shared = group_of(rank)
        grams = [None] * E if gram is None else (gram if target.experts else gram[None])
        pairs = [quantised_pair(w, rank, width, g, rounds=1, group=shared) for w, g in zip(w_IO, grams, strict=True)]
        w = np.stack([rebuilt_pair(pair) for pair in pairs])
        factors = [[pair.first for pair in pairs], [pair.second for pair in pairs]]
        back = target.weight.out_first
        arrays = {}
        for name, parts in zip(('first', 'second')[:: -1 if back else 1], factors, strict=True):
            codes, scale = (np.stack([getattr(part, field) for part in parts]) for field in ('codes', 'scale'))
            if back:
                codes, scale = codes.swapaxes(-1, -2), scale.swapaxes(-1, -2)
            if width == 4:
                codes = packed(np.ascontiguousarray(codes), shared, -1 if back else -2)
            dtype = np.float16 if width == 4 else np.float32
            arrays[f'{name}.codes'] = codes if target.experts else codes[0]
            arrays[f'{name}.scale'] = (scale if target.experts else scale[0]).astype(dtype)
        w = w.swapaxes(-1, -2) if back else w
        form = LowRankConfig(rank=rank, bits=width, group=shared, compute=options.compute)
        return Compressed(form, arrays, size(rank), w if target.experts else w[0])

    return fit


def divisor(size: int, most: int) -> int:
    """The largest even number up to `most` that divides a size."""
    return max((n for n in range(2, most + 1, 2) if not size % n), default=2)


register('svd-int8', 'pairs whose factors are int8')(rounded_pairs(8))
register('svd-int4', 'pairs whose factors are int4 in groups')(rounded_pairs(4))
__all__ = ['fitted', 'svd', 'svd_shared', 'svd_slices', 'unchanged']
