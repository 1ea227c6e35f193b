"""What a mesh must divide to hold a model and a batch."""

import dataclasses
import functools

from weft.model.config import VOCABULARY_MULTIPLE, ModelConfig, encoder_field
from weft.model.decoder import weights_of
from weft.model.parts.registry import MIXERS
from weft.sharding.mesh import BATCH, FSDP, SEQUENCE, Divides


@functools.lru_cache(maxsize=256)
def sizes(c: ModelConfig) -> list[Divides]:
    """What the mesh must divide to hold this model: the dims of its weights, its heads, its layers."""
    vocabulary = VOCABULARY_MULTIPLE if c.vocabulary is None else c.padded_vocabulary
    rules = [
        *MIXERS.module(c.attention).rules(c),
        *(Divides(axes, 'model.model_dim', c.model_dim) for axes in (FSDP, ('tensor',))),
        *(Divides(axes, 'the padded vocabulary', vocabulary) for axes in (FSDP, ('tensor',))),
    ]
    run = c.layer_groups[c.pipelined_group]
    kind = 'moe' if run.specs[0].experts else 'dense'
    units = f'units of {len(run.specs)} layers' if len(run.specs) > 1 else f'{kind} layers'
    name = 'model.layers' if run.repeats == c.layers else f'the number of {units} in a row'
    rules.append(Divides(('stage',), name, run.repeats))
    for name, weight in weights_of(c).items():
        rules += [] if name.startswith('encoder.') else weight.rules()
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
    return list(dict.fromkeys(rules))


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
