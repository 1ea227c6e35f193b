"""The decoder stack, from one device's view.

    tokens_BT ─ embed ─▶ x_BTD ─ groups of like layers, each scanned ─▶ x_BTD ─ norm ─ LM head ─▶ logits over V/tensor
                                   norm ─ attention ─ +        norm ─ MLP or experts ─ +

Between blocks x_BTD is split by rows over BATCH and by sequence over `context` and `tensor`. Letters: B rows, T sequence,
D model, V padded vocabulary, L layers, N tokens of this device, M microbatches, m those of this stage.
"""

from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax

from model.attention import default_backend as attention_backend
from model.config import ModelConfig
from model.grouped_matmul import default_backend as experts_backend
from model.layers import Attention, Cache, Mlp, Norm, View, weight
from model.moe import MoE
from sharding.collectives import vary, whole
from sharding.mesh import FSDP, platform
from sharding.pipeline import dealt, pipeline

# So many layers are written out on a CPU, where a loop's slices are copies; more keep the loop, to compile quickly.
CPU_UNROLL = 8


class Block(nnx.Module):
    """One layer: attention, then an MLP or a mixture of experts, each added to what it read (pre-norm)."""

    def __init__(self, c: ModelConfig, kind: str, rngs: nnx.Rngs):
        self.config = c
        self.attention_norm = Norm(c)
        self.attention = Attention(c, rngs)
        self.mlp_norm = Norm(c)
        self.mlp = Mlp(c, c.mlp_dim, rngs) if kind == 'dense' else MoE(c, rngs)

    def __call__(self, x_BTD, view: View, cache: Cache | None, layer):
        """x after the layer, the cache, and the router's figures (an empty dict without a router)."""
        rate = self.config.dropout
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), view, cache, layer)
        x_BTD = x_BTD + view.dropout(y_BTD, rate, 1, layer)
        y_BTD = self.mlp(self.mlp_norm(x_BTD), view)
        y_BTD, figures = y_BTD if isinstance(self.mlp, MoE) else (y_BTD, {})
        return x_BTD + view.dropout(y_BTD, rate, 2, layer), cache, figures


class Decoder(nnx.Module):
    """Embedding, stacked groups of like layers, final norm, LM head.

    The longest group is the pipeline's where the mesh has stages: its layers are split over them, in order. All other
    weights every stage has; it uses them on the rows of its own microbatches.
    """

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        D, V = c.model_dim, c.padded_vocabulary
        # As the tied head too it must be small, or each token begins by predicting itself.
        self.embed_VD = weight(rngs, c, (V, D), P(FSDP, 'tensor'), fan_in=D if c.tied_embedding else 1)
        self.groups = nnx.List([stacked(c, number, rngs) for number in range(len(c.groups))])
        self.norm = Norm(c)
        if not c.tied_embedding:
            self.head_DV = weight(rngs, c, (D, V), P(FSDP, 'tensor'), fan_in=D)

    def hidden(self, tokens_BT, view: View, cache: Cache | None = None):
        """Normed activations before the LM head, in the layout between blocks; the cache; the figures of each router.

        Every stage is given all rows and gives those of its own microbatches (`View.dealt`).
        Figures: name -> [L, …] over the layers with a router, this device's share; empty without one.
        """
        c, ends, M = self.config, view.dealt(), view.microbatches
        tokens_BT = dealt(tokens_BT, M)
        x_BTD = vary(ends.dropout(self.embed(tokens_BT, ends), c.dropout, 0))
        first, figures = 0, dict[str, jax.Array]()
        for number, ((_, n), blocks) in enumerate(zip(c.groups, self.groups, strict=True)):
            if lax.axis_size('stage') > 1 and number == c.longest_group:
                assert cache is None, 'decoding has no pipeline'
                x_BTD, found = pipelined(blocks, x_BTD, view, first, n)
            else:
                x_BTD, cache, found = in_order(blocks, x_BTD, ends, cache, first)
            first, figures = first + n, figures | found
        return self.norm(x_BTD), cache, figures

    def embed(self, tokens_BT, view: View):
        """Each device of `tensor` looks up its part of D for all tokens; what is sent then makes that all of D."""
        x = whole(self.embed_VD[...], self.config.dtype)[tokens_BT]
        if view.sequence_split:
            return lax.all_to_all(x, 'tensor', split_axis=1, concat_axis=2, tiled=True)
        return lax.all_gather(x, 'tensor', axis=2, tiled=True)

    def head(self):
        """The LM head, D first, its part of the vocabulary on each device of `tensor`, in the compute dtype."""
        if not self.config.tied_embedding:
            return whole(self.head_DV[...], self.config.dtype)
        embed_VD = whole(self.embed_VD[...], self.config.dtype)
        return lax.all_to_all(embed_VD, 'tensor', split_axis=0, concat_axis=1, tiled=True).T


def stacked(c: ModelConfig, number: int, rngs: nnx.Rngs) -> Block:
    """The layers of a group as one module with a leading dim, which is split over `stage` where they are the pipeline's."""
    kind, n = c.groups[number]
    layout = P('stage') if number == c.longest_group else P(None)
    keys = jax.tree.map(lambda key: jax.reshard(key, layout), rngs.split(n))
    return jax.vmap(lambda rngs: Block(c, kind, rngs))(keys)


def in_order(blocks: Block, x_BTD, view: View, cache: Cache | None, first):
    """x after the layers of a stacked module, of which the first has number `first`; the cache; figures of each layer."""

    def layer(carry, numbered):
        (x_BTD, cache), (block, number) = carry, numbered
        x_BTD, cache, figures = block(x_BTD, view, cache, number)
        return (x_BTD, cache), vary(figures)

    n = jax.tree.leaves(blocks)[0].shape[0]
    unroll = platform() == 'cpu' and n <= CPU_UNROLL
    run = remat(layer, blocks.config, unroll)
    (x_BTD, cache), figures = lax.scan(run, (x_BTD, cache), (blocks, first + jnp.arange(n)), unroll=unroll)
    return x_BTD, cache, figures


def pipelined(blocks: Block, x_BTD, view: View, first, n: int):
    """The same for layers that are split over `stage`; x holds the rows of this stage's microbatches. No cache."""
    mine = jax.tree.leaves(blocks)[0].shape[0]
    before = lax.axis_index('stage') * mine

    def layers(x_BTD, number):
        x_BTD, _, figures = in_order(blocks, x_BTD, view.microbatch(number), None, first + before)
        return x_BTD, figures

    m = view.microbatches // lax.axis_size('stage')
    x_mBTD, figures = pipeline(layers, x_BTD.reshape(m, -1, *x_BTD.shape[1:]))
    place = lambda a: lax.dynamic_update_slice_in_dim(jnp.zeros((n, *a.shape[1:]), a.dtype), a, before, 0)
    return x_mBTD.reshape(x_BTD.shape), jax.tree.map(place, figures)


def to_vocabulary(x_ND, head_DV):
    """Logits, in at least float32 however narrow x and the head are."""
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    return jnp.einsum('...D,DV->...V', x_ND, head_DV, preferred_element_type=wide)


def remat(layer, c: ModelConfig, unrolled: bool):
    """The layer, keeping for its backward pass what `model.remat` says."""
    if c.remat == 'none':
        return layer
    policy = None if c.remat == 'block' else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=unrolled)  # a loop's border keeps it apart anyhow


class Backends(TypedDict):
    """View's arguments: how attention and the experts compute."""

    backend: str
    experts: str


def backends(c: ModelConfig) -> Backends:
    """The backends that the config names, or the fast ones of the current mesh's platform."""
    name, context = platform(), jax.sharding.get_abstract_mesh().shape['context']
    return {
        'backend': attention_backend(name, context) if c.attention == 'auto' else c.attention,
        'experts': experts_backend(name) if c.experts == 'auto' else c.experts,
    }
