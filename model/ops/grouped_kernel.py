"""The grouped matmul for NVIDIA GPUs: one Pallas (Triton) kernel for rows, one for the weights' gradients.

`lax.ragged_dot` on a GPU holds all rows once for each expert. Here a program multiplies one tile of one group's rows by that
group's weights, or adds up one tile of one group's weight gradient over the group's rows, and nothing is held but inputs
and outputs. Which tile of which group a program has is counted outside (Gale et al. 2022, arXiv:2211.15841, section 5.1);
tiles begin where their group begins, so that no tile has rows of two.

Letters: R rows sorted by group, E groups, D and F widths in and out, V tiles of rows at most, all groups together.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from weft.model.ops.kernels import call, check_dtype


@dataclasses.dataclass(frozen=True)
class GroupedTiling:
    """Rows, columns, and what is added up a step (powers of two, at least 16); warps a program, tiles loaded ahead."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


Tilings = tuple[GroupedTiling, GroupedTiling]  # of rows times weights, of the weights' gradients


def tilings(dtype: jnp.dtype) -> Tilings:
    """Of rows and of weight gradients, within an A100's or H100's shared memory."""
    if jnp.dtype(dtype).itemsize == 2:
        return GroupedTiling(128, 256, 64, 8, 3), GroupedTiling(128, 256, 64, 8, 3)
    return GroupedTiling(64, 128, 32, 8, 2), GroupedTiling(64, 128, 32, 8, 2)


def gmm(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, tiling: Tilings | None = None, transposed: bool = False
) -> jax.Array:
    """y_RF: each group's rows of x times the group's weights. Rows past sum(sizes) hold anything, also in x's gradient.

    `transposed`: x has F columns, and y_RD is x times the weights' transpose. bfloat16, float16 and float32; sums are float32.
    float32 is multiplied as `jax.default_matmul_precision` says, which unsaid is TF32. A CPU interprets the kernels.

    Raises:
        UserError: another dtype.
    """
    check_dtype('grouped matmul backend gmm', x_RD.dtype)
    return _gmm(x_RD, w_EDF, sizes_E, tiling or tilings(x_RD.dtype), transposed)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gmm(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, tiling: Tilings, transposed: bool) -> jax.Array:
    return rows_times_weights(x_RD, w_EDF, sizes_E, tiling[0], transposed)


def _forward(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, tiling: Tilings, transposed: bool
) -> tuple[Any, ...]:
    return _gmm(x_RD, w_EDF, sizes_E, tiling, transposed), (x_RD, w_EDF, sizes_E)


def _backward(tiling: Tilings, transposed: bool, kept: tuple[Any, ...], dy_RF: jax.Array) -> tuple[Any, ...]:
    x_RD, w_EDF, sizes_E = kept
    dx_RD = rows_times_weights(dy_RF, w_EDF, sizes_E, tiling[0], not transposed)
    x_RD, dy_RF = (dy_RF, x_RD) if transposed else (x_RD, dy_RF)
    return dx_RD, weight_gradients(x_RD, dy_RF, sizes_E, tiling[1]), None


_gmm.defvjp(_forward, _backward)


def rows_times_weights(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, t: GroupedTiling, transposed: bool = False
) -> jax.Array:
    """x times w, [R, F]; `transposed`: x has F columns, and the result, times w's transpose, D."""
    R, inner = x_RD.shape
    E, columns = w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
    t = smaller(t, R, columns, inner)
    [y_RF] = call(
        partial(_rows_kernel, t=t, transposed=transposed),
        'gmm_rows',
        (-(-columns // t.columns), R // t.rows + E),
        [_everything(x_RD), _everything(w_EDF), pl.BlockSpec((None, 3), lambda f, v: (v, 0))],
        [pl.BlockSpec((R, columns), lambda f, v: (0, 0))],
        [((R, columns), x_RD.dtype)],
        *(x_RD, w_EDF, row_tiles(sizes_E, R // t.rows + E, t.rows)),
        tiling=t,
    )
    return y_RF


def weight_gradients(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, t: GroupedTiling) -> jax.Array:
    """[E, D, F]: of each group, its rows of x, transposed, times those of dy."""
    (R, D), F, E = x_RD.shape, dy_RF.shape[1], sizes_E.shape[0]
    t = smaller(t, D, F, R)
    ends_E = jnp.cumsum(sizes_E)
    [dw_EDF] = call(
        partial(_weights_kernel, t=t),
        'gmm_weights',
        (-(-F // t.columns), -(-D // t.rows), E),
        [_everything(x_RD), _everything(dy_RF), pl.BlockSpec((None, 2), lambda f, d, e: (e, 0))],
        [pl.BlockSpec((None, D, F), lambda f, d, e: (e, 0, 0))],
        [((E, D, F), x_RD.dtype)],
        *(x_RD, dy_RF, jnp.stack([ends_E - sizes_E, ends_E], 1)),
        tiling=t,
    )
    return dw_EDF


def row_tiles(sizes_E: jax.Array, V: int, rows: int) -> jax.Array:
    """int32 [V, 3]: of each tile its group, its first row, and its group's end; where there are fewer tiles, no rows."""
    ends_E, tiles_E = jnp.cumsum(sizes_E), -(-sizes_E // rows)
    until_E = jnp.cumsum(tiles_E)  # tiles of the groups up to and with this one
    tile_V = jnp.arange(V, dtype=jnp.int32)
    group_V = jnp.minimum(jnp.searchsorted(until_E, tile_V, side='right'), len(sizes_E) - 1).astype(jnp.int32)
    place_V = tile_V - (until_E - tiles_E)[group_V]  # of the tile in its group
    end_V = jnp.where(tile_V < until_E[-1], ends_E[group_V], 0)
    first_V = jnp.where(tile_V < until_E[-1], (ends_E - sizes_E)[group_V] + place_V * rows, 0)
    return jnp.stack([group_V, first_V, end_V], 1)


def smaller(t: GroupedTiling, rows: int, columns: int, inner: int) -> GroupedTiling:
    """Tiles no larger than what there is; Triton's matmuls want 16."""
    rows, columns, inner = (max(16, pl.next_power_of_2(size)) for size in (rows, columns, inner))
    return dataclasses.replace(t, rows=min(t.rows, rows), columns=min(t.columns, columns), inner=min(t.inner, inner))


# Kernels: one program -------------------------------------------------------------------------------------------------


def _rows_kernel(
    x_ref: jax.Ref, w_ref: jax.Ref, tile_ref: jax.Ref, y_ref: jax.Ref, *, t: GroupedTiling, transposed: bool
) -> None:
    group, first, end = (tile_ref[i] for i in range(3))
    inner, columns = x_ref.shape[1], y_ref.shape[1]
    column = pl.program_id(0) * t.columns
    mine_R = first + jnp.arange(t.rows) < end
    inside_F = _inside(column, t.columns, columns)

    def step(i: jax.Array, y_RF: jax.Array) -> jax.Array:
        inside_D = _inside(i * t.inner, t.inner, inner)
        x_RD = _load(x_ref.at[pl.ds(first, t.rows), pl.ds(i * t.inner, t.inner)], mine_R, inside_D)
        if transposed:
            w = _load(w_ref.at[group, pl.ds(column, t.columns), pl.ds(i * t.inner, t.inner)], inside_F, inside_D)
        else:
            w = _load(w_ref.at[group, pl.ds(i * t.inner, t.inner), pl.ds(column, t.columns)], inside_D, inside_F)
        return y_RF + triton.dot(x_RD, w, trans_b=transposed)

    steps = (end > first).astype(jnp.int32) * -(-inner // t.inner)
    y_RF = lax.fori_loop(0, steps, step, jnp.zeros((t.rows, t.columns), jnp.float32))
    target = y_ref.at[pl.ds(first, t.rows), pl.ds(column, t.columns)]
    triton.store(target, y_RF.astype(y_ref.dtype), mask=_both(mine_R, inside_F))


def _weights_kernel(x_ref: jax.Ref, dy_ref: jax.Ref, span_ref: jax.Ref, dw_ref: jax.Ref, *, t: GroupedTiling) -> None:
    start, end = span_ref[0], span_ref[1]
    D, F = dw_ref.shape
    column, row = pl.program_id(0) * t.columns, pl.program_id(1) * t.rows
    inside_D, inside_F = _inside(row, t.rows, D), _inside(column, t.columns, F)

    def step(i: jax.Array, dw_DF: jax.Array) -> jax.Array:
        first = start + i * t.inner
        mine_R = first + jnp.arange(t.inner) < end
        x_RD = _load(x_ref.at[pl.ds(first, t.inner), pl.ds(row, t.rows)], mine_R, inside_D)
        dy_RF = _load(dy_ref.at[pl.ds(first, t.inner), pl.ds(column, t.columns)], mine_R, inside_F)
        return dw_DF + triton.dot(x_RD, dy_RF, trans_a=True)

    steps = (end - start + t.inner - 1) // t.inner
    dw_DF = lax.fori_loop(0, steps, step, jnp.zeros((t.rows, t.columns), jnp.float32))
    target = dw_ref.at[pl.ds(row, t.rows), pl.ds(column, t.columns)]
    triton.store(target, dw_DF.astype(dw_ref.dtype), mask=_both(inside_D, inside_F))


def _inside(first: jax.Array, count: int, size: int) -> jax.Array | None:
    """Which of a tile's places lie in a dim of this size; None: all, in every tile."""
    return None if size % count == 0 else first + jnp.arange(count) < size


def _both(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    if rows is None:
        return None if columns is None else columns[None]
    return rows[:, None] if columns is None else rows[:, None] & columns[None]


def _load(ref: Any, rows: jax.Array | None, columns: jax.Array | None) -> jax.Array:
    """A tile of a `jax.Ref`, which the types of `triton.load` do not know; 0 where it lies outside."""
    mask = _both(rows, columns)
    if mask is None:
        return triton.load(ref)
    return triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0.0)


def _everything(a: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)
