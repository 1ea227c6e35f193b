"""Reading prompts and decoding one token a step, with a sharded cache of keys and values: pure functions of global arrays.

Letters: B rows, T prompt tokens, S slots of the cache or tokens of a source, V vocabulary, D model.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax

from weft.model.capture import EVERYWHERE, Taps, chosen, collected, look, out_layouts, own_taps
from weft.model.context import CrossCache, ForwardContext
from weft.model.decoder import Decoder
from weft.model.edits import Edit, Observer
from weft.model.forward import LOGITS, ROWS, TOKENS, columns, needs_causal, needs_no_stages, one_device, real_vocabulary
from weft.model.head import to_vocabulary
from weft.model.kv_cache import CacheSize, DenseCache, KVCache, WindowCache
from weft.model.parameters import specs
from weft.model.records import Records
from weft.model.stack import declared_cache
from weft.runtime import background
from weft.sharding.collectives import as_replicated, mark_varying, psum
from weft.sharding.mesh import BATCH, platform
from weft.sharding.sequence_layout import cyclic

# Compiler options of a step by platform. Merging products of the same tokens joins their weights first: a copy each step.
OPTIONS: dict[str, dict[str, Any]] = {'gpu': {'xla_gpu_dot_merger_threshold_mb': 0}}
COMPILING = ThreadPoolExecutor(1, 'compiling')


class Program:
    """`jax.jit` of a function that can be compiled before its arguments are there: for their shapes, dtypes and layouts."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, dict[str, Any]] | None = None, **how: Any):
        @functools.cache
        def compiled(platform: str) -> Any:
            return jax.jit(function, compiler_options=(options or {}).get(platform), **how)

        self.compiled = compiled
        self.under_way: list[Future[Any]] = []
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        while self.under_way:
            self.under_way.pop().result()
        return self.compiled(platform())(*arguments)

    def ahead(self, *arguments: Any) -> None:
        """Begins to compile it on the current mesh for such arguments: arrays, or what says their kinds. A call waits."""
        mesh = jax.sharding.get_mesh()

        def compile_it() -> Any:
            with jax.set_mesh(mesh):
                return self.compiled(platform()).lower(*arguments).compile()

        self.under_way.append(background.submit(COMPILING, compile_it))


def jit_step(step: Callable[..., Any], **how: Any) -> Program:
    """A decoding step as a program, with the options of the platform that it is called on."""
    return Program(step, OPTIONS, **how)


def empty_cache(
    model: Decoder, rows: int, length: int, source: tuple[CrossCache, ...] | None = None, chunk: int = 1
) -> KVCache:
    """A cache in the compute dtype, split over BATCH, `context` and `tensor`: what each layer declares (model/kv_cache.py).

    Args:
        rows: sequences, all devices together.
        length: tokens of a row at most. Layers with a window keep only the last ones, as many as they see.
        source: what `encode` gives.
        chunk: tokens of a row at most that `extend` will read at once.

    Raises UserError on a mesh with stages, and for a model that decodes nothing.
    """
    needs_no_stages('decoding')
    needs_causal(model, 'decoding')
    mesh = jax.sharding.get_abstract_mesh().shape
    size = CacheSize(rows, length, chunk, mesh['context'], mesh['tensor'], model.compute.dtype, platform())

    arrays = declared_cache(model.config, size)
    return KVCache(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.spec), arrays), source)


def encode(model: Decoder, tokens_BS: jax.Array, length_B: jax.Array) -> tuple[CrossCache, ...]:
    """What an encoder–decoder's cache keeps of sources, of which row b's tokens are tokens_BS[b, :length_B[b]]."""

    def body(model: Decoder, tokens_BS: jax.Array, length_B: jax.Array) -> tuple[CrossCache, ...]:
        position_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        segment_BS = (position_BS < length_B[:, None]).astype(jnp.int32)
        ctx = ForwardContext(position_BS, segment_BS, model.resolved_compute)
        return model.kept(model.read(tokens_BS, position_BS, segment_BS, ctx))

    of_tokens: Any = P(None, ROWS, 'context', 'tensor')
    of_rows: Any = P(None, BATCH)
    layout = CrossCache(of_tokens, of_tokens, of_rows)
    return one_device(body, model, (TOKENS, TOKENS), (layout,) * len(model.groups))(model, tokens_BS, length_B)


class CachedStep:
    """A function of global arrays, with rows split over BATCH, of one that is written from one device's view.

    step(model, cache, *rows, edits=()) gives the logits [B, vocabulary] after each row's last token, and the cache; `edits`
    change activations of the tokens that it reads (model/edits.py), whose columns are their positions.
    """

    def __init__(
        self,
        body: Callable[..., tuple[jax.Array, KVCache, Records]],
        order: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        """`order`: which columns of the first of the rows each device of `context` reads; None: every device reads all."""
        self.body, self.order = body, order
        functools.update_wrapper(self, body)

    def __call__(
        self, model: Decoder, cache: KVCache, *rows: jax.Array, edits: Sequence[Edit] = ()
    ) -> tuple[jax.Array, KVCache]:
        logit_BV, groups, _ = self._program(model, cache, (), {})(model, cache, rows, tuple(edits))
        return real_vocabulary(logit_BV, model), cache._replace(groups=groups)

    def capture(
        self, model: Decoder, cache: KVCache, *rows: jax.Array, taps: Collection[str], edits: Sequence[Edit] = ()
    ) -> tuple[jax.Array, KVCache, dict[str, jax.Array]]:
        """What a call gives and, by name, activations of the tokens that it reads, as `model.capture.capture` gives them.

        Of `prefill` there are as many columns as the text has, filled up to a multiple of `context`. Keys of
        `attention.pattern` are columns, those of `decode` and `extend` as many as the cache has slots; logits are those after
        each row's last token. Raises UserError for a name that no layer offers, and for patterns of `decode` and
        `extend` where every layer's cache is a window, which keeps no columns.
        """
        everything = self._program(model, cache, None, EVERYWHERE)
        offered = look(lambda *given: everything(*given)[2], model, cache, rows, tuple(edits))
        names = chosen(taps, offered)
        program = self._program(model, cache, names, out_layouts(names, offered))
        logit_BV, groups, found = program(model, cache, rows, tuple(edits))
        context = jax.sharding.get_abstract_mesh().shape['context']
        order = self.order and self.order(filled(rows[0].shape[1], context), context).reshape(-1)
        arrays = {name: tap.value for name, tap in collected(found, order).items()}
        return real_vocabulary(logit_BV, model), cache._replace(groups=groups), arrays

    def _program(
        self, model: Decoder, cache: KVCache, names: Collection[str] | None, layouts_of_taps: Any
    ) -> Callable[..., tuple[jax.Array, Any, Taps]]:
        """The step as a shard_map that captures what has these names (None: all)."""
        assert (cache.source is None) == (model.config.encoder is None), (
            'an encoder–decoder reads a source first: see `encode`'
        )
        layout = specs(cache)

        def on_device(
            model: Decoder, cache: KVCache, rows: tuple[jax.Array, ...], edits: tuple[Edit, ...]
        ) -> tuple[jax.Array, Any, Taps]:
            observer = None
            if names is None or names or edits:
                observer = Observer('all' if names is None else frozenset(names), edits)
            groups = mark_varying(cache.groups)  # what is written to; a source is only read
            logit_BV, cache, records = self.body(model, cache._replace(groups=groups), *rows, observer=observer)
            if observer:
                observer.check(model.config.layers)
            return as_replicated(logit_BV, 'context'), cache.groups, own_taps(records)

        outputs = P(ROWS, 'tensor'), layout.groups, layouts_of_taps
        return one_device(on_device, model, (layout, TOKENS, P()), outputs)


def filled(columns: int, context: int) -> int:
    """Columns of a row, filled up so that as many come to each device of `context`."""
    return -(-columns // context) * context


def logits_of_last(
    model: Decoder, x_BD: jax.Array, position_B: jax.Array, ctx: ForwardContext, records: Records
) -> tuple[jax.Array, Records]:
    """This device's logits [B, V] of each row's last token, at a position, and all that was recorded."""
    logit_BV = to_vocabulary(x_BD, model.head(), model.config)
    here, said = dataclasses.replace(ctx, position_BT=position_B[:, None], column_T=None, decoding=True).recording()
    if ctx.observer:
        logit_BV = here.tap('logits', logit_BV[:, None], LOGITS, real=model.config.vocabulary)[:, 0]
    return logit_BV, records._replace(taps=records.taps | said.taps)


def pattern_columns(cache: KVCache) -> int:
    """Columns over which a step tells attention patterns: slots of a row, of layers that keep all of it; 0: none does."""
    whole = [group for group in cache.groups if isinstance(group, DenseCache) and not isinstance(group, WindowCache)]
    return max((group.arrays[0].shape[2] for group in whole), default=0) * lax.axis_size('context')


@functools.partial(CachedStep, order=cyclic)
def prefill(
    model: Decoder, cache: KVCache, tokens_BT: jax.Array, length_B: jax.Array, observer: Observer | None = None
) -> tuple[jax.Array, KVCache, Records]:
    """Reads the prompts: row b's are tokens_BT[b, :length_B[b]], what follows is padding.

    Gives the logits [B, vocabulary] after each row's last token, and the cache. Device i of `context` reads columns i,
    i + n, i + 2n …, whose keys and values are those that it keeps.
    """
    T = filled(tokens_BT.shape[1], lax.axis_size('context'))
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, T - tokens_BT.shape[1])))
    column_T = columns(T, cyclic)
    tokens_BT = tokens_BT[:, column_T]
    position_BT = jnp.broadcast_to(column_T, tokens_BT.shape)
    segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
    split = tokens_BT.shape[1] % lax.axis_size('tensor') == 0
    how = model.resolved_compute
    ctx = ForwardContext(position_BT, segment_BT, how, sequence_split=split, column_T=column_T, observer=observer)
    x_BTD, cache, records = model.hidden(tokens_BT, ctx, cache)
    last_BT1 = (position_BT == length_B[:, None] - 1)[..., None]  # one column, of one device of `context`
    last_BD = psum(jnp.where(last_BT1, ctx.gather_sequence(x_BTD), 0).sum(1), 'context')
    logit_BV, records = logits_of_last(model, last_BD, length_B - 1, ctx, records)
    return logit_BV, cache, records


@CachedStep
def extend(
    model: Decoder,
    cache: KVCache,
    tokens_BT: jax.Array,
    begin_B: jax.Array,
    length_B: jax.Array,
    observer: Observer | None = None,
) -> tuple[jax.Array, KVCache, Records]:
    """Reads more tokens after those in the cache: row b's are tokens_BT[b, :length_B[b]] and stand at position begin_B[b] on.

    A row has one of them at least; what follows is padding, which does not come into the cache and sees what the last one sees.
    Gives the logits [B, vocabulary] after each row's last token, and the cache. Every device of `context` works on the same
    tokens, as in `decode`: each score of a token with a slot exists at once, so a long text is to come in chunks, of no more
    tokens than the `chunk` of `empty_cache`.
    """
    column_1T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    live_BT = column_1T < length_B[:, None]
    position_BT = begin_B[:, None] + jnp.minimum(column_1T, length_B[:, None] - 1)
    ctx = decoding_view(model, cache, position_BT, live_BT.astype(jnp.int32), observer)
    x_BTD, cache, records = model.hidden(tokens_BT, ctx, cache)
    last_BT1 = (column_1T == length_B[:, None] - 1)[..., None]
    last_BD = jnp.where(last_BT1, x_BTD, 0).sum(1)
    logit_BV, records = logits_of_last(model, last_BD, begin_B + length_B - 1, ctx, records)
    return logit_BV, cache, records


@CachedStep
def decode(
    model: Decoder, cache: KVCache, token_B: jax.Array, position_B: jax.Array, observer: Observer | None = None
) -> tuple[jax.Array, KVCache, Records]:
    """One more token in each row, at its position. Gives the logits [B, vocabulary] after it, and the cache.

    Every device of `context` works on the same tokens; each attends to the slots that it keeps.
    """
    ctx = decoding_view(model, cache, position_B[:, None], jnp.ones_like(position_B)[:, None], observer)
    x_BTD, cache, records = model.hidden(token_B[:, None], ctx, cache)
    logit_BV, records = logits_of_last(model, x_BTD[:, 0], position_B, ctx, records)
    return logit_BV, cache, records


def decoding_view(
    model: Decoder, cache: KVCache, position_BT: jax.Array, segment_BT: jax.Array, observer: Observer | None
) -> ForwardContext:
    """What layers know of new tokens after those in the cache, which every device of `context` and `tensor` has whole."""
    return ForwardContext(
        position_BT,
        segment_BT,
        model.resolved_compute,
        sequence_split=False,
        decoding=True,
        observer=observer,
        slots=pattern_columns(cache) if observer else 0,
    )


def grown(cache: KVCache, length: int) -> KVCache:
    """The cache for rows of so many tokens at most, rounded up as `empty_cache` does, with what is in it."""
    layout = specs(cache)
    return jax.shard_map(lambda cache: cache.grown(length), in_specs=(layout,), out_specs=layout)(cache)
