"""Folders of published models, written: the counterpart of model/hub.py."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model import tensor_files
from model.config import ModelConfig
from model.families import Family, Fields, families, tensors
from model.hub import CONFIG, INDEX, SINGLE, shapes_of
from sharding.errors import UserError, nearest

FILE_BYTES = 5 * 10**9  # of tensors in one file that is written
NOT_EXPORTED = ('quantization_config', 'auto_map', 'transformers_version')
# What a model's config says of running and training it.
NO_LOGIT = ('dtype', 'weight_dtype', 'remat', 'attention', 'experts', 'dropout', 'mtp_loss')
NO_LOGIT_MOE = ('balance_loss', 'z_loss', 'bias_update_rate', 'dispatch', 'capacity_factor')


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
    names = [f'model-{i + 1:05}-of-{len(parts):05}.safetensors' for i in range(len(parts))]
    with staged(folder) as place:
        for name, contents in {
            **files,
            CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode() + b'\n',
        }.items():
            (place / name).write_bytes(contents)
        if len(parts) == 1:
            tensor_files.write(place / SINGLE, parts[0], content)
        else:
            for name, part in zip(names, parts, strict=True):
                tensor_files.write(place / name, part, content)
            total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values())
            where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            index = {'metadata': {'total_size': total}, 'weight_map': where}
            (place / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')


class staged:
    """A new folder that gets its name when the block ends well, and is gone when it does not."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Path:
        refuse_existing(self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # Of this process alone, whoever else makes a folder of that name.
        self.place = Path(tempfile.mkdtemp(prefix=f'.{self.folder.name}.', suffix='.partial', dir=self.folder.parent))
        self.place.chmod(0o777 & ~umask())
        return self.place

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                refuse_existing(self.folder)
                for path in [*self.place.rglob('*'), self.place]:
                    flush(path)
                self.place.rename(self.folder)
                flush(self.folder.parent)
        finally:
            shutil.rmtree(self.place, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def umask() -> int:
    """Which rights this process does not give to what it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_existing(folder: Path) -> None:
    """Raises UserError where there is something of that name."""
    if folder.exists() or folder.is_symlink():
        raise UserError(f'{folder}: exists already, and nothing is overwritten; choose another name, or move it away')


def published_config(
    c: ModelConfig, context: int, name: str | None = None, original: Mapping[str, Any] | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family of a model, and the fields of its config.json: of the named family, or of the first that can say this model.

    `original` is what the model was read from; it is given back where it still says the same. `context` is how many tokens a
    row may have, where the model does not say. Raises UserError where no family fits, with what stands in the way.
    """
    known = {family.name: family for family in families()}
    if name is not None and name not in known:
        raise UserError(f'--family {name}: no such family{nearest(name, known)}')
    reasons: list[tuple[str, int, str]] = []
    for family in [known[name]] if name else known.values():
        try:
            if original is not None:
                fields = {field: value for field, value in original.items() if field not in NOT_EXPORTED}
                if not _says(family, fields, c):
                    return family, fields
            # Some families' default in transformers is a padding token that a small vocabulary does not have.
            fields = {'architectures': [family.architectures[0]], 'pad_token_id': None} | family.write(c)
            if c.positions == 'rotary':  # others have a table, whose rows the family has told
                fields.setdefault('max_position_embeddings', context)
            if not (differing := _says(family, fields, c)):
                tensors(family, c, shapes_of(c))
                return family, fields
            reasons.append((family.name, len(differing), ', '.join(differing)))
        except UserError as error:
            reasons.append((family.name, 100, str(error)))
    reasons.sort(key=lambda reason: reason[1])
    told = '; '.join(f'{near}: {why}' for near, _, why in reasons[:3])
    raise UserError(f'no published family can say this model: {told}')


def _says(family: Family, fields: Mapping[str, Any], c: ModelConfig) -> list[str]:
    """Where a model differs from what its family reads in a config's fields."""
    reader = Fields(fields)
    found = family.read(reader)
    reader.finish()
    there = [name for name, said in family.told.items() if all(getattr(c, field) == said[field] for field in said)]
    return _differing(family.model_of(found, there), c)


def _differing(found: ModelConfig, c: ModelConfig) -> list[str]:
    """Where two models differ: names of fields with both values, without those that change no logit."""

    def said(config: ModelConfig) -> dict[str, Any]:
        fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_LOGIT}
        if config.moe:
            fields['moe'] = {name: value for name, value in fields['moe'].items() if name not in NO_LOGIT_MOE}
            fields['moe']['choice_bias'] = config.moe.has_choice_bias
        return fields

    mine, other = said(c), said(found)
    pairs = [(f'model.{name}', mine[name], other[name]) for name in mine]
    for name, a, b in pairs[:]:
        if isinstance(a, dict) and isinstance(b, dict):
            pairs.remove((name, a, b))
            pairs += [(f'{name}.{inner}', a[inner], b[inner]) for inner in a]
    return [f'{name} is {a!r} and would be {b!r}' for name, a, b in pairs if a != b]
