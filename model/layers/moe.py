"""A mixture of experts: a router chooses, model/ops/expert_dispatch.py takes tokens to the devices of their experts and back.

Letters: B rows, T sequence, N tokens of this device, D model, E experts, K experts per token, F hidden units of an expert,
L layers.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jax.typing import DTypeLike

from weft.model.compute import GroupedMatmul
from weft.model.config import ModelConfig, MoEConfig
from weft.model.context import ForwardContext
from weft.model.costs import INT32, CostCounter
from weft.model.edits import Chosen
from weft.model.layers.mlp import LOOPED, Mlp, activation, hidden_costs
from weft.model.linear import ExpertLinear, Linear
from weft.model.ops.expert_dispatch import LocalExperts, Routed, capacity, default_dispatch, dispatch
from weft.model.parameters import Role, Size, parameter, residual_gain
from weft.model.parts.registry import MIXTURES
from weft.sharding.collectives import mark_varying, psum, upcast
from weft.sharding.mesh import FSDP, SEQUENCE


class MoE(nnx.Module):
    """Experts split over `expert`, their hidden units over `tensor`; the router works on each device's own tokens."""

    def __init__(self, c: ModelConfig):
        self.config, self.moe = c, mixture(c)
        m = self.moe
        D, E = Size(c.model_dim, 'model.model_dim'), Size(m.experts, 'model.moe.experts')
        F = Size(m.mlp_dim, 'model.moe.mlp_dim')
        self.router = Linear(D, E, part='router', bias=m.router_bias, split=(FSDP, None), role=Role.ROUTER)
        if c.mlp.gated:
            self.gate = ExpertLinear(E, D, F, bias=m.bias)
        self.up = ExpertLinear(E, D, F, bias=m.bias)
        self.down = ExpertLinear(E, D, F, back=True, bias=m.bias, gain=residual_gain(c.layers))
        if m.has_choice_bias:  # the training step moves it: see `updated_bias`
            self.correction_E = parameter((E,), P(None), Role.CORRECTION, part='router')
        if m.shared_experts:
            hidden = Size(m.shared_dim, 'model.moe.shared_mlp_dim × model.moe.shared_experts')
            self.shared = Mlp(c, hidden, 'shared_experts')
        if m.shared_gate:
            self.shared_gate_D = parameter((D,), P(None), Role.VECTOR, part='shared_experts')

    @staticmethod
    def costs(c: ModelConfig, count: CostCounter, last: bool) -> None:
        """Tells a counter what one device does if choices are even; `last`: nothing in the backward pass needs the result."""
        m = mixture(c)
        count.matmul('router', count.own_tokens, c.model_dim, m.experts)
        # Sums over a row's tokens: of choices, which the backward pass needs once more, of scores, and of real tokens.
        axes = SEQUENCE if count.split else ('context',)
        count.send('psum', axes, count.rows * m.experts * count.wide, 2 + count.again)
        count.send_alike('psum', axes, count.rows * count.wide)
        expert_costs(c, count)
        dispatch_costs(c, count, last)
        if m.shared_experts:  # the gate's gradient needs what it weighs
            hidden_costs(c, count, 'experts', m.shared_dim, last and not m.shared_gate)

    def __call__(self, x_BTD: jax.Array, ctx: ForwardContext) -> jax.Array:
        """The block's output in the layout between blocks. Padding visits no routed expert."""
        m = self.moe
        gate_BTK, expert_BTK = self.route(x_BTD, ctx)
        expert_BTK = jnp.where(ctx.live_BT[..., None], expert_BTK, m.experts)
        flat = lambda a: a.reshape(-1, a.shape[-1])
        routed = Routed(flat(x_BTD), flat(gate_BTK), flat(expert_BTK))
        apart = ctx.asks('experts.outputs')
        if apart:  # a row of its own for each choice, so that nothing is added up on the way
            routed = Routed(jnp.repeat(routed.x_ND, m.top_k, 0), *(a_NK.reshape(-1, 1) for a_NK in routed[1:]))
        send = dispatch(ctx.compute.dispatch)
        y_ND, dropped = send(
            routed,
            self.experts(x_BTD.dtype, ctx.compute.grouped_matmul),
            split=ctx.sequence_split,
            capacity_factor=ctx.compute.capacity_factor,
        )
        ctx.metric('router.dropped_share', dropped / m.top_k)
        if apart:
            chosen = Chosen(expert_BTK, m.experts)
            y_BTKD = ctx.tap('experts.outputs', y_ND.reshape(*gate_BTK.shape, -1), chosen=chosen)
            y_ND = upcast(y_BTKD).sum(2).astype(x_BTD.dtype)
        y_BTD = y_ND.reshape(x_BTD.shape)
        return y_BTD + self.visited(x_BTD, ctx) if m.shared_experts else y_BTD

    def route(self, x_BTD: jax.Array, ctx: ForwardContext) -> tuple[jax.Array, jax.Array]:
        """gate_BTK, what each of a token's experts counts, and expert_BTK, which they are, int32. Padding's are passed over."""
        router_DE = self.router.kernel(self.router.weight.dtype)  # as wide as it is kept
        router_bias_E = self.router.b_O[...] if self.moe.router_bias else None
        bias_E = self.correction_E[...] if self.moe.has_choice_bias else None
        return route(x_BTD, router_DE, bias_E, ctx, self.config, router_bias_E)

    def visited(self, x_BTD: jax.Array, ctx: ForwardContext) -> jax.Array:
        """What the shared experts give, in the layout between blocks, with their gate's weight."""
        y_BTD = self.shared(x_BTD, ctx)
        if not self.moe.shared_gate:
            return y_BTD
        gate_BT1 = jax.nn.sigmoid((upcast(x_BTD) * upcast(self.shared_gate_D[...])[None, None]).sum(-1, keepdims=True))
        return (gate_BT1 * y_BTD).astype(y_BTD.dtype)

    def experts(self, dtype: DTypeLike, backend: GroupedMatmul) -> LocalExperts:
        """The experts that this device holds, D whole."""
        c = self.config
        inner = (self.gate, self.up) if c.mlp.gated else (self.up,)
        biases = None
        if self.moe.bias:
            biases = tuple(one.bias(dtype) for one in inner), self.down.bias(dtype)
        gate_EDF = self.gate.kernel(dtype) if c.mlp.gated else None
        return LocalExperts(gate_EDF, self.up.kernel(dtype), self.down.kernel(dtype), activation(c), backend, biases)


def mixture(c: ModelConfig) -> MoEConfig:
    """The model's mixture, of which it has one."""
    assert c.moe is not None
    return c.moe


def route(
    x_BTD: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array | None,
    ctx: ForwardContext,
    c: ModelConfig,
    router_bias_E: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each token's experts and their weights, in at least float32.

    bias_E, or None, is added to the scores to choose by them; weights and metrics are made of the scores without it
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Of several groups of experts the best are chosen first (`choices`).

    Returns gate_BTK and expert_BTK (int32), and says these metrics, which are sums over real tokens:
        balance_loss  Σ over rows of the sequence-level balance loss, E/K Σ_e f_e P_e with f_e the share of the row's choices
                      that fell on e (times K) and P_e its mean normalised score (DeepSeek-V3, arXiv:2412.19437, eq. 17–20)
        z_loss        Σ over tokens of logsumexp(logits)² (ST-MoE, arXiv:2202.08906, eq. 5)
        entropy       Σ over tokens of the entropy of the normalised scores, in nats
        load          of each expert how many tokens chose it, by K
    """
    m = mixture(c)
    logit_BTE = jnp.einsum('BTD,DE->BTE', upcast(x_BTD), upcast(router_DE), precision='highest')
    if router_bias_E is not None:
        logit_BTE = logit_BTE + upcast(router_bias_E)[None, None]
    score_BTE = jax.nn.softmax(logit_BTE, axis=-1) if m.router == 'softmax' else jax.nn.sigmoid(logit_BTE)
    score_BTE = ctx.tap('router.scores', score_BTE)
    choice_BTE = score_BTE if bias_E is None else score_BTE + bias_E.astype(score_BTE.dtype)[None, None]
    if bias_E is None and m.groups == 1:
        gate_BTK, expert_BTK = lax.top_k(score_BTE, m.top_k)
    else:
        expert_BTK = choices(lax.stop_gradient(choice_BTE), m)
        gate_BTK = jnp.take_along_axis(score_BTE, expert_BTK, axis=-1)
    expert_BTK = ctx.tap('router.choices', expert_BTK)
    if ctx.edits('router.choices'):
        gate_BTK = jnp.take_along_axis(score_BTE, expert_BTK, axis=-1)
    if m.renormalize:
        gate_BTK = gate_BTK / gate_BTK.sum(-1, keepdims=True)
    live_BT1 = mark_varying(ctx.live_BT[..., None].astype(score_BTE.dtype))
    chosen_BTKE = expert_BTK[..., None] == jnp.arange(m.experts)[None, None, None]
    chosen_BTE = chosen_BTKE.sum(2).astype(score_BTE.dtype) * live_BT1
    share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True) * live_BT1
    axes = SEQUENCE if ctx.sequence_split else ('context',)
    row = lambda a_BTE: psum(a_BTE.sum(1), axes)
    tokens_B1 = jnp.maximum(row(live_BT1), 1)
    balance = (row(chosen_BTE) * row(share_BTE) / tokens_B1**2).sum() * (m.experts / m.top_k)
    # So many devices have the row's sums, and where the sequence is not split over `tensor` the tokens': each keeps its share.
    copies = 1 if ctx.sequence_split else lax.axis_size('tensor')
    z = (jax.nn.logsumexp(logit_BTE, axis=-1, keepdims=True) ** 2 * live_BT1).sum()
    entropy = -(share_BTE * jnp.log(jnp.where(share_BTE > 0, share_BTE, 1))).sum()
    ctx.metric('router.balance_loss', balance / lax.axis_size(SEQUENCE), per='rows', weight=m.balance_loss)
    ctx.metric('router.z_loss', z / copies, weight=m.z_loss)
    ctx.metric('router.entropy', entropy / copies)
    ctx.metric('router.load', chosen_BTE.sum((0, 1)) / (copies * m.top_k), report=expert_shares)
    gate_BTK = ctx.tap('router.weights', gate_BTK * m.routed_scale, chosen=Chosen(expert_BTK, m.experts))
    return gate_BTK, expert_BTK


def expert_shares(load_LE: jax.Array) -> dict[str, jax.Array]:
    """What is logged of how a batch's choices fall on experts: the share of each, and the largest of all layers."""
    return {'router.load': load_LE, 'router.max_share': load_LE.max()}


def choices(choice_BTE: jax.Array, m: MoEConfig) -> jax.Array:
    """int32 [B, T, K]: the best experts of the best groups (DeepSeek-V2, section 2.1.3; the group's score as in V3's code)."""
    if m.groups > 1:
        groups_BTgE = choice_BTE.reshape(*choice_BTE.shape[:-1], m.groups, -1)
        best = lax.top_k(groups_BTgE, 2 if m.group_score == 'top2' else 1)[0].sum(-1)
        _, chosen_BTG = lax.top_k(best, m.top_groups)
        open_BTg = (chosen_BTG[..., None] == jnp.arange(m.groups)[None, None, None]).any(2)
        choice_BTE = jnp.where(open_BTg[..., None], groups_BTgE, -jnp.inf).reshape(choice_BTE.shape)
    return lax.top_k(choice_BTE, m.top_k)[1]


def updated_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """The bias for the next step: up by `rate` where an expert had fewer tokens than the mean of its layer, down where more.

    Wang et al. 2024, arXiv:2408.15664, algorithm 1. `load_LE` counts the whole step's tokens, of all devices.
    """
    load_LE = load_LE.astype(bias_LE.dtype)
    return bias_LE + rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)


def expert_costs(c: ModelConfig, count: CostCounter) -> None:
    """Tells a counter what a device's experts compute, and what their backward pass needs."""
    m, D, F, t, n = mixture(c), c.model_dim, mixture(c).mlp_dim / count.mesh.tensor, count.tokens, count.mesh.tensor
    buffered = count.compute.dispatch == 'all_to_all'
    rows = buffer_rows(c, count) if buffered else t * m.top_k  # those that visit an expert, or all of the buffer
    for _ in range(2 if c.mlp.gated else 1):
        count.grouped_matmul('experts', rows, D, F)
    count.grouped_matmul('experts', rows, F, D)
    # The buffer in which experts find their tokens: all devices' of `expert`, but of `ragged` only what a choice can fill.
    if buffered:
        each = min(t / n, math.ceil(count.compute.capacity_factor * t / n * m.top_k / m.experts))
        rows = m.experts * each * n
    elif count.compute.dispatch == 'ragged':
        rows = count.mesh.expert * t * min(m.top_k, m.experts / count.mesh.expert)
    else:
        rows = count.mesh.expert * t * m.top_k
    if count.looped and (buffered or count.platform != 'gpu'):
        masks = 2  # a byte for each number
        count.keep(rows * ((2 * D + LOOPED * F) * count.number + masks * D))
    else:  # a kernel's own backward pass
        count.keep(rows * (2 * D + (3 if c.mlp.gated else 2) * F) * count.number)
    if not count.looped:
        count.keep(t * D * count.number)
    count.work(rows * (F + D) * count.number)


def buffer_rows(c: ModelConfig, count: CostCounter) -> float:
    """Rows that a device's experts are sent by `all_to_all`, empty ones among them."""
    m, N = mixture(c), int(count.own_tokens)
    if not count.split:
        return m.experts * N
    return count.mesh.tensor * m.experts * capacity(N, m.top_k, m.experts, count.compute.capacity_factor)


def dispatch_costs(c: ModelConfig, count: CostCounter, last: bool) -> None:
    """Tells a counter what model/ops/expert_dispatch.py sends, on accelerators: on CPUs `ragged` is made of all_gathers."""
    m, D = mixture(c), c.model_dim * count.number
    name = default_dispatch('tpu') if count.compute.dispatch == 'auto' else count.compute.dispatch
    tokens, N = count.own_tokens, count.own_tokens
    if name == 'all_to_all':
        rows = buffer_rows(c, count)
        own = rows / count.mesh.tensor if count.split else rows
        count.send('all_to_all', ('expert',), own * D, 2 * count.passes)
        if count.split:
            count.all_gather(('tensor',), rows * D)
            count.reduce_scatter(('tensor',), rows * D)
    else:
        gathered = [axis for axis in ('tensor', 'expert') if axis == 'tensor' or name == 'all_gather']
        for axis in gathered if count.split else gathered[1:]:  # tokens, their experts, and the weights of these
            tokens *= getattr(count.mesh, axis)
            for size, grad in ((D, True), (m.top_k * count.wide, True), (m.top_k * INT32, False)):
                count.all_gather((axis,), tokens * size, grad)
        if name == 'all_gather':
            count.reduce_scatter(('expert',), tokens * D, last)
        else:
            count.all_gather(('expert',), count.mesh.expert * m.experts * INT32, grad=False)
            count.send('ragged_all_to_all', ('expert',), tokens * m.top_k * D, 2 * count.passes)
        if count.split:
            count.reduce_scatter(('tensor',), N * count.mesh.tensor * D, last)
    if not count.split:
        count.send('psum', ('tensor',), N * D)


MIXTURES.implement('moe', MoE)
