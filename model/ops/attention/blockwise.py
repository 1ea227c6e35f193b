"""Attention in tiles with an online softmax: no array of all T times S scores exists, forward or backward.

Milakov and Gimelshein 2018 (arXiv:1805.02867) for the softmax; FlashAttention-2, Dao 2023 (arXiv:2307.08691), for the
gradient, which keeps the output and one log-sum-exp a query. Plain jax.numpy, so it runs everywhere, in shapes chosen
for XLA on a CPU, where batched matmuls over contiguous [time, H] rows are far faster than einsums over strided heads.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H width of a query and a
key, U of a value, c query tiles, d key tiles. Of one tile: N = K (or B * K) heads, M = G * T query rows that share a
head's keys, S keys, and R = 1 (or B) masks of [T, S].
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.ops.attention.mask import FLOOR, HIDDEN, QKV, Keys, MaskRule, TokenIndex, seen_tiles, sees, tiles_of
from weft.sharding.collectives import vary_like, wide
from weft.sharding.mesh import platform

TILES = {'cpu': 128, 'gpu': 128, 'tpu': 512}  # queries and keys a tile, by platform: a TPU's matmuls want larger ones
ONE_TILE = 1 << 20  # scores: up to here (4 MiB in float32) all of them make one tile, without loops


def blockwise_attention(
    inputs: QKV, rule: MaskRule, tile: int | None = None, *, sink_KG: jax.Array | None = None
) -> jax.Array:
    """What `reference_attention` gives, [B, T, K, G, U], from the scores of `tile` queries and keys of a row at a time.

    Small inputs (`ONE_TILE`) are one tile altogether. Key tiles outside the range that a query tile sees are skipped.
    """
    T, G = inputs.q_BTKGH.shape[1], inputs.q_BTKGH.shape[3]
    q_tile, at_c, keys = in_tiles(inputs, tile)
    return uncut(tiled(cut(inputs.q_BTKGH, q_tile), at_c, keys, sink_KG, rule), T, G)


def in_tiles(inputs: QKV, tile: int | None) -> tuple[int, TokenIndex, Keys]:
    """Queries a tile, and where those of each tile stand; keys and values in tiles, [B, d, K, tile, H or U], and where."""
    q_BTKGH, k_BSKH, v_BSKU, q_at, k_at = inputs
    (B, T, K, G, _), S = q_BTKGH.shape, k_BSKH.shape[1]
    if tile is None:
        tile = max(T, S) if B * K * G * T * S <= ONE_TILE else TILES[platform()]
    q_tile, k_tile = min(tile, T), min(tile, S)
    keys = cut(k_BSKH[:, :, :, None], k_tile), cut(v_BSKU[:, :, :, None], k_tile), tiles_of(k_at, k_tile, nobody=-2)
    return q_tile, tiles_of(q_at, q_tile, nobody=-1), keys


def cut(x_BTKGH: jax.Array, tile: int) -> jax.Array:
    """[B, c, K, G * tile, H]: tiles of time, heads before time; the last tile is filled up with zeros."""
    B, _, K, G, H = x_BTKGH.shape
    x_BTKGH = fill(x_BTKGH, tile)
    return x_BTKGH.reshape(B, -1, tile, K, G, H).transpose(0, 1, 3, 4, 2, 5).reshape(B, -1, K, G * tile, H)


def fill(x_BT: jax.Array, tile: int) -> jax.Array:
    """With zeros at the end, up to whole tiles."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % tile)] + [(0, 0)] * (x_BT.ndim - 2))


def uncut(x_BcKMH: jax.Array, T: int, G: int) -> jax.Array:
    """The inverse of `cut`: [B, T, K, G, H]."""
    B, c, K, M, H = x_BcKMH.shape
    x_BcKGTH = x_BcKMH.reshape(B, c, K, G, M // G, H)
    return x_BcKGTH.transpose(0, 1, 4, 2, 3, 5).reshape(B, -1, K, G, H)[:, :T]


# One tile of queries with one tile of keys ----------------------------------------------------------------------------


def scores(q_NMH: jax.Array, k_NSH: jax.Array, rule: MaskRule) -> jax.Array:
    s_NMS = rule.scale * jnp.einsum('NMH,NSH->NMS', q_NMH, k_NSH, preferred_element_type=wide(q_NMH.dtype))
    return s_NMS if rule.softcap is None else rule.softcap * jnp.tanh(s_NMS / rule.softcap)


def hidden(s_NMS: jax.Array, see_RTS: jax.Array) -> jax.Array:
    """Scores of which only those that are seen count."""
    R, T, S = see_RTS.shape
    return jnp.where(see_RTS[:, None], s_NMS.reshape(R, -1, T, S), HIDDEN).reshape(s_NMS.shape)


State = tuple[jax.Array, jax.Array, jax.Array]  # max_NM, sum_NM, out_NMU: softmax(s) v over some keys is out / sum


def attend(q_NMH: jax.Array, k_NSH: jax.Array, v_NSU: jax.Array, see_RTS: jax.Array, rule: MaskRule) -> State:
    s_NMS = hidden(scores(q_NMH, k_NSH, rule), see_RTS)
    max_NM = jnp.maximum(s_NMS.max(-1), FLOOR)
    p_NMS = jnp.exp(s_NMS - max_NM[..., None])
    out_NMU = jnp.einsum('NMS,NSU->NMU', p_NMS.astype(v_NSU.dtype), v_NSU, preferred_element_type=s_NMS.dtype)
    return max_NM, p_NMS.sum(-1), out_NMU


def merge(a: State, b: State) -> State:
    """The state over the keys of both."""
    max_NM = jnp.maximum(a[0], b[0])
    a_NM, b_NM = jnp.exp(a[0] - max_NM), jnp.exp(b[0] - max_NM)
    return max_NM, a[1] * a_NM + b[1] * b_NM, a[2] * a_NM[..., None] + b[2] * b_NM[..., None]


def finish(state: State, sink_NM: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of a tile's queries; a query that saw no key gets 0 and `FLOOR`, which weighs nothing.

    A sink is one more score of each query, which has no value.
    """
    if sink_NM is not None:
        state = merge(state, (sink_NM, jnp.ones_like(state[1]), jnp.zeros_like(state[2])))
    max_NM, sum_NM, out_NMU = state
    some_NM = jnp.where(sum_NM > 0, sum_NM, 1)
    return out_NMU / some_NM[..., None], max_NM + jnp.log(some_NM)


def attend_back(
    q_NMH: jax.Array,
    k_NSH: jax.Array,
    v_NSU: jax.Array,
    dout_NMU: jax.Array,
    lse_NM: jax.Array,
    delta_NM: jax.Array,
    see_RTS: jax.Array,
    rule: MaskRule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [N, M, H]; dk and dv transposed, [N, H, S] and [N, U, S], which spares a transposed copy of the scores."""
    acc = wide(q_NMH.dtype)
    s_NMS = scores(q_NMH, k_NSH, rule)
    p_NMS = jnp.exp(hidden(s_NMS, see_RTS) - lse_NM[..., None])
    dv_NUS = jnp.einsum('NMS,NMU->NUS', p_NMS.astype(dout_NMU.dtype), dout_NMU, preferred_element_type=acc)
    dp_NMS = jnp.einsum('NMU,NSU->NMS', dout_NMU, v_NSU, preferred_element_type=acc)
    ds_NMS = p_NMS * (dp_NMS - delta_NM[..., None]) * rule.scale
    if rule.softcap is not None:
        ds_NMS = ds_NMS * (1 - (s_NMS / rule.softcap) ** 2)
    ds_NMS = ds_NMS.astype(q_NMH.dtype)
    dk_NHS = jnp.einsum('NMS,NMH->NHS', ds_NMS, q_NMH, preferred_element_type=acc)
    return jnp.einsum('NMS,NSH->NMH', ds_NMS, k_NSH, preferred_element_type=acc), dk_NHS, dv_NUS


# One tile of queries with the keys that it may see --------------------------------------------------------------------


Gradients = tuple[jax.Array, ...]  # of queries, and of keys and values as `attend_back` has them
Row = tuple[jax.Array, ...]  # () or (b,)


def over_keys(
    state: State,
    q_KMH: jax.Array,
    at_T: TokenIndex,
    keys: Keys,
    first: jax.Array,
    end: jax.Array,
    rule: MaskRule,
    row: Row = (),
) -> State:
    """The state with the keys of tiles `first` to `end` - 1; with `row` (b,), `keys` have rows, and b's are meant.

    A row is not cut out beforehand, which would copy it.
    """
    k_dKSH, v_dKSU, at_d = keys

    def key_tile(d: jax.Array, state: State) -> State:
        see_RTS = sees(one(at_T), one(at_tile(at_d, *row, d)), rule.window, rule.causal)
        return merge(state, attend(q_KMH, k_dKSH[*row, d], v_dKSU[*row, d], see_RTS, rule))

    return lax.fori_loop(first, end, key_tile, state)


def over_keys_back(
    grads: Gradients,
    query: Sequence[Any],
    keys: Keys,
    first: jax.Array,
    end: jax.Array,
    rule: MaskRule,
    row: Row = (),
) -> Gradients:
    """The gradients (dq_KMH, dk_dKHS, dv_dKUS) with what the keys of tiles `first` to `end` - 1 add; `row` as in `over_keys`.

    query: q_KMH, its places at_T, dout_KMU, and the log-sum-exp and delta, [K, M] each, of the whole softmax.
    """
    q_KMH, at_T, dout_KMU, lse_KM, delta_KM = query
    k_dKSH, v_dKSU, at_d = keys

    def key_tile(d: jax.Array, grads: Gradients) -> Gradients:
        dq_KMH, dk_dKHS, dv_dKUS = grads
        see_RTS = sees(one(at_T), one(at_tile(at_d, *row, d)), rule.window, rule.causal)
        k_KSH, v_KSU = k_dKSH[*row, d], v_dKSU[*row, d]
        dq, dk, dv = attend_back(q_KMH, k_KSH, v_KSU, dout_KMU, lse_KM, delta_KM, see_RTS, rule)
        return dq_KMH + dq, dk_dKHS.at[*row, d].add(dk), dv_dKUS.at[*row, d].add(dv)

    return lax.fori_loop(first, end, key_tile, grads)


def nothing(q: jax.Array, U: int) -> State:
    """The state of queries [..., H] that have met no key, whose values are U wide."""
    return like(q, q.shape[:-1], FLOOR), like(q, q.shape[:-1]), like(q, (*q.shape[:-1], U))


def like(x: jax.Array, shape: tuple[int, ...], fill: float = 0.0) -> jax.Array:
    """A constant in `wide` that varies over the mesh axes that x varies over."""
    return vary_like(jnp.full(shape, fill, wide(x.dtype)), x)


def at_tile(at: TokenIndex, *where: jax.Array | int) -> TokenIndex:
    return at[0][where], at[1][where]


def one(at_T: TokenIndex) -> TokenIndex:
    """[1, T] each."""
    return at_T[0][None], at_T[1][None]


# All tiles ------------------------------------------------------------------------------------------------------------


def is_one_tile(q_BcKMH: jax.Array, k_BdKSH: jax.Array) -> bool:
    B, c, K, M, _ = q_BcKMH.shape
    return c == k_BdKSH.shape[1] == 1 and B * K * M * k_BdKSH.shape[3] <= ONE_TILE


def heads(x_B1KMH: jax.Array) -> jax.Array:
    """[B * K, M, H] of the only tile."""
    return x_B1KMH.reshape(-1, *x_B1KMH.shape[3:])


def only(at: TokenIndex) -> TokenIndex:
    """[B, T] each, of the only tile."""
    return at[0][:, 0], at[1][:, 0]


def by_query(sink_KG: jax.Array, q_BcKMH: jax.Array) -> jax.Array:
    """[B, c, K, M]: a number of each query head for all of its queries."""
    B, c, K, M, _ = q_BcKMH.shape
    sink_KG = sink_KG.astype(wide(q_BcKMH.dtype))
    return jnp.broadcast_to(jnp.repeat(sink_KG, M // sink_KG.shape[1], axis=1)[None, None], (B, c, K, M))


def sink_gradient(sink_KG: jax.Array, lse_BcKM: jax.Array, delta_BcKM: jax.Array) -> jax.Array:
    """Of the sinks: the share that a sink has of a query's softmax takes from all that is seen."""
    K, G = sink_KG.shape

    def by_head(x_BcKM: jax.Array) -> jax.Array:
        return x_BcKM.reshape(*x_BcKM.shape[:2], K, G, -1)

    share = jnp.exp(sink_KG.astype(lse_BcKM.dtype)[None, None, :, :, None] - by_head(lse_BcKM))
    return -(share * by_head(delta_BcKM)).sum((0, 1, 4)).astype(sink_KG.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def tiled(q_BcKMH: jax.Array, at_c: TokenIndex, keys: Keys, sink_KG: jax.Array | None, rule: MaskRule) -> jax.Array:
    return tiled_forward(q_BcKMH, at_c, keys, sink_KG, rule)[0]


def tiled_forward(
    q_BcKMH: jax.Array, at_c: TokenIndex, keys: Keys, sink_KG: jax.Array | None, rule: MaskRule
) -> tuple[Any, ...]:
    k_BdKSH, v_BdKSU, at_d = keys
    sink_BcKM = None if sink_KG is None else by_query(sink_KG, q_BcKMH)
    U = v_BdKSU.shape[-1]
    if is_one_tile(q_BcKMH, k_BdKSH):
        see_RTS = sees(only(at_c), only(at_d), rule.window, rule.causal)
        state = attend(heads(q_BcKMH), heads(k_BdKSH), heads(v_BdKSU), see_RTS, rule)
        out_NMU, lse_NM = finish(state, None if sink_BcKM is None else heads(sink_BcKM))
        out_BcKMU = out_NMU.astype(q_BcKMH.dtype).reshape(*q_BcKMH.shape[:-1], U)
        return out_BcKMU, (q_BcKMH, at_c, keys, sink_KG, out_BcKMU, lse_NM.reshape(q_BcKMH.shape[:-1]))

    def row(row: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        *tiles, keys = row

        def query_tile(tile: list[Any]) -> tuple[jax.Array, jax.Array]:
            q_KMH, at_T, sink_KM, first, end = tile
            state = over_keys(nothing(q_KMH, U), q_KMH, at_T, keys, first, end, rule)
            out_KMU, lse_KM = finish(state, sink_KM)
            return out_KMU.astype(q_KMH.dtype), lse_KM

        return lax.map(query_tile, tiles)

    out_BcKMU, lse_BcKM = lax.map(row, (q_BcKMH, at_c, sink_BcKM, *seen_tiles(at_c, at_d, rule), keys))
    return out_BcKMU, (q_BcKMH, at_c, keys, sink_KG, out_BcKMU, lse_BcKM)


def tiled_backward(rule: MaskRule, kept: tuple[Any, ...], dout_BcKMU: jax.Array) -> tuple[Any, ...]:
    q_BcKMH, at_c, keys, sink_KG, out_BcKMU, lse_BcKM = kept
    k_BdKSH, v_BdKSU, at_d = keys
    delta_BcKM = (dout_BcKMU.astype(lse_BcKM.dtype) * out_BcKMU).sum(-1)
    if is_one_tile(q_BcKMH, k_BdKSH):
        see_RTS = sees(only(at_c), only(at_d), rule.window, rule.causal)
        q, k, v, dout, lse, delta = map(heads, (q_BcKMH, k_BdKSH, v_BdKSU, dout_BcKMU, lse_BcKM, delta_BcKM))
        dq_NMH, dk_NHS, dv_NUS = attend_back(q, k, v, dout, lse, delta, see_RTS, rule)
        grads = dq_NMH, dk_NHS.swapaxes(1, 2), dv_NUS.swapaxes(1, 2)
    else:

        def row(row: tuple[Any, ...]) -> Gradients:
            *tiles, keys = row

            def query_tile(dkv: Gradients, tile: list[Any]) -> tuple[Gradients, jax.Array]:
                *query, first, end = tile
                grads = like(query[0], query[0].shape), *dkv
                dq_KMH, *more = over_keys_back(grads, query, keys, first, end, rule)
                return tuple(more), dq_KMH

            (dk_dKHS, dv_dKUS), dq_cKMH = lax.scan(query_tile, transposed_zeros(keys), tiles)
            return dq_cKMH, dk_dKHS.swapaxes(-1, -2), dv_dKUS.swapaxes(-1, -2)

        seen = seen_tiles(at_c, at_d, rule)
        grads = lax.map(row, (q_BcKMH, at_c, dout_BcKMU, lse_BcKM, delta_BcKM, *seen, keys))
    inputs = q_BcKMH, k_BdKSH, v_BdKSU
    dq, dk, dv = (grad.reshape(x.shape).astype(x.dtype) for grad, x in zip(grads, inputs, strict=True))
    return dq, None, (dk, dv, None), None if sink_KG is None else sink_gradient(sink_KG, lse_BcKM, delta_BcKM)


tiled.defvjp(tiled_forward, tiled_backward)


def transposed_zeros(keys: Keys) -> tuple[jax.Array, ...]:
    """Zeros in the shapes of keys and values with their last two dims exchanged, as `attend_back` gives their gradients."""
    k, v, _ = keys
    return tuple(like(k, (*x.shape[:-2], x.shape[-1], x.shape[-2])) for x in (k, v))


# All tiles, for a ring: queries as they come, and their state or gradient changed in place -----------------------------


def more_keys(state_BT: State, q_BTKGH: jax.Array, at_c: TokenIndex, keys: Keys, rule: MaskRule) -> State:
    """The state of all queries ([B, T, K, G], twice, and [B, T, K, G, U]), with these keys too; T in whole tiles of at_c."""
    first_Bc, end_Bc = seen_tiles(at_c, keys[2], rule)
    B, c = first_Bc.shape

    def query_tile(i: jax.Array, state_BT: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        b, i = i // c, i % c
        max_KM, sum_KM, out_KMU, q_KMH = (get_tile(x, c, b, i) for x in (*state_BT, q_BTKGH))
        state = max_KM, sum_KM, out_KMU
        state = over_keys(state, q_KMH, at_tile(at_c, b, i), keys, first_Bc[b, i], end_Bc[b, i], rule, row=(b,))
        return tuple(set_tile(x, c, b, i, new) for x, new in zip(state_BT, state, strict=True))

    return lax.fori_loop(0, B * c, query_tile, state_BT)


def more_keys_back(
    dq_BTKGH: jax.Array,
    q_BTKGH: jax.Array,
    at_c: TokenIndex,
    keys: Keys,
    dout_BTKGU: jax.Array,
    lse_BTKG: jax.Array,
    delta_BTKG: jax.Array,
    rule: MaskRule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq with these keys' part added, and their dk and dv, all in `wide`.

    Log-sum-exp and delta (dout times out, summed over U) are those of the whole softmax, over whatever keys.
    """
    first_Bc, end_Bc = seen_tiles(at_c, keys[2], rule)
    B, c = first_Bc.shape

    def query_tile(i: jax.Array, grads: Gradients) -> Gradients:
        dq_BTKGH, *dkv_BdKHS = grads
        b, i = i // c, i % c
        dq_KMH, q_KMH, *of_output = (
            get_tile(x, c, b, i) for x in (dq_BTKGH, q_BTKGH, dout_BTKGU, lse_BTKG, delta_BTKG)
        )
        query, seen = (q_KMH, at_tile(at_c, b, i), *of_output), (first_Bc[b, i], end_Bc[b, i])
        dq_KMH, *dkv_BdKHS = over_keys_back((dq_KMH, *dkv_BdKHS), query, keys, *seen, rule, row=(b,))
        return set_tile(dq_BTKGH, c, b, i, dq_KMH), *dkv_BdKHS

    grads = lax.fori_loop(0, B * c, query_tile, (dq_BTKGH, *transposed_zeros(keys)))
    dq_BTKGH, dk_BdKHS, dv_BdKUS = grads
    return dq_BTKGH, dk_BdKHS.swapaxes(-1, -2), dv_BdKUS.swapaxes(-1, -2)


def get_tile(x_BTKG: jax.Array, tiles: int, b: jax.Array, i: jax.Array) -> jax.Array:
    """[K, M] or [K, M, H]: tile i of `tiles` of row b."""
    B, T, K, G, *H = x_BTKG.shape
    x_TKG = x_BTKG.reshape(B, tiles, T // tiles, K, G, *H)[b, i]
    return jnp.moveaxis(x_TKG, 0, 2).reshape(K, -1, *H)


def set_tile(x_BTKG: jax.Array, tiles: int, b: jax.Array, i: jax.Array, new_KM: jax.Array) -> jax.Array:
    B, T, K, G, *H = x_BTKG.shape
    new_TKG = jnp.moveaxis(new_KM.reshape(K, G, -1, *H), 2, 0)
    return x_BTKG.reshape(B, tiles, T // tiles, K, G, *H).at[b, i].set(new_TKG).reshape(x_BTKG.shape)
