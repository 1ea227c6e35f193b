"""A mixture of experts: a router chooses, the experts that this device holds work, and nothing is dropped.

Letters: N tokens of this device, D model, E experts, K experts per token, F hidden units of an expert, R rows (a row is one
token for one of its experts); n as a prefix dim counts devices.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax

from model.config import ModelConfig
from model.grouped_matmul import combine, expert_mlp, permute
from model.layers import ACTIVATIONS, Mlp, View, residual_gain, weight
from sharding.collectives import wide
from sharding.mesh import FSDP


class MoE(nnx.Module):
    """Experts split over `expert`, their hidden units over `tensor`; the router works on each device's own tokens."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        D, E, F = c.model_dim, c.moe.experts, c.moe.mlp_dim
        self.router_DE = weight(rngs, c, (D, E), P(FSDP, None), fan_in=D)
        if c.gated:
            self.gate_EDF = weight(rngs, c, (E, D, F), P('expert', ('data', 'context'), 'tensor'), fan_in=D)
        self.up_EDF = weight(rngs, c, (E, D, F), P('expert', ('data', 'context'), 'tensor'), fan_in=D)
        self.down_EDF = weight(rngs, c, (E, D, F), P('expert', ('data', 'context'), 'tensor'), fan_in=F, gain=residual_gain(c))
        if c.moe.shared_experts:
            self.shared = Mlp(c, F * c.moe.shared_experts, rngs)

    def __call__(self, x_BTD, view: View):
        """The block's output in the layout between blocks, and this device's share of the router's figures (see `route`)."""
        c = self.config
        router_DE = lax.all_gather(self.router_DE[...], FSDP, tiled=True)
        gate_BTK, expert_BTK, figures = route(x_BTD, router_DE, view, c)
        flat = lambda a: a.reshape(-1, a.shape[-1])
        y_ND = self.routed(flat(x_BTD), flat(gate_BTK), flat(expert_BTK), view)
        y_BTD = y_ND.reshape(x_BTD.shape)
        return (y_BTD + self.shared(x_BTD, view) if c.moe.shared_experts else y_BTD), figures

    def routed(self, x_ND, gate_NK, expert_NK, view: View):
        """Tokens go to every device of `expert` (and of `tensor`), which adds what its experts make of them; sums come back."""
        axes = ('expert', 'tensor') if view.sequence_split else ('expert',)
        x_ND, gate_NK, expert_NK = (lax.all_gather(a, axes, tiled=True) for a in (x_ND, gate_NK, expert_NK))
        y_ND = self.local_experts(x_ND, gate_NK, expert_NK, view.experts)
        y_ND = lax.psum_scatter(y_ND, axes, tiled=True)
        return y_ND if view.sequence_split else lax.psum(y_ND, 'tensor')

    def local_experts(self, x_ND, gate_NK, expert_NK, backend: str):
        """Σ over a token's experts held here of gate · expert(x); partial over `tensor`. Rows are sorted by expert."""
        c = self.config
        gather = lambda w_EDF: lax.all_gather(w_EDF.astype(x_ND.dtype), ('data', 'context'), axis=1, tiled=True)
        up_EDF, down_EDF = gather(self.up_EDF[...]), gather(self.down_EDF[...])
        E = up_EDF.shape[0]
        mine_R = expert_NK.reshape(-1) - E * lax.axis_index('expert')
        mine_R = jnp.where((mine_R >= 0) & (mine_R < E), mine_R, E)  # E: another device's expert; such rows sort last
        order_R = jnp.argsort(mine_R, stable=True)
        inverse_R = jnp.argsort(order_R)
        sizes_E = (mine_R[:, None] == jnp.arange(E)[None]).sum(0, dtype=jnp.int32)
        y_RD = expert_mlp(
            permute(x_ND, order_R, inverse_R),
            gather(self.gate_EDF[...]) if c.gated else None,
            up_EDF,
            down_EDF.swapaxes(1, 2),
            sizes_E,
            activation=ACTIVATIONS[c.activation],
            backend=backend,
        )
        return combine(y_RD, gate_NK.astype(x_ND.dtype), order_R, inverse_R)


def route(x_BTD, router_DE, view: View, c: ModelConfig):
    """Each token's experts and their weights, in at least float32, and this device's share of the router's figures.

    Returns gate_BTK, expert_BTK (int32) and a dict of sums over this device's real tokens, all of which become whole when
    added up over every mesh axis:
        balance  Σ over rows of the sequence-level balance loss, E/K Σ_e f_e P_e with f_e the share of the row's choices
                 that fell on e (times K) and P_e its mean normalised score (DeepSeek-V3, arXiv:2412.19437, eq. 17–20)
        z        Σ over tokens of logsumexp(logits)² (ST-MoE, arXiv:2202.08906, eq. 5)
        entropy  Σ over tokens of the entropy of the normalised scores, in nats
        load_E   tokens that chose each expert
    """
    m = c.moe
    logit_BTE = jnp.einsum('BTD,DE->BTE', wide(x_BTD), wide(router_DE), precision='highest')
    score_BTE = jax.nn.softmax(logit_BTE, axis=-1) if m.router == 'softmax' else jax.nn.sigmoid(logit_BTE)
    gate_BTK, expert_BTK = lax.top_k(score_BTE, m.top_k)
    if m.renormalize:
        gate_BTK = gate_BTK / gate_BTK.sum(-1, keepdims=True)
    live_BT1 = view.live_BT[..., None].astype(score_BTE.dtype)
    chosen_BTE = (expert_BTK[..., None] == jnp.arange(m.experts)[None, None, None]).sum(2).astype(
        score_BTE.dtype
    ) * live_BT1
    share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True) * live_BT1
    row = lambda a_BTE: lax.psum(a_BTE.sum(1), 'tensor') if view.sequence_split else a_BTE.sum(1)
    tokens_B1 = jnp.maximum(row(live_BT1), 1)
    balance = (row(chosen_BTE) * row(share_BTE) / tokens_B1**2).sum() * (m.experts / m.top_k)
    copies = lax.axis_size('tensor')  # every device of `tensor` has the row's sums: each keeps its share
    figures = {
        'balance': balance / copies,
        'z': (jax.nn.logsumexp(logit_BTE, axis=-1, keepdims=True) ** 2 * live_BT1).sum(),
        'entropy': -(share_BTE * jnp.log(jnp.where(share_BTE > 0, share_BTE, 1))).sum(),
        'load_E': chosen_BTE.sum((0, 1)),
    }
    if not view.sequence_split:
        figures |= {name: figures[name] / copies for name in ('z', 'entropy', 'load_E')}
    return gate_BTK * m.routed_scale, expert_BTK, figures
