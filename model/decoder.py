"""The decoder stack, from one device's view.

    tokens_BT ─ embed ─▶ x_BTD ─ groups of like layers, each scanned ─▶ x_BTD ─ norm ─ LM head ─▶ logits over V/tensor
                                   norm ─ attention ─ +        norm ─ MLP or experts ─ +

Between blocks x_BTD is split by rows over BATCH and by sequence over `context` and `tensor`. An encoder–decoder has a second
stack, whose output each block attends to between the two (`Decoder.read`). Letters: B rows, T sequence, S tokens of a
source, D model, V padded vocabulary, L layers, N tokens of this device, M microbatches, m those of this stage, P positions,
Y kinds of segments, R buckets of distances.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax

from weft.model.config import LayerSpec, ModelConfig
from weft.model.encoder import CrossAttention, HeadMlp, Pooler, kept, sinusoids
from weft.model.latent import LatentAttention
from weft.model.layers import (
    Attention,
    CrossKVCache,
    EncoderOutput,
    ForwardContext,
    KVCache,
    Mlp,
    Norm,
    constant,
    linear_back,
    weight,
)
from weft.model.moe import MoE
from weft.model.ops.attention import AttentionFeatures
from weft.model.ops.attention import default_backend as attention_backend
from weft.model.ops.grouped_matmul import default_backend as experts_backend
from weft.sharding.collectives import active_axes, all_gather, all_to_all, mark_varying, tensor_slice, unshard, upcast
from weft.sharding.mesh import FSDP, platform
from weft.sharding.pipeline import my_microbatches, pipeline

# Platform -> layers that are written out at most, of whole rows and of a decoding step: a loop's slices of weights, and of what
# is kept, are copies, and with them a decoding step takes up to twice as long. More keep the loop, to compile quickly.
UNROLLED = {'cpu': (8, 64), 'gpu': (16, 256)}
# TPUs read a slice of a stack where it is used, but for experts, all of which they would copy to multiply by a few.
UNROLLED_EXPERTS = {'tpu': (0, 64)}


class Block(nnx.Module):
    """One layer: attention, then an MLP or a mixture of experts, each added to what it read; norms as `norm_order` says."""

    def __init__(self, c: ModelConfig, kind: LayerSpec, rngs: nnx.Rngs):
        self.config = c
        self.attention_norm = Norm(c)
        self.attention = LatentAttention(c, kind, rngs) if c.latent else Attention(c, kind, rngs)
        if c.encoder:
            self.cross_norm, self.cross = Norm(c), CrossAttention(c, rngs)
        self.mlp_norm = Norm(c)
        self.mlp = MoE(c, rngs) if kind.experts else Mlp(c, c.mlp_dim, rngs)
        if c.norm_order == 'sandwich':
            self.attention_out_norm, self.mlp_out_norm = Norm(c), Norm(c)
            if c.encoder:
                self.cross_out_norm = Norm(c)

    def __call__(self, x_BTD, ctx: ForwardContext, cache: KVCache | None, layer):
        """x after the layer, the cache, and the router's figures (an empty dict without a router)."""
        rate, figures, before = self.config.dropout, {}, self.config.norm_order in ('pre', 'sandwich')
        y_BTD, cache = self.attention(self.attention_norm(x_BTD) if before else x_BTD, ctx, cache, layer)
        x_BTD = self.add(x_BTD, y_BTD, 'attention', ctx, rate, 1, layer)
        if self.config.encoder:
            y_BTD, cache = self.cross(self.cross_norm(x_BTD) if before else x_BTD, ctx, cache, layer)
            x_BTD = self.add(x_BTD, y_BTD, 'cross', ctx, rate, 4, layer)
        y_BTD = self.mlp(self.mlp_norm(x_BTD) if before else x_BTD, ctx)
        if isinstance(self.mlp, MoE):
            y_BTD, figures = y_BTD
        return self.add(x_BTD, y_BTD, 'mlp', ctx, rate, 2, layer), cache, figures

    def add(self, x_BTD, y_BTD, part: str, ctx: ForwardContext, rate: float, *site):
        """The sum of x and a part's output, of which the output or the sum is normed where the order asks for it."""
        if self.config.norm_order in ('sandwich', 'output'):
            name = 'out_norm' if self.config.norm_order == 'sandwich' else 'norm'
            y_BTD = getattr(self, f'{part}_{name}')(y_BTD)
        x_BTD = x_BTD + ctx.dropout(y_BTD, rate, *site)
        return getattr(self, f'{part}_norm')(x_BTD) if self.config.norm_order == 'post' else x_BTD


class Ahead(Block):
    """A layer that predicts one token further than what it reads, with the model's embedding and head.

    Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): the activations that stand for a token are joined
    with the embedding of the next one. As in published weights both the model's own activations and this layer's are normed
    before the head reads them, and it is those that the next layer is given.
    """

    def __init__(self, c: ModelConfig, kind: LayerSpec, rngs: nnx.Rngs):
        super().__init__(c, kind, rngs)
        D = c.model_dim
        self.embedding_norm, self.hidden_norm, self.norm = Norm(c), Norm(c), Norm(c)
        self.join_DE = weight(rngs, c, (D, 2 * D), P(FSDP, None), fan_in=2 * D)  # E: embedding, then activations

    def ahead(self, x_BTD, next_BTD, ctx: ForwardContext, layer):
        """The activations that stand for the tokens of `next_BTD`, in the layout between blocks; the router's figures."""
        x_BTE = jnp.concatenate([self.embedding_norm(next_BTD), self.hidden_norm(x_BTD)], -1)
        x_BTD, _, figures = self(linear_back(x_BTE, unshard(self.join_DE[...], x_BTE.dtype)), ctx, None, layer)
        return self.norm(x_BTD), figures


class Decoder(nnx.Module):
    """Embedding, runs of layers, final norm, LM head.

    Each of the kinds that a run repeats has its layers stacked, one group for each: of layers a b a b, groups a a and b b.
    The longest run is the pipeline's where the mesh has stages: its layers are split over them, in order. All other
    weights every stage has; it uses them on the rows of its own microbatches. Without a vocabulary it is layers and final norm
    alone: an encoder's.
    """

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        if c.vocabulary is not None:
            D, V = c.model_dim, c.padded_vocabulary
            # As the tied head too it must be small, or each token begins by predicting itself.
            self.embed_VD = weight(rngs, c, (V, D), P(FSDP, 'tensor'), fan_in=D if c.tied_embedding else 1)
            if c.positions == 'learned':
                self.position_PD = weight(rngs, c, (c.max_positions, D), P(None, ('tensor', *FSDP)), fan_in=D)
            if c.segment_kinds:
                self.kind_YD = weight(rngs, c, (c.segment_kinds, D), P(None, ('tensor', *FSDP)), fan_in=D)
            if c.embedding_norm:
                self.embedding_norm = Norm(c)
            if c.encoder:
                self.encoder = Decoder(c.of_encoder, rngs)
        if c.positions == 'relative':
            self.relative_RN = weight(rngs, c, (c.relative_buckets, c.heads), P(None, 'tensor'), fan_in=c.model_dim)
        self.groups = nnx.List(
            [
                stacked(c, kind, run.repeats, 'stage' if number == c.pipelined_group else None, rngs)
                for number, run in enumerate(c.layer_groups)
                for kind in run.specs
            ]
        )
        if c.norm_order != 'post':
            self.norm = Norm(c)
        if c.vocabulary is not None:
            if c.head_mlp:
                self.head_mlp = HeadMlp(c, rngs)
            if c.head and not c.tied_embedding:
                self.head_DV = weight(rngs, c, (D, V), P(FSDP, 'tensor'), fan_in=D)
            if c.head_bias:
                self.head_bias_V = constant(c, 0.0, (V,), P('tensor'))
            if c.pooler:
                self.pooler = Pooler(c, rngs)
        if c.mtp_layers:
            self.mtp = stacked(c, c.layer_specs[-1], c.mtp_layers, None, rngs, Ahead)

    def hidden(self, tokens_BT, ctx: ForwardContext, cache: KVCache | None = None, for_head: bool = True):
        """Normed activations before the LM head, in the layout between blocks; the cache; the figures of each router.

        Without `for_head` they are what the layers give, before BERT's MLP of the head.
        Every stage is given all rows and gives those of its own microbatches (`ForwardContext.my_microbatches`).
        Figures: name -> [L, …] over the layers with a router, in the order of the groups, this device's share; empty without.
        """
        c, ends, M = self.config, ctx.my_microbatches(), ctx.microbatches
        tokens_BT = my_microbatches(tokens_BT, M)
        x_BTD = mark_varying(ends.dropout(self.embed(tokens_BT, ends), c.dropout, 0))
        x_BTD, cache, figures = self.stack(x_BTD, ctx, cache)
        return (self.head_mlp(x_BTD) if c.head_mlp and for_head else x_BTD), cache, figures

    def read(self, tokens_BS, position_BS, segment_BS, ctx: ForwardContext) -> EncoderOutput:
        """What the encoder makes of rows of sources, `ctx` being that of the rows that will attend to it."""
        e = self.encoder.config
        ctx = dataclasses.replace(
            ctx,
            position_BT=position_BS,
            segment_BT=segment_BS,
            backend=backends(e)['backend'],
            sequence_split=tokens_BS.shape[1] % lax.axis_size('tensor') == 0,
            dropout_key=None if ctx.dropout_key is None else jax.random.fold_in(ctx.dropout_key, 3),
            column_T=jnp.arange(tokens_BS.shape[1]),
            decoding=False,
            source=None,
        )
        x_BSD = mark_varying(ctx.dropout(self.embed(tokens_BS, ctx), e.dropout, 0))
        x_BSD, _, _ = self.encoder.stack(x_BSD, ctx)
        return EncoderOutput(ctx.gather_sequence(x_BSD), segment_BS)

    def kept(self, memory: EncoderOutput) -> CrossKVCache:
        """What decoding needs of an encoder's output."""
        sizes = [len(run.specs) for run in self.config.layer_groups]
        return kept(memory, [self.groups[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))])

    def stack(self, x_BTD, ctx: ForwardContext, cache: KVCache | None = None):
        """The layers and the final norm; as `hidden`."""
        c, ends = self.config, ctx.my_microbatches()
        if c.positions == 'relative':
            ctx, ends = (dataclasses.replace(one, relative_RN=self.relative_RN[...]) for one in (ctx, ends))
        first, group, figures = 0, 0, list[dict[str, jax.Array]]()
        for number, run in enumerate(c.layer_groups):
            blocks = tuple(self.groups[group : group + len(run.specs)])
            if lax.axis_size('stage') > 1 and number == c.pipelined_group:
                assert cache is None, 'decoding has no pipeline'
                x_BTD, found = pipelined(blocks, x_BTD, ctx, first, run.repeats)
            else:
                x_BTD, cache, found = in_order(blocks, x_BTD, ends, cache, first)
            first, group, figures = first + run.layers, group + len(run.specs), [*figures, *found]
        return (x_BTD if c.norm_order == 'post' else self.norm(x_BTD)), cache, by_layer(figures)

    def ahead(self, x_BTD, next_kBT, ctx: ForwardContext):
        """Of each layer of `mtp` its normed activations before the LM head, and the figures of their routers by layer.

        x_BTD is what `hidden` gives. next_kBT: of layer k the tokens k + 1 places after those that the model read.
        """
        c, ends = self.config, ctx.my_microbatches()
        found, figures = [], []
        for k, next_BT in enumerate(next_kBT):
            layer = jax.tree.map(lambda a, k=k: a[k], self.mtp)
            run = remat(lambda layer, x, after, k=k: layer.ahead(x, after, ends, c.layers + k), c, True)
            x_BTD, of_layer = run(layer, x_BTD, self.embed(my_microbatches(next_BT, ctx.microbatches), ends))
            found.append(x_BTD)
            figures.append(jax.tree.map(lambda a: mark_varying(a)[None], of_layer))
        return found, by_layer(figures)

    def embed(self, tokens_BT, ctx: ForwardContext):
        """Each device of `tensor` looks up its part of D for all tokens; what is sent then makes that all of D."""
        c = self.config
        x = lookup(unshard(self.embed_VD[...], c.dtype), tokens_BT)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.segment_kinds:
            kind_BT = jnp.zeros_like(tokens_BT) if ctx.kind_BT is None else ctx.kind_BT
            x = x + unshard(self.kind_YD[...], x.dtype, dim=1)[kind_BT]
        if c.positions in ('learned', 'sinusoidal'):
            x = x + self.position_table(x.dtype)[ctx.position_BT]
        x = all_to_all(x, 'tensor', 1, 2) if ctx.sequence_split else all_gather(x, 'tensor', 2)
        return self.embedding_norm(x) if c.embedding_norm else x

    def position_table(self, dtype):
        """What is added to the tokens' embeddings by position, this device's part of D: [P, D / tensor]."""
        if self.config.positions == 'sinusoidal':
            return tensor_slice(jnp.asarray(sinusoids(self.config), dtype))
        return unshard(self.position_PD[...], dtype, dim=1)

    def head(self, learns: bool = False) -> 'Head':
        """The LM head in the compute dtype, its part of the vocabulary on each device of `tensor`; `learns`: has a gradient."""
        bias_V = self.head_bias_V[...] if self.config.head_bias else None
        if not self.config.tied_embedding:
            V = self.head_DV.shape[1]
            w_DV, fill = self.head_DV[...], scattered_columns(V) - V
            if fill and learns and active_axes(FSDP):  # kept apart from the gather, for the compiler joins them wrongly
                w_DV = lax.optimization_barrier(jnp.pad(w_DV, ((0, 0), (0, fill))))
            return Head(unshard(w_DV, self.config.dtype)[:, :V], bias_V)
        embed_VD = unshard(self.embed_VD[...], self.config.dtype)
        return Head(all_to_all(embed_VD, 'tensor', 0, 1), bias_V)


def scattered_columns(columns: int) -> int:
    """Columns to which a matrix is filled up so that its gradient is scattered as it was asked for.

    XLA's TPU compiler cuts a reduce-scatter into equal runs of tiles of 128 columns. Of a vocabulary whose number of tiles has
    a large prime factor (Llama 3's: 167) there are none of a fit size, and it sends an all-reduce, twice the bytes.
    """
    if platform() != 'tpu':
        return columns
    tiles = -(-columns // 128)
    if tiles <= 64 or any(tiles % run == 0 for run in range(8, 65)):
        return 128 * tiles
    unit = 2
    while tiles > 64 * unit:
        unit *= 2
    return 128 * unit * -(-tiles // unit)


class Head(NamedTuple):
    """What makes logits of activations."""

    w: jax.Array  # [D, V]; where `ModelConfig.tied_embedding` [V, D], as the embedding lies: to turn it is to copy it
    bias_V: jax.Array | None = None
    sink: jax.Array | None = None  # takes w's gradient: see `wide_product`


def stacked(
    c: ModelConfig, kind: LayerSpec, repeats: int, axis: str | None, rngs: nnx.Rngs, layer: type[Block] = Block
) -> Block:
    """Layers of a kind as one module with a leading dim, which is split over `axis`."""
    keys = jax.tree.map(lambda key: jax.reshard(key, P(axis)), rngs.split(repeats))
    return jax.vmap(lambda rngs: layer(c, kind, rngs))(keys)


def in_order(blocks: tuple[Block, ...], x_BTD, ctx: ForwardContext, cache: KVCache | None, first):
    """x after the layers of a run, of which the first has number `first`; the cache; by kind the figures of each layer.

    Each of `blocks` has the layers of one kind: stacked, or a list of them (inference/unstacked.py).
    """

    def unit(carry, numbered):
        (x_BTD, cache), (blocks, number) = carry, numbered
        figures = []
        for place, block in enumerate(blocks):
            x_BTD, cache, found = block(x_BTD, ctx, cache, number + place)
            figures.append(found)
        return (x_BTD, cache), mark_varying(figures)

    if isinstance(blocks[0], nnx.List):
        figures = []
        run = jax.jit(remat(unit, blocks[0][0].config, True))  # like layers are traced once
        for number, layers in enumerate(zip(*blocks, strict=True)):
            (x_BTD, cache), found = run((x_BTD, cache), (layers, first + number * len(blocks)))
            figures.append(found)
        return x_BTD, cache, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *figures)
    repeats = jax.tree.leaves(blocks)[0].shape[0]
    unroll = written_out(repeats * len(blocks), blocks[0].config, ctx.decoding, platform())
    run = remat(unit, blocks[0].config, unroll)
    numbers = first + jnp.arange(repeats) * len(blocks)
    (x_BTD, cache), figures = lax.scan(run, (x_BTD, cache), (blocks, numbers), unroll=unroll)
    return x_BTD, cache, figures


def written_out(layers: int, c: ModelConfig, decoding: bool, on: str) -> bool:
    """Whether so many layers are no loop on a platform."""
    # XLA for GPUs would compute all of them again at once, and what remat is to save would be there together.
    together = c.remat != 'none' and on == 'gpu' and not decoding
    most = UNROLLED.get(on) or (UNROLLED_EXPERTS.get(on) if c.moe else None) or (0, 0)
    return not together and layers <= most[decoding]


def pipelined(blocks: tuple[Block, ...], x_BTD, ctx: ForwardContext, first, repeats: int):
    """Applies a run of blocks that is split over `stage`; x holds the rows of this stage's microbatches. No cache."""
    mine = jax.tree.leaves(blocks)[0].shape[0]
    before = lax.axis_index('stage') * mine

    def layers(x_BTD, number):
        x_BTD, _, figures = in_order(blocks, x_BTD, ctx.microbatch(number), None, first + before * len(blocks))
        return x_BTD, figures

    m = ctx.microbatches // lax.axis_size('stage')
    x_mBTD, figures = pipeline(layers, x_BTD.reshape(m, -1, *x_BTD.shape[1:]))
    place = lambda a: lax.dynamic_update_slice_in_dim(jnp.zeros((repeats, *a.shape[1:]), a.dtype), a, before, 0)
    return x_mBTD.reshape(x_BTD.shape), jax.tree.map(place, figures)


def by_layer(figures: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The figures of all groups with a router as one: name -> [L, …], group after group."""
    found = [of_group for of_group in figures if of_group]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found) if found else {}


@jax.custom_vjp
def lookup(w_VD, tokens_BT):
    """The tokens' rows of w. Backward they are added up in at least float32: a frequent token has thousands."""
    return w_VD[tokens_BT]


def _lookup_forward(w_VD, tokens_BT):
    return lookup(w_VD, tokens_BT), (w_VD, tokens_BT)


def _lookup_backward(kept, dx_BTD):
    w_VD, tokens_BT = kept
    nothing = jnp.zeros_like(w_VD, dtype=upcast(w_VD).dtype)
    return nothing.at[tokens_BT].add(upcast(dx_BTD)).astype(w_VD.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def wide_product(x_ND, w, sink, dims: str = 'DV'):
    """x @ w in at least float32, [..., V], of w [D, V] or, where `dims` is 'VD', its transpose.

    Backward the narrow numbers of x and w are multiplied by as narrow ones. Else autodiff's products of float32 gradients
    would run in float32: on a GPU at half the rate or less. The gradient of w, in at least float32, is that of `sink`, zeros
    that nothing is added to, so that parts of it are not rounded before they are added up; without a sink it is w's own.
    """
    return jnp.einsum(f'...D,{dims}->...V', x_ND, w, preferred_element_type=upcast(x_ND).dtype)


def _wide_product_forward(x_ND, w, sink, dims):
    return wide_product(x_ND, w, sink, dims), (x_ND, w, sink is None)


def _wide_product_backward(dims, kept, dlogit_NV):
    x_ND, w, own = kept
    dlogit_NV = dlogit_NV.astype(x_ND.dtype)
    parts = (a.reshape(-1, a.shape[-1]) for a in (x_ND, dlogit_NV))
    dw = jnp.einsum(f'ND,NV->{dims}', *parts, preferred_element_type=upcast(x_ND).dtype)
    dx_ND = jnp.einsum(f'...V,{dims}->...D', dlogit_NV, w)
    return (dx_ND, dw.astype(w.dtype), None) if own else (dx_ND, jnp.zeros_like(w), dw)


wide_product.defvjp(_wide_product_forward, _wide_product_backward)


def to_vocabulary(x_ND, head: Head, c: ModelConfig):
    """Logits, in at least float32 however narrow x and the head are."""
    logit_NV = wide_product(x_ND, head.w, head.sink, 'VD' if c.tied_embedding else 'DV')
    if c.logit_scale != 1:
        logit_NV = logit_NV * c.logit_scale
    if head.bias_V is not None:
        logit_NV = logit_NV + upcast(head.bias_V).reshape((1,) * (logit_NV.ndim - 1) + (-1,))
    return logit_NV if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logit_NV / c.logit_softcap)


def remat(layer, c: ModelConfig, unrolled: bool):
    """The layer, keeping for its backward pass what `model.remat` says."""
    if c.remat == 'none':
        return layer
    policy = None if c.remat == 'block' else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=unrolled)  # a loop's border keeps it apart anyhow


def asked(c: ModelConfig) -> AttentionFeatures:
    """What the model asks of attention that not every backend has."""
    return AttentionFeatures(
        softcap=c.attention_softcap is not None,
        sinks=c.attention_sinks,
        two_ways=not c.causal or c.encoder is not None,
        relative=c.positions == 'relative',
        value_width=c.value_dim != c.query_dim,
        float64=c.dtype == 'float64',
    )


class Backends(TypedDict):
    """View's arguments: how attention and the experts compute."""

    backend: str
    experts: str


def backends(c: ModelConfig) -> Backends:
    """The backends that the config names, or the fast ones of the current mesh's platform."""
    name, context = platform(), jax.sharding.get_abstract_mesh().shape['context']
    return {
        'backend': attention_backend(name, context, asked(c)) if c.attention == 'auto' else c.attention,
        'experts': experts_backend(name, c.dtype) if c.experts == 'auto' else c.experts,
    }
