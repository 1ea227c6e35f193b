"""The grouped matmul's backend `blocked`, for CPUs: group after group, and in each group block after block of its rows.

    rows      0 1 2 3 4 5 6 7 8 9 …                                   R
    groups    |--- group 0 ---|-------- group 1 --------|- 2 -| (rest)     sizes[0], sizes[1], sizes[2] rows; the rest is 0
    blocks    [   512   ][32 ···]                                          group 0: the largest blocks that fit, then smaller
                            |[   512   ][ 128 ][32]                        ones; the last one may reach past the group's end,
                            |                                              where its rows (···) are computed and dropped

The work follows sum(sizes), not R, and nothing of size R but the result is allocated. Going forward nothing is read of a group
without rows: a group's weights are copied out of their stack, and where there are few rows most copies would be for nothing.
`lax.while_loop` has no reverse mode, so the gradient is written here too: the same walk over blocks, with each block's vjp
recomputed from x, and the weights' gradients summed in at least float32 while a group lasts.

Letters: R rows, sorted by group; E groups (experts); D, F, G widths in, hidden, out; B rows of one block.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.ops.grouped_weights import Bias, RowFunction, Transposed
from weft.sharding.collectives import upcast, vary_like

# Rows of a block, tried in this order in each group; the last one covers what remains. Large blocks run at a plain
# matmul's speed, small ones waste little where a group ends. Few rows a group, as in decoding, have small blocks
# alone (a second size, even where no group has such a block, costs another copy of the weights), and the fewest rows go to
# their groups one by one.
BLOCKS = (512, 128, 32)
SMALL_BLOCKS = (8,)
FEW = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call is known to do before it is compiled."""

    f: RowFunction
    rows: int  # R
    groups: int  # E
    blocks: tuple[int, ...]  # rows of a block, the largest first, none above R

    def block(self, x_BD: jax.Array, weights: Any) -> jax.Array:
        """f on one block of rows with one group's weights, [B, G]."""
        return self.f(block_matmul, x_BD, weights)


def blocked_apply(f: RowFunction, x_RD: jax.Array, weights: Any, sizes_E: jax.Array) -> jax.Array:
    """y_RG = f(matmul, x_RD, weights), as `grouped_matmul.grouped_apply` says; all arguments vary over the same mesh axes."""
    R, E = x_RD.shape[0], sizes_E.shape[0]
    sizes = BLOCKS if BLOCKS[-1] * E <= R else SMALL_BLOCKS
    blocks = tuple(B for B in sizes if B <= R) or (R,)
    return _apply(Plan(f, R, E, blocks), x_RD, weights, sizes_E)


def block_matmul(x_BD: jax.Array, w: Any) -> Any:
    """The `matmul` that f is given: rows of one group times its weight, or weights, without the dim of groups."""
    if isinstance(w, Bias):
        return w.b[None]
    if isinstance(w, Transposed):
        return lax.dot_general(x_BD, w.w, (((1,), (1,)), ((), ())))
    if not isinstance(w, tuple):
        return x_BD @ w
    if x_BD.shape[0] <= SMALL_BLOCKS[-1]:  # joining the weights would take longer than what it saves
        return tuple(x_BD @ w_DF for w_DF in w)
    # One wide product is faster than several narrow ones; XLA makes the wide weight once a group.
    ends = list(itertools.accumulate(w_DF.shape[1] for w_DF in w))[:-1]
    return tuple(jnp.split(x_BD @ jnp.concatenate(w, 1), ends, 1))


def walk(plan: Plan, body: Callable[..., Any], carry: Any, start: jax.Array, size: jax.Array) -> Any:
    """Goes over the blocks that cover the rows `start` … `start + size - 1` of one group; returns the last carry.

    Each block does carry = body(first, mine_B1, carry): its rows are `first` … `first + B - 1`, of which `mine_B1` says which
    belong to the group and no earlier block had.
    """

    def step(B: int, start: jax.Array, end: jax.Array, j: jax.Array, carry: Any) -> Any:
        row = start + j * B
        first = jnp.minimum(row, plan.rows - B)  # the last block of x ends where x ends
        row_B1 = first + lax.broadcasted_iota(jnp.int32, (B, 1), 0)
        return body(first, (row_B1 >= row) & (row_B1 < end), carry)

    for i, B in enumerate(plan.blocks, 1):
        count = size // B if i < len(plan.blocks) else -(-size // B)
        carry = lax.fori_loop(0, count, functools.partial(step, B, start, start + size), carry)
        start, size = start + count * B, size - count * B
    return carry


def read_rows(a_RD: jax.Array, first: jax.Array, B: int) -> jax.Array:
    """B rows from `first` on."""
    return lax.dynamic_slice_in_dim(a_RD, first, B)


def write_rows(a_RD: jax.Array, a_BD: jax.Array, mine_B1: jax.Array, first: jax.Array) -> jax.Array:
    """a_RD with the rows from `first` on replaced by those of a_BD that are `mine`."""
    a_BD = jnp.where(mine_B1, a_BD.astype(a_RD.dtype), read_rows(a_RD, first, a_BD.shape[0]))
    return lax.dynamic_update_slice_in_dim(a_RD, a_BD, first, 0)


def group_weights(weights: Any, e: int | jax.Array) -> Any:
    """The weights of group e, in at least float32."""
    return jax.tree.map(lambda w: upcast(lax.dynamic_index_in_dim(w, e, keepdims=False)), weights)


def group_of_rows(plan: Plan, sizes_E: jax.Array) -> jax.Array:
    """[R]: the group of each row; E for rows of none."""
    ends_E = jnp.cumsum(sizes_E)
    return jnp.searchsorted(ends_E, jnp.arange(plan.rows, dtype=ends_E.dtype), side='right')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(plan: Plan, x_RD: jax.Array, weights: Any, sizes_E: jax.Array) -> jax.Array:
    if plan.rows <= FEW:
        return by_row(plan, x_RD, weights, sizes_E)
    large = plan.blocks == BLOCKS[: len(plan.blocks)]
    if large or plan.rows < plan.groups or x_RD.dtype != upcast(x_RD).dtype:
        return by_group(plan, x_RD, weights, sizes_E)
    together = (sizes_E <= plan.blocks[-1]).all()
    return lax.cond(
        together, lambda: batched(plan, x_RD, weights, sizes_E), lambda: by_group(plan, x_RD, weights, sizes_E)
    )


def by_row(plan: Plan, x_RD: jax.Array, weights: Any, sizes_E: jax.Array) -> jax.Array:
    """y_RG of the fewest rows: each row by itself."""
    group_R = group_of_rows(plan, sizes_E)
    rows = [
        plan.block(upcast(x_RD[r : r + 1]), group_weights(weights, jnp.minimum(group_R[r], plan.groups - 1)))
        for r in range(plan.rows)
    ]
    return jnp.where((group_R < plan.groups)[:, None], jnp.concatenate(rows), 0).astype(x_RD.dtype)


def by_group(plan: Plan, x_RD: jax.Array, weights: Any, sizes_E: jax.Array) -> jax.Array:
    """y_RG, one group that has rows after another, block after block."""
    ends_E = jnp.cumsum(sizes_E)
    with_rows_E = jnp.argsort(sizes_E == 0, stable=True)  # these come first

    def group(i: jax.Array, y_RG: jax.Array) -> jax.Array:
        e = with_rows_E[i]
        mine, size = group_weights(weights, e), sizes_E[e]

        def block(first: jax.Array, mine_B1: jax.Array, y_RG: jax.Array) -> jax.Array:
            x_BD = upcast(read_rows(x_RD, first, mine_B1.shape[0]))
            return write_rows(y_RG, plan.block(x_BD, mine), mine_B1, first)

        return walk(plan, block, y_RG, ends_E[e] - size, size)

    G = jax.eval_shape(plan.block, x_RD, group_weights(weights, 0)).shape[1]
    return lax.fori_loop(0, (sizes_E > 0).sum(), group, vary_like(jnp.zeros((plan.rows, G), x_RD.dtype), x_RD))


def batched(plan: Plan, x_RD: jax.Array, weights: Any, sizes_E: jax.Array) -> jax.Array:
    """y_RG where no group has more rows than the smallest block: a matmul batched over all groups, which copies no weights."""
    R, E = plan.rows, plan.groups
    start_E = jnp.cumsum(sizes_E) - sizes_E
    row_EB = jnp.minimum(start_E[:, None] + jnp.arange(plan.blocks[-1])[None], R - 1)
    y_EBG = jax.vmap(plan.block)(x_RD[row_EB], weights)
    group_R = group_of_rows(plan, sizes_E)
    e_R = jnp.minimum(group_R, E - 1)
    return jnp.where((group_R < E)[:, None], y_EBG[e_R, jnp.arange(R) - start_E[e_R]], 0)


def _forward(plan: Plan, x_RD: jax.Array, weights: Any, sizes_E: jax.Array) -> tuple[Any, ...]:
    return _apply(plan, x_RD, weights, sizes_E), (x_RD, weights, sizes_E)


def _backward(plan: Plan, saved: tuple[Any, ...], dy_RG: jax.Array) -> tuple[Any, ...]:
    x_RD, weights, sizes_E = saved

    def group(dx_RD: jax.Array, item: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        mine, size, end = item
        mine = jax.tree.map(upcast, mine)

        def block(first: jax.Array, mine_B1: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            dx_RD, sums = carry
            B = mine_B1.shape[0]
            # Rows that are not this block's are 0 in both, so that they add nothing to the sums.
            x_BD, dy_BG = (jnp.where(mine_B1, upcast(read_rows(a_RD, first, B)), 0) for a_RD in (x_RD, dy_RG))
            dx_BD, dweights = jax.vjp(plan.block, x_BD, mine)[1](dy_BG)
            return write_rows(dx_RD, dx_BD, mine_B1, first), jax.tree.map(jnp.add, sums, dweights)

        sums = jax.tree.map(lambda w: vary_like(jnp.zeros_like(w), x_RD), mine)
        dx_RD, sums = walk(plan, block, (dx_RD, sums), end - size, size)
        return dx_RD, jax.tree.map(lambda a: a.astype(x_RD.dtype), sums)

    dx_RD, dweights = lax.scan(group, vary_like(jnp.zeros_like(x_RD), x_RD), (weights, sizes_E, jnp.cumsum(sizes_E)))
    return dx_RD, dweights, None


_apply.defvjp(_forward, _backward)
