"""Keys that earlier configs had, and what they are called now: there is no other compatibility with them."""

import dataclasses
from typing import Any

from weft.model.parts.positions import RopeScaling

# Keys of earlier configs -> what they are called now.
RENAMED: dict[str, str] = {
    'model.dtype': 'compute.dtype',
    'model.weight_dtype': 'compute.weight_dtype',
    'model.remat': 'compute.remat',
    'model.experts': 'compute.grouped_matmul',
    'model.moe.dispatch': 'compute.dispatch',
    'model.moe.capacity_factor': 'compute.capacity_factor',
    'model.heads': 'model.attention.heads',
    'model.kv_heads': 'model.attention.kv_heads',
    'model.head_dim': 'model.attention.head_dim',
    'model.qk_norm': 'model.attention.qk_norm',
    'model.qkv_bias': 'model.attention.qkv_bias',
    'model.o_bias': 'model.attention.o_bias',
    'model.window': 'model.attention.window',
    'model.window_pattern': 'model.attention.window_pattern',
    'model.query_scale': 'model.attention.scale',
    'model.query_scale_by_layer': 'model.attention.scale_by_layer',
    'model.attention_softcap': 'model.attention.softcap',
    'model.attention_sinks': 'model.attention.sinks',
    'model.mlp_dim': 'model.mlp.dim',
    'model.activation': 'model.mlp.activation',
    'model.activation_limit': 'model.mlp.limit',
    'model.mlp_bias': 'model.mlp.bias',
    'model.norm_epsilon': 'model.norm.epsilon',
    'model.norm_order': 'model.norm.order',
    'model.norm_offset': 'model.norm.offset',
    'model.max_positions': 'model.positions.max',
    'model.relative_buckets': 'model.positions.buckets',
    'model.relative_most': 'model.positions.max_distance',
    'model.rope_theta': 'model.positions.theta',
    'model.rope_scaling': 'model.positions.scaling',
    'model.rotary_fraction': 'model.positions.fraction',
    'model.rotary_pairs': 'model.positions.layout',
    'model.rotary_pattern': 'model.positions.pattern',
    'model.local_rope_theta': 'model.positions.local_theta',
    'model.tied_embedding': 'model.embedding.tied',
    'model.embedding_scale': 'model.embedding.scale',
    'model.segment_kinds': 'model.embedding.token_types',
    'model.embedding_norm': 'model.embedding.norm',
    'model.logit_scale': 'model.head.scale',
    'model.logit_softcap': 'model.head.softcap',
    'model.head_mlp': 'model.head.mlp',
    'model.head_bias': 'model.head.bias',
    'model.next_sentence': 'model.pooler.next_sentence',
    'model.mtp_layers': 'model.mtp.layers',
    'model.mtp_loss': 'model.mtp.loss',
    'model.latent.q_rank': 'model.attention.q_lora_rank',
    'model.latent.kv_rank': 'model.attention.kv_lora_rank',
    'model.latent.plain_dim': 'model.attention.qk_nope_head_dim',
    'model.latent.rotary_dim': 'model.attention.qk_rope_head_dim',
    'model.latent.value_dim': 'model.attention.v_head_dim',
    'model.latent': 'model.attention.kind',
    **{
        f'model.rope_scaling.{field.name}': f'model.positions.scaling.{field.name}'
        for field in dataclasses.fields(RopeScaling)
    },
    'model.bias': 'model.attention.o_bias, model.mlp.bias and model.norm.bias',
    'training.learning_rate': 'optimizer.learning_rate',
    'training.warmup_steps': 'optimizer.warmup_steps',
    'training.final_learning_rate': 'optimizer.final_learning_rate_ratio',
    'training.weight_decay': 'optimizer.weight_decay',
    'training.beta1': 'optimizer.beta1',
    'training.beta2': 'optimizer.beta2',
    'training.epsilon': 'optimizer.epsilon',
    'training.clip': 'optimizer.grad_clip',
}
# Keys that hold a value in earlier configs, and are sections now -> where the value stands.
RENAMED_VALUES = {
    'model.attention': 'compute.attention',
    'model.norm': 'model.norm.kind',
    'model.positions': 'model.positions.kind',
    'model.head': 'model.head, which is null for none',
    'model.pooler': 'model.pooler, which is null for none',
}


def renamed(key: str, value: Any) -> str | None:
    """What to say of a key with this value where earlier configs had it so; None: it is no key of theirs alone."""
    if key in RENAMED:
        return f'no key {key!r}; did you mean {RENAMED[key]!r}?'
    if key in RENAMED_VALUES and value is not None:
        return f'{key} is a section; did you mean {RENAMED_VALUES[key]!r}?'
    return None
