"""The GGUF format, versions 2 and 3, little-endian (its published description: ggml's docs/gguf.md).

A file has a header (keys with values, then each tensor's name, dims, type and offset) and the tensors' numbers, many of them in
blocks of few bits (blocks.py). Files come from strangers: a header is read within limits that are named here and in header.py,
and no longer than the file is; each claim in it is checked before it is believed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.hub.gguf.blocks import LAYOUTS, PLAIN, Blocks, Numbers, type_name
from weft.hub.gguf.header import Header
from weft.hub.tensor_files import Stored
from weft.runtime.errors import UserError, shown
from weft.storage.foreign import SteadyFile, shown_path, shown_value

MAGIC = b'GGUF'
VERSIONS = (2, 3)
MOST_KEYS = 2**16
MOST_TENSORS = 2**20
MOST_PARTS = 1024  # files that a model is split into
MOST_DIMS = 4
Entry = tuple[tuple[int, ...], int, int]  # a tensor's shape, its type's number and its offset
PART = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.gguf', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the header of a file, or of all files that a model is split into, says."""

    path: Path  # of the first
    values: Mapping[str, Any]  # numbers, texts, NumPy arrays of numbers, lists of texts
    tensors: Mapping[str, Numbers]

    def error(self, said: str) -> UserError:
        return UserError(f'{shown_path(self.path)}: {said}')


def read(path: Path) -> Contents:
    """What a GGUF file's header says, and those of the files beside it that it goes on in.

    Raises UserError where a file is not whole, says what cannot be true, or is of a kind that is not read.
    """
    first = _one(path)
    count = whole(first, 'split.count', 1)
    return first if count <= 1 else _parts(first, count)


def whole(contents: Contents, key: str, default: int) -> int:
    """A key that holds a whole number, from 0 on."""
    found = contents.values.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise contents.error(f'key {key} is {shown_value(found)}: it must be a whole number from 0 on')
    return found


def _parts(first: Contents, count: int) -> Contents:
    path = first.path
    named = PART.fullmatch(path.name)
    if count > MOST_PARTS:
        raise first.error(f'is one of {count} files: at most {MOST_PARTS} are read')
    if not named or int(named[3]) != count:
        raise first.error(
            f'is one of {count} files of a model, which are named NAME-00001-of-{count:05}.gguf and so on: give '
            'them these names again, and name the first'
        )
    names = [path.with_name(f'{named[1]}-{i + 1:05}-of-{count:05}.gguf') for i in range(count)]
    if whole(first, 'split.no', 0) != 0 or path != names[0]:
        raise first.error(f'is not the first of the {count} files of a model: name {shown_path(names[0])}')
    tensors = dict(first.tensors)
    for i, name in enumerate(names[1:], 1):
        if not name.is_file():
            raise UserError(
                f'{shown_path(name)}: is missing: {shown(path.name)} says that the model is in {count} files'
            )
        part = _one(name)
        if (of := whole(part, 'split.count', 1)) != count or whole(part, 'split.no', 0) != i:
            raise part.error(
                f'says that it is file {whole(part, "split.no", 0)} of {of}, counted from 0, and by its name is {i} of '
                f'{count}: it belongs to another model'
            )
        for tensor, numbers in part.tensors.items():
            if tensor in tensors:
                raise part.error(f'tensor {tensor} is also in {shown(tensors[tensor].path.name)}')
            tensors[tensor] = numbers
    wanted = whole(first, 'split.tensors.count', len(tensors))
    if wanted != len(tensors):
        raise first.error(f'its {count} files have {len(tensors)} tensors and must have {wanted}: one was exchanged')
    return Contents(path, first.values, tensors)


def _one(path: Path) -> Contents:
    """What one file's header says."""
    header = Header(SteadyFile.of(path))
    if header.size < 24:
        raise header.error(f'has {header.size} bytes: not a GGUF file, which begins with 24 bytes of header')
    header.need(4, 'its first bytes')
    magic, version = header.raw[:4], header.number('<u4', 'its version')
    if magic != MAGIC:
        raise header.error(f'begins with {magic!r} and not with {MAGIC!r}: not a GGUF file')
    if int.from_bytes(version.to_bytes(4, 'little'), 'big') in (1, *VERSIONS):
        raise header.error('is big-endian: take the little-endian file, or turn it with gguf_convert_endian.py')
    if version not in VERSIONS:
        again = '; convert the model again with a newer converter' if version < min(VERSIONS) else ''
        raise header.error(f'is of GGUF version {version}; supported: {" and ".join(map(str, VERSIONS))}{again}')
    tensors = header.count('the header', 'tensors', MOST_TENSORS, 24)
    keys = header.count('the header', 'keys', MOST_KEYS, 13)
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = header.name('a key')
        if key in values:
            raise header.error(f'key {key!r} is there twice')
        values[key] = header.value(key)
    entries: dict[str, Entry] = {}
    for _ in range(tensors):
        name = header.name('a tensor')
        if name in entries:
            raise header.error(f'tensor {name!r} is there twice')
        entries[name] = _entry(header, name)
    alignment = whole(Contents(path, values, {}), 'general.alignment', 32)
    if not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise header.error(f'general.alignment is {alignment}: it must be a power of 2 up to {2**16}, such as 32')
    return Contents(path, values, _placed(header, entries, alignment))


def _entry(header: Header, name: str) -> Entry:
    what = f'tensor {name!r}'
    dims = header.number('<u4', what)
    if not 1 <= dims <= MOST_DIMS:
        raise header.error(f'{what} has {dims} dims: from 1 to {MOST_DIMS} work')
    shape = tuple(header.number('<u8', what) for _ in range(dims))[::-1]  # a file has the innermost first
    return shape, header.number('<u4', what), header.number('<u8', what)


def _placed(header: Header, entries: Mapping[str, Entry], alignment: int) -> dict[str, Numbers]:
    """The tensors, each where its numbers are."""
    start = -(-header.at // alignment) * alignment
    found: dict[str, Numbers] = {}
    for name, (shape, kind, offset) in entries.items():
        what = f'tensor {name!r}'
        layout = LAYOUTS.get(kind)
        if layout is None:
            known = ', '.join(one.name for one in LAYOUTS.values())
            raise header.error(f'{what} is of type {type_name(kind)}, which is not supported; supported: {known}')
        if not all(1 <= dim < 2**48 for dim in shape) or math.prod(shape) >= 2**48:
            raise header.error(f'{what} has dims {list(shape)}: each must be at least 1, all below 2^48 numbers')
        if shape[-1] % layout.numbers:
            raise header.error(
                f'{what} has rows of {shape[-1]} numbers, and {layout.name} has them in blocks of '
                f'{layout.numbers}: the header is wrong'
            )
        if offset % alignment or offset >= 2**63:
            raise header.error(f'{what} begins at {offset}, which is no multiple of {alignment}: the header is wrong')
        begin = start + offset
        plain = PLAIN.get(layout.name)
        found[name] = (
            Stored(header.file, plain, shape, begin) if plain is not None else Blocks(header.file, layout, shape, begin)
        )
    end = start
    for name, one in sorted(found.items(), key=lambda item: item[1].begin):
        if one.begin < end:
            raise header.error(f'tensor {name!r} overlaps another: the header is wrong')
        if one.begin - end >= alignment:
            raise header.error(f'tensor {name!r} leaves {one.begin - end} bytes before it unused: the header is wrong')
        end = one.begin + one.bytes
        if end > header.size:
            raise header.error(
                f'has {header.size} bytes and tensor {name!r} ends at {end}: it was cut off; fetch it again'
            )
    return found
