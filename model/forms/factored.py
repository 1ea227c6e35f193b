"""Weights kept as factors that are two in use: W ≈ first @ second, [model, rank] and [rank, hidden].

A pair from an SVD, pairs of slices that share one side, Tucker's form and a sum of outer products (CP) differ in how they make
the two. Slices are experts, or heads side by side. Letters: as kept.py, and N tokens, S slices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jax.typing import DTypeLike

from weft.model.forms.kept import Columns, KeptWeight, heads_of, layout_of
from weft.model.forms.rounded import RoundedArray
from weft.model.linear import linear, linear_back
from weft.model.parameters import EVERY, Parameter, Role, Size, parameter
from weft.model.parts.linear_forms import CPConfig, LowRankConfig, TuckerConfig
from weft.model.parts.registry import WEIGHTS
from weft.runtime.errors import UserError
from weft.sharding.collectives import tensor_slice, unshard

FLAT_MULTIPLE = 1024  # numbers of an array that no dim splits evenly are filled up to it, and split over all axes


class Factor(nnx.Module):
    """An array of numbers, split by the axes of a dim of the weight, gathered in use over those of the model's dim."""

    def __init__(
        self,
        weight: Parameter,
        shape: tuple[int, ...],
        layout: tuple[Any, ...],
        role: Role,
        scale: float,
        dim: int | None,
    ):
        """Declares it; `dim`: the one that is the model's, which is whole in use."""
        self.gathered, self.dim = weight.gathered if dim is not None else (), dim or 0
        more: dict[str, Any] = {'part': weight.part, 'gathered': self.gathered, 'scale': scale}
        self.w = parameter(shape, P(*layout), role, **more)

    def whole(self, dtype: DTypeLike) -> jax.Array:
        """In the compute dtype, the model's dim whole."""
        return unshard(self.w[...], dtype, self.gathered, self.dim)


class Flat(nnx.Module):
    """An array that has no dim of the weight: all axes split it, filled up by zeros, and it is whole in use."""

    def __init__(self, weight: Parameter, shape: tuple[int, ...], role: Role, scale: float):
        self.shape, self.size = shape, 1
        for n in shape:
            self.size *= n
        filled = Size(-(-self.size // FLAT_MULTIPLE) * FLAT_MULTIPLE, 'a core, filled up')
        self.w = parameter((filled,), P(EVERY), role, scale=scale, gathered=EVERY, part=weight.part)

    def whole(self, dtype: DTypeLike) -> jax.Array:
        """In the compute dtype, in its shape."""
        return unshard(self.w[...], dtype, EVERY)[: self.size].reshape(self.shape)


class PairWeight(KeptWeight):
    """Two factors in use."""

    compute: str

    def factors(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """[D, R] whole, and [R, F] of this device; of experts one or both have a leading dim of this device's experts."""
        raise NotImplementedError

    def dense(self, dtype: DTypeLike) -> jax.Array:
        first, second = self.factors(dtype)
        return first @ second

    def product(self, x_BTI: jax.Array, columns: Columns) -> jax.Array | None:
        if self.dim or self.compute == 'rebuild':
            return None
        first_DR, second_RF = self.factors(x_BTI.dtype)
        second_RF = columns(second_RF)
        (D, R), F, N = first_DR.shape, second_RF.shape[1], x_BTI.size // x_BTI.shape[-1]
        if self.compute == 'auto' and N * R * (D + F) > D * R * F + N * D * F:
            return None
        if self.out_first:
            return linear_back(linear_back(x_BTI, second_RF), first_DR)
        return linear(linear(x_BTI, first_DR), second_RF)


class LowRankWeight(PairWeight):
    """A pair for the weight, or for each expert; of experts one side may be shared. Rounded factors do not learn."""

    def __init__(self, weight: Parameter, config: LowRankConfig):
        super().__init__(weight)
        self.compute = config.compute
        *experts, D, F = weight.shape
        *split, over_D, over_F = layout_of(weight)
        lead = {side: not experts or config.shared == side for side in ('model', 'hidden')}
        shapes = {
            'model': ((*(() if lead['model'] else experts), D, config.rank), (over_D, None)),
            'hidden': ((*(() if lead['hidden'] else experts), config.rank, F), (None, over_F)),
        }
        made = dict[str, Factor | RoundedArray]()
        for side, (shape, layout) in shapes.items():
            role = self.role if len(shape) == len(weight.shape) or not self.learns else Role.MATRIX
            full = (*(split if len(shape) == len(weight.shape) else []), *layout)
            scale = weight.scale if side == 'model' else config.rank**-0.5
            if config.bits:
                of = Parameter(
                    shape, P(*full), role, part=weight.part, gathered=self.gathered if side == 'model' else ()
                )
                axis = -1 if self.out_first else -2
                made[side] = RoundedArray(of, f'int{config.bits}', axis, config.group)
            else:
                made[side] = Factor(weight, shape, full, role, scale, len(shape) - 2 if side == 'model' else None)
        self.first, self.second = made['model'], made['hidden']

    def factors(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        return self.first.whole(dtype), self.second.whole(dtype)


class HeadPairs(KeptWeight):
    """A pair for each head's part of a weight; `shared`: their factors on the hidden side are one."""

    def __init__(self, weight: Parameter, config: LowRankConfig):
        super().__init__(weight)
        heads, unit = slices_of(weight, 'slices is heads')
        self.compute, self.heads, self.split = config.compute, heads, not weight.repeats
        over_D, over_F = layout_of(weight)
        over_H = over_F if self.split else None
        H = slice_size(weight, heads)
        shape: tuple[int, ...] = (H, weight.shape[0], config.rank)
        self.first = Factor(weight, shape, (over_H, over_D, None), self.role, weight.scale, 1)
        lead, over = ((), ()) if config.shared == 'hidden' else ((H,), (over_H,))
        shape, layout = (*lead, config.rank, unit), (*over, None, None)
        self.second = Factor(weight, shape, layout, self.role, config.rank**-0.5, None)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        first_HDR, second = self.first.whole(dtype), self.second.whole(dtype)
        w_HDK = first_HDR @ second
        return mine(self, w_HDK.swapaxes(0, 1).reshape(w_HDK.shape[1], -1))

    def product(self, x_BTI: jax.Array, columns: Columns) -> jax.Array | None:
        first_HDR, second = self.first.whole(x_BTI.dtype), self.second.whole(x_BTI.dtype)
        H, D, R = first_HDR.shape
        N, K = x_BTI.size // x_BTI.shape[-1], second.shape[-1]
        fewer = N * H * R * (D + K) <= H * D * R * K + N * D * H * K
        if self.compute == 'rebuild' or not self.split or (self.compute == 'auto' and not fewer):
            return None
        second_HRK = jnp.broadcast_to(second, (H, R, K))
        if self.out_first:
            h_NHR = jnp.einsum('nhk,hrk->nhr', x_BTI.reshape(-1, H, K), second_HRK)
            return jnp.einsum('nhr,hdr->nd', h_NHR, first_HDR).reshape(*x_BTI.shape[:-1], -1)
        h_NHR = jnp.einsum('nd,hdr->nhr', x_BTI.reshape(-1, D), first_HDR)
        return jnp.einsum('nhr,hrk->nhk', h_NHR, second_HRK).reshape(*x_BTI.shape[:-1], -1)


def low_rank(weight: Parameter, config: LowRankConfig) -> KeptWeight:
    """The form that the config's slices ask for."""
    if config.slices == 'heads':
        if config.shared == 'model':
            raise UserError(
                'model.weights.shared is model with slices heads: heads that share it are one pair; slices: none says so'
            )
        return HeadPairs(weight, config)
    if config.shared != 'none' and len(weight.shape) == 2:
        raise UserError(
            f'model.weights.shared is {config.shared} of a map without experts: nothing shares it; nearest: none'
        )
    return LowRankWeight(weight, config)


class SlicedPair(PairWeight):
    """What Tucker's form and CP have: the weight as [slices, model, units], a factor for each dim or none."""

    def __init__(self, weight: Parameter, compute: str, what: str):
        super().__init__(weight)
        self.compute = compute
        self.slices, self.unit = slices_of(weight, what)
        self.split = bool(self.dim) or not weight.repeats
        *over_E, over_D, over_F = layout_of(weight)
        # The axes that split each of the three dims, and the dims as they are declared.
        if self.dim:
            self.over, self.sizes = (over_E[0], over_D, over_F), tuple(weight.shape)
        else:
            self.over = (over_F if self.split else None, over_D, None)
            self.sizes = (slice_size(weight, self.slices), weight.shape[0], self.unit)

    def factor(self, weight: Parameter, place: int, rank: int, scale: float) -> Factor:
        """Declares the factor of a dim: [size, rank]."""
        role = Role.MATRIX if self.learns else Role.FROZEN
        layout = (self.over[place], None)
        return Factor(weight, (self.sizes[place], rank), layout, role, scale, 0 if place == 1 else None)

    def joined(self, second_RSK: jax.Array) -> jax.Array:
        """The second factor of [rank, slices, units]: of heads side by side, of experts [slices, rank, units]."""
        if self.dim:
            return second_RSK.swapaxes(0, 1)
        return mine(self, second_RSK.reshape(second_RSK.shape[0], -1))


class TuckerWeight(SlicedPair):
    """A core, and a factor for each dim that has a rank (Tucker 1966); null: the core has that dim whole."""

    def __init__(self, weight: Parameter, config: TuckerConfig):
        super().__init__(weight, config.compute, 'kind tucker')
        names = ('slices', 'model.model_dim', 'units')
        for rank, size, name in zip(config.ranks, self.sizes, names, strict=True):
            if rank is not None and not 1 <= rank <= size:
                raise UserError(f'model.weights.ranks has {rank} of {size} {name}: at least 1 and at most {int(size)}')
        self.ranks = config.ranks
        if config.ranks[0] is not None:
            self.of_slices = self.factor(weight, 0, config.ranks[0], self.slices**-0.5)
        if config.ranks[1] is not None:
            self.of_model = self.factor(weight, 1, config.ranks[1], int(self.sizes[1]) ** -0.5)
        if config.ranks[2] is not None:
            self.of_units = self.factor(weight, 2, config.ranks[2], int(self.sizes[2]) ** -0.5)
        whole = [rank is None and axes is not None for rank, axes in zip(config.ranks, self.over, strict=True)]
        shape = tuple(size if rank is None else rank for rank, size in zip(config.ranks, self.sizes, strict=True))
        role = (Role.EXPERT if self.learns else Role.FROZEN) if self.dim else self.role
        scale = (
            weight.scale
            * (self.slices * int(self.sizes[1]) * int(self.sizes[2]) / (shape[0] * shape[1] * shape[2])) ** 0.5
        )
        if any(whole):
            layout = tuple(axes if there else None for axes, there in zip(self.over, whole, strict=True))
            self.core: Any = Factor(weight, shape, layout, role, scale, 1 if whole[1] else None)
        else:
            self.core = Flat(weight, shape, role, scale)

    def factors(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        core = self.core.whole(dtype)
        if self.ranks[0] is not None:
            core = jnp.einsum('sa,abc->sbc', self.of_slices.whole(dtype), core)
        if self.ranks[2] is not None:
            core = jnp.einsum('sbc,kc->sbk', core, self.of_units.whole(dtype))
        second = self.joined(core.swapaxes(0, 1))
        if self.ranks[1] is None:
            return jnp.eye(second.shape[-2], dtype=dtype), second
        return self.of_model.whole(dtype), second

    def dense(self, dtype: DTypeLike) -> jax.Array:
        first, second = self.factors(dtype)
        return second if self.ranks[1] is None else first @ second

    def product(self, x_BTI: jax.Array, columns: Columns) -> jax.Array | None:
        return None if self.ranks[1] is None else super().product(x_BTI, columns)


class CPWeight(SlicedPair):
    """A sum of outer products (Hitchcock 1927): a vector of slices, of the model's width and of units for each."""

    def __init__(self, weight: Parameter, config: CPConfig):
        super().__init__(weight, config.compute, 'kind cp')
        self.of_slices = self.factor(weight, 0, config.rank, 1.0)
        self.of_model = self.factor(weight, 1, config.rank, weight.scale)
        self.of_units = self.factor(weight, 2, config.rank, config.rank**-0.5)

    def factors(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        slices_SR, units_KR = self.of_slices.whole(dtype), self.of_units.whole(dtype)
        return self.of_model.whole(dtype), self.joined(jnp.einsum('sr,kr->rsk', slices_SR, units_KR))


def slices_of(weight: Parameter, what: str) -> tuple[int, int]:
    """Experts or heads of a weight, and the hidden units of one. Raises UserError where it has neither."""
    if len(weight.shape) == 3:
        return int(weight.shape[0]), int(weight.shape[2])
    heads = heads_of(weight)
    if not heads:
        raise UserError(
            f'model.weights: {what}, and {weight.part} has a map without heads or experts; name those in targets that have: '
            'attention.q, attention.k, attention.v, attention.o, expert'
        )
    return heads, int(weight.shape[-1]) // heads


def slice_size(weight: Parameter, heads: int) -> int:
    """The number of heads as a dim, split as the heads are."""
    hidden = weight.shape[-1]
    return Size(heads, hidden.field, heads) if isinstance(hidden, Size) and not weight.repeats else heads


def mine(form: Any, w_DF: jax.Array) -> jax.Array:
    """Of a weight made of all heads what this device has of it, as if it were kept so; of its own heads all."""
    return w_DF if form.split or lax.axis_size('tensor') == 1 else tensor_slice(w_DF, 1)


WEIGHTS.implement('low_rank', low_rank)
WEIGHTS.implement('tucker', TuckerWeight)
WEIGHTS.implement('cp', CPWeight)
