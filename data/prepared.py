"""A run's prepared data on the disk: written whole, and read only as it was written.

    runs/NAME/data/
      data.json            what it was made from, facts, and of each file the size and the SHA-256 of its blocks; its own hash
      train.stream_S.npy …  the arrays of data/packing.py or data/pairs.py, by split

Files are hashed when a run starts, up to AT_ONCE bytes in all. Of more than that the tokens, which are by far the most, are
hashed a block at a time, each when a row of it is first read. Tokens stay on the disk, and so do other arrays of more than
IN_MEMORY bytes.
"""

import hashlib
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.data.packing import Rows, Samples
from weft.data.pairs import PairRows
from weft.data.tokenizer import Tokenizer, own_tokenizer
from weft.runtime.errors import MachineError, UserError, shown
from weft.storage import files as disk
from weft.storage.sealed import sealed, unsealed

SPLITS = 'train', 'validation'
DESCRIPTION = 'data.json'
BLOCK = 2**24  # bytes that are hashed at once
IN_MEMORY = 2**26  # bytes of an array that is held in memory, if it is not the tokens
AT_ONCE = 2**28  # bytes that are hashed at the start: about a quarter of a second
HEADER = re.compile(  # of an array of one dimension, as np.save writes it
    rb"\x93NUMPY\x01\0[^\0]\0\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \((\d{1,15}),\), \} *\n"
)
MEND = 'restore the run folder from a copy, or start over with --fresh'


@dataclass(frozen=True, eq=False)
class Dataset:
    """A run's data: its rows stay on the disk where they are many."""

    tokenizer: Tokenizer
    train: Samples
    validation: Samples
    facts: dict[str, Any]  # what was read, left out, split and packed: plain values that JSON holds
    key: dict[str, Any]  # the config that it was made from

    def train_bytes(self) -> bytes:
        """The UTF-8 text that training predicts, document after document."""
        return self.tokenizer.decode_bytes(self.train.predicted())

    def validation_bytes(self) -> bytes:
        """The UTF-8 text that is held out."""
        return self.tokenizer.decode_bytes(self.validation.predicted())


def save(folder: Path, dataset: Dataset) -> None:
    """Writes `folder`/data and the tokenizer beside it. A kill, or a power cut, at any moment leaves a whole or nothing."""
    new, old, data = folder / 'data.partial', folder / 'data.old', folder / 'data'
    try:
        _write(new, dataset)
    except (OSError, MachineError):
        disk.remove(new)  # nobody needs half of it, and where the disk is full it is in the way
        raise
    if os.path.lexists(data):  # of another config; out of the way first, because its tokenizer is about to go
        disk.rename(data, old)
    dataset.tokenizer.save(folder)
    disk.rename(new, data)
    disk.remove(old)


def _write(folder: Path, dataset: Dataset) -> None:
    """The rows of a dataset and their description, all synced."""
    disk.make_folder(folder)
    sizes, blocks = {}, {}
    for part in SPLITS:
        samples = getattr(dataset, part)
        for name in samples.ARRAYS:
            path = folder / f'{part}.{name}.npy'
            with disk.new(path) as file:
                np.save(file, np.asarray(getattr(samples, name)), allow_pickle=False)
            sizes[path.name], blocks[path.name] = path.stat().st_size, hashes(path)
    description = {'key': dataset.key, 'facts': dataset.facts, 'sizes': sizes, 'blocks': blocks}
    disk.put(folder / DESCRIPTION, sealed({**description, 'tokenizer_sha256': dataset.tokenizer.sha256}))
    disk.sync_tree(folder)


def clear(folder: Path) -> None:
    """Removes what a process that was killed in `save` has left."""
    for leftover in folder / 'data.partial', folder / 'data.old':
        disk.remove(leftover)


def load(
    folder: Path, say: Callable[[str], None], read_tokenizer: Callable[[Path], Tokenizer | None] = own_tokenizer
) -> Dataset | None:
    """The data in a run's folder, whose tokenizer `read_tokenizer` gives; None if there is none.

    Raises UserError where anything is not as it was written.
    """
    data = folder / 'data'
    if not data.exists():
        return None
    key, facts, sizes, blocks, sha256 = _description(data / DESCRIPTION)
    kind: Any = PairRows if key.get('pairs') else Rows
    names = [f'{part}.{name}.npy' for part in SPLITS for name in kind.ARRAYS]
    if blocks is None:
        say(f'{data}: prepared before files were hashed: their sizes are checked, and not what they hold')
    for name in names:
        try:
            with disk.reading(data / name) as descriptor:
                found: Any = os.fstat(descriptor).st_size
        except FileNotFoundError:
            found = 'no'
        if found != sizes.get(name):
            raise UserError(f'{data / name}: {found} bytes where {sizes.get(name)} were written; {MEND}')
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f'{folder / Tokenizer.name}: missing beside {data}; {MEND}')
    if tokenizer.sha256 != sha256:
        raise UserError(f'{folder / tokenizer.name}: not the tokenizer that made {data}; {MEND}')
    later = sum(sizes.values()) > AT_ONCE

    def array(name: str) -> Any:
        path, known = data / f'{name}.npy', None if blocks is None else blocks.get(f'{name}.npy')
        if blocks is not None and (not isinstance(known, list) or len(known) != -(-sizes[path.name] // BLOCK)):
            raise UserError(f'{data / DESCRIPTION}: damaged (no hashes of {path.name}); {MEND}')
        stream = name.endswith('.stream_S')
        if known is not None and later and stream:
            return Stored(path, known)
        if known is not None:
            for number, digest in enumerate(hashes(path)):
                if digest != known[number]:
                    raise altered(path, number)
        stored = Stored(path)
        return stored if stream or sizes[path.name] > IN_MEMORY else stored[:]

    def rows(part: str) -> Samples:
        arrays = {name: array(f'{part}.{name}') for name in kind.ARRAYS}
        return kind(sequence_length=key['sequence_length'], bytes=facts[part]['bytes'], **arrays)

    return Dataset(tokenizer, facts=facts, key=key, **{part: rows(part) for part in SPLITS})


def _description(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int], dict[str, list[str]] | None, str]:
    """Key, facts, sizes, hashes of blocks (None: it is from before there were any) and the tokenizer's hash."""
    try:
        fields = unsealed(disk.read(path), needs_seal=False)
    except FileNotFoundError:
        raise UserError(f'{path}: missing; {MEND}') from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f'{path}: damaged ({shown(error)}); {MEND}') from None
    key, facts, sizes, sha256 = (fields.get(name) for name in ('key', 'facts', 'sizes', 'tokenizer_sha256'))
    if not (
        isinstance(key, dict)
        and type(key.get('sequence_length')) is int
        and key['sequence_length'] > 0
        and isinstance(facts, dict)
        and isinstance(facts.get('sha256'), str)
        and all(isinstance(facts.get(part), dict) and type(facts[part].get('bytes')) is int for part in SPLITS)
        and isinstance(sizes, dict)
        and all(type(size) is int for size in sizes.values())
        and isinstance(sha256, str)
        and isinstance(fields.get('blocks', {}), dict)
    ):
        raise UserError(f'{path}: damaged (it does not say what data/prepared.py writes); {MEND}')
    return key, facts, sizes, fields.get('blocks'), sha256


def hashes(path: Path) -> list[str]:
    """The SHA-256 of each block of a file."""
    with disk.reading(path) as descriptor, os.fdopen(os.dup(descriptor), 'rb') as file:
        return [hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK), b'')]


def altered(path: Path, number: int) -> UserError:
    """Of a block of a file."""
    return UserError(
        f'{path}: block {number} (of {BLOCK >> 20} MiB) is not what was written: the data was altered; {MEND}'
    )


class Stored:
    """An array in a file: as a NumPy array, in slices, each of which is read when it is asked for.

    It is not mapped into memory, where a file that is cut off meanwhile would end the process. With `blocks`, the hashes of the
    file's, each block is hashed when something of it is first read.
    """

    def __init__(self, path: Path, blocks: list[str] | None = None):
        self.path, self.blocks = path, blocks
        self.known: set[int] = set()
        with disk.reading(path) as descriptor:
            self.descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self.descriptor)
        said = HEADER.match(self._pread(0, 128))
        if said is None:
            raise UserError(f'{path}: damaged (it does not begin as an array of whole numbers); {MEND}')
        self.dtype, self.shape, self.begin = np.dtype(said[1].decode()), (int(said[2]),), said.end()
        size, wanted = os.fstat(self.descriptor).st_size, self.begin + self.shape[0] * self.dtype.itemsize
        if size != wanted:
            raise UserError(f'{path}: damaged (it has {size} bytes and says that they are {wanted}); {MEND}')

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        first, last, step = part.indices(self.shape[0])
        assert step == 1, part
        begin, size = self.begin + first * self.dtype.itemsize, (last - first) * self.dtype.itemsize
        if size <= 0:
            return np.empty(0, self.dtype)
        if self.blocks is not None:
            self._check(begin // BLOCK, (begin + size - 1) // BLOCK, self.blocks)
        return np.frombuffer(self._read(begin, size), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list[int]:
        """All of it."""
        return self[:].tolist()

    def _read(self, begin: int, size: int) -> bytes:
        """So many bytes of the file. Raises UserError where it does not have them any more."""
        found = self._pread(begin, size)
        if len(found) < size:
            raise UserError(
                f'{self.path}: ends at byte {begin + len(found)}, where it was longer when the run began: the data was cut off '
                f'meanwhile; {MEND}'
            )
        return found

    def _pread(self, begin: int, size: int) -> bytes:
        """So many bytes of the file, or all from there on."""
        try:
            found = os.pread(self.descriptor, size, begin)
            while len(found) < size and (more := os.pread(self.descriptor, size - len(found), begin + len(found))):
                found += more  # a network's disk may give less
        except OSError as error:
            raise disk.fault(self.path, error) from error
        return found

    def _check(self, first: int, last: int, blocks: list[str]) -> None:
        """Hashes the blocks that nothing was read of yet. Raises UserError for one that was altered."""
        end = self.begin + self.shape[0] * self.dtype.itemsize
        for number in range(first, last + 1):
            if number not in self.known:
                content = self._read(number * BLOCK, min(BLOCK, end - number * BLOCK))
                if hashlib.sha256(content).hexdigest() != blocks[number]:
                    raise altered(self.path, number)
                self.known.add(number)
