"""The decoder stack, from one device's view.

    tokens_BT ─ embed ─▶ x_BTD ─ groups of like layers, each scanned ─▶ x_BTD ─ norm ─ LM head ─▶ logits over V/tensor
                                   norm ─ attention ─ +        norm ─ MLP or experts ─ +

Between blocks x_BTD is split by rows over BATCH and by sequence over `context` and `tensor`. An encoder–decoder has a second
stack, whose output each block attends to between the two (`Decoder.read`). Letters: B rows, T sequence, S tokens of a
source, D model, V padded vocabulary, L layers, N tokens of this device, M microbatches, m those of this stage, P positions,
Y kinds of segments, R buckets of distances.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax

from weft.model.block import Block, MTPBlock
from weft.model.compute import DEFAULT, ComputeConfig, resolve
from weft.model.config import ModelConfig
from weft.model.context import CrossCache, EncoderOutput, ForwardContext
from weft.model.embedding import lookup
from weft.model.forms.rounded import RoundedArray
from weft.model.head import Head, scattered_columns
from weft.model.kv_cache import KVCache, LayerCache
from weft.model.layers.bert import HeadMlp, Pooler
from weft.model.layers.norm import Norm
from weft.model.layers.positions import sinusoids
from weft.model.linear import dense
from weft.model.linear_forms import take_forms, take_table_forms, take_weights
from weft.model.parameters import Parameter, Role, Size, declared, initialise, name_of, parameter, stack_layers
from weft.model.records import Records, join
from weft.model.stack import apply_layers, apply_pipeline, each_layer, remat
from weft.sharding.collectives import active_axes, all_gather, all_to_all, mark_varying, tensor_slice, unshard
from weft.sharding.mesh import FSDP
from weft.sharding.pipeline import my_microbatches


class Decoder(nnx.Module):
    """Embedding, runs of layers, final norm, LM head.

    Each of the kinds that a run repeats has its layers stacked, one group for each: of layers a b a b, groups a a and b b.
    The longest run is the pipeline's where the mesh has stages: its layers are split over them, in order. All other
    weights every stage has; it uses them on the rows of its own microbatches. Without a vocabulary it is layers and final norm
    alone: an encoder's.
    """

    def __init__(self, c: ModelConfig, compute: ComputeConfig = DEFAULT):
        self.config, self.compute = c, compute
        D = Size(c.model_dim, 'model.model_dim')
        if c.vocabulary is not None:
            V = Size(c.padded_vocabulary, 'the padded vocabulary')
            # As the tied head too it must be small, or each token begins by predicting itself.
            scale = c.model_dim**-0.5 if c.embedding.tied else 1.0
            embedding = functools.partial(parameter, role=Role.EMBEDDING, part='embedding', gathered=FSDP)
            self.embed_VD = embedding((V, D), P(FSDP, 'tensor'), scale=scale, padded=0)
            table = functools.partial(embedding, layout=P(None, ('tensor', *FSDP)), scale=c.model_dim**-0.5)
            if c.positions.kind == 'learned':
                self.position_PD = table((c.positions.max, D))
            if c.embedding.token_types:
                self.token_type_YD = table((c.embedding.token_types, D))
            if c.embedding.norm:
                self.embedding_norm = Norm(c)
            if c.encoder:
                self.encoder = Decoder(c.of_encoder, compute)
        if c.positions.kind == 'relative':
            shape = c.positions.buckets, Size(c.attention.heads, 'model.attention.heads')
            scale = c.model_dim**-0.5
            self.relative_RN = parameter(shape, P(None, 'tensor'), Role.EMBEDDING, scale=scale, part='attention')
        layers, mtp = one_of_each(c), [MTPBlock(c, c.layer_specs[-1])] if c.mtp.layers else []
        forms = [spec.forms for group in c.layer_groups for spec in group.specs]
        ahead = [(layer, c.forms_of(c.layers)) for layer in mtp]
        take_forms(c, [*zip(layers, forms, strict=True), *ahead], whole=c.vocabulary is not None)
        self.groups = nnx.List(stacked(c, layers))
        if c.norm.order != 'post':
            self.norm = Norm(c)
        if c.vocabulary is not None:
            if c.head_mlp:
                self.head_mlp = HeadMlp(c)
            if c.head and not c.embedding.tied:
                of = {'scale': c.model_dim**-0.5, 'gathered': FSDP, 'padded': 1, 'part': 'head'}
                self.head_DV = parameter((D, V), P(FSDP, 'tensor'), Role.HEAD, **of)
            if c.head_bias:
                self.head_bias_V = parameter((V,), P('tensor'), Role.BIAS, padded=0, part='head')
            if c.pooler:
                self.pooler = Pooler(c)
        if c.vocabulary is not None:
            take_table_forms(c, self)
        if c.mtp.layers:
            numbers = tuple(range(c.layers, c.layers + c.mtp.layers))
            self.mtp = stack_layers(mtp[0], numbers, None)

    @property
    def resolved_compute(self) -> ComputeConfig:
        """`compute` on the current mesh, with no 'auto' in it."""
        return resolve(self.compute, self.config)

    @overload
    def hidden(
        self, tokens_BT: jax.Array, ctx: ForwardContext, cache: None = None, for_head: bool = True
    ) -> tuple[jax.Array, None, Records]: ...

    @overload
    def hidden(
        self, tokens_BT: jax.Array, ctx: ForwardContext, cache: KVCache, for_head: bool = True
    ) -> tuple[jax.Array, KVCache, Records]: ...

    def hidden(
        self, tokens_BT: jax.Array, ctx: ForwardContext, cache: KVCache | None = None, for_head: bool = True
    ) -> tuple[jax.Array, KVCache | None, Records]:
        """Normed activations before the LM head, in the layout between blocks; the cache; what layers record.

        Without `for_head` they are what the layers give, before BERT's MLP of the head.
        Every stage is given all rows and gives those of its own microbatches (`ForwardContext.my_microbatches`).
        Records have a leading dim L: the layers that have them, of metrics in the order of the groups.
        """
        c, (ends, said), M = self.config, ctx.my_microbatches().recording(), ctx.microbatches
        tokens_BT = my_microbatches(tokens_BT, M)
        x_BTD = ends.tap('embedding', self.embed(tokens_BT, ends))
        x_BTD, cache, records = self.stack(mark_varying(ends.dropout(x_BTD, c.dropout, 0)), ctx, cache)
        if c.norm.order != 'post':
            x_BTD = ends.tap('final_norm', x_BTD)
        records = records._replace(taps=records.taps | said.taps)
        return (self.head_mlp(x_BTD) if c.head_mlp and for_head else x_BTD), cache, records

    def read(
        self, tokens_BS: jax.Array, position_BS: jax.Array, segment_BS: jax.Array, ctx: ForwardContext
    ) -> EncoderOutput:
        """What the encoder makes of rows of sources, `ctx` being that of the rows that will attend to it."""
        e = self.encoder.config
        ctx = dataclasses.replace(
            ctx,
            position_BT=position_BS,
            segment_BT=segment_BS,
            compute=self.encoder.resolved_compute,
            sequence_split=tokens_BS.shape[1] % lax.axis_size('tensor') == 0,
            dropout_key=None if ctx.dropout_key is None else jax.random.fold_in(ctx.dropout_key, 3),
            column_T=jnp.arange(tokens_BS.shape[1]),
            decoding=False,
            source=None,
            observer=None,  # names are those of the decoder's layers
        )
        x_BSD = mark_varying(ctx.dropout(self.embed(tokens_BS, ctx), e.dropout, 0))
        x_BSD, _, _ = self.encoder.stack(x_BSD, ctx)
        return EncoderOutput(ctx.gather_sequence(x_BSD), segment_BS)

    def kept(self, source: EncoderOutput) -> tuple[CrossCache, ...]:
        """What decoding needs of an encoder's output: of each group the layers' keys and values, stacked."""
        return tuple(each_layer(lambda block: block.cross.kept(source), group) for group in self.groups)

    def stack(
        self, x_BTD: jax.Array, ctx: ForwardContext, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None, Records]:
        """The layers and the final norm; as `hidden`."""
        c, ends = self.config, ctx.my_microbatches()
        if c.positions.kind == 'relative':
            ctx, ends = (dataclasses.replace(one, relative_RN=self.relative_RN[...]) for one in (ctx, ends))
        first, group, kept = 0, 0, list[LayerCache | None]()
        records, layers = list[Records](), list[range]()
        for number, run in enumerate(c.layer_groups):
            these = slice(group, group + len(run.specs))
            blocks = tuple(self.groups[these])
            if lax.axis_size('stage') > 1 and number == c.pipelined_group:
                assert cache is None, 'decoding has no pipeline'
                x_BTD, found = apply_pipeline(blocks, x_BTD, ctx, first, run.repeats)
            else:
                x_BTD, groups, found = apply_layers(blocks, x_BTD, ends, cache and cache.part(these), first)
                kept += groups
            records += found
            layers += [range(first + place, first + run.layers, len(run.specs)) for place in range(len(run.specs))]
            first, group = first + run.layers, group + len(run.specs)
        cache = cache and cache._replace(groups=tuple(kept))
        return (x_BTD if c.norm.order == 'post' else self.norm(x_BTD)), cache, join(records, layers)

    def mtp_hidden(
        self, x_BTD: jax.Array, next_kBT: Sequence[jax.Array] | jax.Array, ctx: ForwardContext
    ) -> tuple[list[jax.Array], Records]:
        """Of each layer of `mtp` its normed activations before the LM head, and what they record.

        x_BTD is what `hidden` gives. next_kBT: of layer k the tokens k + 1 places after those that the model read.
        """
        c, ends = (
            self.config,
            dataclasses.replace(ctx.my_microbatches(), observer=None),
        )  # names are of the stack's layers
        found, records = [], []

        def apply(layer: MTPBlock, x_BTD: jax.Array, next_BTD: jax.Array, number: int) -> tuple[jax.Array, Records]:
            here, said = ends.recording()
            return layer.predict(x_BTD, next_BTD, here, number), said

        for k, next_BT in enumerate(next_kBT):
            layer = jax.tree.map(lambda a, k=k: a[k], self.mtp)
            run = remat(functools.partial(apply, number=c.layers + k), ends.compute.remat, True)
            x_BTD, said = run(layer, x_BTD, self.embed(my_microbatches(next_BT, ctx.microbatches), ends))
            found.append(x_BTD)
            records.append(jax.tree.map(lambda a: mark_varying(a)[None], said))
        return found, join(records)

    def embed(self, tokens_BT: jax.Array, ctx: ForwardContext) -> jax.Array:
        """Each device of `tensor` looks up its part of D for all tokens; what is sent then makes that all of D."""
        c = self.config
        if isinstance(self.embed_VD, RoundedArray):
            x = self.embed_VD.rows(tokens_BT, self.compute.dtype)
        else:
            x = lookup(unshard(self.embed_VD[...], self.compute.dtype), tokens_BT)
        if c.embedding.scale != 1:
            x = x * jnp.asarray(c.embedding.scale, x.dtype)
        if c.embedding.token_types:
            kind_BT = jnp.zeros_like(tokens_BT) if ctx.kind_BT is None else ctx.kind_BT
            x = x + unshard(self.token_type_YD[...], x.dtype, dim=1)[kind_BT]
        if c.positions.kind == 'learned':
            x = x + unshard(self.position_PD[...], x.dtype, dim=1)[ctx.position_BT]
        elif c.positions.kind == 'sinusoidal':
            x = x + tensor_slice(jnp.asarray(sinusoids(c), x.dtype))[ctx.position_BT]
        x = all_to_all(x, 'tensor', 1, 2) if ctx.sequence_split else all_gather(x, 'tensor', 2)
        return self.embedding_norm(x) if c.embedding.norm else x

    def head(self, learns: bool = False) -> 'Head':
        """The LM head in the compute dtype, its part of the vocabulary on each device of `tensor`; `learns`: has a gradient."""
        bias_V = self.head_bias_V[...] if self.config.head_bias else None
        if not self.config.embedding.tied:
            if isinstance(self.head_DV, RoundedArray):
                return Head(self.head_DV.whole(self.compute.dtype), bias_V)
            V = self.head_DV.shape[1]
            w_DV, fill = self.head_DV[...], scattered_columns(V) - V
            if fill and learns and active_axes(FSDP):  # kept apart from the gather, for the compiler joins them wrongly
                w_DV = lax.optimization_barrier(jnp.pad(w_DV, ((0, 0), (0, fill))))
            return Head(unshard(w_DV, self.compute.dtype)[:, :V], bias_V)
        embed_VD = dense(self.embed_VD, self.compute.dtype, FSDP)
        return Head(all_to_all(embed_VD, 'tensor', 0, 1), bias_V)


def one_of_each(c: ModelConfig) -> list[Block]:
    """A layer of each kind that a group of `ModelConfig.layer_groups` repeats."""
    return [Block(c, spec) for group in c.layer_groups for spec in group.specs]


def stacked(c: ModelConfig, layers: list[Block]) -> list[Block]:
    """The layers as stacks of like ones, of one of each kind."""
    found, first = list[Block](), 0
    for number, group in enumerate(c.layer_groups):
        axis = 'stage' if number == c.pipelined_group else None
        for place in range(len(group.specs)):
            numbers = tuple(range(first + place, first + group.layers, len(group.specs)))
            found.append(stack_layers(layers[len(found)], numbers, axis))
        first += group.layers
    return found


def init_decoder(c: ModelConfig, compute: ComputeConfig, key: jax.Array) -> Decoder:
    """A decoder with random weights, the same on every mesh, each born in its layout. Run it under `jax.jit` and a mesh."""
    return initialise(Decoder(c, compute), key, compute.parameter_dtype)


def in_forms(model: Decoder, c: ModelConfig, key: jax.Array) -> Decoder:
    """An opened model with the adapters and the forms of weights of `c`, a config that differs from the model's in these alone.

    What adapters add begins as in a new model with this key. Run it under `jax.jit` and the model's mesh.
    """
    weights = {name_of(path): w for path, w in jax.tree_util.tree_leaves_with_path(model)}
    return take_weights(init_decoder(c, model.compute, key), weights)


def learning(model: Decoder) -> Decoder:
    """The model with None for each weight that has no gradient (`Role.learns`): what training differentiates by."""
    known = weights_of(model.config)
    return jax.tree_util.tree_map_with_path(lambda path, w: w if known[name_of(path)].role.learns else None, model)


def with_rest(part: Decoder, model: Decoder) -> Decoder:
    """The weights of `part`, as `learning` gives them, and those of `model` where it has None."""
    return jax.tree.map(lambda new, old: old if new is None else new, part, model, is_leaf=lambda w: w is None)


@functools.lru_cache(maxsize=256)
def declared_decoder(c: ModelConfig, compute: ComputeConfig = DEFAULT) -> Decoder:
    """The decoder without arrays: each of its weights as it is declared. Not to be changed, for it is made once."""
    return Decoder(c, compute)


@functools.lru_cache(maxsize=256)
def weights_of(c: ModelConfig) -> Mapping[str, Parameter]:
    """Each weight of a decoder by name, as it is declared."""
    return MappingProxyType(declared(declared_decoder(c)))
