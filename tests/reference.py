"""The decoder once more, written plainly for one device without a mesh: what the sharded one must equal.

Takes the sharded model's weights gathered to the host. Letters as in model/layers.py, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np

from weft.model.batch import Batch
from weft.model.config import ModelConfig


def weights(model) -> dict:
    """The model's weights as a nested dict of host arrays, layers unstacked.

    {'embed_VD': …, 'layers': [{'attention.q.w_IO': …}, …]}
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        flat[jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')] = np.asarray(leaf)
    layers, group = [], 0
    for run in model.config.layer_groups:
        units = []
        for _ in run.specs:
            prefix = f'groups.{group}.'
            mine = {name.removeprefix(prefix): leaf for name, leaf in flat.items() if name.startswith(prefix)}
            units.append([{name: leaf[i] for name, leaf in mine.items()} for i in range(run.repeats)])
            group += 1
        layers += [layer for unit in zip(*units, strict=True) for layer in unit]
    return {'layers': layers, **{name: leaf for name, leaf in flat.items() if not name.startswith('groups.')}}


def norm(x, scale, bias, c: ModelConfig):
    if c.norm.kind == 'layernorm':
        x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.norm.epsilon)
    return x * scale + (0 if bias is None else bias)


def rms(x, scale, c):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.norm.epsilon) * scale


def rope(x_BTNH, position_BT, theta):
    half = x_BTNH.shape[-1] // 2
    angle = position_BT[:, :, None, None] * theta ** (-np.arange(half) / half)
    turned = (x_BTNH[..., :half] + 1j * x_BTNH[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag], -1)


def attend(w, x_BTD, position_BT, segment_BT, number: int, c: ModelConfig):
    B, T, _ = x_BTD.shape
    get = lambda name: w.get(f'attention.{name}')
    heads = lambda letter, n: (
        x_BTD @ w[f'attention.{letter}.w_IO'] + (w[f'attention.{letter}.b_O'] if c.attention.qkv_bias else 0)
    ).reshape(B, T, n, c.attention.head_dim)
    q, k, v = heads('q', c.attention.heads), heads('k', c.attention.kv_heads), heads('v', c.attention.kv_heads)
    if c.attention.qk_norm:
        q, k = rms(q, get('q_scale_H'), c), rms(k, get('k_scale_H'), c)
    if c.positions.pattern[number % len(c.positions.pattern)]:
        q, k = rope(q, position_BT, c.positions.theta), rope(k, position_BT, c.positions.theta)
    if c.attention.scale_by_layer:
        q = q / (number + 1)
    k, v = (jnp.repeat(a, c.attention.heads // c.attention.kv_heads, axis=2) for a in (k, v))
    ago = position_BT[:, :, None] - position_BT[:, None, :]
    see = (ago >= 0) & (segment_BT[:, :, None] == segment_BT[:, None, :])
    if c.attention.window:
        see &= ago < c.attention.window
    scores = jnp.where(see[:, None], jnp.einsum('BTNH,BSNH->BNTS', q, k) / np.sqrt(c.attention.head_dim), -jnp.inf)
    a = jnp.einsum('BNTS,BSNH->BTNH', jax.nn.softmax(scores, axis=-1), v).reshape(B, T, -1)
    return a @ get('o.w_OI').T + (get('o.b_O') if c.attention.o_bias else 0)


def activate(c: ModelConfig, gate, up):
    act = {'swiglu': jax.nn.silu, 'geglu': jax.nn.gelu, 'gelu': jax.nn.gelu, 'relu': jax.nn.relu}[c.mlp.activation]
    return act(up) if gate is None else act(gate) * up


def mlp(w, prefix, x_BTD, c: ModelConfig):
    get = lambda name: w.get(prefix + name)
    up = x_BTD @ get('up.w_IO') + (get('up.b_O') if c.mlp.bias else 0)
    gate = x_BTD @ get('gate.w_IO') + (get('gate.b_O') if c.mlp.bias else 0) if c.mlp.gated else None
    return activate(c, gate, up) @ get('down.w_OI').T + (get('down.b_O') if c.mlp.bias else 0)


def experts(w, x_BTD, segment_BT, c: ModelConfig, kept_BTE=True):
    """Every expert works on every token; what was not chosen has weight 0, padding chooses nothing.

    Choices that are not `kept` add nothing. Also Σ of the balance and z losses, and loads.
    """
    m = c.moe
    logit_BTE = x_BTD @ w['mlp.router.w_IO']
    score_BTE = jax.nn.softmax(logit_BTE, -1) if m.router == 'softmax' else jax.nn.sigmoid(logit_BTE)
    rank_BTE = score_BTE + w.get('mlp.correction_E', 0)  # chooses; the gates are made of the scores
    kth = jnp.sort(rank_BTE, -1)[..., -m.top_k, None]
    chosen_BTE = rank_BTE >= kth
    gate_BTE = jnp.where(chosen_BTE, score_BTE, 0)
    if m.renormalize:
        gate_BTE = gate_BTE / gate_BTE.sum(-1, keepdims=True)
    live = (segment_BT > 0)[..., None]
    gate_BTE = jnp.where(live & kept_BTE, gate_BTE, 0)
    up = jnp.einsum('BTD,EDF->BTEF', x_BTD, w['mlp.up.w_EIO'])
    gate = jnp.einsum('BTD,EDF->BTEF', x_BTD, w['mlp.gate.w_EIO']) if c.mlp.gated else None
    y = jnp.einsum('BTEF,EDF,BTE->BTD', activate(c, gate, up), w['mlp.down.w_EOI'], gate_BTE * m.routed_scale)
    if m.shared_experts:
        weight = jax.nn.sigmoid(x_BTD @ w['mlp.shared_gate_D'])[..., None] if m.shared_gate else 1
        y = y + weight * mlp(w, 'mlp.shared.', x_BTD, c)
    share_BTE = jnp.where(live, score_BTE / score_BTE.sum(-1, keepdims=True), 0)
    balance = z = 0.0
    for b in range(x_BTD.shape[0]):  # one sequence at a time, as the paper writes it
        T = live[b].sum()
        f_E = m.experts / (m.top_k * T) * (chosen_BTE[b] & live[b]).sum(0)
        balance += (f_E * (share_BTE[b].sum(0) / T)).sum()
        z += jnp.where(live[b, :, 0], jax.nn.logsumexp(logit_BTE[b], axis=-1) ** 2, 0).sum()
    return y, (balance, z, (chosen_BTE & live).sum((0, 1)))


def forward(w: dict, batch: Batch, c: ModelConfig):
    """Logits [B, T, vocabulary], and (balance, z, load_E) of each layer with experts."""
    x = w['embed_VD'][batch.tokens_BT]
    figures = []
    for number, layer in enumerate(w['layers']):
        normed = lambda x, part, layer=layer: norm(x, layer[f'{part}.scale_D'], layer.get(f'{part}.bias_D'), c)
        before = normed if c.norm.order == 'pre' else lambda x, part: x
        after = normed if c.norm.order == 'output' else lambda x, part: x
        h = before(x, 'attention_norm')
        x = x + after(attend(layer, h, batch.position_BT, batch.segment_BT, number, c), 'attention_norm')
        h = before(x, 'mlp_norm')
        if 'mlp.router.w_IO' in layer:
            y, found = experts(layer, h, batch.segment_BT, c)
            figures.append(found)
        else:
            y = mlp(layer, 'mlp.', h, c)
        x = x + after(y, 'mlp_norm')
    x = norm(x, w['norm.scale_D'], w.get('norm.bias_D'), c)
    head = w['embed_VD'].T if c.embedding.tied else w['head_DV']
    return (x @ head)[..., : c.vocabulary], figures


def loss(w: dict, batch: Batch, c: ModelConfig):
    """What training.loss.loss_fn minimises, and the mean cross-entropy that is part of it."""
    logits, figures = forward(w, batch, c)
    live = batch.segment_BT > 0
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.target_BT[..., None], -1)[..., 0]
    entropy = total = jnp.where(live, nats, 0).sum() / live.sum()
    if c.moe:
        rows = live.any(1).sum()
        total = total + c.moe.balance_loss * sum(f[0] for f in figures) / len(figures) / rows
        total = total + c.moe.z_loss * sum(f[1] for f in figures) / len(figures) / live.sum()
    return total, entropy


def packed_batch(vocabulary: int, B: int, T: int, seed: int = 0, padding: int = 2) -> Batch:
    """Random rows of several documents each, the last tokens padding."""
    r = np.random.default_rng(seed)
    segments = 1 + np.cumsum(r.random((B, T)) < 0.2, axis=1).astype(np.int32)
    starts = np.diff(segments, axis=1, prepend=0) > 0
    columns = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    if padding:
        segments[:, -padding:], positions[:, -padding:] = 0, 0
    ids = r.integers(0, vocabulary, (2, B, T), dtype=np.int32)
    return Batch(ids[0], ids[1], positions.astype(np.int32), segments)
