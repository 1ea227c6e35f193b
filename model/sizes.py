"""What a mesh must divide to hold a model and a batch."""

import dataclasses

from weft.model.config import VOCABULARY_MULTIPLE, LayerSpec, ModelConfig, encoder_field
from weft.sharding.mesh import BATCH, FSDP, SEQUENCE, Divides


def sizes(c: ModelConfig) -> list[Divides]:
    """What the mesh must divide to hold this model."""
    a = c.attention
    rules = [
        Divides(('tensor',), 'model.attention.heads', a.heads),
        Divides(('tensor',), 'model.attention.kv_heads', a.kv_heads, or_repeats=True),
        Divides(FSDP, 'model.model_dim', c.model_dim),
        Divides(('tensor',), 'model.model_dim', c.model_dim),
    ]
    vocabulary = VOCABULARY_MULTIPLE if c.vocabulary is None else c.padded_vocabulary
    rules += [Divides(axes, 'the padded vocabulary', vocabulary) for axes in (FSDP, ('tensor',))]
    run = c.layer_groups[c.pipelined_group]
    units = f'units of {len(run.specs)} layers' if len(run.specs) > 1 else f'{_name(run.specs[0])} layers'
    name = 'model.layers' if run.repeats == c.layers else f'the number of {units} in a row'
    rules.append(Divides(('stage',), name, run.repeats))
    if not all(kind.experts for kind in c.layer_specs):
        rules.append(Divides(('tensor',), 'model.mlp.dim', c.mlp.dim))
    if a.kind == 'mla':
        rules.append(Divides(FSDP, 'model.attention.kv_lora_rank', a.kv_lora_rank))
        if a.q_lora_rank:
            rules.append(Divides(FSDP, 'model.attention.q_lora_rank', a.q_lora_rank))
    else:
        name = 'model.attention.kv_heads × model.attention.head_dim'
        rules.append(Divides(('tensor',), name, a.kv_heads * a.head_dim))
    if c.positions.kind == 'learned' or c.embedding.token_types or c.head_mlp or c.pooler:
        rules.append(Divides((*FSDP, 'tensor'), 'model.model_dim', c.model_dim))
    if c.encoder:
        whole = 'the number of parts that an encoder–decoder can be split into along it'
        rules += [
            *(Divides((axis,), whole, 1) for axis in ('stage', 'context')),
            *(
                dataclasses.replace(rule, field=encoder_field(rule.field))
                for rule in sizes(c.of_encoder)
                if rule.axes == ('tensor',)
            ),
        ]
    if c.moe:
        rules += [
            Divides(('expert',), 'model.moe.experts', c.moe.experts),
            Divides(('tensor',), 'model.moe.mlp_dim', c.moe.mlp_dim),
        ]
        if c.moe.shared_mlp_dim is not None:
            rules.append(Divides(('tensor',), 'model.moe.shared_mlp_dim × model.moe.shared_experts', c.moe.shared_dim))
    return rules


def _name(kind: LayerSpec) -> str:
    return 'moe' if kind.experts else 'dense'


def batch_sizes(
    batch: int, sequence_length: int, accumulation: int = 1, microbatches: int | None = None
) -> list[Divides]:
    """What the mesh must divide to hold a training batch."""
    part = 'training.batch' if accumulation == 1 else 'training.batch / training.accumulation'
    rules = [
        Divides((*BATCH, 'stage'), part, batch // accumulation),
        Divides(SEQUENCE, 'training.sequence_length', sequence_length),
        Divides(('context',), 'training.sequence_length', sequence_length, twice=True),
    ]
    if microbatches is not None:
        rules += [
            Divides(('stage',), 'training.microbatches', microbatches),
            Divides(BATCH, f'{part} / training.microbatches', batch // accumulation // microbatches),
        ]
    return rules
