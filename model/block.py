"""One layer of the stack, from one device's view: attention and a feed-forward part, each added to what it read.

Letters: B rows, T sequence, D model, E twice D.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.costs import CostCounter
from weft.model.layers import attention, mla, mlp, moe  # noqa: F401  (they add what computes their kinds to the registries)
from weft.model.layers.cross import CrossAttention
from weft.model.layers.norm import Norm
from weft.model.linear import TransposedLinear
from weft.model.parameters import Size
from weft.model.parts.registry import FEED_FORWARDS, MIXERS, MIXTURES
from weft.sharding.mesh import FSDP


def mixer(c: ModelConfig) -> Any:
    """What joins the tokens of a row in each layer: the module of the kind that `attention.kind` names."""
    return MIXERS.module(c.attention)


def feed_forward(c: ModelConfig, spec: LayerSpec) -> Any:
    """What works on each token alone in a layer: the module of the kind of `mlp`, or of `moe`."""
    return MIXTURES.module(c.moe) if spec.experts else FEED_FORWARDS.module(c.mlp)


class Block(nnx.Module):
    """One layer: attention, then an MLP or a mixture of experts, each added to what it read; norms as `norm.order` says."""

    def __init__(self, c: ModelConfig, spec: LayerSpec):
        self.config = c
        self.attention_norm = Norm(c)
        self.attention = mixer(c)(c, spec)
        if c.encoder:
            self.cross_norm, self.cross = Norm(c), CrossAttention(c)
        self.mlp_norm = Norm(c)
        self.mlp = feed_forward(c, spec)(c)
        if c.norm.order == 'sandwich':
            self.attention_out_norm, self.mlp_out_norm = Norm(c), Norm(c)
            if c.encoder:
                self.cross_out_norm = Norm(c)

    @staticmethod
    def costs(c: ModelConfig, spec: LayerSpec, count: CostCounter) -> None:
        """Tells a counter what one device does."""
        x = count.tokens / count.mesh.tensor * c.model_dim
        # x, twice with a part added, and normed; a loop keeps of each norm its input and its output, wide.
        count.keep((4 + spec.experts) * x * count.wide if count.looped else 3 * x * count.number)
        mixer(c).costs(c, spec, count)
        if c.encoder:
            CrossAttention.costs(c, spec, count)
        # Where a norm follows a part's sum, the sum is needed once more, also the last one.
        feed_forward(c, spec).costs(c, count, last=c.norm.order == 'pre')

    def __call__(
        self, x_BTD: jax.Array, ctx: ForwardContext, cache: Any | None, layer: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        """x after the layer, and the cache (of its mixer's kind)."""
        rate, before = self.config.dropout, self.config.norm.order in ('pre', 'sandwich')
        x_BTD = ctx.tap('residual.before_attention', x_BTD)
        in_BTD = ctx.tap('attention.input', self.attention_norm(x_BTD) if before else x_BTD)
        y_BTD, cache = self.attention(in_BTD, ctx, cache, layer)
        x_BTD = self.add(x_BTD, y_BTD, 'attention', ctx, rate, 1, layer)
        if self.config.encoder:
            y_BTD, _ = self.cross(self.cross_norm(x_BTD) if before else x_BTD, ctx)
            x_BTD = self.add(x_BTD, y_BTD, 'cross', ctx, rate, 4, layer)
        in_BTD = ctx.tap('mlp.input', self.mlp_norm(x_BTD) if before else x_BTD)
        y_BTD = self.mlp(in_BTD, ctx)
        return self.add(x_BTD, y_BTD, 'mlp', ctx, rate, 2, layer), cache

    def add(
        self, x_BTD: jax.Array, y_BTD: jax.Array, part: str, ctx: ForwardContext, rate: float, *site: int | jax.Array
    ) -> jax.Array:
        """The sum of x and a part's output, of which the output or the sum is normed where the order asks for it."""
        if self.config.norm.order in ('sandwich', 'output'):
            name = 'out_norm' if self.config.norm.order == 'sandwich' else 'norm'
            y_BTD = getattr(self, f'{part}_{name}')(y_BTD)
        y_BTD = ctx.tap(f'{part}.output', y_BTD)
        x_BTD = x_BTD + ctx.dropout(y_BTD, rate, *site)
        x_BTD = getattr(self, f'{part}_norm')(x_BTD) if self.config.norm.order == 'post' else x_BTD
        return ctx.tap(f'residual.after_{part}', x_BTD)


def has_costs(c: ModelConfig) -> bool:
    """Whether all of a model's layers say what they cost, each kind for itself: what one inherits may be wrong of it."""
    return (
        c.adapter is None
        and not c.weights
        and all('costs' in vars(part) for spec in set(c.layer_specs) for part in (mixer(c), feed_forward(c, spec)))
    )


class MTPBlock(Block):
    """A layer that predicts one token further than what it reads, with the model's embedding and head.

    Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): the activations that stand for a token are joined
    with the embedding of the next one. As in published weights both the model's own activations and this layer's are normed
    before the head reads them, and it is those that the next layer is given.
    """

    def __init__(self, c: ModelConfig, spec: LayerSpec):
        super().__init__(c, spec)
        D = Size(c.model_dim, 'model.model_dim')
        self.embedding_norm, self.hidden_norm, self.norm = Norm(c, 'mtp'), Norm(c, 'mtp'), Norm(c, 'mtp')
        self.join = TransposedLinear(2 * D, D, part='mtp', split=(FSDP, None))  # of the embedding, then the activations

    def predict(self, x_BTD: jax.Array, next_BTD: jax.Array, ctx: ForwardContext, layer: jax.Array | int) -> jax.Array:
        """The activations that stand for the tokens of `next_BTD`, in the layout between blocks."""
        x_BTE = jnp.concatenate([self.embedding_norm(next_BTD), self.hidden_norm(x_BTD)], -1)
        x_BTD, _ = self(self.join(x_BTE), ctx, None, layer)
        return self.norm(x_BTD)
