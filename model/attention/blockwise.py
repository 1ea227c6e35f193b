"""Attention in tiles with an online softmax: no array of all T times S scores exists, forward or backward.

Milakov and Gimelshein 2018 (arXiv:1805.02867) for the softmax; FlashAttention-2, Dao 2023 (arXiv:2307.08691), for the
gradient, which keeps the output and one log-sum-exp a query. Plain jax.numpy, so it runs everywhere, in shapes chosen
for XLA on a CPU, where batched matmuls over contiguous [time, H] rows are far faster than einsums over strided heads.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H head dim, c query
tiles, d key tiles. Of one tile: N = K (or B * K) heads, M = G * T query rows that share a head's keys, S keys, and R
= 1 (or B) masks of [T, S].
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from model.attention.mask import FLOOR, HIDDEN, At, sees, span, tiles_of, tiles_see
from sharding.collectives import varying
from sharding.mesh import platform

TILES = {'cpu': 128, 'gpu': 128, 'tpu': 512}  # queries and keys a tile, by platform: a TPU's matmuls want larger ones
ONE_TILE = 1 << 20  # scores: up to here (4 MiB in float32) all of them make one tile, without loops


def blockwise_attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: At,
    k_at: At,
    window: int | None,
    scale: float,
    tile: int | None = None,
) -> jax.Array:
    """What `reference_attention` gives, [B, T, K, G, H], from the scores of `tile` queries and keys of a row at a time.

    Small inputs (`ONE_TILE`) are one tile altogether. Key tiles outside the range that a query tile sees are skipped.
    """
    T, S, G = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.shape[3]
    q_tile, k_tile = tile_sizes(q_BTKGH, S, tile)
    keys = cut(k_BSKH[:, :, :, None], k_tile), cut(v_BSKH[:, :, :, None], k_tile)
    at_c, at_d = tiles_of(q_at, q_tile, nobody=-1), tiles_of(k_at, k_tile, nobody=-2)
    return uncut(tiled(cut(q_BTKGH, q_tile), *keys, at_c, at_d, window, scale), T, G)


def tile_sizes(q_BTKGH: jax.Array, S: int, tile: int | None) -> tuple[int, int]:
    """Queries and keys a tile."""
    B, T, K, G, _ = q_BTKGH.shape
    if tile is None:
        tile = max(T, S) if B * K * G * T * S <= ONE_TILE else TILES[platform()]
    return min(tile, T), min(tile, S)


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


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of scores and sums: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


# One tile of queries with one tile of keys ----------------------------------------------------------------------------


def scores(q_NMH: jax.Array, k_NSH: jax.Array, see_RTS: jax.Array, scale: float) -> jax.Array:
    R, T, S = see_RTS.shape
    s_NMS = scale * jnp.einsum('NMH,NSH->NMS', q_NMH, k_NSH, preferred_element_type=wide(q_NMH.dtype))
    return jnp.where(see_RTS[:, None], s_NMS.reshape(R, -1, T, S), HIDDEN).reshape(s_NMS.shape)


State = tuple[jax.Array, jax.Array, jax.Array]  # max_NM, sum_NM, out_NMH: softmax(s) v over some keys is out / sum


def attend(q_NMH: jax.Array, k_NSH: jax.Array, v_NSH: jax.Array, see_RTS: jax.Array, scale: float) -> State:
    s_NMS = scores(q_NMH, k_NSH, see_RTS, scale)
    max_NM = jnp.maximum(s_NMS.max(-1), FLOOR)
    p_NMS = jnp.exp(s_NMS - max_NM[..., None])
    out_NMH = jnp.einsum('NMS,NSH->NMH', p_NMS.astype(v_NSH.dtype), v_NSH, preferred_element_type=s_NMS.dtype)
    return max_NM, p_NMS.sum(-1), out_NMH


def merge(a: State, b: State) -> State:
    """The state over the keys of both."""
    max_NM = jnp.maximum(a[0], b[0])
    a_NM, b_NM = jnp.exp(a[0] - max_NM), jnp.exp(b[0] - max_NM)
    return max_NM, a[1] * a_NM + b[1] * b_NM, a[2] * a_NM[..., None] + b[2] * b_NM[..., None]


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of a tile's queries; a query that saw no key gets 0 and `FLOOR`, which weighs nothing."""
    max_NM, sum_NM, out_NMH = state
    some_NM = jnp.where(sum_NM > 0, sum_NM, 1)
    return out_NMH / some_NM[..., None], max_NM + jnp.log(some_NM)


def attend_back(
    q_NMH: jax.Array,
    k_NSH: jax.Array,
    v_NSH: jax.Array,
    dout_NMH: jax.Array,
    lse_NM: jax.Array,
    delta_NM: jax.Array,
    see_RTS: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [N, M, H]; dk and dv transposed, [N, H, S], which spares a transposed copy of the scores."""
    acc = wide(q_NMH.dtype)
    p_NMS = jnp.exp(scores(q_NMH, k_NSH, see_RTS, scale) - lse_NM[..., None])
    dv_NHS = jnp.einsum('NMS,NMH->NHS', p_NMS.astype(dout_NMH.dtype), dout_NMH, preferred_element_type=acc)
    dp_NMS = jnp.einsum('NMH,NSH->NMS', dout_NMH, v_NSH, preferred_element_type=acc)
    ds_NMS = (p_NMS * (dp_NMS - delta_NM[..., None]) * scale).astype(q_NMH.dtype)
    dk_NHS = jnp.einsum('NMS,NMH->NHS', ds_NMS, q_NMH, preferred_element_type=acc)
    return jnp.einsum('NMS,NSH->NMH', ds_NMS, k_NSH, preferred_element_type=acc), dk_NHS, dv_NHS


# One tile of queries with the keys that it may see --------------------------------------------------------------------


def over_keys(state: State, q_KMH, at_T: At, k_dKSH, v_dKSH, at_d: At, first, end, window, scale, row=()) -> State:
    """The state with the keys of tiles `first` to `end` - 1; with `row` (b,), k, v and at_d have rows, and b's are meant.

    A row is not cut out beforehand, which would copy it.
    """

    def key_tile(d, state):
        see_RTS = sees(one(at_T), one(at_tile(at_d, *row, d)), window)
        return merge(state, attend(q_KMH, k_dKSH[*row, d], v_dKSH[*row, d], see_RTS, scale))

    return lax.fori_loop(first, end, key_tile, state)


def over_keys_back(
    grads, q_KMH, at_T: At, dout_KMH, lse_KM, delta_KM, k_dKSH, v_dKSH, at_d: At, first, end, window, scale, row=()
):
    """The same of the gradients dq_KMH, dk_dKHS and dv_dKHS: this tile's part of them is added."""

    def key_tile(d, grads):
        dq_KMH, dk_dKHS, dv_dKHS = grads
        see_RTS = sees(one(at_T), one(at_tile(at_d, *row, d)), window)
        k_KSH, v_KSH = k_dKSH[*row, d], v_dKSH[*row, d]
        dq, dk, dv = attend_back(q_KMH, k_KSH, v_KSH, dout_KMH, lse_KM, delta_KM, see_RTS, scale)
        return dq_KMH + dq, dk_dKHS.at[*row, d].add(dk), dv_dKHS.at[*row, d].add(dv)

    return lax.fori_loop(first, end, key_tile, grads)


def nothing(q: jax.Array) -> State:
    """The state of queries [..., H] that have met no key."""
    return like(q, q.shape[:-1], FLOOR), like(q, q.shape[:-1]), like(q, q.shape)


def like(x: jax.Array, shape: tuple[int, ...], fill: float = 0.0) -> jax.Array:
    """A constant that varies over the mesh axes that x varies over, as a loop's carry must."""
    constant = jnp.full(shape, fill, wide(x.dtype))
    axes = tuple(varying(x))
    return lax.pcast(constant, axes, to='varying') if axes else constant


def at_tile(at: At, *where: jax.Array | int) -> At:
    return at[0][where], at[1][where]


def one(at_T: At) -> At:
    """[1, T] each."""
    return at_T[0][None], at_T[1][None]


# All tiles ------------------------------------------------------------------------------------------------------------


def is_one_tile(q_BcKMH: jax.Array, k_BdKSH: jax.Array) -> bool:
    B, c, K, M, _ = q_BcKMH.shape
    return c == k_BdKSH.shape[1] == 1 and B * K * M * k_BdKSH.shape[3] <= ONE_TILE


def heads(x_B1KMH: jax.Array) -> jax.Array:
    """[B * K, M, H] of the only tile."""
    return x_B1KMH.reshape(-1, *x_B1KMH.shape[3:])


def only(at: At) -> At:
    """[B, T] each, of the only tile."""
    return at[0][:, 0], at[1][:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def tiled(
    q_BcKMH: jax.Array, k_BdKSH: jax.Array, v_BdKSH: jax.Array, at_c: At, at_d: At, window: int | None, scale: float
) -> jax.Array:
    return tiled_forward(q_BcKMH, k_BdKSH, v_BdKSH, at_c, at_d, window, scale)[0]


def tiled_forward(q_BcKMH, k_BdKSH, v_BdKSH, at_c, at_d, window, scale):
    inputs = q_BcKMH, k_BdKSH, v_BdKSH, at_c, at_d
    if is_one_tile(q_BcKMH, k_BdKSH):
        see_RTS = sees(only(at_c), only(at_d), window)
        out_NMH, lse_NM = finish(attend(heads(q_BcKMH), heads(k_BdKSH), heads(v_BdKSH), see_RTS, scale))
        out_BcKMH, lse_BcKM = out_NMH.astype(q_BcKMH.dtype).reshape(q_BcKMH.shape), lse_NM.reshape(q_BcKMH.shape[:-1])
        return out_BcKMH, (*inputs, out_BcKMH, lse_BcKM)

    def row(row):
        q_cKMH, k_dKSH, v_dKSH, at_c, at_d, first_c, end_c = row

        def query_tile(tile):
            q_KMH, at_T, first, end = tile
            state = over_keys(nothing(q_KMH), q_KMH, at_T, k_dKSH, v_dKSH, at_d, first, end, window, scale)
            out_KMH, lse_KM = finish(state)
            return out_KMH.astype(q_KMH.dtype), lse_KM

        return lax.map(query_tile, (q_cKMH, at_c, first_c, end_c))

    out_BcKMH, lse_BcKM = lax.map(row, (*inputs, *span(tiles_see(at_c, at_d, window)[0])))
    return out_BcKMH, (*inputs, out_BcKMH, lse_BcKM)


def tiled_backward(window, scale, kept, dout_BcKMH):
    *inputs, out_BcKMH, lse_BcKM = kept
    q_BcKMH, k_BdKSH, v_BdKSH, at_c, at_d = inputs
    delta_BcKM = (dout_BcKMH.astype(lse_BcKM.dtype) * out_BcKMH).sum(-1)
    if is_one_tile(q_BcKMH, k_BdKSH):
        see_RTS = sees(only(at_c), only(at_d), window)
        q, k, v, dout, lse, delta = map(heads, (q_BcKMH, k_BdKSH, v_BdKSH, dout_BcKMH, lse_BcKM, delta_BcKM))
        dq_NMH, dk_NHS, dv_NHS = attend_back(q, k, v, dout, lse, delta, see_RTS, scale)
        grads = dq_NMH, dk_NHS.swapaxes(1, 2), dv_NHS.swapaxes(1, 2)
    else:

        def row(row):
            q_cKMH, k_dKSH, v_dKSH, at_c, at_d, dout_cKMH, lse_cKM, delta_cKM, first_c, end_c = row

            def query_tile(dkv_dKHS, tile):
                q_KMH, at_T, dout_KMH, lse_KM, delta_KM, first, end = tile
                query, keys = (q_KMH, at_T, dout_KMH, lse_KM, delta_KM), (k_dKSH, v_dKSH, at_d, first, end)
                grads = like(q_KMH, q_KMH.shape), *dkv_dKHS
                dq_KMH, *dkv_dKHS = over_keys_back(grads, *query, *keys, window, scale)
                return tuple(dkv_dKHS), dq_KMH

            d, K, S, H = k_dKSH.shape
            zeros = like(k_dKSH, (d, K, H, S)), like(k_dKSH, (d, K, H, S))
            tiles = q_cKMH, at_c, dout_cKMH, lse_cKM, delta_cKM, first_c, end_c
            (dk_dKHS, dv_dKHS), dq_cKMH = lax.scan(query_tile, zeros, tiles)
            return dq_cKMH, dk_dKHS.swapaxes(2, 3), dv_dKHS.swapaxes(2, 3)

        grads = lax.map(row, (*inputs, dout_BcKMH, lse_BcKM, delta_BcKM, *span(tiles_see(at_c, at_d, window)[0])))
    dqkv = (grad.reshape(x.shape).astype(x.dtype) for grad, x in zip(grads, inputs[:3], strict=True))
    return *dqkv, None, None


tiled.defvjp(tiled_forward, tiled_backward)


# All tiles, for a ring: queries as they come, and their state or gradient changed in place -----------------------------


def more_keys(state_BT: State, q_BTKGH, k_BdKSH, v_BdKSH, at_c: At, at_d: At, window, scale) -> State:
    """The state of all queries ([B, T, K, G], twice, and [B, T, K, G, H]), with these keys too; T in whole tiles of at_c."""
    first_Bc, end_Bc = span(tiles_see(at_c, at_d, window)[0])
    B, c = first_Bc.shape

    def query_tile(i, state_BT):
        b, i = i // c, i % c
        max_KM, sum_KM, out_KMH = (get_tile(x, c, b, i) for x in state_BT)
        q_KMH, at_T = get_tile(q_BTKGH, c, b, i), at_tile(at_c, b, i)
        keys = k_BdKSH, v_BdKSH, at_d, first_Bc[b, i], end_Bc[b, i]
        state = over_keys((max_KM, sum_KM, out_KMH), q_KMH, at_T, *keys, window, scale, row=(b,))
        return tuple(set_tile(x, c, b, i, new) for x, new in zip(state_BT, state, strict=True))

    return lax.fori_loop(0, B * c, query_tile, state_BT)


def more_keys_back(
    dq_BTKGH, q_BTKGH, k_BdKSH, v_BdKSH, at_c: At, at_d: At, dout_BTKGH, lse_BTKG, delta_BTKG, window, scale
):
    """dq with these keys' part added, and their dk and dv, all in `wide`.

    Log-sum-exp and delta (dout times out, summed over H) are those of the whole softmax, over whatever keys.
    """
    first_Bc, end_Bc = span(tiles_see(at_c, at_d, window)[0])
    B, c = first_Bc.shape

    def query_tile(i, grads):
        dq_BTKGH, *dkv_BdKHS = grads
        b, i = i // c, i % c
        dq_KMH, q_KMH, dout_KMH, lse_KM, delta_KM = (
            get_tile(x, c, b, i) for x in (dq_BTKGH, q_BTKGH, dout_BTKGH, lse_BTKG, delta_BTKG)
        )
        query = q_KMH, at_tile(at_c, b, i), dout_KMH, lse_KM, delta_KM
        keys = k_BdKSH, v_BdKSH, at_d, first_Bc[b, i], end_Bc[b, i]
        dq_KMH, *dkv_BdKHS = over_keys_back((dq_KMH, *dkv_BdKHS), *query, *keys, window, scale, row=(b,))
        return set_tile(dq_BTKGH, c, b, i, dq_KMH), *dkv_BdKHS

    _, d, K, S, H = k_BdKSH.shape
    zeros = like(k_BdKSH, (B, d, K, H, S)), like(k_BdKSH, (B, d, K, H, S))
    dq_BTKGH, dk_BdKHS, dv_BdKHS = lax.fori_loop(0, B * c, query_tile, (dq_BTKGH, *zeros))
    return dq_BTKGH, dk_BdKHS.swapaxes(3, 4), dv_BdKHS.swapaxes(3, 4)


def get_tile(x_BTKG: jax.Array, tiles: int, b, i) -> jax.Array:
    """[K, M] or [K, M, H]: tile i of `tiles` of row b."""
    B, T, K, G, *H = x_BTKG.shape
    x_TKG = x_BTKG.reshape(B, tiles, T // tiles, K, G, *H)[b, i]
    return jnp.moveaxis(x_TKG, 0, 2).reshape(K, -1, *H)


def set_tile(x_BTKG: jax.Array, tiles: int, b, i, new_KM: jax.Array) -> jax.Array:
    B, T, K, G, *H = x_BTKG.shape
    new_TKG = jnp.moveaxis(new_KM.reshape(K, G, -1, *H), 2, 0)
    return x_BTKG.reshape(B, tiles, T // tiles, K, G, *H).at[b, i].set(new_TKG).reshape(x_BTKG.shape)
