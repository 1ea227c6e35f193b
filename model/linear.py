"""Linear maps, from one device's view: gather the weight, multiply, add the bias.

Each is a module that another of the same methods may take the place of: an adapter beside it, a weight of fewer bits.

Letters: B rows, T sequence, N tokens, I inputs, O outputs, E experts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax

from weft.model.parameters import Role, parameter
from weft.sharding.collectives import axis_index, unshard
from weft.sharding.mesh import FSDP, platform

GATHERED = ('data', 'context')  # axes over which experts' weights are gathered


class Linear(nnx.Module):
    """y = x W + b, with W kept as in × out, split over FSDP by its inputs and over `tensor` by its outputs."""

    out_first = False

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

    @property
    def weight(self) -> nnx.Param:
        """As it is kept."""
        return self.w_OI if self.out_first else self.w_IO

    def kernel(self, dtype) -> jax.Array:
        """The weight gathered over the axes that split its first dim, in the compute dtype; laid out as it is kept."""
        return unshard(self.weight[...], dtype, self.gathered)

    def bias(self, dtype) -> jax.Array:
        """The bias as outputs have it."""
        return self.b_O.astype(dtype)

    def product(self, x_BTI: jax.Array) -> jax.Array:
        """x W without the bias; where `tensor` splits the inputs, this device's part of the sum."""
        return linear(x_BTI, self.kernel(x_BTI.dtype))

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

    out_first = True

    def product(self, x_BTI: jax.Array) -> jax.Array:
        return linear_back(x_BTI, self.kernel(x_BTI.dtype))


class ExpertLinear(nnx.Module):
    """One linear map for each expert: [experts, model, hidden], split over `expert`, `data` × `context` and `tensor`.

    `back`: from hidden units to the width of the model, else the other way.
    """

    def __init__(
        self, experts: int, model: int, hidden: int, *, back: bool = False, bias: bool = False, gain: float = 1.0
    ):
        split, self.back, self.biased = P('expert', GATHERED, 'tensor'), back, bias
        kind = {'gathered': GATHERED, 'part': 'experts', 'out_first': back}
        if back:
            self.w_EOI = parameter((experts, model, hidden), split, Role.EXPERT, scale=gain * hidden**-0.5, **kind)
        else:
            self.w_EIO = parameter((experts, model, hidden), split, Role.EXPERT, scale=gain * model**-0.5, **kind)
        if bias:
            outputs, axis = (model, None) if back else (hidden, 'tensor')
            self.b_EO = parameter((experts, outputs), P('expert', axis), Role.BIAS, part='experts')

    @property
    def weight(self) -> nnx.Param:
        """As it is kept."""
        return self.w_EOI if self.back else self.w_EIO

    def kernel(self, dtype) -> jax.Array:
        """The weights of this device's experts with the model's dim whole, in the compute dtype, [E, model, hidden]."""
        return unshard(self.weight[...], dtype, GATHERED, 1)

    def bias(self, dtype) -> jax.Array:
        """The biases of this device's experts, where there are any. Back, the devices of `tensor` add up: one has the bias."""
        b_EO = jnp.where(axis_index('tensor') == 0, self.b_EO[...], 0) if self.back else self.b_EO
        return b_EO.astype(dtype)


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
