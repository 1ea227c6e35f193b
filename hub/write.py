"""Folders of published models, written: the counterpart of hub/read.py."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.hub import tensor_files
from weft.hub.families import Family, Fields, families
from weft.hub.families.fields import passed_over
from weft.hub.published_folder import CONFIG, INDEX, SINGLE
from weft.hub.read import shapes_of
from weft.hub.tensor_table import tensors
from weft.hub.tokenizers.side_files import json_file
from weft.model.config import OF_TRAINING, ModelConfig
from weft.runtime.errors import UserError, nearest
from weft.storage import files as disk
from weft.storage.staged import staged

FILE_BYTES = 5 * 10**9  # of tensors in one file that is written
NOT_EXPORTED = ('quantization_config', 'auto_map', 'transformers_version')
OF_LAYERS = tuple(  # what `ModelConfig.layer_specs` says
    f'model.{field}'
    for field in ('moe.first_dense_layers', 'moe.pattern', 'attention.window_pattern', 'positions.pattern')
)
FAR, MOST_TOLD = 1000, 8  # fields: of a family that does not read at all; of one that are told


def write(
    folder: Path,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    kinds: Mapping[str, tuple[np.dtype, Sequence[int]]],
    content: Callable[[str], np.ndarray],
    file_bytes: int = FILE_BYTES,
) -> None:
    """Makes a folder of a config, files beside it, and tensors, of which `content` is asked for one at a time.

    It has its name only when all of it is there. Raises UserError where it exists.
    """
    parts: list[dict[str, tuple[np.dtype, Sequence[int]]]] = [{}]
    room = file_bytes
    for name, (dtype, shape) in kinds.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and parts[-1]:
            parts.append({})
            room = file_bytes
        parts[-1][name] = (dtype, shape)
        room -= size
    names = [SINGLE]
    if len(parts) > 1:
        names = [f'model-{i + 1:05}-of-{len(parts):05}.safetensors' for i in range(len(parts))]
    with staged(folder) as place:
        for name, contents in {**files, CONFIG: json_file(config)}.items():
            disk.make_folder((place / name).parent)
            disk.put(place / name, contents)
        for name, part in zip(names, parts, strict=True):
            tensor_files.write(place / name, part, content)
        if len(parts) > 1:
            total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values())
            where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            disk.put(place / INDEX, json_file({'metadata': {'total_size': total}, 'weight_map': where}))


def published_config(
    c: ModelConfig,
    context: int,
    name: str | None = None,
    original: Mapping[str, Any] | None = None,
    absent: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> tuple[Family, dict[str, Any]]:
    """The family of a model, and the fields of its config.json: of the named family, or of the first that can say this model.

    `original` is what the model was read from; it is given back where it still says the same, but for parts that were `absent`
    from its files and fields that were `ignored`. `context` is how many tokens a row may have, where the model does not say.
    Raises UserError where no family fits, with what stands in the way.
    """
    known = {family.name: family for family in families()}
    if name is not None and name not in known:
        raise UserError(f'--family {name}: no such family{nearest(name, known)}')
    reasons: list[tuple[int, str]] = []
    for family in [known[name]] if name else known.values():
        try:
            if original is not None:
                fields = {field: value for field, value in original.items() if field not in NOT_EXPORTED}
                read = passed_over(fields, [name for name in ignored if name not in NOT_EXPORTED], CONFIG)
                if not _says(family, read, c, absent):
                    return family, fields
            # Some families' default in transformers is a padding token that a small vocabulary does not have.
            fields = {'pad_token_id': None} | family.config(c)
            if c.positions.kind == 'rotary':  # others have a table, whose rows the family has told
                fields.setdefault('max_position_embeddings', context)
            if not (differing := _says(family, fields, c)):
                tensors(family, c, shapes_of(c))
                return family, fields
            told = ', '.join(map(str, differing[:MOST_TOLD]))
            told += f' and {len(differing) - MOST_TOLD} more' if len(differing) > MOST_TOLD else ''
            reasons.append((sum(one.size for one in differing), f'{family.name}, which would need {told}'))
        except UserError as error:
            reasons.append((FAR, f'{family.name}: {error}'))
    if name:
        raise UserError(f'this model cannot be said as {reasons[0][1]}')
    _, nearest_one = min(reasons, key=lambda reason: reason[0])
    raise UserError(f'no published family can say this model; the nearest is {nearest_one}')


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field in which a family has something else."""

    field: str
    wanted: Any  # the family's
    size: int = 1  # how many fields it stands for

    def __str__(self) -> str:
        # A whole section in words; one value as it would be given on the command line.
        if isinstance(self.wanted, dict):
            return self.field
        return f'{self.field}={self.wanted if isinstance(self.wanted, str) else json.dumps(self.wanted)}'


def _says(family: Family, fields: Mapping[str, Any], c: ModelConfig, absent: Sequence[str] = ()) -> list[Difference]:
    """Where a model differs from what its family reads in a config's fields."""
    reader = Fields(fields)
    found = family.model(reader)
    reader.finish()
    there = [name for name, told in family.told.items() if told(c) == c]
    found = family.model_of(found, there)
    for part in absent:
        found = family.without(found, part)
    return _differing(found, c)


def _differing(found: ModelConfig, c: ModelConfig) -> list[Difference]:
    """Where `c` differs from the model that a family reads, by what changes a logit."""
    mine, other = _said(c), _said(found)
    differing = []
    for name in [name for name in mine if name in other]:
        a, b = mine[name], other[name]
        both = isinstance(a, dict) and isinstance(b, dict)
        if both and a.get('kind') == b.get('kind'):
            differing += [
                Difference(f'model.{name}.{inner}', b[inner]) for inner in a if a[inner] != b.get(inner, a[inner])
            ]
        elif both:
            differing.append(Difference(f'model.{name}.kind', b['kind'], max(len(a), len(b))))
        elif a != b:
            differing.append(Difference(f'model.{name}', b, max(len(x) if isinstance(x, dict) else 1 for x in (a, b))))
    # Which layers are mixtures and which have the window can be said in several ways.
    same = c.layer_specs == found.layer_specs
    return [one for one in differing if not (same and one.field in OF_LAYERS)]


def _said(c: ModelConfig) -> dict[str, Any]:
    """The fields of a model that change its logits, those of a part by its name, as they are with this model's other fields."""
    fields: dict[str, Any] = dataclasses.asdict(c)
    for key in OF_TRAINING:
        part, _, field = key.rpartition('.')
        section = fields[part] if part else fields
        if section is not None:
            del section[field]
    if c.encoder is None or c.of_encoder.attention.query_dim == c.attention.query_dim:
        fields['attention']['scale'] = c.attention.scale or c.attention.query_dim**-0.5
    if c.moe:
        fields['moe']['choice_bias'] = c.moe.has_choice_bias
        fields['moe']['shared_mlp_dim'] = c.moe.shared_dim // max(c.moe.shared_experts, 1)
        if c.moe.groups == 1:
            del fields['moe']['group_score'], fields['moe']['top_groups']
        if all(kind.experts for kind in c.layer_specs):
            del fields['mlp']['dim']  # of a plain MLP, which no layer has
    if c.encoder:
        e, own = c.of_encoder, {field: getattr(c.encoder, field) for field in ('layers', 'start_token')}
        heads = {field: getattr(e.attention, field) for field in ('heads', 'kv_heads', 'head_dim')}
        fields['encoder'] = own | heads | {'mlp_dim': e.mlp.dim}
    if c.mlp.activation != 'clamped_swiglu':
        del fields['mlp']['limit']
    if not c.attention.window:
        del fields['attention']['window_pattern']
        fields['positions'].pop('local_theta', None)
    if not c.head:
        del fields['embedding']['tied']
    return fields
