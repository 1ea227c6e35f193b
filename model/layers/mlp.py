"""The feed-forward layer, from one device's view.

Letters: B rows, T sequence, D model, F hidden units.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.linear import linear, linear_back
from weft.model.parameters import constant, residual_gain, weight
from weft.model.parts.registry import FEED_FORWARDS
from weft.sharding.collectives import (
    unshard,
)
from weft.sharding.mesh import FSDP


def clamped_swiglu(gate, up, *, limit: float):
    """gpt-oss's gated unit (its published modeling code): a sigmoid of slope 1.702, both inputs cut off, up moved by 1."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS: dict[str, Callable] = {
    'swiglu': lambda gate, up: jax.nn.silu(gate) * up,
    'geglu': lambda gate, up: jax.nn.gelu(gate) * up,
    'clamped_swiglu': clamped_swiglu,
    'gelu': jax.nn.gelu,  # the tanh form, as in GPT-2
    'gelu_exact': partial(jax.nn.gelu, approximate=False),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


def activation(c: ModelConfig) -> Callable[..., jax.Array]:
    """Of an MLP's hidden units: a function of up, or of gate and up where `c.mlp.gated`."""
    found = ACTIVATIONS[c.mlp.activation]
    return partial(found, limit=c.mlp.limit) if c.mlp.activation == 'clamped_swiglu' else found


class Mlp(nnx.Module):
    """Gated (Shazeer 2020, arXiv:2002.05202) or plain, hidden units split over `tensor`."""

    def __init__(self, c: ModelConfig, hidden: int, rngs: nnx.Rngs):
        self.config = c
        D, F = c.model_dim, hidden
        if c.mlp.gated:
            self.gate_DF = weight(rngs, c, (D, F), P(FSDP, 'tensor'), fan_in=D)
        self.up_DF = weight(rngs, c, (D, F), P(FSDP, 'tensor'), fan_in=D)
        self.down_DF = weight(rngs, c, (D, F), P(FSDP, 'tensor'), fan_in=F, gain=residual_gain(c))
        self.biased = c.mlp.bias
        if self.biased:
            if c.mlp.gated:
                self.gate_bias_F = constant(c, 0.0, (F,), P('tensor'))
            self.up_bias_F = constant(c, 0.0, (F,), P('tensor'))
            self.down_bias_D = constant(c, 0.0, (D,), P(None))

    def __call__(self, x_BTD, ctx: ForwardContext):
        """The block's output in the layout between blocks."""
        c, dtype = self.config, x_BTD.dtype
        x_BTD = ctx.gather_sequence(x_BTD)
        h_BTF = linear(x_BTD, unshard(self.up_DF[...], dtype))
        if self.biased:
            h_BTF = h_BTF + self.up_bias_F.astype(dtype)[None, None]
        if c.mlp.gated:
            gate_BTF = linear(x_BTD, unshard(self.gate_DF[...], dtype))
            if self.biased:
                gate_BTF = gate_BTF + self.gate_bias_F.astype(dtype)[None, None]
            h_BTF = activation(c)(gate_BTF, h_BTF)
        else:
            h_BTF = activation(c)(h_BTF)
        y_BTD = ctx.reduce_scatter_sequence(linear_back(h_BTF, unshard(self.down_DF[...], dtype)))
        return y_BTD + self.down_bias_D.astype(dtype)[None, None] if self.biased else y_BTD


FEED_FORWARDS.implement('mlp', lambda c, rngs: Mlp(c, c.mlp.dim, rngs))
