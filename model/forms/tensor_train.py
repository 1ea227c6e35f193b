"""Weights kept as tensor trains: a matrix as a chain of cores (Oseledets 2011; Novikov et al. 2015, arXiv:1509.06569).

The model's width is a product of i_1 … i_d, the hidden units of o_1 … o_d, and the number at (i, o) a product of d matrices,
core k's at (i_k, o_k). Letters: as kept.py, and N tokens, r and s the ranks on both sides of a core.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from weft.model.forms.factored import Factor, Flat
from weft.model.forms.kept import Columns, KeptWeight, layout_of
from weft.model.parameters import Parameter
from weft.model.parts.linear_forms import TensorTrainConfig
from weft.model.parts.registry import WEIGHTS
from weft.runtime.errors import UserError
from weft.sharding.collectives import tensor_slice


class TensorTrainWeight(KeptWeight):
    """Cores [r, i, o, s]; experts have chains of their own."""

    def __init__(self, weight: Parameter, config: TensorTrainConfig):
        super().__init__(weight)
        *experts, D, F = weight.shape
        for name, size, parts in (('rows', D, config.rows), ('columns', F, config.columns)):
            if math.prod(parts) != size:
                raise UserError(
                    f'model.weights.{name} is {list(parts)}: their product is {math.prod(parts)} and must be {int(size)}'
                )
        self.compute, self.rows, self.columns = config.compute, config.rows, config.columns
        ranks = (1, *config.ranks, 1)
        self.shapes = shapes = [
            (r, i, o, s) for r, i, o, s in zip(ranks[:-1], config.rows, config.columns, ranks[1:], strict=True)
        ]
        # Each number of the weight is a sum of so many products as there are ways through the ranks.
        scale = (weight.scale / math.prod(config.ranks) ** 0.5) ** (1 / len(shapes)) if weight.scale else 0.0
        over = layout_of(weight)[0]
        self.cores = nnx.List(
            [
                Factor(weight, (*experts, *shape), (over, None, None, None, None), self.role, scale, None)
                if experts
                else Flat(weight, shape, self.role, scale)
                for shape in shapes
            ]
        )

    def dense(self, dtype: DTypeLike) -> jax.Array:
        cores = [core.whole(dtype) for core in self.cores]
        w = jax.vmap(rebuilt)(cores) if self.dim else rebuilt(cores)
        return w if lax.axis_size('tensor') == 1 else tensor_slice(w, w.ndim - 1)

    def product(self, x_BTI: jax.Array, columns: Columns) -> jax.Array | None:
        if self.dim or self.compute == 'rebuild' or lax.axis_size('tensor') > 1:
            return None
        N = x_BTI.size // x_BTI.shape[-1]
        shapes = self.shapes
        ways = chain_flops(N, shapes, self.out_first), rebuild_flops(shapes) + N * math.prod(self.rows + self.columns)
        if self.compute == 'auto' and ways[0] > ways[1]:
            return None
        cores = [core.whole(x_BTI.dtype) for core in self.cores]
        if self.out_first:
            cores = [core.swapaxes(1, 2) for core in cores]
        return through(x_BTI.reshape(N, -1), cores).reshape(*x_BTI.shape[:-1], -1)


def rebuilt(cores: list[jax.Array]) -> jax.Array:
    """The matrix [rows, columns]."""
    w_DFs = cores[0][0].reshape(cores[0].shape[1], cores[0].shape[2], -1)
    for core in cores[1:]:
        D, F, _ = w_DFs.shape
        w_DFs = jnp.einsum('DFr,rios->DiFos', w_DFs, core).reshape(D * core.shape[1], F * core.shape[2], -1)
    return w_DFs[..., 0]


def through(x_NI: jax.Array, cores: list[jax.Array]) -> jax.Array:
    """x W, one core after another: of [N, columns so far, r, rows to come] one row's part is summed over each time."""
    N = x_NI.shape[0]
    z = x_NI.reshape(N, 1, 1, -1)
    for core in cores:
        r, i, o, s = core.shape
        z_NFrix = z.reshape(N, z.shape[1], r, i, -1)
        z = jnp.einsum('NFrix,rios->NFosx', z_NFrix, core).reshape(N, z.shape[1] * o, s, -1)
    return z.reshape(N, -1)


def chain_flops(tokens: int, shapes: Sequence[tuple[int, ...]], out_first: bool) -> int:
    """Multiplications of `through`."""
    left = math.prod(shape[2 if out_first else 1] for shape in shapes)
    found, done = 0, 1
    for r, i, o, s in shapes:
        i, o = (o, i) if out_first else (i, o)
        left //= i
        found += tokens * done * left * r * i * o * s
        done *= o
    return found


def rebuild_flops(shapes: Sequence[tuple[int, ...]]) -> int:
    """Multiplications of `rebuilt`."""
    found, numbers = 0, math.prod(shapes[0][1:3])
    for r, i, o, s in shapes[1:]:
        found += numbers * r * i * o * s
        numbers *= i * o
    return found


WEIGHTS.implement('tensor_train', TensorTrainWeight)
