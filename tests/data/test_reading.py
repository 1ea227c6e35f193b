"""A file is read by what it is, not by what it is called; what is no text is named, with what to do instead."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from weft.data import reading
from weft.data.pairs import Pair, read_pairs
from weft.data.sources import texts
from weft.runtime.errors import UserError

WANTED = ['one', 'two é', 'three\nlines\nof it']
LINES = ''.join(json.dumps({'n': 1, 'text': text}) + '\n' for text in WANTED).encode()
ARRAY = json.dumps([{'n': 1, 'text': text} for text in WANTED], indent=1).encode()
BOM = b'\xef\xbb\xbf'


def read(path: Path | str, data: bytes | None = None) -> list[str]:
    if data is not None:
        Path(path).write_bytes(data)
    return [text for _, text in texts([str(path)])]


def told(path: Path | str, data: bytes | None = None) -> str:
    """The one line that refuses a file."""
    with pytest.raises(UserError) as caught:
        read(path, data)
    line = str(caught.value)
    assert '\n' not in line
    assert len(line) <= 500
    return line


def frames(*parts: bytes, **options: int) -> bytes:
    return b''.join(zstandard.ZstdCompressor(**options).compress(part) for part in parts)


PACKED = {
    '': bytes,
    '.gz': gzip.compress,
    '.GZ': gzip.compress,
    '.zst': frames,
    '.zstd': frames,
    '.xz': lzma.compress,
    '.bz2': bz2.compress,
}


@pytest.mark.parametrize('ending', PACKED)
@pytest.mark.parametrize('kind', ['jsonl', 'JSONL', 'ndjson', 'jsonlines', 'json', 'JSON as an array', 'none'])
def test_json_is_read_under_all_its_names(tmp_path: Path, kind: str, ending: str) -> None:
    name = {'JSON as an array': 'a.JSON', 'none': 'part-00000'}.get(kind, f'a.{kind}') + ending
    assert read(tmp_path / name, PACKED[ending](ARRAY if kind == 'JSON as an array' else LINES)) == WANTED


@pytest.mark.parametrize('ending', PACKED)
def test_what_is_packed_is_known_by_its_content(tmp_path: Path, ending: str) -> None:
    data = PACKED[ending](b'some text')
    for name in ('a.txt', 'a', 'a.md.gz' if ending else 'b', f'a.txt{ending}'):
        assert read(tmp_path / name, data) == ['some text'], name


def test_packed_files_of_several_parts_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = b'\x53\x2a\x4d\x18\x04\x00\x00\x00abcd'
    for name, data in {
        'a.gz': gzip.compress(b'one ') + gzip.compress(b'two'),
        'b.gz': gzip.compress(b'one two') + bytes(512),
        'a.zst': frames(b'one ', b'two'),
        'b.zst': skipped + frames(b'one ') + skipped + frames(b'two') + skipped,
        'c.zst': frames(*[b'x' * 3000] * 3)[:0] + frames(b'one two'),
        'a.xz': lzma.compress(b'one ') + lzma.compress(b'two') + bytes(8),
        'a.bz2': bz2.compress(b'one ') + bz2.compress(b'two'),
    }.items():
        assert read(tmp_path / name, data) == ['one two'], name
    monkeypatch.setattr(reading, 'BLOCK', 1 << 12)
    long = os.urandom(20_000).hex() * 3
    for ending in ('.gz', '.zst', '.xz', '.bz2'):
        assert read(tmp_path / f'long.txt{ending}', PACKED[ending](long.encode())) == [long]


@pytest.mark.parametrize('ending', ['.gz', '.zst', '.xz', '.bz2'])
def test_a_damaged_packed_file_is_named(tmp_path: Path, ending: str) -> None:
    data = PACKED[ending](os.urandom(20_000).hex().encode())
    middle = len(data) // 2
    altered = data[:middle] + bytes([data[middle] ^ 0xFF]) * 40 + data[middle + 40 :]
    # zstd has a checksum only where it was asked for.
    for damaged in (data[:-3], data[:middle], *([altered] if ending != '.zst' else [])):
        assert f'a.txt{ending}: not a whole' in told(tmp_path / f'a.txt{ending}', damaged)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read(tmp_path / 'a.txt', BOM + b'hello') == ['hello']
    assert read(tmp_path / 'a.jsonl', BOM + LINES) == WANTED
    assert read(tmp_path / 'a.json', BOM + ARRAY) == WANTED
    assert read(tmp_path / 'b.jsonl.gz', gzip.compress(BOM + LINES)) == WANTED
    assert read(tmp_path / 'b.txt', b'a' + BOM) == ['a\ufeff']
    (tmp_path / 'a.tsv').write_bytes(BOM + b'a\tb\r\nc\rd\te\n')
    assert list(read_pairs([str(tmp_path / 'a.tsv')], '--data')) == [Pair('a', 'b'), Pair('c\rd', 'e')]
    for encoding in ('utf-16', 'utf-16-be', 'utf-16-le', 'utf-32'):
        mark = {'utf-16-be': b'\xfe\xff', 'utf-16-le': b'\xff\xfe'}.get(encoding, b'')
        line = told(tmp_path / 'u.txt', mark + 'hello there, all of you'.encode(encoding))
        assert 'UTF-16' in line or 'UTF-32' in line
        assert 'iconv -f UTF-' in line
    assert 'UTF-16LE' in told(tmp_path / 'u.txt', 'hello there'.encode('utf-16-le'))
    assert 'byte 7 is 0xff' in told(tmp_path / 'u.txt', BOM + b'four\xff')


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == 'zip':
        with zipfile.ZipFile(file, 'w') as packed:
            packed.writestr('a.txt', 'hello')
    else:
        with tarfile.open(fileobj=file, mode=kind) as packed:
            packed.addfile(tarfile.TarInfo('a.txt'))
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(9))
    return file.getvalue()


NO_TEXT = {
    'a.parquet': (b'PAR1\x15\x04\x15\x00\x4c' + bytes(99), ['Parquet', 'read_parquet', 'a.parquet']),
    'renamed.txt': (b'PAR1\x15\x04\x15\x00\x4c' + bytes(99), ['Parquet']),
    'a.arrow': (b'ARROW1\0\0' + bytes(99), ['Arrow', 'read_feather']),
    'a.zip': (archive('zip'), ['zip', 'unpack']),
    'a.tar': (archive('w:'), ['tar', 'unpack']),
    'a.tgz': (archive('w:gz'), ['tar', 'unpack']),
    'a.npy': (array(), ['NumPy', 'score.py']),
    'a.pdf': (b'%PDF-1.7\n%\xe2\xe3', ['PDF', 'pdftotext']),
    'a.h5': (b'\x89HDF\r\n\x1a\n' + bytes(9), ['HDF5']),
    'a.sqlite': (b'SQLite format 3\0' + bytes(9), ['SQLite']),
    'a.pkl': (b'\x80\x04\x95' + bytes(9), ['pickle', 'never read']),
    'a.lz4': (b'\x04\x22\x4d\x18' + bytes(9), ['lz4']),
    'twice.gz.gz': (gzip.compress(gzip.compress(b'a')), ['packed twice']),
    'plain.gz': (b'plain', ['not a whole .gz file', 'not packed']),
}


@pytest.mark.parametrize('name', NO_TEXT)
def test_what_is_no_text_is_told_with_what_helps(tmp_path: Path, name: str) -> None:
    data, words = NO_TEXT[name]
    line = told(tmp_path / name, data)
    assert all(word in line for word in words), line


def test_text_that_begins_as_other_files_do_is_text(tmp_path: Path) -> None:
    for text in ('PAR1 is par', 'ORCs', 'GGUF', 'BZh was here', '(µ/ý', 'Rar!', '[1, 2]', '[', '{', '{"a": 1}', ']'):
        assert read(tmp_path / 'a.txt', text.encode()) == [text]
        assert read(tmp_path / 'a', text.encode()) == [text]
    for text in ('[1, 2]', '[]', '[', '{\n "name": "settings"\n}', '{"name": "settings"}', '{"a', '[[1]]', '"a"', '7'):
        assert read(tmp_path / 'a.json', text.encode()) == [text]


JSON = {
    'bad.json': (b'[{"text": "a"}, {"text": ', r'bad.json[1]: not JSON'),
    'open.json': (b'[{"text": "a"}', r'open.json[1]: not JSON (it ends before its array does)'),
    'comma.json': (b'[{"text": "a"},]', r'comma.json[1]: not JSON'),
    'after.json': (b'[{"text": "a"}] x', r'after.json: not JSON (more follows'),
    'mixed.json': (b'[{"text": "a"}, 7]', r'mixed.json[1]: JSON, but no object'),
    'field.json': (b'[{"texts": "a"}]', r"field.json[0]: no field --field 'text'; did you mean 'texts'?"),
    'lines.json': (b'{"texts": "a"}\n{"texts": "b"}', r"lines.json:1: no field --field 'text'"),
    'twice.jsonl': (b'{"text": "a", "text": "b"}', r"an object in it has 'text' twice"),
    'deep.jsonl': (b'{"text": "a", "x": ' + b'[' * 200_000, r'deep.jsonl:1: not JSON (nested too deeply)'),
    'deep.json': (b'[{"text": "a"}, ' + b'[' * 200_000, r'deep.json[1]: not JSON (nested too deeply)'),
}


@pytest.mark.parametrize('name', JSON)
def test_a_mistake_in_json_is_named_by_its_place(tmp_path: Path, name: str) -> None:
    data, message = JSON[name]
    assert message in told(tmp_path / name, data)


@pytest.mark.parametrize(
    ('name', 'data', 'place'),
    [('a.jsonl', b'{"text": "a"}\n{"txt": 1}', ':2: no field'), ('a.json', b'[{"text": "a"}, 7]', '[1]: JSON, but')],
)
def test_a_long_path_keeps_its_line_in_a_message(tmp_path: Path, name: str, data: bytes, place: str) -> None:
    (tmp_path / ('long' * 50)).mkdir()
    line = told(tmp_path / ('long' * 50) / name, data)
    assert f'…{place}' in line, line


def test_other_fields_may_hold_any_numbers(tmp_path: Path) -> None:
    data = b'{"n": ' + b'1' * 5000 + b', "m": 1e999, "text": "a"}'
    assert read(tmp_path / 'a.jsonl', data) == ['a']
    assert read(tmp_path / 'a.json', b'[' + data + b']') == ['a']


def test_an_array_is_read_whatever_the_size_of_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [str(i) * (i % 50 + 1) for i in range(300)]
    data = json.dumps([{'text': text} for text in wanted], indent=1).encode()
    for block in (7, 64, 1000, 1 << 20):
        monkeypatch.setattr(reading, 'BLOCK', block)
        assert read(tmp_path / 'a.json', data) == wanted


def test_bombs_are_told_before_they_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, 'UNPACKED', 1 << 16)
    zeros, peak = bytes(1 << 23), 0
    tracemalloc.start()
    for ending in ('.gz', '.zst', '.xz', '.bz2'):
        data = PACKED[ending](zeros)
        for name in (f'a.txt{ending}', f'a.jsonl{ending}', f'a.json{ending}'):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            assert 'unpacks to more than 200 times its size' in told(tmp_path / name, data)
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert peak < len(zeros) * 2.5  # zstd gives a small file at once


def test_texts_and_lines_have_named_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading.DOCUMENT > 2_227_753_162  # TinyStories, one file
    monkeypatch.setattr(reading, 'LINE', 1000)
    monkeypatch.setattr(reading, 'DOCUMENT', 3000)
    long = json.dumps({'text': 'a' * 2000}).encode()
    assert 'a.jsonl:2: a line of more than 1,000 characters' in told(
        tmp_path / 'a.jsonl', LINES.split(b'\n')[0] + b'\n' + long
    )
    assert 'a.json[0]: ' in told(tmp_path / 'a.json', b'[' + json.dumps({'text': 'a' * 3_000_000}).encode()[:-1])
    assert 'a text of more than 3,000 characters' in told(tmp_path / 'a.txt', b'a ' * 2000)
    assert read(tmp_path / 'b.txt', b'a' * 3000) == ['a' * 3000]


def test_a_zstd_window_is_taken_up_to_a_limit(tmp_path: Path) -> None:
    def packed(log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return stream.compress(b'x' * 1000) + stream.flush()

    assert read(tmp_path / 'a.zst', packed(29)) == ['x' * 1000]
    assert 'window of more than 512 MiB' in told(tmp_path / 'a.zst', packed(31))
