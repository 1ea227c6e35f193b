"""Tokens to their experts and back: three ways that differ in what they send, one signature.

    all_gather  every token goes to every device of `expert` (and `tensor`), which adds what its experts make of it; sums
                come back. Sends the same whatever the router says. Nothing is dropped.
    all_to_all  each device sends each expert a buffer of `capacity_factor` times its even share of rows; what does not
                fit is dropped. The least to send, to hold and to compute (GShard, arXiv:2006.16668, section 2.2).
    ragged      each row goes to its expert's device alone, in messages as long as they need be. Nothing is dropped.

Each is a function of one device's view
    (routed, experts, *, split, capacity_factor) -> (y_ND, dropped)
    routed     this device's tokens; with `split` each device of `tensor` has its own, without it all have the same ones
    experts    those that this device holds
    y_ND       Σ over a token's choices of gate · expert(x), in the layout of x
    dropped    this device's share of the choices that had no room, float32: whole when added up over every mesh axis

Letters: N tokens, K experts a token, D model, E experts (of an array: those in its rows), F hidden units of an expert, C rows
of an expert's buffer, R pairs (token, choice), S slots of a buffer that pairs go to; n, s and d as dims count
devices of `expert`: s the one that rows come from, d the one that has their experts, numbered e there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.ops.grouped_matmul import combine, expert_mlp, permute
from weft.sharding import collectives
from weft.sharding.collectives import axis_index, match_varying, psum, reduce_scatter, vary_like
from weft.sharding.mesh import platform


class Routed(NamedTuple):
    """Tokens and the experts that a router chose for them."""

    x_ND: jax.Array
    gate_NK: jax.Array  # the weight of each choice in its token's sum
    expert_NK: jax.Array  # the chosen experts among all E; E itself means none

    def all_gather(self, axis: str) -> 'Routed':
        """The tokens of all devices along an axis."""
        return Routed(*(collectives.all_gather(a, axis) for a in self))


Combined = tuple[jax.Array, jax.Array]  # y_ND, dropped


class LocalExperts(NamedTuple):
    """The experts that this device holds, their hidden units split over `tensor`: what they make of a row is a partial sum."""

    gate_EDF: jax.Array | None  # None: a plain MLP
    up_EDF: jax.Array
    down_EDF: jax.Array  # used as its transpose
    activation: Callable[..., jax.Array]  # of gate and up, or of up alone
    backend: str  # of the grouped matmul
    biases: tuple[tuple[jax.Array, ...], jax.Array] | None = None  # of gate (if any) and up [E, F] each, of down [E, D]

    @property
    def held(self) -> int:
        """How many of the E experts."""
        return self.up_EDF.shape[0]

    def grouped(self, x_SD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """The first sizes[0] rows meet the first expert, and so on; rows past the sum give 0."""
        weights = self.gate_EDF, self.up_EDF, self.down_EDF
        return expert_mlp(x_SD, *weights, sizes_E, activation=self.activation, biases=self.biases, backend=self.backend)

    def batched(self, x_ECD: jax.Array) -> jax.Array:
        """Row e of x goes through expert e: each has C rows."""
        inner = [jnp.einsum('ECD,EDF->ECF', x_ECD, w) for w in (self.gate_EDF, self.up_EDF) if w is not None]
        if self.biases:
            inner = [h_ECF + b_EF[:, None] for h_ECF, b_EF in zip(inner, self.biases[0], strict=True)]
        y_ECD = jnp.einsum('ECF,EDF->ECD', self.activation(*inner), self.down_EDF)
        return y_ECD + self.biases[1][:, None] if self.biases else y_ECD


def default_dispatch(platform: str) -> str:
    """What `compute.dispatch: auto` means on a `jax.Device.platform`: 'cpu', 'gpu' or 'tpu'.

    It drops nothing, so that losses do not depend on the mesh and decoding equals the full forward pass. Of the two that do
    not, all_gather sends the less, or as much, while `expert` has no more devices than a token has experts, and was no
    slower on a CPU; on a wider axis choose `ragged`. Bytes and memory are those of compiled programs: benchmarks/dispatch.md.
    """
    assert platform in ('cpu', 'gpu', 'tpu'), platform
    return 'all_gather'


def dispatch(name: str) -> Callable[..., Combined]:
    """The way of that name, 'all_gather', 'all_to_all' or 'ragged': a function as the top of this file has it."""
    return _DISPATCH[name]


def all_gather(routed: Routed, experts: LocalExperts, *, split: bool, capacity_factor: float) -> Combined:
    """Every token to every device; rows of other devices' experts sort last and are not computed."""
    # One axis at a time: over two at once TPU makes the sums on all devices, twice the bytes (benchmarks/dispatch.md).
    for axis in ('tensor', 'expert') if split else ('expert',):
        routed = routed.all_gather(axis)
    E = experts.held
    mine_NK = routed.expert_NK - E * axis_index('expert')
    mine_NK = jnp.where((mine_NK >= 0) & (mine_NK < E), mine_NK, E)
    order_R, place_R, sizes_E = by_expert(mine_NK, E)
    y_RD = experts.grouped(permute(routed.x_ND, order_R, place_R), sizes_E)
    y_ND = reduce_scatter(combine(y_RD, routed.gate_NK.astype(y_RD.dtype), order_R, place_R), 'expert')
    return (reduce_scatter(y_ND, 'tensor') if split else psum(y_ND, 'tensor')), jnp.float32(0)


def all_to_all(routed: Routed, experts: LocalExperts, *, split: bool, capacity_factor: float) -> Combined:
    """A buffer of C rows from each device to each expert. Tokens that come later in the order of rows are dropped first.

    Gates stay at home. Without `split` there is room for every token, so that decoding drops none.
    """
    x_ND, gate_NK, expert_NK = routed
    (N, K), n = expert_NK.shape, lax.axis_size('expert')
    E, D = n * experts.held, x_ND.shape[1]
    C = capacity(N, K, E, capacity_factor) if split else N
    order_S, slot_R, dropped = slots(expert_NK, E, C)
    x_nECD = permute(x_ND, order_S, slot_R, partial=True).reshape(n, experts.held, C, D)
    x_nECD = collectives.all_to_all(x_nECD, 'expert', 0, 0)
    if split:
        # As a matrix: TPU then keeps the sum on the way back, and this one's gradient, a reduce-scatter.
        x_nECD = collectives.all_gather(x_nECD.reshape(-1, D), 'tensor').reshape(-1, experts.held, C, D)
    y_ECD = experts.batched(x_nECD.swapaxes(0, 1).reshape(experts.held, -1, D))
    y_nECD = y_ECD.reshape(experts.held, -1, C, D).swapaxes(0, 1)
    if split:
        y_nECD = reduce_scatter(y_nECD.reshape(-1, D), 'tensor').reshape(n, experts.held, C, D)
    y_SD = collectives.all_to_all(y_nECD, 'expert', 0, 0).reshape(E * C, D)
    y_ND = combine(y_SD, gate_NK.astype(x_ND.dtype), order_S, slot_R, partial=True)
    return (y_ND, dropped) if split else (psum(y_ND, 'tensor'), dropped / lax.axis_size('tensor'))


def ragged(routed: Routed, experts: LocalExperts, *, split: bool, capacity_factor: float) -> Combined:
    """Rows sorted by expert, each run of rows to its expert's device, where it lands in the order of experts.

    As in an MLP, the devices of `tensor` have all of each other's tokens in between. The buffer has room for the worst
    case, that all tokens of all devices want the experts of one.
    """
    x_ND, gate_NK, expert_NK = routed.all_gather('tensor') if split else routed
    (N, K), n = expert_NK.shape, lax.axis_size('expert')
    E = n * experts.held
    order_R, place_R, count_E = by_expert(expert_NK, E)
    count_nE = collectives.all_gather(count_E[None], 'expert')
    mine_nE = lax.dynamic_slice_in_dim(count_nE, axis_index('expert') * experts.held, experts.held, 1)
    x_SD = exchange(permute(x_ND, order_R, place_R), count_nE, n * N * min(K, experts.held))
    y_SD = experts.grouped(x_SD, mine_nE.sum(0, dtype=jnp.int32))
    y_RD = exchange(y_SD, count_nE, N * K, back=True)
    y_ND = combine(y_RD, gate_NK.astype(x_ND.dtype), order_R, place_R)
    return (reduce_scatter(y_ND, 'tensor') if split else psum(y_ND, 'tensor')), jnp.float32(0)


_DISPATCH = {'all_gather': all_gather, 'all_to_all': all_to_all, 'ragged': ragged}


def by_expert(expert_NK: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pairs sorted by expert and, where equal, by token: which pair comes where, where each pair comes, rows by expert.

    Pairs of expert E, which is none, come last and are not counted.
    """
    expert_R = expert_NK.reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)
    return order_R, jnp.argsort(order_R), (expert_R[:, None] == jnp.arange(E)[None]).sum(0, dtype=jnp.int32)


def capacity(N: int, K: int, E: int, factor: float) -> int:
    """Rows of one expert's buffer from N tokens: `factor` times an even share, and at most one for each token."""
    return min(N, math.ceil(factor * N * K / E))


def slots(expert_NK: jax.Array, E: int, C: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A buffer of C rows for each expert: which pair is in each of the E C slots, which slot each pair has, pairs dropped.

    An index past the end means none: slots that are empty, pairs that have no expert or found their buffer full.
    """
    order_R, place_R, count_E = by_expert(expert_NK, E)
    R, start_E = expert_NK.size, jnp.cumsum(count_E) - count_E
    row_EC = start_E[:, None] + jnp.arange(C)[None]
    full_EC = jnp.arange(C)[None] < count_E[:, None]
    order_EC = jnp.where(full_EC, order_R.at[row_EC].get(mode='fill', fill_value=R), R)
    expert_R = expert_NK.reshape(-1)
    rank_R = place_R - start_E.at[expert_R].get(mode='fill', fill_value=0)
    slot_R = jnp.where((rank_R < C) & (expert_R < E), expert_R * C + rank_R, E * C)
    return order_EC.reshape(-1), slot_R, jnp.maximum(count_E - C, 0).sum().astype(jnp.float32)


def exchange(x_RD: jax.Array, count_nE: jax.Array, rows: int, back: bool = False) -> jax.Array:
    """Sends rows, sorted by expert on the device that they come from, to the devices of their experts; or `back` again.

    Two devices a and b with two experts each; a3 are device a's rows for expert 3, a run of any length, often 0:

        a's rows at home    a0 a1 a2 a3          a's rows there, those of experts 0 and 1    a0 b0 a1 b1
        b's rows at home    b0 b1 b2 b3          b's rows there, those of experts 2 and 3    a2 b2 a3 b3

    At home runs stand by expert; there by expert, and those of one expert by the device that they come from, so that the rows
    of an expert are one block.

    Args:
        x_RD: on the way out this device's rows at home, on the way back its rows there.
        count_nE: int32, rows from each device of `expert` for each of all E experts.
        rows: of the result, at least as many as can arrive; those past the last that arrived are 0.

    The gradient is the exchange in the other direction.
    """
    if count_nE.shape[0] == 1:
        return x_RD  # `rows` are those that there are
    return _exchange(*match_varying((x_RD, count_nE)), rows, back)


class Runs(NamedTuple):
    """The runs of rows that an exchange moves, from each device s to each expert e of each device d: int32 [s, d, e]."""

    count_sde: jax.Array  # rows of a run
    home_sde: jax.Array  # where it begins among the rows at home, on device s
    there_sde: jax.Array  # where it begins among the rows there, on device d

    @classmethod
    def of(cls, count_nE: jax.Array) -> 'Runs':
        n, E = count_nE.shape
        count_sde = count_nE.reshape(n, n, E // n)
        home_sde = (jnp.cumsum(count_nE, 1) - count_nE).reshape(count_sde.shape)
        count_des = count_sde.transpose(1, 2, 0)  # as they stand there
        there_des = jnp.cumsum(count_des.reshape(n, E), 1).reshape(count_des.shape) - count_des
        return cls(count_sde, home_sde, there_des.transpose(2, 0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(x_RD: jax.Array, count_nE: jax.Array, rows: int, back: bool) -> jax.Array:
    me, runs = axis_index('expert'), Runs.of(count_nE)

    def of_me(a_sde: jax.Array, dim: int) -> jax.Array:
        return lax.dynamic_index_in_dim(a_sde, me, dim, keepdims=False).reshape(-1)

    sender, receiver = (1, 0) if back else (0, 1)  # dims of the runs
    begin_sde, land_sde = (runs.there_sde, runs.home_sde) if back else (runs.home_sde, runs.there_sde)
    # Where each run begins here, its rows, where it begins on the device that it goes to; rows of each run that comes.
    offsets = [of_me(a_sde, sender) for a_sde in (begin_sde, runs.count_sde, land_sde)]
    offsets.append(of_me(runs.count_sde, receiver))
    # ragged_all_to_all's result varies over the mesh axes that its second argument does.
    empty_SD = vary_like(jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype), x_RD)
    ragged_all_to_all = gathered_ragged_all_to_all if platform() == 'cpu' else lax.ragged_all_to_all
    return ragged_all_to_all(x_RD, empty_SD, *offsets, axis_name='expert')


def _exchange_forward(x_RD: jax.Array, count_nE: jax.Array, rows: int, back: bool) -> tuple[Any, ...]:
    # What is kept of x is how many rows it has: an array without columns.
    return _exchange(x_RD, count_nE, rows, back), (count_nE, jnp.zeros_like(x_RD, shape=(x_RD.shape[0], 0)))


def _exchange_backward(rows: int, back: bool, saved: tuple[Any, ...], g_SD: jax.Array) -> tuple[Any, ...]:
    count_nE, shaped = saved
    return _exchange(g_SD, count_nE, shaped.shape[0], not back), None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def gathered_ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`lax.ragged_all_to_all`, which CPUs do not have, from an all_gather: it sends everything to everyone."""
    n, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    sent_nRD = lax.all_gather(operand, axis_name)

    def to_me(a: jax.Array) -> jax.Array:
        # Run i of a device goes to device i // (runs / n).
        return lax.dynamic_index_in_dim(lax.all_gather(a, axis_name).reshape(n, n, -1), me, 1, keepdims=False)

    first, size, to = (to_me(a) for a in (input_offsets, send_sizes, output_offsets))
    first = (first + operand.shape[0] * jnp.arange(n, dtype=first.dtype)[:, None]).reshape(-1)
    size, to = jnp.minimum(size.reshape(-1), recv_sizes), to.reshape(-1)
    row = jnp.arange(output.shape[0], dtype=to.dtype)
    inside = (row[:, None] >= to[None]) & (row[:, None] < (to + size)[None])
    source = jnp.where(inside, (first - to)[None] + row[:, None], 0).sum(1)
    received = sent_nRD.reshape(-1, *operand.shape[1:]).at[source].get(mode='promise_in_bounds')
    return jnp.where(inside.any(1).reshape(-1, *(1,) * (output.ndim - 1)), received, output)
