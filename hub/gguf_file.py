"""The GGUF format, versions 2 and 3, little-endian (its published description: ggml's docs/gguf.md).

A file has a header (keys with values, then each tensor's name, dims, type and offset) and the tensors' numbers, many of them in
blocks of few bits. Files come from strangers: a header is read within limits that are named here, and no longer than the file
is; each claim in it is checked before it is believed. Numbers are read by slices, blocks by those that a slice touches.
"""

import dataclasses
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from weft.hub.tensor_files import Stored, read_part
from weft.runtime.errors import UserError, shown
from weft.storage.foreign import SteadyFile, opened, shown_path, shown_value

MAGIC = b'GGUF'
VERSIONS = (2, 3)
LONGEST_HEADER = 2**27  # bytes; the tokens and merges of a vocabulary of 262,144 are some 15 MB
FIRST = 2**20  # bytes of a file that are read first
LONGEST_TEXT = 2**24  # bytes of one text, such as a chat template
LONGEST_NAME = 256  # bytes of a key or of a tensor's name, of which ggml allows 63
MOST_KEYS = 2**16
MOST_TENSORS = 2**20
MOST_VALUES = 2**22  # of an array: tokens, merges
MOST_TEXTS = 2**23  # in all arrays together
MOST_PARTS = 1024  # files that a model is split into
MOST_DIMS = 4
PART = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.gguf', re.DOTALL)


class Layout(NamedTuple):
    """A type of tensor: so many numbers in a block of so many bytes. No bytes: it is known, and not supported."""

    name: str
    numbers: int = 1
    bytes: int = 0


# By the number that stands for each in a file.
LAYOUTS = {
    0: Layout('F32', 1, 4),
    1: Layout('F16', 1, 2),
    2: Layout('Q4_0', 32, 18),
    3: Layout('Q4_1', 32, 20),
    6: Layout('Q5_0', 32, 22),
    7: Layout('Q5_1', 32, 24),
    8: Layout('Q8_0', 32, 34),
    10: Layout('Q2_K', 256, 84),
    11: Layout('Q3_K', 256, 110),
    12: Layout('Q4_K', 256, 144),
    13: Layout('Q5_K', 256, 176),
    14: Layout('Q6_K', 256, 210),
    30: Layout('BF16', 1, 2),
    39: Layout('MXFP4', 32, 17),
} | {
    i: Layout(name)
    for i, name in {
        9: 'Q8_1',
        15: 'Q8_K',
        16: 'IQ2_XXS',
        17: 'IQ2_XS',
        18: 'IQ3_XXS',
        19: 'IQ1_S',
        20: 'IQ4_NL',
        21: 'IQ3_S',
        22: 'IQ2_S',
        23: 'IQ4_XS',
        24: 'I8',
        25: 'I16',
        26: 'I32',
        27: 'I64',
        28: 'F64',
        29: 'IQ1_M',
        34: 'TQ1_0',
        35: 'TQ2_0',
        40: 'NVFP4',
    }.items()
}
SUPPORTED = [layout.name for layout in LAYOUTS.values() if layout.bytes]
PLAIN = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(jnp.bfloat16)}
# Values' types by the number that stands for each: struct's letter, NumPy's name. 8 is a text, 9 an array.
NUMBERS = {
    0: ('B', '<u1'),
    1: ('b', '<i1'),
    2: ('H', '<u2'),
    3: ('h', '<i2'),
    4: ('I', '<u4'),
    5: ('i', '<i4'),
    6: ('f', '<f4'),
    7: ('B', '<u1'),  # true or false
    10: ('Q', '<u8'),
    11: ('q', '<i8'),
    12: ('d', '<f8'),
}
FLOAT32, BOOL, TEXT, ARRAY = 6, 7, 8, 9
FLOAT = np.dtype(np.float32)
BFLOAT16 = np.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A tensor in blocks of few bits, read as the float32 that they stand for, MXFP4 as bfloat16, which holds it exactly."""

    file: SteadyFile
    layout: Layout
    shape: tuple[int, ...]  # the last dim's numbers are next to each other, in whole blocks
    begin: int  # of its bytes in the file

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def dtype(self) -> np.dtype:
        return BFLOAT16 if self.layout.name == 'MXFP4' else FLOAT

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.layout.numbers * self.layout.bytes

    def read(self, take: tuple[Any, ...] = ()) -> np.ndarray:
        """A part of it, by slices; the first may be an array of indices."""
        cuts: list[Any] = [*take, *[slice(None)] * (len(self.shape) - len(take))]
        first, span = cuts[:-1], range(self.shape[-1])[cuts[-1]]
        row = self.shape[-1] // self.layout.numbers * self.layout.bytes
        ends = (min(span[0], span[-1]), max(span[0], span[-1]) + 1) if len(span) else (0, 0)
        begin, end = ends[0] // self.layout.numbers, -(-ends[1] // self.layout.numbers)
        cut = (*first, slice(begin * self.layout.bytes, end * self.layout.bytes))
        packed = read_part(self.file, self.begin, (*self.shape[:-1], row), np.dtype(np.uint8), cut)
        numbers = _numbers(packed, self.layout).astype(self.dtype, copy=False)
        if span == range(begin * self.layout.numbers, end * self.layout.numbers):
            return numbers
        return numbers[..., np.array(span, np.intp) - begin * self.layout.numbers]


def _numbers(packed: np.ndarray, layout: Layout) -> np.ndarray:
    """float32 [..., numbers] of blocks, uint8 [..., bytes]."""
    from gguf import GGMLQuantizationType  # it brings much with it that most runs have no use for
    from gguf.quants import dequantize

    if not packed.size:
        return np.zeros((*packed.shape[:-1], packed.shape[-1] // layout.bytes * layout.numbers), FLOAT)
    with np.errstate(over='ignore', invalid='ignore'):  # a block's scale may be infinite or not a number
        return dequantize(np.ascontiguousarray(packed), GGMLQuantizationType[layout.name])


Numbers = Stored | Blocks


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the header of a file, or of all files that a model is split into, says."""

    path: Path  # of the first
    values: Mapping[str, Any]  # numbers, texts, NumPy arrays of numbers, lists of texts
    tensors: Mapping[str, Numbers]

    @property
    def where(self) -> str:
        """The file, for messages."""
        return shown_path(self.path)


class _Header:
    """Reads a header from its first byte on, never past the file's end or LONGEST_HEADER."""

    def __init__(self, file: SteadyFile):
        self.file, self.path, self.size = file, file.path, file.size
        self.where = shown_path(file.path)
        self.raw = b''  # of the file, from its first byte on, as much as was needed
        self.end = min(self.size, LONGEST_HEADER)
        self.at = 0
        self.texts = 0  # in arrays, so far

    def need(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin, having passed over them."""
        at = self.at
        if count > self.end - at:
            if self.end < self.size and count <= self.size - at:
                raise UserError(
                    f'{self.where}: its header has more than {LONGEST_HEADER} bytes, the most that is read of one, at {what}'
                )
            raise UserError(
                f'{self.where}: has {self.size} bytes and ends within its header, at {what}: it was cut off, or the header is '
                'wrong; fetch it again'
            )
        self.at = at + count
        self.hold(self.at)
        return at

    def hold(self, end: int) -> None:
        """Reads on, to that byte at least."""
        if end > len(self.raw):
            more = min(max(end, 2 * len(self.raw), FIRST), self.end) - len(self.raw)
            self.raw += self.file.read(len(self.raw), more)

    def number(self, letter: str, what: str) -> Any:
        form = f'<{letter}'
        at = self.need(struct.calcsize(form), what)
        return struct.unpack_from(form, self.raw, at)[0]

    def count(self, what: str, of: str, most: int, least_bytes: int) -> int:
        """A count of what follows, each at least that many bytes."""
        count = self.number('Q', what)
        if count > most:
            raise UserError(
                f'{self.where}: {what} has {count} {of}: at most {most} are read; the header is wrong, or not of a model'
            )
        if count * least_bytes > self.size - self.at:
            raise UserError(
                f'{self.where}: {what} has {count} {of}, and only {self.size - self.at} bytes follow: the header is wrong, or '
                'the file was cut off'
            )
        return count

    def text(self, what: str, most: int = LONGEST_TEXT) -> str:
        length = self.number('Q', what)
        if length > most:
            raise UserError(f'{self.where}: {what} is a text of {length} bytes: at most {most} are read')
        at = self.need(length, what)
        return self.decoded(self.raw[at : at + length], what)

    def name(self, of: str) -> str:
        """The name of a key or a tensor, which messages repeat."""
        found = self.text(f'the name of {of}', LONGEST_NAME)
        if not found.isprintable() or ' ' in found:
            raise UserError(
                f'{self.where}: the name of {of} is {shown_value(found)}: names have letters, digits and signs alone'
            )
        return found

    def decoded(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f'{self.where}: {what} is not UTF-8 at its byte {error.start}: the header is wrong'
            ) from None

    def value(self, key: str) -> Any:
        what = f'key {key!r}'
        kind = self.number('I', what)
        if kind == TEXT:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in NUMBERS:
            raise UserError(
                f'{self.where}: {what} has a value of type {kind}: types go from 0 to 12; the header is wrong'
            )
        number = self.number(NUMBERS[kind][0], what)
        if kind == FLOAT32:
            return shortest(number)
        return self.flag(number, what) if kind == BOOL else number

    def flag(self, number: int, what: str) -> bool:
        if number > 1:
            raise UserError(f'{self.where}: {what} is true or false, and has the byte {number}: it must be 0 or 1')
        return bool(number)

    def array(self, what: str) -> Any:
        kind = self.number('I', what)
        if kind == ARRAY:
            raise UserError(f'{self.where}: {what} is an array of arrays, which is not read; no model has one')
        if kind == TEXT:
            count = self.count(what, 'texts', min(MOST_VALUES, MOST_TEXTS - self.texts), 8)
            self.texts += count
            return self.array_of_texts(what, count)
        if kind not in NUMBERS:
            raise UserError(
                f'{self.where}: {what} is an array of type {kind}: types go from 0 to 12; the header is wrong'
            )
        dtype = np.dtype(NUMBERS[kind][1])
        count = self.count(what, 'values', MOST_VALUES, dtype.itemsize)
        at = self.need(count * dtype.itemsize, what)
        found = np.frombuffer(self.raw[at : at + count * dtype.itemsize], dtype)
        if kind == BOOL:
            self.flag(int(found.max(initial=0)), what)
            return found.astype(np.bool_)
        return found

    def array_of_texts(self, what: str, count: int) -> list[str]:
        """Written for speed: a vocabulary has hundreds of thousands."""
        found, at, end = [], self.at, self.end
        length_at = struct.Struct('<Q').unpack_from
        for i in range(count):
            if at + 8 > len(self.raw):
                self.hold(min(at + 8, end))
            if at + 8 > end or (length := length_at(self.raw, at)[0]) > min(end - at - 8, LONGEST_TEXT):
                self.at = at
                self.text(f'{what}, text {i}')  # says what is wrong
                raise AssertionError
            at += 8 + length
            if at > len(self.raw):
                self.hold(at)
            try:
                found.append(self.raw[at - length : at].decode())
            except UnicodeDecodeError:
                self.decoded(self.raw[at - length : at], f'{what}, text {i}')
        self.at = at
        return found


def shortest(number: float) -> float:
    """The shortest decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number))) if math.isfinite(number) else number


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
        raise UserError(f'{contents.where}: key {key} is {shown_value(found)}: it must be a whole number from 0 on')
    return found


def _parts(first: Contents, count: int) -> Contents:
    path, where = first.path, first.where
    named = PART.fullmatch(path.name)
    if count > MOST_PARTS:
        raise UserError(f'{where}: is one of {count} files: at most {MOST_PARTS} are read')
    if not named or int(named[3]) != count:
        raise UserError(
            f'{where}: is one of {count} files of a model, which are named NAME-00001-of-{count:05}.gguf and so on: give '
            'them these names again, and name the first'
        )
    names = [path.with_name(f'{named[1]}-{i + 1:05}-of-{count:05}.gguf') for i in range(count)]
    if whole(first, 'split.no', 0) != 0 or path != names[0]:
        raise UserError(f'{where}: is not the first of the {count} files of a model: name {shown_path(names[0])}')
    tensors = dict(first.tensors)
    for i, name in enumerate(names[1:], 1):
        if not name.is_file():
            raise UserError(
                f'{shown_path(name)}: is missing: {shown(path.name)} says that the model is in {count} files'
            )
        part = _one(name)
        if (of := whole(part, 'split.count', 1)) != count or whole(part, 'split.no', 0) != i:
            raise UserError(
                f'{shown_path(name)}: says that it is file {whole(part, "split.no", 0)} of {of}, counted '
                f'from 0, and by its name is {i} of {count}: it belongs to another model'
            )
        for tensor, numbers in part.tensors.items():
            if tensor in tensors:
                raise UserError(f'{shown_path(name)}: tensor {tensor} is also in {shown(tensors[tensor].path.name)}')
            tensors[tensor] = numbers
    wanted = whole(first, 'split.tensors.count', len(tensors))
    if wanted != len(tensors):
        raise UserError(
            f'{where}: its {count} files have {len(tensors)} tensors and must have {wanted}: one was exchanged'
        )
    return Contents(path, first.values, tensors)


def _one(path: Path) -> Contents:
    """What one file's header says."""
    with opened(path) as descriptor:
        file = SteadyFile.of(path, descriptor)
    if file.size < 24:
        raise UserError(
            f'{shown_path(path)}: has {file.size} bytes: not a GGUF file, which begins with 24 bytes of header'
        )
    return _contents(_Header(file))


def _contents(header: _Header) -> Contents:
    path, where = header.path, header.where
    header.need(4, 'its first bytes')
    magic, version = header.raw[:4], header.number('I', 'its version')
    if magic != MAGIC:
        raise UserError(f'{where}: begins with {magic!r} and not with {MAGIC!r}: not a GGUF file')
    if int.from_bytes(version.to_bytes(4, 'little'), 'big') in (1, *VERSIONS):
        raise UserError(f'{where}: is big-endian: take the little-endian file, or turn it with gguf_convert_endian.py')
    if version not in VERSIONS:
        raise UserError(
            f'{where}: is of GGUF version {version}; supported: {" and ".join(map(str, VERSIONS))}; convert the model again '
            'with a newer converter'
            if version < min(VERSIONS)
            else f'{where}: is of GGUF version {version}; supported: {" and ".join(map(str, VERSIONS))}'
        )
    tensors = header.count('the header', 'tensors', MOST_TENSORS, 24)
    keys = header.count('the header', 'keys', MOST_KEYS, 13)
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = header.name('a key')
        if key in values:
            raise UserError(f'{where}: key {key!r} is there twice')
        values[key] = header.value(key)
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = header.name('a tensor')
        if name in entries:
            raise UserError(f'{where}: tensor {name!r} is there twice')
        entries[name] = _entry(header, name)
    return Contents(path, values, _placed(header, entries, _alignment(path, values)))


def _entry(header: _Header, name: str) -> tuple[tuple[int, ...], int, int]:
    """A tensor's shape, its type's number and its offset."""
    what = f'tensor {name!r}'
    dims = header.number('I', what)
    if not 1 <= dims <= MOST_DIMS:
        raise UserError(f'{header.where}: {what} has {dims} dims: from 1 to {MOST_DIMS} work')
    shape = tuple(header.number('Q', what) for _ in range(dims))[::-1]  # a file has the innermost first
    return shape, header.number('I', what), header.number('Q', what)


def _alignment(path: Path, values: Mapping[str, Any]) -> int:
    """What offsets are multiples of."""
    found = whole(Contents(path, values, {}), 'general.alignment', 32)
    if not 1 <= found <= 2**16 or found & (found - 1):
        raise UserError(
            f'{shown_path(path)}: general.alignment is {found}: it must be a power of 2 up to {2**16}, such as 32'
        )
    return found


def _placed(
    header: _Header, entries: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: int
) -> dict[str, Numbers]:
    """The tensors, each where its numbers are."""
    where, start = header.where, -(-header.at // alignment) * alignment
    found: dict[str, Numbers] = {}
    for name, (shape, kind, offset) in entries.items():
        layout = LAYOUTS.get(kind)
        if layout is None or not layout.bytes:
            said = f'type {kind}' if layout is None else f'type {layout.name}'
            raise UserError(
                f'{where}: tensor {name!r} is of {said}, which is not supported; supported: {", ".join(SUPPORTED)}'
            )
        if not all(1 <= dim < 2**48 for dim in shape) or math.prod(shape) >= 2**48:
            raise UserError(
                f'{where}: tensor {name!r} has dims {list(shape)}: each must be at least 1, all below 2^48 numbers'
            )
        if shape[-1] % layout.numbers:
            raise UserError(
                f'{where}: tensor {name!r} has rows of {shape[-1]} numbers, and {layout.name} has them in blocks of '
                f'{layout.numbers}: the header is wrong'
            )
        if offset % alignment or offset >= 2**63:
            raise UserError(
                f'{where}: tensor {name!r} begins at {offset}, which is no multiple of {alignment}: the header is wrong'
            )
        begin = start + offset
        plain = PLAIN.get(layout.name)
        found[name] = (
            Stored(header.file, plain, shape, begin) if plain is not None else Blocks(header.file, layout, shape, begin)
        )
    end = start
    for name, one in sorted(found.items(), key=lambda item: item[1].begin):
        if one.begin < end:
            raise UserError(f'{where}: tensor {name!r} overlaps another: the header is wrong')
        if one.begin - end >= alignment:
            raise UserError(
                f'{where}: tensor {name!r} leaves {one.begin - end} bytes before it unused: the header is wrong'
            )
        end = one.begin + one.bytes
        if end > header.size:
            raise UserError(
                f'{where}: has {header.size} bytes and tensor {name!r} ends at {end}: it was cut off; fetch it again'
            )
    return found
