"""What a model costs by its shapes alone: parameters, matmul FLOPs per token, bytes read per decoded token.

Conventions. A multiplication and an addition are 2 FLOPs; only matmuls count (no norms, softmax, rotations or lookups). A
backward pass is twice its forward pass; what rematerialisation repeats is not counted. Attention is the causal triangle:
in a row of T tokens that are one document a token sees (T + 1) / 2 keys on average, fewer with a window. Of the experts,
those that a token visits. The vocabulary is the real one, unpadded. Of an encoder–decoder a token is one of the target
together with one of the source.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from weft.model.block import Block
from weft.model.config import LayerSpec, MLAConfig, ModelConfig, changed
from weft.model.decoder import weights_of
from weft.model.kv_cache import CacheSize
from weft.model.layers.norm import Norm
from weft.model.parameters import Parameter, declared
from weft.model.stack import declared_cache


def parameters(c: ModelConfig) -> dict[str, int]:
    """Parameters by part; the sum is what a checkpoint holds (with the embedding's padding rows)."""
    parts: dict[str, int] = {}
    for name, weight in weights_of(c).items():
        part = next((whole for whole in ('mtp', 'encoder') if name.startswith(f'{whole}.')), weight.part)
        parts[part] = parts.get(part, 0) + math.prod(weight.global_shape)
    return parts


def layer_parameters(c: ModelConfig, spec: LayerSpec) -> dict[str, int]:
    """Parameters of one layer by part."""
    return _by_part(declared(Block(c, spec)).values())


def norm_parameters(c: ModelConfig) -> int:
    """Parameters of one norm."""
    return sum(weight.size for weight in declared(Norm(c)).values())


def mtp_layer_parameters(c: ModelConfig) -> int:
    """Parameters of one layer of `mtp`."""
    return sum(weight.size for name, weight in weights_of(c).items() if name.startswith('mtp.'))


def _by_part(weights: Iterable[Parameter]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for weight in weights:
        parts[weight.part] = parts.get(weight.part, 0) + weight.size
    return parts


def active_parameters(c: ModelConfig) -> int:
    """Parameters that one token meets while decoding: all but `mtp` and the experts that it does not visit."""
    parts = parameters(c)
    parts.pop('mtp', None)
    idle = parts['experts'] * (c.moe.experts - c.moe.top_k) // c.moe.experts if c.moe else 0
    return sum(parts.values()) - idle


def keys_seen(c: ModelConfig, sequence_length: int) -> float:
    """Keys that a token of a row sees, itself one of them, on average over tokens and layers."""

    def seen(windowed: bool) -> float:
        window = c.attention.reach(sequence_length, windowed)
        if not c.causal:  # as far ahead as behind
            return ((2 * window - 1) * sequence_length - window * (window - 1)) / sequence_length
        return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length

    return sum(seen(kind.windowed) for kind in c.layer_specs) / c.layers


def forward_flops(c: ModelConfig, keys: float, source_keys: float | None = None) -> dict[str, float]:
    """Matmul FLOPs of one token's forward pass by part, where it sees `keys` keys in each layer on average.

    With an encoder a token of its source sees `source_keys`, and so does the decoder's token; None: as many as `keys`.
    """
    D, moe = c.model_dim, sum(kind.experts for kind in c.layer_specs)
    source_keys = keys if source_keys is None else source_keys
    scores = c.layers * 2.0 * c.attention.heads * (c.attention.query_dim + c.attention.value_dim)  # for each key
    flops = {
        'projections': c.layers * 2.0 * sum(a * b for a, b in projections(c)),
        'attention': scores * keys,
        'mlp': (c.layers - moe) * 2.0 * _matrices(c) * D * c.mlp.dim,
        'head': 2.0 * D * (c.vocabulary or 0) * bool(c.head) + 2.0 * D * D * c.head_mlp,
    }
    if c.encoder:
        flops['cross_attention'] = flops['projections'] + scores * source_keys
        flops['encoder'] = sum(forward_flops(c.of_encoder, source_keys).values())
    if c.moe:
        flops['router'] = moe * 2.0 * D * c.moe.experts
        units = c.moe.top_k * c.moe.mlp_dim + c.moe.shared_dim
        flops['experts'] = moe * 2.0 * units * _matrices(c) * D
    return flops


def training_flops(c: ModelConfig, sequence_length: int) -> float:
    """Matmul FLOPs of one token's forward and backward pass, those of `mtp` among them."""
    return sum(flops_per_token(c, 'train', sequence_length).values())


def flops_per_token(c: ModelConfig, what: Literal['train', 'prefill', 'decode'], context: float) -> dict[str, float]:
    """Matmul FLOPs of one token by part.

    Args:
        c: a model with its vocabulary.
        what: `train` forward and backward, the mean over a row of `context` tokens; `prefill` the mean over a prompt of
            `context` tokens, of which the last alone has logits; `decode` one token that sees `context` keys, itself one of
            them, whose keys and values the cache has (of an encoder's output too: as many).
        context: tokens.
    """
    if what == 'decode':
        return _decode_flops(c, context)
    forward = forward_flops(c, keys_seen(c, int(context)), context)
    if what == 'prefill':
        return forward | {'head': forward['head'] / context}
    if c.mtp.layers:
        last = c.layer_specs[-1]
        mixture = dataclasses.replace(c.moe, first_dense_layers=0, pattern=(True,)) if c.moe and last.experts else None
        one = changed(
            c,
            {
                'layers': 1,
                'mtp.layers': 0,
                'attention.window_pattern': (last.windowed,),
                'moe': mixture,
            },
        )
        layer = sum(forward_flops(one, keys_seen(one, int(context))).values())  # with the head, which each has too
        forward['mtp'] = c.mtp.layers * (layer + 2 * 2 * c.model_dim**2)
    return {part: 3 * flops for part, flops in forward.items()}


def _decode_flops(c: ModelConfig, context: float) -> dict[str, float]:
    """One token whose keys are in a cache. Latent attention goes to the latent space instead (model/layers/mla.py)."""
    a = c.attention
    seen = sum(a.reach(context, kind.windowed) for kind in c.layer_specs) / c.layers
    flops = forward_flops(c, seen, context)
    flops.pop('encoder', None)
    if a.kind == 'mla':
        flops['attention'] = c.layers * 2.0 * a.heads * (2 * a.kv_lora_rank + a.qk_rope_head_dim) * seen
    if c.encoder:  # the source's keys and values are there
        flops['cross_attention'] -= c.layers * 2.0 * 2 * c.model_dim * c.attention.kv_heads * c.attention.head_dim
    return flops


def decode_bytes(c: ModelConfig, rows: int, keys: float, weight_bytes: int, cache_bytes: int) -> float:
    """Bytes that decoding one token reads, where `rows` sequences share each reading of the weights.

    Experts: those that at least one of the rows is expected to visit if choices are even. The embedding is a lookup, unless it
    is the head too. `weight_bytes` and `cache_bytes` are bytes a number.
    """
    parts: dict[str, float] = dict(parameters(c))
    parts.pop('mtp', None)
    if not (c.head and c.embedding.tied):
        parts.pop('embedding')
    if c.moe:
        parts['experts'] *= 1 - (1 - c.moe.top_k / c.moe.experts) ** rows
    seen = sum(c.attention.reach(keys, kind.windowed) for kind in c.layer_specs) / c.layers
    return sum(parts.values()) * weight_bytes / rows + cache_bytes_per_token(c, cache_bytes) * seen


def cache_bytes_per_token(c: ModelConfig, number_bytes: int) -> int:
    """Bytes of one token in every layer's cache: its keys and values, or its latent vectors; without what TPUs fill up."""
    numbers = (
        math.prod(array.shape) for group in declared_cache(c, CacheSize(rows=1, length=1)) for array in group.arrays
    )
    return sum(numbers) * number_bytes


def projections(c: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of each of a layer's matrices of attention, as training and prefill use them."""
    D, a = c.model_dim, c.attention
    N, M = a.heads * a.query_dim, a.kv_heads * a.head_dim
    if not isinstance(a, MLAConfig):
        return [(D, N), (D, M), (D, M), (D, N)]
    queries = [(D, a.q_lora_rank), (a.q_lora_rank, N)] if a.q_lora_rank else [(D, N)]
    latent = [(D, a.kv_lora_rank + a.qk_rope_head_dim), (a.kv_lora_rank, a.heads * (a.qk_nope_head_dim + a.v_head_dim))]
    return [*queries, *latent, (D, a.heads * a.v_head_dim)]


def _matrices(c: ModelConfig) -> int:
    return 3 if c.mlp.gated else 2
