"""A user's file as text, a block at a time, whatever it is called and however it is packed; or what it is, and what helps.

Compression is told by how a file begins, not by its name: gzip, zstd, xz and bzip2. Memory and time are bounded by what a file
really has: a line, a document and how far a file unpacks have limits, which messages name.
"""

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from weft.runtime.errors import UserError, shown
from weft.storage.files import kind_of

BLOCK = 1 << 20
# A zstd block of 4 bytes stands for up to 128 KiB: what comes out of so many bytes at once fits any memory.
SMALL_BLOCK = 2048
# Characters of a document at most. A plain file has as many bytes, so the limit is for what goes on without end, not for
# what is large: a file of text of a few GB, TinyStories, is one document.
DOCUMENT = 1 << 33
LINE = 1 << 26  # characters of a line or of a JSON value at most
WINDOW = 1 << 29  # bytes that zstd and xz may look back
# Text packs to a tenth, and the same line over and over to a hundredth; beyond both a file is made to fill the memory.
MOST_TIMES, UNPACKED = 200, 1 << 26


class Packing(NamedTuple):
    """A way to compress files."""

    name: str
    begins: re.Pattern[bytes]
    suffixes: tuple[str, ...]
    unpack: Callable[[IO[bytes]], Iterator[bytes]]


def _blocks(file: Any) -> Iterator[bytes]:
    with file:
        yield from iter(lambda: file.read(BLOCK), b'')


def _frames(
    file: IO[bytes], new: Callable[[], Any], name: str, padding: bytes = b'', most: tuple[int, ...] = ()
) -> Iterator[bytes]:
    """All that follow one another, with padding before them; zstandard itself takes one that is cut short for a whole one."""
    frame = None
    while data := file.read(SMALL_BLOCK):
        while data:
            if frame is None and not (data := data.lstrip(padding)):
                break
            frame = frame or new()
            yield frame.decompress(data, *most)
            while most and not frame.eof and not frame.needs_input:
                yield frame.decompress(b'', *most)
            data, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
    if frame is not None:
        raise EOFError(f'it ends before its last {name} does')


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    return _frames(file, zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj, 'frame')


def _unxz(file: IO[bytes]) -> Iterator[bytes]:
    new = lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=WINDOW)
    return _frames(file, new, 'stream', padding=b'\0', most=(BLOCK,))


PACKINGS = (
    Packing('gzip', re.compile(rb'\x1f\x8b'), ('.gz', '.gzip', '.tgz'), lambda f: _blocks(gzip.GzipFile(fileobj=f))),
    Packing('zstd', re.compile(rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18'), ('.zst', '.zstd'), _unzstd),
    Packing('xz', re.compile(rb'\xfd7zXZ\0'), ('.xz',), _unxz),
    Packing(
        'bzip2', re.compile(rb'BZh[1-9](1AY&SY|\x17rE8P\x90)'), ('.bz2', '.bzip2'), lambda f: _blocks(bz2.BZ2File(f))
    ),
)
BROKEN = (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, ValueError)

AS_LINES = (
    "in Python: import pandas; pandas.read_{}('{}').to_json('data.jsonl', orient='records', lines=True) makes .jsonl"
)
UNPACK = 'unpack it, and name the folder with what was in it'
GIVE_TEXT = 'give a file of text'
LEAVE_OUT = ', or leave it out by a glob such as *.txt'
# What some files begin with, what they are, and what to do with them.
NO_TEXT = (
    (b'PAR1', 'Parquet', AS_LINES.replace('{}', 'parquet', 1)),
    (b'ARROW1', 'Arrow', AS_LINES.replace('{}', 'feather', 1)),
    (b'FEA1', 'Feather', AS_LINES.replace('{}', 'feather', 1)),
    (b'ORC', 'ORC', AS_LINES.replace('{}', 'orc', 1)),
    (b'Obj\x01', 'Avro', 'write its records as JSON Lines'),
    (b'\x89HDF\r\n\x1a\n', 'HDF5', 'write its text as JSON Lines'),
    (b'SQLite format 3\0', 'an SQLite database', 'write its rows as JSON Lines'),
    (b'PK\x03\x04', 'a zip archive (or a document in one)', UNPACK),
    (b'PK\x05\x06', 'an empty zip archive', UNPACK),
    (b'7z\xbc\xaf\x27\x1c', 'a 7z archive', UNPACK),
    (b'Rar!\x1a\x07', 'a RAR archive', UNPACK),
    (b'\x93NUMPY', 'a NumPy array', 'text is read, not token ids; scripts/score.py reads those'),
    (b'%PDF-', 'PDF', 'pdftotext makes text of it'),
    (b'\x04\x22\x4d\x18', 'packed by lz4', 'unpack it: unlz4'),
    (b'\x1f\x9d', 'packed by compress', 'unpack it: uncompress'),
    (b'\xff\x06\0\0sNaPpY', 'packed by snappy', 'unpack it'),
    (b'GGUF', 'a GGUF model', 'scripts/convert.py import reads it'),
    (b'\x89PNG\r\n\x1a\n', 'a PNG picture', GIVE_TEXT),
    (b'\xff\xd8\xff', 'a JPEG picture', GIVE_TEXT),
    (b'GIF8', 'a GIF picture', GIVE_TEXT),
    (b'\x7fELF', 'a program', GIVE_TEXT),
    *((b'\x80' + bytes([i]), 'a pickle', 'it is never read, for it may run code; write JSON Lines') for i in range(2, 6)),
)  # fmt: skip
TAR = 257, b'ustar'
HEAD = 512  # bytes that tell what a file is
ENCODINGS = (
    (codecs.BOM_UTF32_LE, 'UTF-32'),
    (codecs.BOM_UTF32_BE, 'UTF-32'),
    (codecs.BOM_UTF16_LE, 'UTF-16'),
    (codecs.BOM_UTF16_BE, 'UTF-16'),
)


def plain_name(path: Path) -> Path:
    """A file's name in lower case, without the endings that say how it is packed."""
    name = path.name.lower()
    endings = [suffix for packing in PACKINGS for suffix in packing.suffixes]
    while stem := next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), ''):
        name = stem
    return Path(name)


def joined(pieces: Iterator[str], name: str, most: int = 0) -> str:
    """A whole text. Raises UserError for one of more than `most` characters; 0: than DOCUMENT."""
    found, size, most = [], 0, most or DOCUMENT
    for piece in pieces:
        found.append(piece)
        size += len(piece)
        if size > most:
            raise UserError(
                f'{name}: a text of more than {most:,} characters; at most so many are read at once: split it '
                f'(split --line-bytes={most // 2}), or make JSON Lines of it'
            )
    return ''.join(found)


def lines_of(pieces: Iterator[str], where: str) -> Iterator[tuple[int, str]]:
    """The lines of a text, with their numbers from 1, empty ones left out. Only line feeds end a line.

    A carriage return before one belongs to it. Raises UserError for a line of more than LINE characters.
    """
    number, held, length = 1, list[str](), 0
    for piece in itertools.chain(pieces, '\n'):
        for at, part in enumerate(piece.split('\n')):
            if at:  # what is held is a whole line
                line = ''.join(held).removesuffix('\r')
                if line and not line.isspace():
                    yield number, line
                number, held, length = number + 1, [], 0
            held.append(part)
            length += len(part)
            if length > LINE:
                raise UserError(
                    f'{where}:{number}: a line of more than {LINE:,} characters; at most so many are read: break it up'
                )


def pieces(path: Path, told: str = '', streams: bool = False) -> Iterator[str]:
    """The text of a file, piece by piece, without a byte order mark.

    `told` stands before its name in messages; with `streams` it may be a pipe, as of `<(…)`. Raises UserError for what is no
    regular file, cannot be read, is damaged, unpacks to far more than text would, or is no UTF-8: with the byte, or with what
    the file is, where that can be told.
    """
    # What an option names is one file; of a folder others may be left out.
    name, others = f'{told}{shown(path)}', '' if told else LEAVE_OUT
    decoder, done = codecs.getincrementaldecoder('utf-8')(), 0
    for block in _with_head(_unpacked(path, name, streams)):
        if not done:
            _check_text(block, name, path, others)
            done = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
            block = block[done:]
        yield _decoded(decoder, block, done, name, others)
        done += len(block)
    yield _decoded(decoder, b'', done, name, others, final=True)


def _decoded(
    decoder: codecs.IncrementalDecoder, block: bytes, done: int, name: str, others: str, final: bool = False
) -> str:
    held = decoder.getstate()[0]  # the beginning of a character that the last block ended in
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        at = done - len(held) + error.start
        rule = f'text must be UTF-8; convert the file (iconv -t utf-8){others}'
        raise UserError(f'{name}: byte {at} is 0x{error.object[error.start]:02x}, {error.reason}; {rule}') from None


def _with_head(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes; the first block has enough of them to tell what they are, if there are so many."""
    head = b''
    while len(head) < HEAD and (block := next(blocks, None)) is not None:
        head += block
    if head:
        yield head
    yield from blocks


def _check_text(head: bytes, name: str, path: Path, others: str) -> None:
    """Raises UserError where a file's beginning says that it is no text, or text in another encoding."""
    for begins, what, instead in NO_TEXT:
        if head.startswith(begins) and not (begins.isascii() and begins.isalnum() and _is_text(head)):
            raise UserError(f'{name}: is {what}, not text; {instead.replace("{}", shown(path.name))}{others}')
    if head[TAR[0] : TAR[0] + len(TAR[1])] == TAR[1]:
        raise UserError(f'{name}: is a tar archive, not text; {UNPACK}{others}')
    for packing in PACKINGS:
        if packing.begins.match(head):
            raise UserError(f'{name}: is packed twice, by {packing.name} within; unpack it once')
    encoding = _marked(head)
    if encoding is None and len(head) >= 8 and not any(head[1:64:2]) and all(head[0:64:2]):
        encoding = 'UTF-16LE'
    if encoding is not None:
        convert = f'iconv -f {encoding} -t utf-8 {shown(path.name)} > converted.txt'
        raise UserError(f'{name}: is {encoding} text, and UTF-8 is read; {convert}')


def _marked(content: bytes) -> str | None:
    return next((encoding for mark, encoding in ENCODINGS if content.startswith(mark)), None)


def _is_text(head: bytes) -> bool:
    """Whether these bytes could as well be text, which begins with such letters."""
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head)
    except UnicodeDecodeError:
        return False
    return b'\0' not in head


def _unpacked(path: Path, name: str, streams: bool) -> Iterator[bytes]:
    with opened(path, name, streams) as file:
        size = 0
        try:
            head = file.peek(16)[:16]
        except OSError as error:
            raise _unreadable(error, name) from None
        packing = next((one for one in PACKINGS if one.begins.match(head)), None)
        if packing is None and head and any(path.suffix.lower() in one.suffixes for one in PACKINGS):
            raise UserError(
                f'{name}: not a whole {path.suffix} file; it is not packed at all; take {path.suffix} off its name'
            )
        blocks = _blocks(file) if packing is None else packing.unpack(file)
        try:
            for block in blocks:
                size += len(block)
                if packing and size > max(UNPACKED, MOST_TIMES * os.fstat(file.fileno()).st_size):
                    raise UserError(
                        f'{name}: unpacks to more than {MOST_TIMES} times its size, as no text does; if it is meant, '
                        'unpack it first'
                    )
                yield block
        except UserError:
            raise
        except BROKEN as error:
            raise _broken(error, packing, name) from None


def _unreadable(error: Exception, name: str) -> UserError:
    why = getattr(error, 'strerror', None) or error
    return UserError(f'{name}: cannot be read ({why}); make it readable or name other paths')


def _broken(error: Exception, packing: Packing | None, name: str) -> UserError:
    if packing is None or (isinstance(error, OSError) and error.errno is not None):
        return _unreadable(error, name)
    if 'too much memory' in str(error) or 'emory usage limit' in str(error):
        return UserError(
            f'{name}: was packed by {packing.name} with a window of more than {WINDOW >> 20} MiB; pack it again with a '
            'smaller one (zstd without --long or --ultra), or unpack it first'
        )
    return UserError(f'{name}: not a whole {packing.name} file ({shown(error)}); make it again from the original')


def decoded(content: bytes, name: str) -> str:
    """UTF-8 as text, without a byte order mark. Raises UserError for anything else."""
    if encoding := _marked(content):
        raise UserError(f'{name}: is {encoding} text, and UTF-8 is read; convert it (iconv -f {encoding} -t utf-8)')
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = content.count(b'\n', 0, error.start) + 1
        raise UserError(
            f'{name}: line {line}: not UTF-8 at byte {error.start}, which is 0x{content[error.start]:02x}'
        ) from None


def opened(path: Path, name: str, streams: bool = False) -> io.BufferedReader:
    """A regular file for reading, which never waits. Raises UserError for others, but with `streams` for pipes and terminals.

    A device that gives bytes without end is read up to the limits of what is read.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if streams else os.O_NONBLOCK))
    except OSError as error:
        raise _unreadable(error, name) from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f'{name}: cannot be read ({error})') from None
    kind = os.fstat(file).st_mode
    if stat.S_ISDIR(kind) or not (stat.S_ISREG(kind) or streams):
        os.close(file)
        raise UserError(f'{name}: is {kind_of(kind)}; it must be a regular file')
    return os.fdopen(file, 'rb')
