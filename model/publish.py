"""Folders of published models, written: the counterpart of model/hub.py."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model import tensor_files
from model.config import ModelConfig
from model.families import Family, Fields, families, tensors
from model.families.fields import passed_over
from model.hub import CONFIG, INDEX, SINGLE, shapes_of
from sharding.errors import UserError, nearest

FILE_BYTES = 5 * 10**9  # of tensors in one file that is written
NOT_EXPORTED = ('quantization_config', 'auto_map', 'transformers_version')
# What a model's config says of running and training it.
NO_LOGIT = ('dtype', 'weight_dtype', 'remat', 'attention', 'experts', 'dropout', 'mtp_loss')
NO_LOGIT_MOE = ('balance_loss', 'z_loss', 'bias_update_rate', 'dispatch', 'capacity_factor')
OF_KINDS = (
    'model.moe.first_dense_layers',
    'model.moe.pattern',
    'model.window_pattern',
    'model.rotary_pattern',
)  # what `ModelConfig.kinds` says
FAR, MOST_TOLD = 1000, 4  # fields: of a family that does not read at all; of one that are told


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
            (place / name).parent.mkdir(exist_ok=True)
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
    """A new folder that gets its name when the block ends well, and is gone when it does not.

    What a process that was killed left of it is gone when the next begins.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock: int | None = None

    def __enter__(self) -> Path:
        refuse_existing(self.folder)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.clear()
            self.make()
        except OSError as error:
            raise UserError(f'{self.folder}: cannot be made: {error.strerror}: {error.filename}') from None
        return self.place

    def make(self) -> None:
        """A folder of this process alone, whoever else makes one of that name; locked while the process lives."""
        while True:
            prefix, suffix = f'.{self.folder.name}.', '.partial'
            self.place = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=self.folder.parent))
            with contextlib.suppress(OSError):  # a file system without locks: what is killed there stays
                self.lock = locked(self.place)
            if self.place.exists():  # nobody took it for a leftover before it was locked
                self.place.chmod(0o777 & ~umask())
                return
            self.unlock()

    def clear(self) -> None:
        """Removes what processes that were killed left of this name."""
        ours = re.compile(rf'\.{re.escape(self.folder.name)}\.\w{{8}}\.partial')  # as tempfile names them
        for path in self.folder.parent.iterdir():
            if ours.fullmatch(path.name):
                with contextlib.suppress(OSError):  # a living process has it
                    lock = locked(path)
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)

    def unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

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
            self.unlock()


def locked(folder: Path) -> int:
    """A lock on a folder, which ends when it is closed or the process does.

    Raises OSError where another process has it, the folder is gone, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


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
    try:
        there = folder.exists() or folder.is_symlink()
    except OSError as error:
        raise UserError(f'{folder}: cannot be made: {error.strerror}') from None
    if there:
        raise UserError(f'{folder}: exists already, and nothing is overwritten; choose another name, or move it away')


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
            if c.positions == 'rotary':  # others have a table, whose rows the family has told
                fields.setdefault('max_position_embeddings', context)
            if not (differing := _says(family, fields, c)):
                tensors(family, c, shapes_of(c))
                return family, fields
            reasons.append((sum(one.size for one in differing), f'{family.name}, which would need {_told(differing)}'))
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


def _told(differing: list[Difference]) -> str:
    more = f' and {len(differing) - MOST_TOLD} more' if len(differing) > MOST_TOLD else ''
    return ', '.join(map(str, differing[:MOST_TOLD])) + more


def _says(family: Family, fields: Mapping[str, Any], c: ModelConfig, absent: Sequence[str] = ()) -> list[Difference]:
    """Where a model differs from what its family reads in a config's fields."""
    reader = Fields(fields)
    found = family.model(reader)
    reader.finish()
    there = [name for name, said in family.told.items() if all(getattr(c, field) == said[field] for field in said)]
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
        if isinstance(a, dict) and isinstance(b, dict):
            differing += [
                Difference(f'model.{name}.{inner}', b[inner]) for inner in a if a[inner] != b.get(inner, a[inner])
            ]
        elif a != b:
            differing.append(Difference(f'model.{name}', b, max(len(x) if isinstance(x, dict) else 1 for x in (a, b))))
    # Which layers are mixtures and which have the window can be said in several ways.
    return differing if c.kinds != found.kinds else [one for one in differing if one.field not in OF_KINDS]


def _said(c: ModelConfig) -> dict[str, Any]:
    """The fields of a model that change its logits, as they are with this model's other fields."""
    fields = {name: value for name, value in dataclasses.asdict(c).items() if name not in NO_LOGIT}
    if c.encoder is None or c.of_encoder.query_dim == c.query_dim:
        fields['query_scale'] = c.query_scale or c.query_dim**-0.5
    if c.moe:
        fields['moe'] = {name: value for name, value in fields['moe'].items() if name not in NO_LOGIT_MOE}
        fields['moe']['choice_bias'] = c.moe.has_choice_bias
        fields['moe']['shared_mlp_dim'] = c.moe.shared_dim // max(c.moe.shared_experts, 1)
        if c.moe.groups == 1:
            del fields['moe']['group_score'], fields['moe']['top_groups']
        if all(kind.experts for kind in c.kinds):
            del fields['mlp_dim']  # of a plain MLP, which no layer has
    if c.encoder:
        fields['encoder'] = {
            field: getattr(c.of_encoder, field) for field in fields['encoder'] if field != 'start_token'
        }
        fields['encoder']['start_token'] = c.encoder.start_token
    idle = [] if c.positions == 'relative' else ['relative_buckets', 'relative_most']
    idle += [] if c.positions == 'rotary' else [name for name in fields if name.startswith(('rope_', 'rotary_'))]
    idle += [] if c.activation == 'clamped_swiglu' else ['activation_limit']
    idle += [] if c.window else ['window_pattern', 'local_rope_theta']
    idle += [] if c.head else ['tied_embedding', 'logit_scale', 'logit_softcap']
    return {name: value for name, value in fields.items() if name not in idle}
