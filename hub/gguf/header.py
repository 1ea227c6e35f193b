"""A GGUF file's header, read from its first byte on, within limits that are named here."""

import math
import struct
from typing import Any

import numpy as np

from weft.storage.foreign import SteadyFile, shown_value

LONGEST_HEADER = 2**27  # bytes; the tokens and merges of a vocabulary of 262,144 are some 15 MB
FIRST = 2**20  # bytes of a file that are read first
LONGEST_TEXT = 2**24  # bytes of one text, such as a chat template
LONGEST_NAME = 256  # bytes of a key or of a tensor's name, of which ggml allows 63
MOST_VALUES = 2**22  # of an array: tokens, merges
MOST_TEXTS = 2**23  # in all arrays together
# NumPy's names of values' types by the number that stands for each; 7 is true or false. 8 is a text, 9 an array.
NUMBERS = dict(enumerate(('<u1', '<i1', '<u2', '<i2', '<u4', '<i4', '<f4', '<u1'))) | {10: '<u8', 11: '<i8', 12: '<f8'}
FLOAT32, BOOL, TEXT, ARRAY = 6, 7, 8, 9


class Header:
    """Reads a header from its first byte on, never past the file's end or LONGEST_HEADER."""

    def __init__(self, file: SteadyFile):
        self.file, self.path, self.size = file, file.path, file.size
        self.error = file.error
        self.raw = b''  # of the file, from its first byte on, as much as was needed
        self.end = min(self.size, LONGEST_HEADER)
        self.at = 0
        self.texts = 0  # in arrays, so far

    def need(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin, having passed over them."""
        at = self.at
        if count > self.end - at:
            if self.end < self.size and count <= self.size - at:
                raise self.error(
                    f'its header has more than {LONGEST_HEADER} bytes, the most that is read of one, at {what}'
                )
            raise self.error(
                f'has {self.size} bytes and ends within its header, at {what}: it was cut off, or the header is '
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

    def number(self, dtype: str, what: str) -> Any:
        at = self.need(np.dtype(dtype).itemsize, what)
        return np.frombuffer(self.raw, dtype, 1, at).item()

    def count(self, what: str, of: str, most: int, least_bytes: int) -> int:
        """A count of what follows, each at least that many bytes."""
        count = self.number('<u8', what)
        if count > most:
            raise self.error(
                f'{what} has {count} {of}: at most {most} are read; the header is wrong, or not of a model'
            )
        if count * least_bytes > self.size - self.at:
            raise self.error(
                f'{what} has {count} {of}, and only {self.size - self.at} bytes follow: the header is wrong, or '
                'the file was cut off'
            )
        return count

    def text(self, what: str, most: int = LONGEST_TEXT) -> str:
        length = self.number('<u8', what)
        if length > most:
            raise self.error(f'{what} is a text of {length} bytes: at most {most} are read')
        at = self.need(length, what)
        return self.decoded(self.raw[at : at + length], what)

    def name(self, of: str) -> str:
        """The name of a key or a tensor, which messages repeat."""
        found = self.text(f'the name of {of}', LONGEST_NAME)
        if not found.isprintable() or ' ' in found:
            raise self.error(f'the name of {of} is {shown_value(found)}: names have letters, digits and signs alone')
        return found

    def decoded(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f'{what} is not UTF-8 at its byte {error.start}: the header is wrong') from None

    def value(self, key: str) -> Any:
        what = f'key {key!r}'
        kind = self.number('<u4', what)
        if kind == TEXT:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in NUMBERS:
            raise self.error(f'{what} has a value of type {kind}: types go from 0 to 12; the header is wrong')
        number = self.number(NUMBERS[kind], what)
        if kind == FLOAT32:
            return shortest(number)
        return self.flag(number, what) if kind == BOOL else number

    def flag(self, number: int, what: str) -> bool:
        if number > 1:
            raise self.error(f'{what} is true or false, and has the byte {number}: it must be 0 or 1')
        return bool(number)

    def array(self, what: str) -> Any:
        kind = self.number('<u4', what)
        if kind == ARRAY:
            raise self.error(f'{what} is an array of arrays, which is not read; no model has one')
        if kind == TEXT:
            count = self.count(what, 'texts', min(MOST_VALUES, MOST_TEXTS - self.texts), 8)
            self.texts += count
            return self.array_of_texts(what, count)
        if kind not in NUMBERS:
            raise self.error(f'{what} is an array of type {kind}: types go from 0 to 12; the header is wrong')
        dtype = np.dtype(NUMBERS[kind])
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
