"""Where text comes from: the standard library's own source, or the user's files.

Mistakes in the user's files are named by file and line or byte offset.
"""

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from data.config import DataConfig
from sharding.errors import UserError, nearest

# Not the standard library's own: what was installed beside it. Not like the rest: tests, with their tables of cases.
LEFT_OUT = frozenset({'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'})
# Lines that only the generated files of encodings/ have: character tables, and wrappers of the codecs in C, all alike.
TABLE_MARKS = '_table = ', '_table=', 'import _codecs_'


@dataclass(frozen=True)
class Document:
    name: str  # of its file, and the line in a JSONL file
    group: str  # documents of one group stay on the same side of the split: a top-level package, or a file
    text: str


def stdlib(root: Path, skipped: list[str]) -> Iterator[Document]:
    """The Python files under `root`, sorted, grouped by top-level package; undecodable ones are added to `skipped`."""
    for path in _walk(root, LEFT_OUT):
        relative = path.relative_to(root)
        # _sysconfigdata is not source but this machine's build settings.
        if path.suffix != '.py' or path.name.startswith('_sysconfigdata'):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            skipped.append(relative.as_posix())
            continue
        if relative.parts[0] == 'encodings' and any(mark in text for mark in TABLE_MARKS):
            continue
        if text:
            yield Document(relative.as_posix(), relative.parts[0], text)


def documents(config: DataConfig, skipped: list[str]) -> Iterator[Document]:
    """The documents of `config.source`, none of them empty, in the same order each time."""
    if config.paths == ('stdlib',):
        root = Path(sysconfig.get_path('stdlib'))
        if not (root / 'os.py').is_file():
            raise UserError(f"data.source='stdlib': no source of it in {root}; name files or folders of your own text")
        yield from stdlib(root, skipped)
        return
    for path, name, text in _read(config.paths, config.field, 'data.source', skipped):
        yield Document(name, str(path), text)


def texts(paths: Sequence[str], field: str = 'text') -> Iterator[tuple[str, str]]:
    """(name, text) of each document in files, folders and globs: a file, or a line of JSONL; empty ones are left out.

    UserError for a path that matches nothing, holds no text or cannot be read; for text that is not UTF-8, with file
    and byte offset; for a damaged .gz or .zst; for a line of JSONL that is no object with `field`, with its number.
    """
    for _, name, text in _read(paths, field, '--data', []):
        yield name, text


def _read(paths: Sequence[str], field: str, option: str, skipped: list[str]) -> Iterator[tuple[Path, str, str]]:
    seen: set[Path] = set()
    for given in paths:
        found = False
        for path in files_of(given, option):
            if path.resolve() in seen:
                found = True
                continue
            seen.add(path.resolve())
            empty = True
            for name, text in _documents_of(path, field):
                found, empty = True, False
                yield path, name, text
            if empty:
                skipped.append(str(path))
        if not found:
            raise UserError(
                f'{option}={given}: holds no text; a file must not be empty, and a folder must hold one that is not'
            )


def files_of(given: str, option: str) -> list[Path]:
    """The files that a path, a folder (without hidden files) or a glob names, sorted. A name that exists is no glob."""
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        files = [file.relative_to(path) for file in _walk(Path(path))]
        return [Path(path) / file for file in files if not any(part.startswith('.') for part in file.parts)]
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.exists(path):
        raise UserError(f'{option}={given}: must be a regular file, a folder or a glob')
    matches = sorted(glob.glob(path, recursive=True))
    # A folder that `**` matches comes with its files, which match too.
    files = [Path(match) for match in matches if os.path.isfile(match)]
    if not files:
        beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*'))
        hint = nearest(path, beside) if beside else ''
        raise UserError(f'{option}={given}: no such file or folder, and no file matches it as a glob{hint}')
    return files


def _walk(root: Path, left_out: frozenset[str] = frozenset({'__pycache__'})) -> Iterator[Path]:
    """Files under `root`, sorted within each folder, without the folders named in `left_out`."""

    def fail(error: OSError) -> None:
        raise UserError(
            f'{error.filename}: cannot be read ({error.strerror}); make it readable or name other paths'
        ) from None

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(set(folders) - left_out)  # those that os.walk enters, in this order
        yield from (path for name in sorted(names) if os.path.isfile(path := Path(folder) / name))


def _documents_of(path: Path, field: str) -> Iterator[tuple[str, str]]:
    text = text_of(path)
    if not path.name.endswith(('.jsonl', '.jsonl.gz', '.jsonl.zst')):
        if text:
            yield str(path), text
        return
    for number, line in enumerate(text.split('\n'), start=1):
        if line.strip():
            name = f'{path}:{number}'
            if document := field_of(line, field, name, f'data.field={field!r}'):
                yield name, document


def text_of(path: Path) -> str:
    """All of a file, which may be compressed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); make it readable or name other paths') from None
    try:
        if path.suffix == '.gz':
            data = gzip.decompress(data)
        elif path.suffix == '.zst':
            data = _unzstd(data)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f'{path}: not a whole {path.suffix} file ({error}); make it again from the original') from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        rule = 'text must be UTF-8; convert the file (iconv -t utf-8), or leave it out by a glob such as *.txt'
        raise UserError(f'{path}: byte {error.start} is 0x{data[error.start]:02x}, {error.reason}; {rule}') from None


def _unzstd(data: bytes) -> bytes:
    """All frames of `data`; zstandard itself takes a frame that is cut short for a whole one."""
    frames = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError('it ends before its last frame does')
        data = frame.unused_data
    return b''.join(frames)


def field_of(line: str, field: str, name: str, shown: str) -> str:
    """The text in a field of a line of JSONL, which messages call `shown`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name}: not JSON ({error}); every line must be one JSON object') from None
    if not isinstance(value, dict):
        raise UserError(f'{name}: JSON, but no object; every line must be an object with the text in {shown}')
    if field not in value:
        raise UserError(f'{name}: no field {shown}{nearest(field, value)}')
    text = value[field]
    if not isinstance(text, str):
        raise UserError(f'{name}: field {field!r} is {text!r:.40}; it must be text')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f'{name}: field {field!r} has half of a surrogate pair at character {error.start}; leave it out'
        ) from None
    return text
