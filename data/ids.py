"""Token ids of a .npy file. A file's header may say anything: it is believed as far as the file has the bytes for it.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import ast
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from weft.runtime.errors import UserError, shown

MAGIC, ARCHIVE = b'\x93NUMPY', b'PK'
MOST_HEADER = 10_000  # bytes that NumPy reads too
WHOLE = re.compile(r'[<>|=]?[iu][1248]')  # dtypes of whole numbers


def read_ids(option: str, path: str) -> np.ndarray:
    """The whole numbers [B, T] of a .npy file, at least one. `option` names the file in messages; raises UserError."""
    where = f'{option} {shown(path)}'
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f'{where}: is no regular file; np.save writes one')
        with open(path, 'rb') as file:
            begins = file.read(MOST_HEADER + 12)
            size = file.seek(0, 2)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, UserError):
            raise
        raise UserError(f'{where}: {getattr(error, "strerror", None) or error}') from None
    if begins.startswith(ARCHIVE):
        raise UserError(f'{where}: an archive of several arrays; save the one with np.save')
    header, offset = read_header(begins)
    kind, shape = header.get('descr'), header.get('shape')
    if (
        not isinstance(shape, tuple)
        or not all(type(n) is int and n >= 0 for n in shape)
        or kind is None
        or not isinstance(header.get('fortran_order'), bool)
    ):
        raise UserError(f'{where}: not a whole .npy file of numbers; np.save writes one')
    if not (isinstance(kind, str) and WHOLE.fullmatch(kind)) or len(shape) != 2 or 0 in shape:
        raise UserError(
            f'{where}: {shown(kind, 40)} {shown(list(shape), 80)}: it must hold whole numbers [B, T], not none'
        )
    needed = math.prod(shape) * np.dtype(kind).itemsize
    if needed > size - offset:
        raise UserError(
            f'{where}: is to hold {shown(list(shape), 80)}, {shown(needed, 40)} bytes, and has {size - offset}: it is cut '
            'short, or says what is not so; np.save writes a whole one'
        )
    found = np.fromfile(path, np.dtype(kind), math.prod(shape), offset=offset)
    if found.size < math.prod(shape):
        raise UserError(f'{where}: was cut short while it was read')
    return found.reshape(shape, order='F' if header['fortran_order'] else 'C')


def read_header(begins: bytes) -> tuple[dict[str, Any], int]:
    """What a file's first bytes say of its array, and where that begins; nothing where they are no .npy file's."""
    if not begins.startswith(MAGIC) or begins[6:7] not in (b'\1', b'\2', b'\3'):
        return {}, 0
    start = 10 if begins[6] == 1 else 12
    length = int.from_bytes(begins[8:start], 'little')
    if len(begins) < start + length or length > MOST_HEADER:
        return {}, 0
    try:
        header = ast.literal_eval(begins[start : start + length].decode('utf-8' if begins[6] == 3 else 'latin-1'))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # whatever text it is
        return {}, 0
    return (header if isinstance(header, dict) else {}), start + length
