"""The experts' arithmetic: rows sorted by expert, each run of rows multiplied by its own expert's weights.

R: rows (token, choice) sorted by expert   E: experts held here   D, F, G: widths in, hidden, out   N: tokens
K: choices a token   S: slots that rows go to (all R of them, in the order of experts, or fewer)

Everything is written from one device's view and works inside a fully manual `jax.shard_map` and outside of one.
Backends: `reference` computes every expert for every row and keeps the right one (obviously right, E times the work);
`ragged` is `lax.ragged_dot`, which TPUs have kernels for; `gmm` is our kernels for GPUs, where `lax.ragged_dot` holds all rows
once an expert; `blocked` is for CPUs, where `lax.ragged_dot` costs E times the work too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.ops.blocked_matmul import blocked_apply
from weft.model.ops.grouped_weights import Bias, Matmul, RowFunction, Transposed
from weft.runtime.errors import UserError, nearest
from weft.sharding.collectives import match_varying, upcast, wide
from weft.sharding.mesh import platform

BACKENDS = ('reference', 'blocked', 'ragged', 'gmm')

# Rows [R, D] times weights [E, D, F], or rows [R, F] times their transposes.
PLAIN, TRANSPOSED = (
    lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (dim,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
    )
    for dim in (1, 2)
)


def default_backend(name: str, dtype: str = 'float32') -> str:
    """The fast backend of a `jax.Device.platform`, 'cpu', 'gpu' or 'tpu', that has this compute dtype."""
    fast = {'cpu': 'blocked', 'gpu': 'gmm'}.get(name, 'ragged')
    return 'ragged' if fast == 'gmm' and dtype == 'float64' else fast


def needs_unchecked(backend: str) -> bool:
    """Whether a shard_map that holds this backend must be made with check_vma=False: on a CPU, where Pallas interprets it."""
    return backend == 'gmm' and platform() == 'cpu'


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, backend: str) -> jax.Array:
    """y_RF, where the first sizes[0] rows of x meet w[0], the next sizes[1] rows meet w[1], and so on.

    sum(sizes) <= R; rows past the sum give 0, and neither receive nor contribute any gradient whatever they hold. Sums
    are made in float32 or wider. Raises UserError for an unknown backend.
    """
    return grouped_apply(lambda matmul, x_RD, w: matmul(x_RD, w), x_RD, w_EDF, sizes_E, backend=backend)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Shazeer 2020, arXiv:2002.05202, eq. 5."""
    return jax.nn.silu(gate) * up


def expert_mlp(
    x_RD: jax.Array,
    gate_EDF: jax.Array | None,
    up_EDF: jax.Array,
    down_EDF: jax.Array,
    sizes_E: jax.Array,
    *,
    activation: Callable[..., jax.Array] = swiglu,
    biases: tuple[tuple[jax.Array, ...], jax.Array] | None = None,
    backend: str,
) -> jax.Array:
    """y_RD = activation(x gate, x up) down' with each row's own expert; rows as in `grouped_matmul`.

    Without a gate activation(x up) down'. `biases`: what is added to each of the inner products ([E, F] each, in the order of
    gate and up), and to the result ([E, D]). Faster on a CPU than three grouped matmuls: see `grouped_apply`.
    """

    def mlp(matmul: Matmul, x_RD: jax.Array, weights: Any) -> jax.Array:
        inner, down, *added = weights
        h = matmul(x_RD, inner)
        if added:
            h = tuple(a + matmul(a, bias) for a, bias in zip(h, added[0], strict=True))
        y = matmul(activation(*h), down)
        return y + matmul(y, added[1]) if added else y

    inner = (up_EDF,) if gate_EDF is None else (gate_EDF, up_EDF)
    added = () if biases is None else (tuple(map(Bias, biases[0])), Bias(biases[1]))
    return grouped_apply(mlp, x_RD, (inner, Transposed(down_EDF), *added), sizes_E, backend=backend)


def grouped_apply(f: RowFunction, x_RD: jax.Array, weights: Any, sizes_E: jax.Array, *, backend: str) -> jax.Array:
    """y_RG = f(matmul, x_RD, weights), each row with the weights of its own group; `weights` is a pytree of [E, ...].

    f acts on rows independently, has finite gradients at a row of zeros, keeps the dtype, closes over no traced value,
    and multiplies rows by weights with `matmul` alone: `blocked` hands it a block of rows and one group's weights, so
    that all of f happens while the block is in cache; the other backends hand it all rows and all weights. Rows past
    sum(sizes) as in `grouped_matmul`.
    """
    if backend not in BACKENDS:
        raise UserError(f'grouped matmul backend {backend!r} does not exist{nearest(backend, BACKENDS)}')
    for w in jax.tree.leaves(weights):
        assert w.dtype == x_RD.dtype, (w.dtype, x_RD.dtype)
        assert w.shape[0] == sizes_E.shape[0], (w.shape, sizes_E.shape)
    x_RD, weights, sizes_E = match_varying((x_RD, weights, sizes_E.astype(jnp.int32)))
    if backend == 'blocked':
        return blocked_apply(f, x_RD, weights, sizes_E)
    ends_E = jnp.cumsum(sizes_E)
    row_R = jnp.arange(x_RD.shape[0])

    def matmul(x_RD: jax.Array, w_EDF: Any) -> Any:
        if isinstance(w_EDF, Bias):
            group_R = jnp.searchsorted(ends_E, row_R.astype(ends_E.dtype), side='right')
            # In at least float32, in which its gradient is then added up.
            b_RF = upcast(w_EDF.b).at[group_R].get(mode='fill', fill_value=0, indices_are_sorted=True)
            return b_RF.astype(w_EDF.b.dtype)
        transposed = isinstance(w_EDF, Transposed)
        if isinstance(w_EDF, tuple) and not transposed:
            return tuple(matmul(x_RD, w) for w in w_EDF)
        if transposed:
            w_EDF = w_EDF.w
        if backend == 'gmm':
            from weft.model.ops.grouped_kernel import gmm  # it needs Pallas, whose import takes a while

            return gmm(x_RD, w_EDF, sizes_E, transposed=transposed)
        if backend == 'ragged':
            # A TPU sums in float32 whatever it writes; asked for float32 it would hold all rows in it too.
            kept = x_RD.dtype if platform() == 'tpu' else wide(x_RD.dtype)
            dims = TRANSPOSED if transposed else PLAIN
            y_RF = lax.ragged_dot_general(x_RD, w_EDF, sizes_E, dims, preferred_element_type=kept)
        else:
            mine_RE = (row_R[:, None] < ends_E[None]) & (row_R[:, None] >= (ends_E - sizes_E)[None])
            sums = 'RF,EDF,RE->RD' if transposed else 'RD,EDF,RE->RF'
            kept = wide(x_RD.dtype)
            y_RF = jnp.einsum(sums, x_RD, w_EDF, mine_RE.astype(kept), preferred_element_type=kept)
        return y_RF.astype(x_RD.dtype)

    # Masked at both ends: what the last rows hold (even NaN) reaches neither y nor, through 0 * NaN, a gradient.
    inside_R1 = (row_R < ends_E[-1])[:, None]
    y_RG = f(matmul, jnp.where(inside_R1, x_RD, 0), weights)
    return jnp.where(inside_R1, y_RG, 0)


def permute(x_ND: jax.Array, order_S: jax.Array, slot_R: jax.Array, *, partial: bool = False) -> jax.Array:
    """x_SD[s] = x_ND[order[s] // K]: the tokens' rows, one for each choice (R = N K), in the order of their experts.

    order_S names the (token, choice) pair in each slot and slot_R the slot of each pair: permutations of each other, unless
    `partial`, where an index past the end means none: an empty slot, which is 0, or a pair without a slot. The gradient is a
    sum of K gathers, where autodiff would write a scatter-add.
    """
    return _permute(*match_varying((x_ND, order_S, slot_R)), slot_R.shape[0] // x_ND.shape[0], _mode(partial))


def combine(
    y_SD: jax.Array, share_NK: jax.Array, order_S: jax.Array, slot_R: jax.Array, *, partial: bool = False
) -> jax.Array:
    """y_ND = sum over K of share_NK times the token's own rows of y_SD: the way back from `permute`, same indices."""
    return _combine(*match_varying((y_SD, share_NK, order_S, slot_R)), _mode(partial))


def _mode(partial: bool) -> str:
    return 'fill' if partial else 'promise_in_bounds'


def _rows(x_RD: jax.Array, row_B: jax.Array, mode: str) -> jax.Array:
    return x_RD.at[row_B].get(mode=mode, fill_value=0)


def _added(y_SD: jax.Array, share_NK: jax.Array, slot_R: jax.Array, mode: str) -> jax.Array:
    # K gathers added up, not one summed over K: XLA's CPU code for a sum over a middle dim is three times slower.
    pairs = zip(share_NK.T, slot_R.reshape(share_NK.shape).T, strict=True)
    terms = [share_N[:, None] * upcast(_rows(y_SD, slot_N, mode)) for share_N, slot_N in pairs]
    return sum(terms[1:], terms[0]).astype(y_SD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _permute(x_ND: jax.Array, order_S: jax.Array, slot_R: jax.Array, K: int, mode: str) -> jax.Array:
    return _rows(x_ND, order_S // K, mode)  # past the pairs' end is past the tokens' end


def _permute_forward(x_ND: jax.Array, order_S: jax.Array, slot_R: jax.Array, K: int, mode: str) -> tuple[Any, ...]:
    return _permute(x_ND, order_S, slot_R, K, mode), slot_R


def _permute_backward(K: int, mode: str, slot_R: jax.Array, g_SD: jax.Array) -> tuple[Any, ...]:
    return _added(g_SD, jnp.ones((slot_R.shape[0] // K, K), g_SD.dtype), slot_R, mode), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _combine(y_SD: jax.Array, share_NK: jax.Array, order_S: jax.Array, slot_R: jax.Array, mode: str) -> jax.Array:
    return _added(y_SD, share_NK, slot_R, mode)


def _combine_forward(
    y_SD: jax.Array, share_NK: jax.Array, order_S: jax.Array, slot_R: jax.Array, mode: str
) -> tuple[Any, ...]:
    return _combine(y_SD, share_NK, order_S, slot_R, mode), (y_SD, share_NK, order_S, slot_R)


def _combine_backward(mode: str, saved: tuple[Any, ...], g_ND: jax.Array) -> tuple[Any, ...]:
    y_SD, share_NK, order_S, slot_R = saved
    g_SD = _rows(g_ND, order_S // share_NK.shape[1], mode)
    dshare_S = jnp.sum(g_SD * y_SD, 1)
    dy_SD = _rows(share_NK.reshape(-1), order_S, mode)[:, None] * g_SD
    return dy_SD, _rows(dshare_S, slot_R, mode).reshape(share_NK.shape), None, None


_combine.defvjp(_combine_forward, _combine_backward)
