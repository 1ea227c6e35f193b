"""The feed-forward layer, from one device's view.

Letters: B rows, T sequence, D model, F hidden units.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from weft.model.config import ModelConfig
from weft.model.context import ForwardContext
from weft.model.costs import CostCounter
from weft.model.linear import Linear, TransposedLinear
from weft.model.parameters import Size, residual_gain
from weft.model.parts.registry import FEED_FORWARDS
from weft.sharding.mesh import BATCH


def clamped_swiglu(gate: jax.Array, up: jax.Array, *, limit: float) -> jax.Array:
    """gpt-oss's gated unit (its published modeling code): a sigmoid of slope 1.702, both inputs cut off, up moved by 1."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS: dict[str, Callable[..., Any]] = {
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


LOOPED = 6  # arrays that a loop keeps of hidden units: what goes into each product, and the activation's steps


class Mlp(nnx.Module):
    """Gated (Shazeer 2020, arXiv:2002.05202) or plain, hidden units split over `tensor`."""

    def __init__(self, c: ModelConfig, hidden: Size | None = None, part: str = 'mlp'):
        self.config, self.part = c, part
        hidden = Size(c.mlp.dim, 'model.mlp.dim') if hidden is None else hidden
        D, biased = Size(c.model_dim, 'model.model_dim'), c.mlp.bias
        if c.mlp.gated:
            self.gate = Linear(D, hidden, part=part, bias=biased)
        self.up = Linear(D, hidden, part=part, bias=biased)
        self.down = TransposedLinear(hidden, D, part=part, bias=biased, gain=residual_gain(c.layers))

    @staticmethod
    def costs(c: ModelConfig, count: CostCounter, last: bool) -> None:
        """Tells a counter what one device does; `last`: nothing in the backward pass needs the layer's result."""
        count.keep(count.tokens * c.model_dim * count.number)
        hidden_costs(c, count, 'mlp', c.mlp.dim, last)

    def __call__(self, x_BTD: jax.Array, ctx: ForwardContext) -> jax.Array:
        """The block's output in the layout between blocks."""
        c = self.config
        x_BTD = ctx.gather_sequence(x_BTD)
        h_BTF = self.up(x_BTD)
        h_BTF = activation(c)(self.gate(x_BTD), h_BTF) if c.mlp.gated else activation(c)(h_BTF)
        h_BTF = ctx.tap(f'{self.part}.hidden_units', h_BTF, P(BATCH, 'context', 'tensor'))
        return self.down(h_BTF, ctx.reduce_scatter_sequence)


def hidden_costs(c: ModelConfig, count: CostCounter, part: str, units: int, last: bool) -> None:
    """Tells a counter what an MLP of so many hidden units does, without its input, which another may have kept."""
    D, F, hidden = c.model_dim, units / count.mesh.tensor, count.tokens * units / count.mesh.tensor * count.number
    count.gather_sequence(D)
    for _ in range(2 if c.mlp.gated else 1):
        count.matmul(part, count.tokens, D, F)
    count.matmul(part, count.tokens, F, D, last)
    count.reduce_scatter_sequence(D, last)
    count.keep(hidden * (LOOPED if count.looped else 3 if c.mlp.gated else 2))
    # The units' gradient. Those of gate and up take the places of gate and up, but not on TPUs: one fused matmul makes them.
    count.work(hidden * (2 if count.platform == 'tpu' else 1))


FEED_FORWARDS.implement('mlp', Mlp)
