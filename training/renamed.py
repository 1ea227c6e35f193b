"""Keys that earlier configs had, and what they are called now: there is no other compatibility with them."""

import dataclasses
from typing import Any

from weft.model.parts.positions import RopeScaling

# By section: its keys, as `new=old` where the key in the section `model` of earlier configs had another name; the optimizer's
# were in `training`.
SECTIONS = {
    'compute': 'dtype weight_dtype remat grouped_matmul=experts dispatch=moe.dispatch capacity_factor=moe.capacity_factor',
    'model.attention': (
        'heads kv_heads head_dim qk_norm qkv_bias o_bias window window_pattern scale=query_scale '
        'scale_by_layer=query_scale_by_layer softcap=attention_softcap sinks=attention_sinks kind=latent '
        'q_lora_rank=latent.q_rank kv_lora_rank=latent.kv_rank qk_nope_head_dim=latent.plain_dim '
        'qk_rope_head_dim=latent.rotary_dim v_head_dim=latent.value_dim'
    ),
    'model.mlp': 'dim=mlp_dim activation limit=activation_limit bias=mlp_bias',
    'model.norm': 'epsilon=norm_epsilon order=norm_order offset=norm_offset',
    'model.positions': (
        'max=max_positions buckets=relative_buckets max_distance=relative_most theta=rope_theta scaling=rope_scaling '
        'fraction=rotary_fraction layout=rotary_pairs pattern=rotary_pattern local_theta=local_rope_theta'
    ),
    'model.embedding': 'tied=tied_embedding scale=embedding_scale token_types=segment_kinds norm=embedding_norm',
    'model.head': 'scale=logit_scale softcap=logit_softcap mlp=head_mlp bias=head_bias',
    'model.pooler': 'next_sentence',
    'model.mtp': 'layers=mtp_layers loss=mtp_loss',
    'optimizer': (
        'learning_rate warmup_steps final_learning_rate_ratio=final_learning_rate weight_decay beta1 beta2 epsilon '
        'grad_clip=clip'
    ),
}
RENAMED: dict[str, str] = {}
for section, keys in SECTIONS.items():
    for key in keys.split():
        new, _, old = key.partition('=')
        RENAMED[f'{"training" if section == "optimizer" else "model"}.{old or new}'] = f'{section}.{new}'
RENAMED['model.bias'] = 'model.attention.o_bias, model.mlp.bias and model.norm.bias'
for field in dataclasses.fields(RopeScaling):
    RENAMED[f'model.rope_scaling.{field.name}'] = f'model.positions.scaling.{field.name}'

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
