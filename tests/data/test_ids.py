"""Token ids of .npy files: whatever a header says, its file has one clear line or its numbers."""

import os
import re

import numpy as np
import pytest

from weft.data.ids import read_ids
from weft.runtime.errors import UserError

IDS = np.array([[1, 5, 9, 11], [2, 6, 10, 12]])
HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }\n"


def header(text: str, version: int = 1, data: bytes = b'') -> bytes:
    """A .npy file with this header."""
    encoded = text.encode()
    return (
        b'\x93NUMPY' + bytes([version, 0]) + len(encoded).to_bytes(2 if version == 1 else 4, 'little') + encoded + data
    )


@pytest.mark.parametrize('dtype', ['i1', 'u1', '<i2', '>i2', '<u2', '<i4', '>i4', '>u4', '<i8', '>i8', '<u8', '>u8'])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_whole_numbers_of_every_width_and_order_are_read(tmp_path, dtype, order):
    np.save(tmp_path / 'ids.npy', np.asarray(IDS, dtype, order=order))
    found = read_ids('--tokens', str(tmp_path / 'ids.npy'))
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, IDS)


@pytest.mark.parametrize('version', [1, 2, 3])
def test_every_version_of_the_format_is_read(tmp_path, version):
    (tmp_path / 'ids.npy').write_bytes(header(HEADER % ('<i8', '(2, 4)'), version, IDS.tobytes() + b'more'))
    np.testing.assert_array_equal(read_ids('--tokens', str(tmp_path / 'ids.npy')), IDS)


CUT, NONE, OTHER = 'it is cut short, or says', 'not a whole .npy file of numbers', 'it must hold whole numbers [B, T]'
WRONG = {
    'more rows than memory has': (header(HEADER % ('<i4', '(4611686018427387904, 2)')), CUT),
    'more numbers than 64 bits count': (header(HEADER % ('<i4', f'(1, {10**40})')), CUT),
    'a row too many': (header(HEADER % ('<i8', '(3, 4)'), 1, IDS.tobytes()), '96 bytes, and has 64'),
    'negative sizes': (header(HEADER % ('<i4', '(-1, -4)'), 1, bytes(64)), NONE),
    'a size that is no number': (header(HEADER % ('<i4', '(True, 4)'), 1, bytes(64)), NONE),
    'objects': (header(HEADER % ('|O', '(1, 4)'), 1, bytes(64)), f'|O [1, 4]: {OTHER}'),
    'fractions': (header(HEADER % ('<f4', '(1, 4)'), 1, bytes(64)), f'<f4 [1, 4]: {OTHER}'),
    'true and false': (header(HEADER % ('|b1', '(1, 4)'), 1, bytes(64)), OTHER),
    'numbers of no bytes': (header(HEADER % ('<i0', '(1, 4)')), OTHER),
    'no dtype': (header(HEADER % ('\x1b[2J', '(1, 4)'), 1, bytes(64)), '\\x1b[2J [1, 4]'),
    'no rows': (header(HEADER % ('<i4', f'({2**62}, 0)')), OTHER),
    'a hundred dims': (header(HEADER % ('<i4', f'({"1," * 100})'), 1, bytes(4)), OTHER),
    'no fields': (header('[1]'), NONE),
    'code': (header('__import__("os").abort()'), NONE),
    'deep': (header('(' * 5000), NONE),
    'long': (header(' ' * 70_000 + HEADER % ('<i4', '(1, 4)'), 2, bytes(64)), NONE),
    'an unknown version': (header(HEADER % ('<i4', '(1, 4)'), 9, bytes(64)), NONE),
    'nothing': (b'', NONE),
    'half of a header': (header(HEADER % ('<i4', '(1, 4)'))[:30], NONE),
    'text': (b'1 5 9 11\n', NONE),
    'an archive': (b'PK\x03\x04', 'an archive of several arrays'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_file_that_holds_no_rows_of_ids_has_one_clear_line(tmp_path, name):
    content, said = WRONG[name]
    path = tmp_path / 'ids.npy'
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        read_ids('--tokens', str(path))
    assert str(error.value).startswith(f'--tokens {path}: ')
    assert '\x1b' not in str(error.value)
    assert len(str(error.value)) < 400


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    for path, said in (
        (tmp_path, 'is no regular file'),
        (tmp_path / 'fifo', 'is no regular file'),
        ('/dev/zero', 'is no regular file'),
        (tmp_path / 'none', 'No such file'),
        ('a\0b', 'null'),
        ('x' * 300, 'too long'),
    ):
        with pytest.raises(UserError, match=said):
            read_ids('--tokens', str(path))
