"""A decoder's forward pass in NumPy, which keeps and changes what stands at each place: what captures and edits must equal.

It shares no code with model/: weights come as a dict of host arrays (`tests.reference.weights`), all in float64. Letters as in
docs/glossary.md; n query heads, U width of a value, r of a rotary key.
"""

from collections.abc import Callable

import numpy as np

from weft.model.config import ModelConfig

At = Callable[[str, int | None, np.ndarray], np.ndarray]  # (name, layer, value) -> the value to go on with


def forward(w: dict, tokens_BT, position_BT, segment_BT, c: ModelConfig, at: At) -> np.ndarray:
    """Logits [B, T, vocabulary]; `at` is called once at each place."""
    x = at('embedding', None, w['embed_VD'][tokens_BT])
    for number, layer in enumerate(w['layers']):
        here = lambda name, value, number=number: at(name, number, value)
        x = here('residual.before_attention', x)
        attend = latent_attention if c.attention.kind == 'mla' else grouped_attention
        h = here('attention.input', rms(x, layer['attention_norm.scale_D'], c.norm.epsilon))
        y = attend(layer, h, position_BT, segment_BT, c, here)
        x = here('residual.after_attention', x + here('attention.output', y))
        h = here('mlp.input', rms(x, layer['mlp_norm.scale_D'], c.norm.epsilon))
        if 'mlp.router.w_IO' in layer:
            y = mixture(layer, h, segment_BT, c, here)
        else:
            y = mlp(layer, 'mlp.', h, lambda value, here=here: here('mlp.hidden_units', value))
        x = here('residual.after_mlp', x + here('mlp.output', y))
    x = at('final_norm', None, rms(x, w['norm.scale_D'], c.norm.epsilon))
    head = w['embed_VD'].T if c.embedding.tied else w['head_DV']
    return at('logits', None, (x @ head)[..., : c.vocabulary])


def rms(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def turned(x_BTnH, position_BT, theta):
    """Rotary positions: dims h and h + H/2 turn together."""
    half = x_BTnH.shape[-1] // 2
    angle = position_BT[:, :, None, None] * theta ** (-np.arange(half) / half)
    a, b = x_BTnH[..., :half], x_BTnH[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def weigh(q_BTnH, k_BSnH, v_BSnU, position_BT, segment_BT, here):
    """Head outputs [B, T, n, U], of keys and values repeated to as many heads as there are queries."""
    ago = position_BT[:, :, None] - position_BT[:, None, :]
    see = (ago >= 0) & (segment_BT[:, :, None] == segment_BT[:, None, :])
    scores = np.einsum('BTnH,BSnH->BTnS', q_BTnH, k_BSnH) / np.sqrt(q_BTnH.shape[-1])
    pattern = here('attention.pattern', softmax(np.where(see[:, :, None], scores, -np.inf)))
    return here('attention.head_outputs', np.einsum('BTnS,BSnU->BTnU', pattern, v_BSnU))


def grouped_attention(w, x, position_BT, segment_BT, c, here):
    H, repeats = c.attention.head_dim, c.attention.heads // c.attention.kv_heads
    q, k, v = ((x @ w[f'attention.{one}.w_IO']).reshape(*x.shape[:2], -1, H) for one in 'qkv')
    if c.attention.qk_norm:
        q, k = (rms(a, w[f'attention.{one}_scale_H'], c.norm.epsilon) for a, one in ((q, 'q'), (k, 'k')))
    q, k = (turned(a, position_BT, c.positions.theta) for a in (q, k))
    q, k, v = here('attention.queries', q), here('attention.keys', k), here('attention.values', v)
    k, v = np.repeat(k, repeats, 2), np.repeat(v, repeats, 2)
    out = weigh(q, k, v, position_BT, segment_BT, here)
    return out.reshape(*x.shape[:2], -1) @ w['attention.o.w_OI'].T


def latent_attention(w, x, position_BT, segment_BT, c, here):
    a = c.attention
    down = x @ w['attention.kv_down.w_IO']
    latent = rms(down[..., : a.kv_lora_rank], w['attention.kv_scale_R'], 1e-6)
    key = turned(down[..., None, a.kv_lora_rank :], position_BT, c.positions.theta)[:, :, 0]
    q = queries(w, x, a, here).reshape(*x.shape[:2], a.heads, -1)
    plain, turning = q[..., : a.qk_nope_head_dim], q[..., a.qk_nope_head_dim :]
    q = here('attention.queries', np.concatenate([plain, turned(turning, position_BT, c.positions.theta)], -1))
    latent, key = here('attention.latent', latent), here('attention.rotary_key', key)
    both = (latent @ w['attention.kv_up.w_IO']).reshape(*x.shape[:2], a.heads, -1)
    k, v = both[..., : a.qk_nope_head_dim], both[..., a.qk_nope_head_dim :]
    shared = np.broadcast_to(key[:, :, None], (*k.shape[:3], a.qk_rope_head_dim))
    k, v = here('attention.keys', np.concatenate([k, shared], -1)), here('attention.values', v)
    out = weigh(q, k, v, position_BT, segment_BT, here)
    return out.reshape(*x.shape[:2], -1) @ w['attention.o.w_OI'].T


def queries(w, x, a, here):
    if not a.q_lora_rank:
        return x @ w['attention.q.w_IO']
    latent = here('attention.query_latent', rms(x @ w['attention.q_down.w_IO'], w['attention.q_scale_Q'], 1e-6))
    return latent @ w['attention.q_up.w_IO']


def mlp(w, prefix, x, hidden):
    units = silu(x @ w[f'{prefix}gate.w_IO']) * (x @ w[f'{prefix}up.w_IO'])
    return hidden(units) @ w[f'{prefix}down.w_OI'].T


def mixture(w, x, segment_BT, c, here):
    """Each token's experts one after another: no dispatch, no sorting."""
    m = c.moe
    scores = here('router.scores', softmax(x @ w['mlp.router.w_IO']))
    experts = here('router.choices', np.argsort(-scores, -1, kind='stable')[..., : m.top_k])
    weights = np.take_along_axis(scores, experts, -1)
    if m.renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    weights = here('router.weights', weights * m.routed_scale)
    outputs = np.zeros((*experts.shape, x.shape[-1]))
    for place in np.ndindex(experts.shape):
        e, h = experts[place], x[place[:2]]
        units = silu(h @ w['mlp.gate.w_EIO'][e]) * (h @ w['mlp.up.w_EIO'][e])
        outputs[place] = weights[place] * (w['mlp.down.w_EOI'][e] @ units)
    outputs = here('experts.outputs', np.where((segment_BT > 0)[..., None, None], outputs, 0))
    y = outputs.sum(2)
    if m.shared_experts:
        y = y + mlp(w, 'mlp.shared.', x, lambda value: here('shared_experts.hidden_units', value))
    return y
