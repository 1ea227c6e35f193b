"""The safetensors format: the length of a header, the header (JSON: each tensor's dtype, shape and place), the numbers.

Files come from strangers, so a header is checked before anything in it is believed.
Numbers are read by slices from files mapped into memory, and written one tensor after another.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sharding.errors import UserError

LONGEST_HEADER = 100_000_000  # bytes, as in the format's own implementation
DTYPES = {
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

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, take: tuple[Any, ...] = ()) -> np.ndarray:
        """A part of it, as a view of the file: the kernel brings its pages as they are used, and may drop them again."""
        if not self.bytes:
            return np.zeros(self.shape, self.dtype)[take]
        raw = np.memmap(self.path, np.uint8, 'r', offset=self.begin, shape=(self.bytes,))
        return np.asarray(raw).view(self.dtype).reshape(self.shape)[take]


def header(path: Path) -> dict[str, Stored]:
    """The tensors of a file. Raises UserError where it is not whole or says what cannot be true."""
    size = path.stat().st_size
    with path.open('rb') as file:
        first = file.read(8)
        length = int.from_bytes(first, 'little')
        if len(first) < 8:
            raise UserError(
                f'{path}: has {size} bytes: not a safetensors file, which begins with the length of its header'
            )
        if length > LONGEST_HEADER:
            raise UserError(
                f'{path}: its header would have {length} bytes: at most {LONGEST_HEADER} are allowed; not a safetensors file?'
            )
        if length > size - 8:
            raise UserError(f'{path}: has {size} bytes, its header alone {length + 8}: it was cut off; fetch it again')
        raw = file.read(length)
    entries = _parse(raw, path)
    found = {name: _stored(name, entry, path, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].bytes)):
        if stored.begin != end:
            what = 'overlaps another' if stored.begin < end else f'leaves {stored.begin - end} bytes before it unused'
            raise UserError(f'{path}: tensor {name} {what}: the header is wrong')
        end += stored.bytes
    if end != size:
        what = 'it was cut off; fetch it again' if end > size else 'what follows belongs to no tensor'
        raise UserError(f'{path}: has {size} bytes and its tensors end at {end}: {what}')
    return found


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    """The header's entries by tensor."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f'{path}: its header names {name!r} twice')
            found[name] = value
        return found

    try:
        entries = json.loads(raw.decode(), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: its header is not JSON ({error}): not a safetensors file, or damaged') from None
    if not isinstance(entries, dict) or raw[:1] != b'{':
        raise UserError(f'{path}: its header is not a JSON object: not a safetensors file, or damaged')
    entries.pop('__metadata__', None)
    return entries


def _stored(name: str, entry: Any, path: Path, start: int) -> Stored:
    """An entry of the header, the numbers beginning at `start`."""
    whole = lambda values: isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
        raise UserError(f'{path}: tensor {name}: its entry must have dtype, shape and data_offsets, and nothing else')
    if not isinstance(entry['dtype'], str) or entry['dtype'] not in DTYPES:
        raise UserError(f'{path}: tensor {name} has dtype {entry["dtype"]!r}; supported: {", ".join(DTYPES)}')
    offsets = entry['data_offsets']
    if not whole(entry['shape']) or not whole(offsets) or len(offsets) != 2:
        raise UserError(
            f'{path}: tensor {name}: shape {entry["shape"]} and data_offsets {offsets} must be whole numbers, the offsets two'
        )
    stored = Stored(path, DTYPES[entry['dtype']], tuple(entry['shape']), start + offsets[0])
    if offsets[1] - offsets[0] != stored.bytes:
        raise UserError(
            f'{path}: tensor {name} {entry["dtype"]}{list(stored.shape)} needs {stored.bytes} bytes and has '
            f'{offsets[1] - offsets[0]}: the header is wrong'
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
