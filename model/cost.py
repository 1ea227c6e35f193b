"""What a model costs by its shapes alone: parameters, matmul FLOPs per token, bytes read per decoded token.

Conventions. A multiplication and an addition are 2 FLOPs; only matmuls count (no norms, softmax, rotations or lookups). A
backward pass is twice its forward pass; what rematerialisation repeats is not counted. Attention is the causal triangle:
in a row of T tokens that are one document a token sees (T + 1) / 2 keys on average, fewer with a window. Of the experts,
those that a token visits. The vocabulary is the real one, unpadded.
"""

from model.config import ModelConfig


def parameters(c: ModelConfig) -> dict[str, int]:
    """Parameters by part; the sum is what a checkpoint holds (with the embedding's padding rows)."""
    D, N, M = c.model_dim, c.heads * c.head_dim, c.kv_heads * c.head_dim
    norm = D * (2 if c.norm == 'layernorm' and c.bias else 1)
    attention = D * (2 * N + 2 * M) + (N + 2 * M) * c.qkv_bias + D * c.bias + 2 * c.head_dim * c.qk_norm
    kinds = dict(c.groups)
    parts = {
        'embedding': c.padded_vocabulary * D,
        'attention': c.layers * attention,
        'mlp': kinds.get('dense', 0) * _mlp(c, c.mlp_dim),
        'norms': (2 * c.layers + 1) * norm,
        'head': 0 if c.tied_embedding else c.padded_vocabulary * D,
    }
    if c.moe:
        parts['router'] = kinds.get('moe', 0) * c.moe.experts * (D + bool(c.moe.bias_update_rate))
        parts['experts'] = kinds.get('moe', 0) * c.moe.experts * _matrices(c) * D * c.moe.mlp_dim
        parts['shared_experts'] = kinds.get('moe', 0) * (
            _mlp(c, c.moe.shared_experts * c.moe.mlp_dim) if c.moe.shared_experts else 0
        )
    return parts


def active_parameters(c: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts that it does not visit."""
    parts = parameters(c)
    idle = parts['experts'] * (c.moe.experts - c.moe.top_k) // c.moe.experts if c.moe else 0
    return sum(parts.values()) - idle


def keys_seen(c: ModelConfig, sequence_length: int) -> float:
    """Keys that a token of a row sees, itself one of them, on average."""
    window = min(c.window or sequence_length, sequence_length)
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


def forward_flops(c: ModelConfig, keys: float) -> dict[str, float]:
    """Matmul FLOPs of one token's forward pass by part, where it sees `keys` keys."""
    D, N, M = c.model_dim, c.heads * c.head_dim, c.kv_heads * c.head_dim
    kinds = dict(c.groups)
    flops = {
        'projections': c.layers * 2.0 * D * (2 * N + 2 * M),
        'attention': c.layers * 2 * 2.0 * N * keys,
        'mlp': kinds.get('dense', 0) * 2.0 * _matrices(c) * D * c.mlp_dim,
        'head': 2.0 * D * c.vocabulary,
    }
    if c.moe:
        visited = c.moe.top_k + c.moe.shared_experts
        flops['router'] = kinds.get('moe', 0) * 2.0 * D * c.moe.experts
        flops['experts'] = kinds.get('moe', 0) * 2.0 * visited * _matrices(c) * D * c.moe.mlp_dim
    return flops


def training_flops(c: ModelConfig, sequence_length: int) -> float:
    """Matmul FLOPs of one token's forward and backward pass."""
    return 3 * sum(forward_flops(c, keys_seen(c, sequence_length)).values())


def decode_bytes(c: ModelConfig, rows: int, keys: float, weight_bytes: int, cache_bytes: int) -> float:
    """Bytes that decoding one token reads, where `rows` sequences share each reading of the weights.

    Experts: those that at least one of the rows is expected to visit if choices are even. The embedding is a lookup, unless it
    is the head too. `weight_bytes` and `cache_bytes` are bytes a number.
    """
    parts: dict[str, float] = dict(parameters(c))
    if not c.tied_embedding:
        parts.pop('embedding')
    if c.moe:
        parts['experts'] *= 1 - (1 - c.moe.top_k / c.moe.experts) ** rows
    seen = min(keys, c.window or keys)
    return sum(parts.values()) * weight_bytes / rows + cache_bytes_per_token(c, cache_bytes) * seen


def cache_bytes_per_token(c: ModelConfig, number_bytes: int) -> int:
    """Bytes that the cache keeps of one token: its keys and values in every layer."""
    return 2 * c.layers * c.kv_heads * c.head_dim * number_bytes


def _matrices(c: ModelConfig) -> int:
    return 3 if c.gated else 2


def _mlp(c: ModelConfig, hidden: int) -> int:
    return _matrices(c) * c.model_dim * hidden + (hidden + c.model_dim) * c.bias
