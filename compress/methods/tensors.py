"""Tensor decompositions: Tucker's form and CP of stacked heads or experts, and tensor trains of any order.

Matrices that have neither heads nor experts are tensors of two dims, of which Tucker's form and CP are a pair (`svd`).
"""

from collections.abc import Callable

import numpy as np

from weft.compress.diagnosis import tucker_ranks
from weft.compress.methods.base import Compressed, Options, register, root_of
from weft.compress.methods.matrices import svd, too_small, weigh
from weft.compress.numerics import bits
from weft.compress.numerics import cp as cp_form
from weft.compress.numerics import tensor_train as train
from weft.compress.numerics import tucker as tucker_form
from weft.compress.weights import Target
from weft.model.parts.linear_forms import CPConfig, TensorTrainConfig, TuckerConfig


def input_mode(target: Target) -> int:
    """Of [slices, model, units], the dim that the inputs have."""
    return 2 if target.weight.out_first else 1


@register('tucker', "Tucker's form of stacked heads or experts, by HOSVD; a pair for other matrices")
def hosvd(target: Target, budget: float, options: Options) -> Compressed:
    return tucker(target, budget, options, tucker_form.hosvd)


@register('tucker-hooi', "Tucker's form, improved by HOOI")
def hooi(target: Target, budget: float, options: Options) -> Compressed:
    return tucker(target, budget, options, lambda w, ranks: tucker_form.hooi(w, ranks, iterations=5))


def tucker(target: Target, budget: float, options: Options, fit: Callable[..., tucker_form.Tucker]) -> Compressed:
    """Ranks are those that the mode's singular values predict to lose the least."""
    if not target.slices:
        return svd(target, budget, options)
    w_SDK, mode = weigh(target, options, target.stack), input_mode(target)
    ranks = list(tucker_ranks(w_SDK, budget))
    root = root_of(target, options)
    found = fit(w_SDK, tuple(ranks))
    core, factors = found.core, list(found.factors)  # a whole dim has no factor to take the weighing back by
    if root is not None:
        if factors[mode] is None:
            core = np.moveaxis(np.tensordot(root[1], core, (1, mode)), 0, mode)
        else:
            factors[mode] = root[1] @ factors[mode]
    w = tucker_form.rebuild(tucker_form.Tucker(core, tuple(factors)))
    names = ('of_slices', 'of_model', 'of_units')
    arrays = {
        f'{name}.w': factor.astype(np.float32)
        for name, factor in zip(names, factors, strict=True)
        if factor is not None
    }
    arrays['core.w'] = core.astype(np.float32)
    form = TuckerConfig(ranks=(ranks[0], ranks[1], ranks[2]), compute=options.compute)
    return Compressed(form, arrays, bits.tucker(w_SDK.shape, ranks), target.of_stack(w))


@register(
    'cp', 'a sum of outer products of stacked heads or experts, by alternating least squares; a pair for other matrices'
)
def cp(target: Target, budget: float, options: Options) -> Compressed:
    if not target.slices:
        return svd(target, budget, options)
    w_SDK = weigh(target, options, target.stack)
    size = lambda r: bits.cp(w_SDK.shape, r)
    if size(1) > budget:
        raise too_small(target, budget)
    most = min(np.prod(w_SDK.shape) // max(w_SDK.shape), budget // size(1))
    rank = bits.rank_within(size, budget, int(max(most, 1)))
    factors = list(cp_form.cp_als(w_SDK, rank, iterations=40, seed=options.seed, tolerance=1e-5).factors)
    root = root_of(target, options)
    if root is not None:
        factors[input_mode(target)] = root[1] @ factors[input_mode(target)]
    names = ('of_slices', 'of_model', 'of_units')
    arrays = {f'{name}.w': factor.astype(np.float32) for name, factor in zip(names, factors, strict=True)}
    w = cp_form.rebuild(cp_form.CP(tuple(factors)))
    return Compressed(CPConfig(rank=rank, compute=options.compute), arrays, size(rank), target.of_stack(w))


@register('tensor-train', 'a chain of --order cores for each matrix, and for each expert; it does not weigh inputs')
def tensor_train(target: Target, budget: float, options: Options) -> Compressed:
    w_EDF = target.w if target.experts else target.w[None]
    E, D, F = w_EDF.shape
    rows, columns = train.modes(D, options.order), train.modes(F, options.order)
    # Long sizes meet short ones, so that cores are alike.
    columns = columns[::-1]
    largest = train.largest_ranks(rows, columns)
    if options.rank is None:
        cap = bits.rank_within(lambda r: E * bits.tensor_train(rows, columns, r), budget, max(largest, default=1))
    else:
        cap = options.rank
    trains = [train.tt_svd(w, rows, columns, cap) for w in w_EDF]
    cores = [np.stack(parts) for parts in zip(*(one.cores for one in trains), strict=True)]
    ranks = tuple(core.shape[1] for core in cores[1:])
    arrays = {f'cores.{k}.w': (core if target.experts else core[0]).astype(np.float32) for k, core in enumerate(cores)}
    w = np.stack([train.rebuild(one) for one in trains])
    form = TensorTrainConfig(rows=rows, columns=columns, ranks=ranks, compute=options.compute)
    taken = 32 * sum(core.size for core in cores)
    return Compressed(form, arrays, taken, w if target.experts else w[0])
