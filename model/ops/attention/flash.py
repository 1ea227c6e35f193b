"""Attention for NVIDIA GPUs: one forward and two backward Pallas (Triton) kernels.

FlashAttention-2, Dao 2023 (arXiv:2307.08691). One program owns a tile of queries (forward, dq), or a tile of keys for
all the query heads that share them (dk, dv), so that no two programs add to one place. It walks over the tiles that
its own may see, counted outside from the bounds of each: first those that want a mask, then a run that wants none,
then again those that do. The backward pass is left the output and one log-sum-exp a query, in base 2, where an
exponential is one instruction.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, N = K * G query heads,
H head dim, c query tiles, d key tiles. Inside a kernel T and S are one tile's, and H is filled up to a power of two.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from weft.model.ops.attention.blockwise import State, fill
from weft.model.ops.attention.mask import FLOOR, HIDDEN, QKV, Keys, MaskRule, TokenIndex, sees, tiles_of, tiles_see
from weft.model.ops.attention.mask import span as least_span
from weft.model.ops.kernels import call, check_dtype


class FlashTiling(NamedTuple):
    """Queries and keys a tile (powers of two, at least 16), warps a program, and tiles that are loaded ahead."""

    q: int
    k: int
    warps: int
    stages: int


Carry = TypeVar('Carry')
Pair = tuple[jax.Array, jax.Array]  # the gradients of keys and of values
Tilings = tuple[FlashTiling, FlashTiling, FlashTiling]  # of forward, dq, dkv


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernels know while they are traced."""

    forward: FlashTiling
    dq: FlashTiling
    dkv: FlashTiling
    rule: MaskRule


def tilings(H: int, dtype: jnp.dtype) -> Tilings:
    """By the bytes of one head's row, so that an A100 or H100 has the shared memory.

    The first two are the fastest, or nearly, of those tried on an H200 (benchmarks/h200.md); compiled for sm_90a all but the
    last run on wgmma.
    """
    row = pl.next_power_of_2(H) * jnp.dtype(dtype).itemsize
    if row <= 128:
        return FlashTiling(64, 64, 4, 3), FlashTiling(64, 64, 4, 3), FlashTiling(64, 64, 4, 3)
    if row <= 256:
        return FlashTiling(128, 64, 8, 3), FlashTiling(64, 64, 4, 2), FlashTiling(64, 64, 4, 2)
    if row <= 512:
        return FlashTiling(128, 32, 8, 2), FlashTiling(64, 32, 8, 2), FlashTiling(32, 64, 8, 2)
    return FlashTiling(32, 32, 8, 2), FlashTiling(32, 32, 8, 1), FlashTiling(16, 32, 8, 1)


def flash_attention(inputs: QKV, rule: MaskRule, tiling: Tilings | None = None) -> jax.Array:
    """What `reference_attention` gives, [B, T, K, G, H], for bfloat16, float16, float32; a CPU interprets the kernels.

    Time is filled up to whole tiles (a copy, where they do not divide it); H is filled up inside the kernels. float32
    is multiplied as `jax.default_matmul_precision` says, which unsaid is TF32.

    Raises:
        UserError: another dtype.
    """
    tiles, plan = in_tiles(inputs, rule, tiling)
    return whole_tiles(*tiles, plan)[:, : inputs.q_BTKGH.shape[1]]


def in_tiles(inputs: QKV, rule: MaskRule, tiling: Tilings | None) -> tuple[tuple[jax.Array, jax.Array, Keys], Plan]:
    """q and the places of its tokens, int32 [B, 2, T]; k, v, and theirs, [B, 2, S]; all filled up to whole tiles."""
    assert rule == MaskRule(rule.window, rule.scale), f'{rule}: plain causal attention alone'
    q_BTKGH, k_BSKH, v_BSKH, q_at, k_at = inputs
    check_dtype('attention backend flash', q_BTKGH.dtype)
    T, S, H = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.shape[-1]
    forward, dq, dkv = each = [smaller(t, T, S) for t in tiling or tilings(H, q_BTKGH.dtype)]
    q_tile, k_tile = max(t.q for t in each), max(t.k for t in each)
    keys = fill(k_BSKH, k_tile), fill(v_BSKH, k_tile), fill_at(k_at, k_tile, nobody=-2)
    return (fill(q_BTKGH, q_tile), fill_at(q_at, q_tile, nobody=-1), keys), Plan(forward, dq, dkv, rule)


def smaller(t: FlashTiling, T: int, S: int) -> FlashTiling:
    """Tiles no larger than what there is; Triton's matmuls want 16."""
    q_most, k_most = (max(16, pl.next_power_of_2(length)) for length in (T, S))
    return t._replace(q=min(t.q, q_most), k=min(t.k, k_most))


def fill_at(at: TokenIndex, tile: int, nobody: int) -> jax.Array:
    """int32 [B, 2, T]: positions and segments; what is filled up belongs to segment `nobody`."""
    return jnp.stack([x_BcT.reshape(x_BcT.shape[0], -1) for x_BcT in tiles_of(at, tile, nobody)], axis=1)


# Kernels: one program -------------------------------------------------------------------------------------------------
# What loads and stores is given as Any: the types of `triton.load` do not know a `jax.Ref`.


def load(ref: Any, H: int, *where: Any) -> jax.Array:
    """ref[where], filled up with zeros where its last dim has more than H columns."""
    if ref.shape[-1] == H:
        return ref[where] if where else ref[...]
    return triton.load(ref.at[*where, :] if where else ref, mask=(jnp.arange(ref.shape[-1]) < H)[None, :], other=0.0)


def store(ref: Any, H: int, value: jax.Array) -> None:
    value = value.astype(ref.dtype)
    if ref.shape[-1] == H:
        ref[...] = value
    else:
        triton.store(ref, value, mask=(jnp.arange(ref.shape[-1]) < H)[None, :])


def walk(span_ref: jax.Ref, one_tile: Callable[..., Carry], state: Carry) -> Carry:
    """`one_tile(i, state, masked)` over the tiles that this program may see, from `span_ref` (`spans` made it)."""
    first, bare, bare_end, end = (span_ref[i] for i in range(4))
    state = lax.fori_loop(first, bare, partial(one_tile, masked=True), state)
    state = lax.fori_loop(bare, bare_end, partial(one_tile, masked=False), state)
    return lax.fori_loop(bare_end, end, partial(one_tile, masked=True), state)


def forward_kernel(*refs: jax.Ref, plan: Plan, H: int) -> None:
    q_ref, k_ref, v_ref, q_at_ref, k_at_ref, span_ref, out_ref, lse_ref = refs
    q_TH = load(q_ref, H)
    q_at = q_at_ref[0], q_at_ref[1]

    def one_tile(d: jax.Array, state: State, masked: bool) -> State:
        max_T, sum_T, out_TH = state
        rows = pl.ds(d * plan.forward.k, plan.forward.k)
        s_TS = triton.dot(q_TH, load(k_ref, H, rows), trans_b=True) * (plan.rule.scale * math.log2(math.e))
        if masked:
            s_TS = jnp.where(sees(q_at, (k_at_ref[0, rows], k_at_ref[1, rows]), plan.rule.window), s_TS, HIDDEN)
        new_T = jnp.maximum(max_T, s_TS.max(1))
        p_TS = jnp.exp2(s_TS - new_T[:, None])
        shrink_T = jnp.exp2(max_T - new_T)
        out_TH = out_TH * shrink_T[:, None] + triton.dot(p_TS.astype(v_ref.dtype), load(v_ref, H, rows))
        return new_T, sum_T * shrink_T + p_TS.sum(1), out_TH

    T = plan.forward.q
    nothing = jnp.full((T,), FLOOR, jnp.float32), jnp.zeros((T,), jnp.float32), jnp.zeros(q_TH.shape, jnp.float32)
    max_T, sum_T, out_TH = walk(span_ref, one_tile, nothing)
    some_T = jnp.where(sum_T > 0, sum_T, 1.0)
    store(out_ref, H, out_TH / some_T[:, None])
    lse_ref[...] = max_T + jnp.log2(some_T)


def dq_kernel(*refs: jax.Ref, plan: Plan, H: int) -> None:
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_at_ref, k_at_ref, span_ref, dq_ref = refs
    q_TH, dout_TH = load(q_ref, H), load(dout_ref, H)
    lse_T, delta_T = lse_ref[...], delta_ref[...]
    q_at = q_at_ref[0], q_at_ref[1]

    def one_tile(d: jax.Array, dq_TH: jax.Array, masked: bool) -> jax.Array:
        rows = pl.ds(d * plan.dq.k, plan.dq.k)
        k_SH = load(k_ref, H, rows)
        s_TS = triton.dot(q_TH, k_SH, trans_b=True) * (plan.rule.scale * math.log2(math.e))
        if masked:
            s_TS = jnp.where(sees(q_at, (k_at_ref[0, rows], k_at_ref[1, rows]), plan.rule.window), s_TS, HIDDEN)
        dp_TS = triton.dot(dout_TH, load(v_ref, H, rows), trans_b=True)
        ds_TS = jnp.exp2(s_TS - lse_T[:, None]) * (dp_TS - delta_T[:, None])
        return dq_TH + triton.dot(ds_TS.astype(k_SH.dtype), k_SH)

    store(dq_ref, H, plan.rule.scale * walk(span_ref, one_tile, jnp.zeros(q_TH.shape, jnp.float32)))


def dkv_kernel(*refs: jax.Ref, plan: Plan, H: int) -> None:
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_at_ref, k_at_ref, span_ref, dk_ref, dv_ref = refs
    k_SH, v_SH = load(k_ref, H), load(v_ref, H)
    k_at = k_at_ref[0], k_at_ref[1]

    def one_head(g: jax.Array, grads: Pair) -> Pair:
        def one_tile(c: jax.Array, grads: Pair, masked: bool) -> Pair:
            dk_SH, dv_SH = grads
            rows = pl.ds(c * plan.dkv.q, plan.dkv.q)
            q_TH, dout_TH = load(q_ref, H, rows, g), load(dout_ref, H, rows, g)
            s_ST = triton.dot(k_SH, q_TH, trans_b=True) * (plan.rule.scale * math.log2(math.e))
            if masked:
                see_TS = sees((q_at_ref[0, rows], q_at_ref[1, rows]), k_at, plan.rule.window)
                s_ST = jnp.where(see_TS.T, s_ST, HIDDEN)
            p_ST = jnp.exp2(s_ST - lse_ref[g, rows][None, :])
            dv_SH = dv_SH + triton.dot(p_ST.astype(dout_TH.dtype), dout_TH)
            dp_ST = triton.dot(v_SH, dout_TH, trans_b=True)
            ds_ST = p_ST * (dp_ST - delta_ref[g, rows][None, :])
            return dk_SH + triton.dot(ds_ST.astype(q_TH.dtype), q_TH), dv_SH

        return walk(span_ref, one_tile, grads)

    zeros_SH = jnp.zeros(k_SH.shape, jnp.float32)
    dk_SH, dv_SH = lax.fori_loop(0, q_ref.shape[1], one_head, (zeros_SH, zeros_SH))
    store(dk_ref, H, plan.rule.scale * dk_SH)
    store(dv_ref, H, dv_SH)


# All programs ---------------------------------------------------------------------------------------------------------


def spans(some_Bcd: jax.Array, every_Bcd: jax.Array) -> jax.Array:
    """int32 [B, c, 4]: for `walk`. The run without a mask is the first one of tiles that are seen by every query."""
    first, end = least_span(some_Bcd)
    bare = jnp.where(every_Bcd.any(-1), jnp.argmax(every_Bcd, axis=-1), first).astype(jnp.int32)
    d = jnp.arange(every_Bcd.shape[-1], dtype=jnp.int32)[None, None]
    stop_Bcd = ~every_Bcd & (d >= bare[..., None])
    bare_end = jnp.where(stop_Bcd.any(-1), jnp.argmax(stop_Bcd, axis=-1), every_Bcd.shape[-1]).astype(jnp.int32)
    return jnp.stack([first, bare, bare_end, end], axis=-1)


def pairs(at_BiT: jax.Array, at_BiS: jax.Array, t: FlashTiling, window: int | None) -> tuple[jax.Array, jax.Array]:
    """`tiles_see` for tiles of this size; they divide T and S."""
    at_c, at_d = ((at[:, 0], at[:, 1]) for at in (at_BiT, at_BiS))
    return tiles_see(tiles_of(at_c, t.q, nobody=-1), tiles_of(at_d, t.k, nobody=-2), window)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def whole_tiles(q_BTKGH: jax.Array, at_BiT: jax.Array, keys: Keys, plan: Plan) -> jax.Array:
    return whole_tiles_forward(q_BTKGH, at_BiT, keys, plan)[0]


def query_specs(t: FlashTiling, T: int, S: int, G: int, H: int) -> tuple[pl.BlockSpec, ...]:
    """Blocks of a program (c, n, b) that owns a query tile: of q, k and v, log-sum-exps, both places, and its span."""
    H, last = (
        pl.next_power_of_2(H),
        T // t.q - 1,
    )  # the last queries see most: they start first, which evens out the end
    return (
        pl.BlockSpec((None, t.q, None, None, H), lambda c, n, b: (b, last - c, n // G, n % G, 0)),
        pl.BlockSpec((None, S, None, H), lambda c, n, b: (b, 0, n // G, 0)),
        pl.BlockSpec((None, None, t.q), lambda c, n, b: (b, n, last - c)),
        pl.BlockSpec((None, 2, t.q), lambda c, n, b: (b, 0, last - c)),
        pl.BlockSpec((None, 2, S), lambda c, n, b: (b, 0, 0)),
        pl.BlockSpec((None, None, 4), lambda c, n, b: (b, last - c, 0)),
    )


def key_specs(t: FlashTiling, T: int, G: int, H: int) -> tuple[pl.BlockSpec, ...]:
    """The blocks of the arrays that a program (d, k, b) sees which owns a key tile."""
    H = pl.next_power_of_2(H)
    return (
        pl.BlockSpec((None, T, None, G, H), lambda d, k, b: (b, 0, k, 0, 0)),
        pl.BlockSpec((None, t.k, None, H), lambda d, k, b: (b, d, k, 0)),
        pl.BlockSpec((None, G, T), lambda d, k, b: (b, k, 0)),
        pl.BlockSpec((None, 2, T), lambda d, k, b: (b, 0, 0)),
        pl.BlockSpec((None, 2, t.k), lambda d, k, b: (b, 0, d)),
        pl.BlockSpec((None, None, 4), lambda d, k, b: (b, d, 0)),
    )


def whole_tiles_forward(q_BTKGH: jax.Array, at_BiT: jax.Array, keys: Keys, plan: Plan) -> tuple[Any, ...]:
    out_BTKGH, lse_BNT = tiles_forward(q_BTKGH, at_BiT, keys, plan, q_BTKGH.dtype)
    return out_BTKGH, (q_BTKGH, at_BiT, keys, out_BTKGH, lse_BNT)


def whole_tiles_backward(plan: Plan, kept: tuple[Any, ...], dout_BTKGH: jax.Array) -> tuple[Any, ...]:
    q_BTKGH, at_BiT, keys, out_BTKGH, lse_BNT = kept
    delta_BTKG = (dout_BTKGH.astype(jnp.float32) * out_BTKGH.astype(jnp.float32)).sum(-1)
    output = dout_BTKGH, lse_BNT, by_head(delta_BTKG)
    dq_BTKGH, dk_BSKH, dv_BSKH = tiles_backward(q_BTKGH, at_BiT, keys, *output, plan, q_BTKGH.dtype)
    return dq_BTKGH, None, (dk_BSKH, dv_BSKH, None)


whole_tiles.defvjp(whole_tiles_forward, whole_tiles_backward)


def by_head(x_BTKG: jax.Array) -> jax.Array:
    """[B, N, T], as the kernels want log-sum-exps and deltas."""
    return x_BTKG.reshape(*x_BTKG.shape[:2], -1).swapaxes(1, 2)


def tiles_forward(q_BTKGH: jax.Array, at_BiT: jax.Array, keys: Keys, plan: Plan, dtype: DTypeLike) -> list[jax.Array]:
    """Output [B, T, K, G, H] in `dtype` and log-sum-exp [B, N, T] in base 2 and float32; of no key, 0 and `FLOOR`."""
    k_BSKH, v_BSKH, at_BiS = keys
    (B, T, K, G, H), S, t = q_BTKGH.shape, k_BSKH.shape[1], plan.forward
    q, kv, lse, at_q, at_k, span = query_specs(t, T, S, G, H)
    return call(
        partial(forward_kernel, plan=plan, H=H),
        'flash_forward',
        (T // t.q, K * G, B),
        [q, kv, kv, at_q, at_k, span],
        [q, lse],
        [(q_BTKGH.shape, dtype), ((B, K * G, T), jnp.float32)],
        *(q_BTKGH, k_BSKH, v_BSKH, at_BiT, at_BiS, spans(*pairs(at_BiT, at_BiS, t, plan.rule.window))),
        tiling=t,
    )


def tiles_backward(
    q_BTKGH: jax.Array,
    at_BiT: jax.Array,
    keys: Keys,
    dout_BTKGH: jax.Array,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    plan: Plan,
    dtype: DTypeLike,
) -> list[jax.Array]:
    """dq, dk and dv in `dtype`. Log-sum-exp and delta may be of a softmax over more keys than these."""
    k_BSKH, v_BSKH, at_BiS = keys
    (B, T, K, G, H), S = q_BTKGH.shape, k_BSKH.shape[1]
    inputs = q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH, lse_BNT, delta_BNT, at_BiT, at_BiS

    t = plan.dq
    q, kv, lse, at_q, at_k, span = query_specs(t, T, S, G, H)
    [dq_BTKGH] = call(
        partial(dq_kernel, plan=plan, H=H),
        'flash_dq',
        (T // t.q, K * G, B),
        [q, kv, kv, q, lse, lse, at_q, at_k, span],
        [q],
        [(q_BTKGH.shape, dtype)],
        *(*inputs, spans(*pairs(at_BiT, at_BiS, t, plan.rule.window))),
        tiling=t,
    )

    t = plan.dkv
    q, kv, lse, at_q, at_k, span = key_specs(t, T, G, H)
    some_Bcd, every_Bcd = pairs(at_BiT, at_BiS, t, plan.rule.window)
    dk_BSKH, dv_BSKH = call(
        partial(dkv_kernel, plan=plan, H=H),
        'flash_dkv',
        (S // t.k, K, B),
        [q, kv, kv, q, lse, lse, at_q, at_k, span],
        [kv, kv],
        [(k_BSKH.shape, dtype), (v_BSKH.shape, dtype)],
        *(*inputs, spans(some_Bcd.swapaxes(1, 2), every_Bcd.swapaxes(1, 2))),
        tiling=t,
    )
    return [dq_BTKGH, dk_BSKH, dv_BSKH]
