"""Grok-1 in NumPy and float64, from the released code (xai-org/grok-1, model.py and run.py): what transformers has no model of.

Tensors go by the names of the published conversions to safetensors; matrices are out × in. One row of tokens at a time, loops
where the released code has masks. What that code fixes: RMSNorm's epsilon 1e-5, theta 10,000, dims h and h + H/2 turn together,
tanh form of GELU on the gate (`linear`, not `linear_v`), softmax over all experts without renormalising the chosen ones,
scores times a multiplier (not 1 / √H) and capped by 30 tanh(s / 30), norms before and after each part.
"""

import numpy as np


def rms_norm(x_TD, scale_D, epsilon):
    return scale_D * x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + epsilon)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    """The default of jax.nn.gelu: the tanh form."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def turned(x_TH):
    """One head's rows turned by their positions."""
    T, H = x_TH.shape
    angle_Th = np.outer(np.arange(T), 10_000.0 ** (-np.arange(0, H, 2) / H))
    z_Th = (x_TH[:, : H // 2] + 1j * x_TH[:, H // 2 :]) * np.exp(1j * angle_Th)
    return np.concatenate([z_Th.real, z_Th.imag], -1)


def attention(x_TD, get, c):
    N, K = c['num_attention_heads'], c['num_key_value_heads']
    T, H = len(x_TD), c['hidden_size'] // N
    q_TNH, k_TKH, v_TKH = ((x_TD @ get(f'attn.{name}_proj.weight').T).reshape(T, -1, H) for name in 'qkv')
    heads = []
    for n in range(N):
        k = n // (N // K)
        score_TS = turned(q_TNH[:, n]) @ turned(k_TKH[:, k]).T * c['attn_output_multiplier']
        score_TS = c['max_attn_value'] * np.tanh(score_TS / c['max_attn_value'])
        score_TS[np.triu_indices(T, 1)] = -1e30
        heads.append(softmax(score_TS) @ v_TKH[:, k])
    return np.concatenate(heads, -1) @ get('attn.o_proj.weight').T


def mixture(x_TD, get, c):
    share_TE = softmax(x_TD @ get('moe_block.gate.weight').T)
    y_TD = np.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        for e in np.argsort(-share_TE[t], kind='stable')[: c['num_experts_per_tok']]:
            w = lambda name, e=e: get(f'moe_block.experts.{e}.{name}.weight')
            y_TD[t] += share_TE[t, e] * (w('linear_1') @ (gelu(w('linear') @ x_D) * (w('linear_v') @ x_D)))
    return y_TD


def logits(tensors: dict[str, np.ndarray], c: dict, ids_T: np.ndarray) -> np.ndarray:
    """float64 [T, vocabulary] of one row, for tensors of any dtype and the fields of config.json."""
    epsilon = c['rms_norm_eps']
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    embed_VD = wide['model.embed_tokens.weight']
    x_TD = embed_VD[ids_T] * c['embedding_multiplier_scale']
    for i in range(c['num_hidden_layers']):
        get = lambda name, i=i: wide[f'model.layers.{i}.{name}']
        normed = lambda x, name, get=get: rms_norm(x, get(f'{name}.scale'), epsilon)
        x_TD = x_TD + normed(attention(normed(x_TD, 'pre_attn_norm'), get, c), 'post_attn_norm')
        x_TD = x_TD + normed(mixture(normed(x_TD, 'pre_moe_norm'), get, c), 'post_moe_norm')
    x_TD = rms_norm(x_TD, wide['model.norm.scale'], epsilon)
    return x_TD @ wide.get('lm_head.weight', embed_VD).T * c['output_multiplier_scale']


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """The published tensors of a config."""
    D, F, V = c['hidden_size'], c['intermediate_size'], c['vocab_size']
    M = D // c['num_attention_heads'] * c['num_key_value_heads']
    found = {'model.embed_tokens.weight': (V, D), 'model.norm.scale': (D,)}
    if not c['tie_word_embeddings']:
        found['lm_head.weight'] = (V, D)
    for i in range(c['num_hidden_layers']):
        layer = {f'{name}_norm.scale': (D,) for name in ('pre_attn', 'post_attn', 'pre_moe', 'post_moe')}
        layer |= {f'attn.{name}_proj.weight': (width, D) for name, width in (('q', D), ('k', M), ('v', M), ('o', D))}
        layer['moe_block.gate.weight'] = (c['num_experts'], D)
        for e in range(c['num_experts']):
            of_expert = {'linear': (F, D), 'linear_v': (F, D), 'linear_1': (D, F)}
            layer |= {f'moe_block.experts.{e}.{name}.weight': shape for name, shape in of_expert.items()}
        found |= {f'model.layers.{i}.{name}': shape for name, shape in layer.items()}
    return found
