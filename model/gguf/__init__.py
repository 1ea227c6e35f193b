"""GGUF files as published folders: the fields of config.json that a header stands for, and tensors by their names there.

`read` gives both, to be taken further like a folder's; model/gguf_file.py reads the format, model/gguf/architectures.py says
what each architecture's keys and tensors mean. Tokenizers are made of the same header by data/gguf_tokenizer.py.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model import gguf_file
from model.families import Tensor
from model.gguf.architectures import ARCHITECTURES, Architecture, Experts, Keys, Pair, Second
from model.gguf.sources import Expert, Undone
from model.gguf_file import Blocks, Contents, Numbers
from sharding.errors import UserError, nearest

SUFFIX = '.gguf'
Found = Numbers | Undone
LAYER = re.compile(r'(blk|layers|h)\.(\d+)\.')
EXPERT = re.compile(r'(experts|ffn_gate|ffn_up|ffn_down)\.(\d+)\.')
IDS = {'bos_token_id': 'bos_token_id', 'eos_token_id': 'eos_token_id', 'pad_token_id': 'padding_token_id'}


@dataclasses.dataclass(frozen=True)
class Model:
    """A file that was read."""

    contents: Contents
    architecture: Architecture
    config: Mapping[str, Any]  # as in config.json
    stored: Mapping[str, Found]  # by the names of a published folder
    called: Mapping[str, str]  # what each of these is made of in the file

    @property
    def path(self) -> Path:
        return self.contents.path

    @property
    def packed(self) -> list[str]:
        """The types of its tensors in blocks of few bits."""
        return sorted({one.layout.name for one in self.contents.tensors.values() if isinstance(one, Blocks)})

    def check(self, table: Iterable[Tensor]) -> None:
        """Raises UserError where a tensor of `table` is missing or of another shape, by its name in the file."""
        for one in table:
            found = self.stored.get(one.name)
            if one.copy_of or (found is not None and found.shape == one.shape):
                continue
            if found is None:
                raise UserError(
                    f'{self.path}: tensor {self.name_of(one.name)} is missing: by its keys a model of architecture '
                    f'{self.architecture.name} has it'
                )
            raise UserError(
                f'{found.path}: tensor {self.called[one.name]} stands for {list(found.shape)} numbers and by the keys of the '
                f'file must for {list(one.shape)}'
            )

    def name_of(self, published: str) -> str:
        """What a tensor that a published folder has is called in a file."""
        if published in self.called:
            return self.called[published]
        layer, expert = LAYER.search(published), EXPERT.search(published)
        pattern = LAYER.sub(r'\1.{i}.', published, count=1)
        pattern = EXPERT.sub(r'\1.{e}.', pattern, count=1)
        base, _, suffix = pattern.rpartition('.')
        for name, entry in self.architecture.names.items():
            theirs = entry if isinstance(entry, str) else '' if isinstance(entry, Second) else entry.name
            if theirs in (base, pattern):
                full = name if theirs == pattern else f'{name}.{suffix}'
                full = full.replace('{i}', layer[2] if layer else '')
                return full.replace('{e}', expert[2] if expert else '')
        return published

    def config_json(self) -> bytes:
        """The file config.json that a published folder would have."""
        return json.dumps(self.config, indent=2, ensure_ascii=False).encode() + b'\n'


def is_file(path: Path) -> bool:
    """Whether a path names a GGUF file, which need not exist; a folder is none, whatever its name."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def read(path: Path) -> Model:
    """A file, or the first of those that a model is split into. Raises UserError for what is not supported."""
    contents = gguf_file.read(path)
    values = contents.values
    kind = values.get('general.type', 'model')
    if kind != 'model':
        raise UserError(f'{path}: general.type is {kind!r}: only files of whole models are read, which have "model"')
    name = values.get('general.architecture')
    if not isinstance(name, str) or name not in ARCHITECTURES:
        near = nearest(name, ARCHITECTURES) if isinstance(name, str) else ''
        raise UserError(
            f'{path}: general.architecture is {name!r}, which is not supported{near}; supported: {", ".join(ARCHITECTURES)}'
        )
    if not contents.tensors:
        raise UserError(f'{path}: has no tensors: it is a vocabulary alone, not a model')
    architecture = ARCHITECTURES[name]
    keys = Keys(path, name, values, contents.tensors)
    config = dict(architecture.config(keys))
    config |= {
        field: values[f'tokenizer.ggml.{key}'] for field, key in IDS.items() if f'tokenizer.ggml.{key}' in values
    }
    config |= keys.unread()
    stored, called = _as_published(contents, architecture, config)
    return Model(contents, architecture, config, stored, called)


def _as_published(
    contents: Contents, architecture: Architecture, config: Mapping[str, Any]
) -> tuple[dict[str, Found], dict[str, str]]:
    """Tensors by the names of a published folder, and what each is made of in the file."""
    found: dict[str, Found] = {}
    called: dict[str, str] = {}

    def add(published: str, name: str, source: Found) -> None:
        if published in found:
            raise UserError(
                f'{source.path}: tensors {called[published]} and {name} are the same one of a model of architecture '
                f'{architecture.name}'
            )
        found[published], called[published] = source, name

    for name, numbers in contents.tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in architecture.consumed):
            continue
        layer, expert = LAYER.search(name), EXPERT.search(name)
        pattern = LAYER.sub(r'\1.{i}.', name, count=1)
        pattern = EXPERT.sub(r'\1.{e}.', pattern, count=1)
        base, _, suffix = pattern.rpartition('.')
        entry = architecture.names.get(pattern)
        tail = '' if entry is not None else f'.{suffix}'
        if entry is None and suffix in ('weight', 'bias'):
            entry = architecture.names.get(base)
        if entry is None:
            raise UserError(
                f'{numbers.path}: tensor {name} {list(numbers.shape)} is none that a model of architecture '
                f'{architecture.name} is known to have; its numbers would be lost'
            )
        put = lambda published: published.replace('{i}', layer[2] if layer else '')  # noqa: B023  (used at once)
        if isinstance(entry, Second):
            first = put(entry.first)
            if first not in contents.tensors:
                raise UserError(f'{numbers.path}: tensor {name} is there without {first}, which belongs to it')
        elif isinstance(entry, Pair):
            second = put(entry.second)
            if second not in contents.tensors:
                raise UserError(f'{numbers.path}: tensor {name} is there without {second}, which belongs to it')
            other = contents.tensors[second]
            entry.check(numbers, other, name, second)
            add(put(entry.name), f'{name} and {second}', entry.undo(numbers, other))
        elif isinstance(entry, Experts):
            if len(numbers.shape) < 2:
                raise UserError(
                    f'{numbers.path}: tensor {name} {list(numbers.shape)} has a matrix for each expert: 3 dims'
                )
            if numbers.shape[0] != (wanted := architecture.experts(config)):
                raise UserError(
                    f'{numbers.path}: tensor {name} is of {numbers.shape[0]} experts and the keys say {wanted}'
                )
            for e in range(numbers.shape[0]):
                add(put(entry.name).replace('{e}', str(e)) + tail, name, Expert(numbers, e))
        elif isinstance(entry, str):
            add(put(entry).replace('{e}', expert[2] if expert else '') + tail, name, numbers)
        else:
            published = put(entry.name) + tail
            add(published, name, entry.undo(numbers, config, name))
    return found, called
