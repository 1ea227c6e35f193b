"""The safetensors format: the length of a header, the header (JSON: each tensor's dtype, shape and place), the numbers.

Files come from strangers, so a header is checked before anything in it is believed.
Numbers are read by slices, and written one tensor after another.
"""

import abc
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from weft.runtime.errors import UserError, shown
from weft.storage.foreign import SteadyFile, read_object, shown_path, shown_value

LONGEST_HEADER = 100_000_000  # bytes, as in the format's own implementation
MOST_VALUES = 2**22  # of a header: an entry has some ten
MOST_DIMS = 8
LONGEST_NAME = 256  # characters of a tensor's name, which messages repeat
NEAR = 2**15  # bytes: parts of a tensor that are less far apart are read with what is between them
AT_ONCE = 2**24  # bytes that are read so
DTYPES: dict[str, np.dtype] = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(jnp.bfloat16),
    'F8_E4M3': np.dtype(jnp.float8_e4m3fn),
    'F8_E5M2': np.dtype(jnp.float8_e5m2),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'I16': np.dtype(np.int16),
    'I8': np.dtype(np.int8),
    'U64': np.dtype(np.uint64),
    'U32': np.dtype(np.uint32),
    'U16': np.dtype(np.uint16),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: SteadyFile
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, take: tuple[Any, ...] = ()) -> np.ndarray:
        """A part of it, by slices; the first may be an array of indices, and any an index.

        Raises UserError where the file has changed since its header was read.
        """
        return read_part(self.file, self.begin, self.shape, self.dtype, take)


class Derived(abc.ABC):
    """A tensor whose numbers `of` holds in another form."""

    of: Any

    @abc.abstractmethod
    def read(self, take: tuple[Any, ...] = ()) -> np.ndarray:
        """A part of it, by slices."""

    @property
    def file(self) -> SteadyFile:
        return self.of.file

    @property
    def dtype(self) -> np.dtype:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape


def read_part(
    file: SteadyFile, begin: int, shape: tuple[int, ...], dtype: np.dtype, take: tuple[Any, ...]
) -> np.ndarray:
    """A part of an array that stands in a file from `begin` on, as NumPy would take it."""
    cuts = full_index(take, len(shape))
    spans = [_span(cut, size) for cut, size in zip(cuts, shape, strict=True)]
    out = np.empty([len(span) for span in spans], dtype)
    if out.size:
        _fill(out, file, begin, shape, spans)
    return out.reshape([len(span) for span, cut in zip(spans, cuts, strict=True) if not isinstance(cut, int)])


def full_index(take: tuple[Any, ...], dims: int) -> tuple[Any, ...]:
    """An index with a slice of all for each dim that it leaves out."""
    return (*take, *[slice(None)] * (dims - len(take)))


Span = range | np.ndarray  # which places along a dim


def _span(cut: Any, size: int) -> Span:
    if isinstance(cut, int):
        return range(size)[cut : cut + 1 or None]
    return range(size)[cut] if isinstance(cut, slice) else np.asarray(cut)


def _fill(out: np.ndarray, file: SteadyFile, begin: int, shape: tuple[int, ...], spans: list[Span]) -> None:
    """Reads what stands together into its place, and what is in small pieces with what is between them."""
    last = max((dim for dim, span in enumerate(spans) if not (_together(span) and len(span) == shape[dim])), default=-1)
    # Bytes from one to the next.
    steps = [math.prod(shape[dim + 1 :]) * out.dtype.itemsize for dim in range(len(shape))]
    if last < 0 or (_together(spans[last]) and (last == 0 or steps[last - 1] >= NEAR)):
        begins = [begin]
        for dim, span in enumerate(spans[: last + 1]):
            begins = [one + int(i) * steps[dim] for one in begins for i in (span if dim < last else span[:1])]
        file.read_into(out, *begins)
        return
    dim = last if last == 0 or steps[last - 1] > AT_ONCE else last - 1
    most = max(AT_ONCE // steps[dim], 1)
    order = np.argsort(spans[dim], kind='stable')
    rows = np.asarray(spans[dim])[order]
    for at in np.ndindex(*out.shape[:dim]):
        start = begin + sum(int(span[i]) * step for span, i, step in zip(spans, at, steps, strict=False))
        done = 0
        while done < len(rows):
            first, end = int(rows[done]), int(np.searchsorted(rows, rows[done] + most))
            held = np.empty((int(rows[end - 1]) + 1 - first, *shape[dim + 1 :]), out.dtype)
            file.read_into(held, start + first * steps[dim])
            out[at][order[done:end]] = _taken(held[rows[done:end] - first], spans[dim + 1 :])
            done = end


def _taken(held: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """What stands at `spans` of all dims but the first."""
    for dim, span in enumerate(spans, 1):
        cut: Any = slice(span.start, span.stop, span.step) if isinstance(span, range) else span
        held = held[(*[slice(None)] * dim, cut)]
    return held


def _together(span: Span) -> bool:
    return isinstance(span, range) and (span.step == 1 or len(span) == 1)


def header(path: Path) -> dict[str, Stored]:
    """The tensors of a file. Raises UserError where it is not whole or says what cannot be true."""
    file = SteadyFile.of(path)
    if file.size < 8:
        raise file.error(f'has {file.size} bytes: not a safetensors file, which begins with the length of its header')
    length = int.from_bytes(file.read(0, 8), 'little')
    if length > LONGEST_HEADER:
        raise file.error(
            f'its header would have {length} bytes: at most {LONGEST_HEADER} are allowed; not a safetensors file?'
        )
    if length > file.size - 8:
        raise file.error(f'has {file.size} bytes, its header alone {length + 8}: it was cut off; fetch it again')
    entries = _parse(file.read(8, length), shown_path(path))
    end = 8 + length
    found = {name: _stored(f'{shown_path(path)}: tensor {name}', entry, file, end) for name, entry in entries.items()}
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].bytes)):
        if stored.begin != end:
            what = 'overlaps another' if stored.begin < end else f'leaves {stored.begin - end} bytes before it unused'
            raise file.error(f'tensor {name} {what}: the header is wrong')
        end += stored.bytes
    if end != file.size:
        what = 'it was cut off; fetch it again' if end > file.size else 'what follows belongs to no tensor'
        raise file.error(f'has {file.size} bytes and its tensors end at {end}: {what}')
    return found


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    if raw[:1] != b'{':
        raise UserError(f'{where}: its header is not a JSON object: not a safetensors file, or damaged')
    entries = read_object(raw, f'{where}: its header', MOST_VALUES)
    entries.pop('__metadata__', None)
    for name in entries:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise UserError(
                f'{where}: tensor {shown(name, 60, quoted=True)}: a name has at most {LONGEST_NAME} letters, digits and signs'
            )
    return entries


def _stored(where: str, entry: Any, file: SteadyFile, start: int) -> Stored:
    """An entry of the header, the numbers beginning at `start`; `where` names it."""
    whole = lambda values: isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
        raise UserError(f'{where}: its entry must have dtype, shape and data_offsets, and nothing else')
    dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f'{where} has dtype {shown_value(dtype)}; supported: {", ".join(DTYPES)}')
    if not whole(shape) or not whole(offsets) or len(offsets) != 2:
        raise UserError(
            f'{where}: shape {shown_value(shape)} and data_offsets {shown_value(offsets)} must be whole numbers, the '
            'offsets two'
        )
    if len(shape) > MOST_DIMS:
        raise UserError(f'{where} has {len(shape)} dims: at most {MOST_DIMS} work')
    stored = Stored(file, DTYPES[dtype], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != stored.bytes:
        raise UserError(
            f'{where} {dtype}{shape} needs {stored.bytes} bytes and has {offsets[1] - offsets[0]}: the header is wrong'
        )
    return stored


def write(
    path: Path, kinds: Mapping[str, tuple[np.dtype, Sequence[int]]], content: Callable[[str], np.ndarray]
) -> None:
    """A file of tensors of those dtypes and shapes, in that order; `content` is asked for one at a time."""
    entries: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers refuses a file that does not say so
    end = 0
    for name, (dtype, shape) in kinds.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [begin, end]}
    text = json.dumps(entries, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with path.open('xb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name, (dtype, shape) in kinds.items():
            array = content(name)
            assert (array.dtype, array.shape) == (dtype, tuple(shape)), f'{name}: {array.dtype}{array.shape}'
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
