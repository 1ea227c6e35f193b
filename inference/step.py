"""Reading prompts and decoding one token a step, with a sharded cache of keys and values: pure functions of global arrays.

Letters: B rows, T prompt tokens, S slots of the cache or tokens of a source, V vocabulary, D model.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import P, lax

from weft.model.context import CrossCache, ForwardContext
from weft.model.decoder import Decoder
from weft.model.forward import ROWS, TOKENS, columns, needs_causal, needs_no_stages, one_device, real_vocabulary
from weft.model.head import to_vocabulary
from weft.model.kv_cache import CacheSize, KVCache
from weft.model.parameters import specs
from weft.model.stack import declared_cache
from weft.runtime import background
from weft.sharding.collectives import as_replicated, mark_varying, psum
from weft.sharding.mesh import BATCH, platform
from weft.sharding.sequence_layout import cyclic

# Compiler options of a step by platform. Merging products of the same tokens joins their weights first: a copy each step.
OPTIONS: dict[str, dict[str, Any]] = {'gpu': {'xla_gpu_dot_merger_threshold_mb': 0}}
Step = TypeVar('Step', bound=Callable[..., tuple[jax.Array, KVCache]])  # logits and cache
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


def with_cache(body: Step) -> Step:
    """A function of global arrays, with rows split over BATCH, of one that is written from one device's view."""

    @functools.wraps(body)
    def run(model: Decoder, cache: KVCache, *rows: jax.Array) -> tuple[jax.Array, KVCache]:
        assert (cache.source is None) == (model.config.encoder is None), (
            'an encoder–decoder reads a source first: see `encode`'
        )
        layout = specs(cache)

        def on_device(model: Decoder, cache: KVCache, *rows: jax.Array) -> tuple[jax.Array, Any]:
            groups = mark_varying(cache.groups)  # what is written to; a source is only read
            logit_BV, cache = body(model, cache._replace(groups=groups), *rows)
            return as_replicated(logit_BV, 'context'), cache.groups

        step = one_device(on_device, model, (layout, *[TOKENS] * len(rows)), (P(ROWS, 'tensor'), layout.groups))
        logit_BV, groups = step(model, cache, *rows)
        return real_vocabulary(logit_BV, model), cache._replace(groups=groups)

    return cast(Step, run)


def prefill(model: Decoder, cache: KVCache, tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, KVCache]:
    """Reads the prompts: row b's are tokens_BT[b, :length_B[b]], what follows is padding.

    Returns the logits [B, vocabulary] after each row's last token, and the cache. Device i of `context` reads columns i,
    i + n, i + 2n …, whose keys and values are those that it keeps.
    """
    fill = -tokens_BT.shape[1] % jax.sharding.get_abstract_mesh().shape['context']
    return _prefill(model, cache, jnp.pad(tokens_BT, ((0, 0), (0, fill))), length_B)


@with_cache
def _prefill(model: Decoder, cache: KVCache, tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, KVCache]:
    column_T = columns(tokens_BT.shape[1], cyclic)
    tokens_BT = tokens_BT[:, column_T]
    position_BT = jnp.broadcast_to(column_T, tokens_BT.shape)
    segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
    split = tokens_BT.shape[1] % lax.axis_size('tensor') == 0
    ctx = ForwardContext(position_BT, segment_BT, model.resolved_compute, sequence_split=split)
    x_BTD, cache, _ = model.hidden(tokens_BT, ctx, cache)
    last_BT1 = (position_BT == length_B[:, None] - 1)[..., None]  # one column, of one device of `context`
    last_BD = psum(jnp.where(last_BT1, ctx.gather_sequence(x_BTD), 0).sum(1), 'context')
    return to_vocabulary(last_BD, model.head(), model.config), cache


@with_cache
def extend(
    model: Decoder, cache: KVCache, tokens_BT: jax.Array, begin_B: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Reads more tokens after those in the cache: row b's are tokens_BT[b, :length_B[b]] and stand at position begin_B[b] on.

    A row has one of them at least; what follows is padding, which does not come into the cache and sees what the last one sees.
    Returns the logits [B, vocabulary] after each row's last token, and the cache. Every device of `context` works on the same
    tokens, as in `decode`: each score of a token with a slot exists at once, so a long text is to come in chunks, of no more
    tokens than the `chunk` of `empty_cache`.
    """
    column_1T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    live_BT = column_1T < length_B[:, None]
    position_BT = begin_B[:, None] + jnp.minimum(column_1T, length_B[:, None] - 1)
    segment_BT = live_BT.astype(jnp.int32)
    ctx = ForwardContext(position_BT, segment_BT, model.resolved_compute, sequence_split=False, decoding=True)
    x_BTD, cache, _ = model.hidden(tokens_BT, ctx, cache)
    last_BT1 = (column_1T == length_B[:, None] - 1)[..., None]
    return to_vocabulary(jnp.where(last_BT1, x_BTD, 0).sum(1), model.head(), model.config), cache


@with_cache
def decode(model: Decoder, cache: KVCache, token_B: jax.Array, position_B: jax.Array) -> tuple[jax.Array, KVCache]:
    """One more token in each row, at its position. Returns the logits [B, vocabulary] after it, and the cache.

    Every device of `context` works on the same tokens; each attends to the slots that it keeps.
    """
    ones_B1 = jnp.ones_like(position_B)[:, None]
    ctx = ForwardContext(position_B[:, None], ones_B1, model.resolved_compute, sequence_split=False, decoding=True)
    x_BTD, cache, _ = model.hidden(token_B[:, None], ctx, cache)
    return to_vocabulary(x_BTD[:, 0], model.head(), model.config), cache


def grown(cache: KVCache, length: int) -> KVCache:
    """The cache for rows of so many tokens at most, rounded up as `empty_cache` does, with what is in it."""
    layout = specs(cache)
    return jax.shard_map(lambda cache: cache.grown(length), in_specs=(layout,), out_specs=layout)(cache)
