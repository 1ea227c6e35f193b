"""Linear maps, from one device's view: gather the weight, dequantise it, multiply, add what an adapter adds, add the bias.

A config may ask for a weight in another form (`model.weights`) and for an adapter (`model.adapter`): model/linear_forms.py
gives them to the maps that are their targets. Here is the one place where they are used.

Letters: B rows, T sequence, N tokens, I inputs, O outputs, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jax.typing import DTypeLike

from weft.model.parameters import Role, parameter
from weft.sharding.collectives import axis_index, unshard
from weft.sharding.mesh import FSDP, platform

GATHERED = ('data', 'context')  # axes over which experts' weights are gathered


class LinearMap(nnx.Module):
    """What maps of all layers have: a weight, as it is kept, and an adapter beside it, or none."""

    weight_name: str  # of the attribute
    adapter: Any = None  # of a kind that `model.adapter` names; the weight has no gradient then

    @property
    def weight(self) -> Any:
        """A parameter, or the module of a kind that `model.weights` names."""
        return getattr(self, self.weight_name)

    @weight.setter
    def weight(self, form: Any) -> None:
        setattr(self, self.weight_name, form)


class Linear(LinearMap):
    """y = x W + b, with W kept as in × out, split over FSDP by its inputs and over `tensor` by its outputs."""

    weight_name, out_first = 'w_IO', False

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        part: str,
        bias: bool = False,
        split: tuple[tuple[str, ...] | None, str | None] = (FSDP, 'tensor'),
        gain: float = 1.0,
        role: Role = Role.MATRIX,
        repeats: int | None = None,
        of_source: bool = False,
    ):
        """Declares the weight and the bias.

        Args:
            inputs, outputs: sizes.
            part: what a plan counts it under.
            bias: whether there is one; it is laid out as the outputs are.
            split: the axes that split the dims of the weight as it is kept; over those of the first it is gathered in use.
            gain: initial values have the standard deviation gain / √inputs.
            role: of the weight.
            repeats, of_source: as in `Parameter`.
        """
        of = {'part': part, 'repeats': repeats, 'of_source': of_source}
        whole = split[0] or ()
        kind = {'scale': gain * inputs**-0.5, 'gathered': whole, 'out_first': self.out_first, **of}
        if self.out_first:
            self.w_OI = parameter((outputs, inputs), P(*split), role, **kind)
            outs = None  # in use an output is whole on every device
        else:
            self.w_IO = parameter((inputs, outputs), P(*split), role, **kind)
            outs = split[1]
        self.gathered, self.biased = whole, bias
        if bias:
            self.b_O = parameter((outputs,), P(outs), Role.BIAS, **of)

    def columns(self, w: jax.Array) -> jax.Array:
        """This device's outputs of a weight, whose last dim they are, or of the bias: those that it was given."""
        return w

    def base(self, dtype: DTypeLike) -> jax.Array:
        """The weight whole over the axes that split its first dim, in the compute dtype, without an adapter."""
        w = self.columns(dense(self.weight, dtype, self.gathered))
        return w if self.adapter is None else lax.stop_gradient(w)

    def kernel(self, dtype: DTypeLike) -> jax.Array:
        """What x is multiplied by, with an adapter's share, in the compute dtype; laid out as the weight is kept."""
        w = self.base(dtype)
        return w if self.adapter is None else w + self.adapter.delta(dtype, self.columns)

    def bias(self, dtype: DTypeLike) -> jax.Array:
        """The bias as outputs have it."""
        return self.columns(self.b_O[...]).astype(dtype)

    def matmul(self, x_BTI: jax.Array) -> jax.Array:
        """x W of the weight alone."""
        y_BTO = self.by_form(x_BTI)
        if y_BTO is not None:
            return y_BTO
        return (linear_back if self.out_first else linear)(x_BTI, self.base(x_BTI.dtype))

    def by_form(self, x_BTI: jax.Array) -> jax.Array | None:
        """x W as the weight's form multiplies; None: by the dense weight, for it is an array, or that is faster."""
        if isinstance(self.weight, nnx.Param):
            return None
        form = self.weight if self.adapter is None else jax.tree.map(lax.stop_gradient, self.weight)
        return form.product(x_BTI, self.columns)

    def product(self, x_BTI: jax.Array) -> jax.Array:
        """x W and an adapter's share, without the bias; where `tensor` splits the inputs, this device's part of the sum."""
        y_BTO = self.matmul(x_BTI)
        return y_BTO if self.adapter is None else y_BTO + self.adapter(x_BTI, self.columns)

    def __call__(self, x_BTI: jax.Array, reduce: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """x W + b; `reduce` makes the whole sum of parts before the bias is added."""
        y_BTO = self.product(x_BTI)
        if reduce:
            y_BTO = reduce(y_BTO)
        return y_BTO + self.bias(y_BTO.dtype)[None, None] if self.biased else y_BTO


class TransposedLinear(Linear):
    """y = x Wᵀ + b, with W kept as out × in, split over FSDP by its outputs and over `tensor` by its inputs.

    What maps back to the width of the model is kept so: as its partner that maps out of it, it is gathered over its first dim.
    """

    weight_name, out_first = 'w_OI', True


class ExpertLinear(LinearMap):
    """One linear map for each expert: [experts, model, hidden], split over `expert`, `data` × `context` and `tensor`.

    `back`: from hidden units to the width of the model, else the other way.
    """

    def __init__(
        self, experts: int, model: int, hidden: int, *, back: bool = False, bias: bool = False, gain: float = 1.0
    ):
        split, self.back, self.biased = P('expert', GATHERED, 'tensor'), back, bias
        self.weight_name = 'w_EOI' if back else 'w_EIO'
        kind = {'gathered': GATHERED, 'part': 'experts', 'out_first': back}
        if back:
            self.w_EOI = parameter((experts, model, hidden), split, Role.EXPERT, scale=gain * hidden**-0.5, **kind)
        else:
            self.w_EIO = parameter((experts, model, hidden), split, Role.EXPERT, scale=gain * model**-0.5, **kind)
        if bias:
            outputs, axis = (model, None) if back else (hidden, 'tensor')
            self.b_EO = parameter((experts, outputs), P('expert', axis), Role.BIAS, part='experts')

    def kernel(self, dtype: DTypeLike) -> jax.Array:
        """The weights of this device's experts with the model's dim whole, in the compute dtype, [E, model, hidden]."""
        w = dense(self.weight, dtype, GATHERED, 1)
        return w if self.adapter is None else lax.stop_gradient(w) + self.adapter.delta(dtype)

    def bias(self, dtype: DTypeLike) -> jax.Array:
        """The biases of this device's experts, where there are any. Back, the devices of `tensor` add up: one has the bias."""
        b_EO = jnp.where(axis_index('tensor') == 0, self.b_EO[...], 0) if self.back else self.b_EO
        return b_EO.astype(dtype)


def dense(weight: Any, dtype: Any, axes: tuple[str, ...], dim: int = 0) -> jax.Array:
    """A weight gathered over `axes`, which split a dim of it, as numbers of the compute dtype, whatever form it is kept in."""
    return unshard(weight[...], dtype, axes, dim) if isinstance(weight, nnx.Param) else weight.dense(dtype)


def linear(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x @ w on tokens flattened to one dim: on a CPU the gradient is twice as fast as with two."""
    flat_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
    # Of one token XLA for GPUs may write all products out before it adds them up; of two it does not.
    alone = len(flat_NI) == 1 and platform() == 'gpu'
    y_NO = (jnp.pad(flat_NI, ((0, 1), (0, 0))) @ w_IO)[:1] if alone else flat_NI @ w_IO
    return y_NO.reshape(*x_BTI.shape[:-1], -1)


def linear_back(x_BTI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x @ w.T, for weights kept as out × in."""
    flat_NO = lax.dot_general(x_BTI.reshape(-1, x_BTI.shape[-1]), w_OI, (((1,), (1,)), ((), ())))
    return flat_NO.reshape(*x_BTI.shape[:-1], -1)
