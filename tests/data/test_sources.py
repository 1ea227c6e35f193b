"""Text comes from where the user says, whole and in order, or one line says why not."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from weft.data.config import DataConfig
from weft.data.reading import BLOCK
from weft.data.sources import documents, kind_of_text, stdlib, texts
from weft.data.walk import LeftOut
from weft.runtime.errors import UserError

TEXT = 'first line\nsecond é \u2581\r\n\ttab\n'


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(*paths: Path | str, field: str = 'text') -> list[str]:
    return [text for _, text in texts([str(path) for path in paths], field)]


@pytest.mark.parametrize('suffix', ['.txt', '.md', '.py', ''])
def test_a_file_is_one_document_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    data = TEXT.encode()
    assert read(write(tmp_path / f'a{suffix}', data)) == [TEXT]
    assert read(write(tmp_path / f'b{suffix}.gz', gzip.compress(data))) == [TEXT]
    frames = b''.join(zstandard.compress(part) for part in (data[:10], data[10:]))
    assert read(write(tmp_path / f'c{suffix}.zst', frames)) == [TEXT]


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_a_line_of_jsonl_is_one_document(tmp_path: Path, suffix: str) -> None:
    wanted = [TEXT, 'line\u2028separator \x85', '👩']
    lines = [json.dumps({'id': 1, 'body': text}, ensure_ascii=i % 2 == 0) for i, text in enumerate([*wanted, ''])]
    data = '\r\n\n'.join(lines).encode()
    compress = {'': bytes, '.gz': gzip.compress, '.zst': zstandard.compress}[suffix]
    path = write(tmp_path / f'a.jsonl{suffix}', compress(data))
    assert read(path, field='body') == wanted
    assert [name for name, _ in texts([str(path)], 'body')] == [f'{path}:{line}' for line in (1, 3, 5)]


def test_folders_and_globs_are_sorted_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ('b.txt', 'a.txt', 'sub/c.txt', '.hidden/d.txt', 'sub/.e.txt', 'sub/__pycache__/f.pyc', 'g.md'):
        write(tmp_path / name, name)
    write(tmp_path / 'sub/empty.txt', '')
    (tmp_path / 'sub/broken').symlink_to(tmp_path / 'nowhere')
    assert read(tmp_path) == ['a.txt', 'b.txt', 'g.md', 'sub/c.txt']
    assert read(f'{tmp_path}/**/*.txt') == ['a.txt', 'b.txt', 'sub/c.txt']
    assert read(tmp_path / 'sub', tmp_path / 'b.txt', tmp_path) == ['sub/c.txt', 'b.txt', 'a.txt', 'g.md']
    assert read(write(tmp_path / 'odd[1]/x.txt', 'brackets')) == ['brackets']


FIXTURES = {
    'fixture.json': '[\n {"id": 1, "name": "x"},\n {"id": 2}\n]\n',
    'array.json': '[{"texts": "a"}]',
    'comment.json': '[{"id": 1, // the first\n "name": "x"}]',
    'log.json': '{"level": "info"}\n{"level": "error"}\n',
    'long.json': '[{"id": "' + 'x' * (3 << 20) + '"}]',
    'README': '{"text": "x"}\nis how a line looks\n',
    'log': '{"level": "info"}\n{"level": "error"}\n',
}


@pytest.mark.parametrize('name', FIXTURES)
def test_json_without_the_field_is_text_in_a_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / 'a.py', 'print(1)')
    write(tmp_path / name, FIXTURES[name])
    assert sorted(read(tmp_path)) == sorted(read(tmp_path / '*')) == sorted(['print(1)', FIXTURES[name]])


def test_json_with_the_field_is_documents_in_a_folder_too(tmp_path: Path) -> None:
    long = 'x' * (3 << 20)
    write(tmp_path / 'a.json', json.dumps([{'n': long, 'text': 'one'}, {'text': 'two'}], indent=1))
    write(tmp_path / 'b.json', f'{{"n": "{long}", "text": "three"}}\n{{"text": "four"}}')
    write(tmp_path / 'c', '\n{"text": "five"}\n\n{"text": "six"}')
    write(tmp_path / 'd', '{"text": "seven"}')
    assert read(tmp_path) == ['one', 'two', 'three', 'four', 'five', 'six', 'seven']
    write(tmp_path / 'e.json', '[{"text": "one"')  # damaged, but no plain text
    with pytest.raises(UserError, match=r'e\.json\[0\]: not JSON'):
        read(tmp_path)


@pytest.mark.parametrize('name', ['fixture.json', 'array.json', 'log.json'])
def test_json_that_is_named_must_have_the_field(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}(\[0\]|:1): no field --field 'text'"):
        read(write(tmp_path / name, FIXTURES[name]))


@pytest.mark.parametrize('name', ['a.json', 'a'])
def test_what_a_text_is_takes_a_block_of_spaces_at_most(name: str) -> None:
    taken: list[str] = []

    def blanks() -> Iterator[str]:
        for _ in range(50):
            taken.append(' ' * (BLOCK // 4))
            yield taken[-1]
        yield '[{"text": "a"}]'

    kind, text = kind_of_text(Path(name), ('text',), True, blanks())
    assert (kind, len(taken)) == ('text', 4)
    assert ''.join(text) == ' ' * (BLOCK // 4 * 50) + '[{"text": "a"}]'


def test_stdlib_leaves_out_what_is_not_its_own_source(tmp_path: Path) -> None:
    kept = ['a.py', 'encodings/utf_8.py', 'pkg/b.py', 'pkg/sub/test_c.py']
    for name in kept:
        write(tmp_path / name, name)
    for name in ('test/a.py', 'pkg/tests/a.py', 'idlelib/idle_test/a.py', 'site-packages/jax/a.py', 'pkg/a.txt'):
        write(tmp_path / name, name)
    write(tmp_path / '_sysconfigdata__linux.py', 'build = 1')
    write(tmp_path / 'encodings/cp437.py', 'decoding_table = (')
    write(tmp_path / 'encodings/big5.py', 'import _codecs_tw, codecs')
    write(tmp_path / 'pkg/empty.py', '')
    write(tmp_path / 'pkg/latin.py', b'# \xe9')
    skipped: list[LeftOut] = []
    found = list(stdlib(tmp_path, skipped))
    assert [document.name for document in found] == kept
    assert [document.group for document in found] == ['a.py', 'encodings', 'pkg', 'pkg']
    assert skipped == [('pkg/latin.py', 'not UTF-8')]


def test_this_pythons_stdlib_is_there() -> None:
    names = [document.name for document in documents(DataConfig(), [])]
    assert {'argparse.py', 'json/decoder.py', 'encodings/utf_8.py'} <= set(names)
    assert len(names) == len(set(names))
    assert not any(part in name.split('/') for name in names for part in ('test', 'tests', 'site-packages'))
    assert not {'encodings/cp1252.py', 'encodings/mac_roman.py', 'encodings/gbk.py'} & set(names)


def jsonl(*lines: str) -> bytes:
    return '\n'.join(lines).encode()


MISTAKES = {
    'empty.txt': (b'', 'holds no text'),
    'blank.jsonl': (b'\n\n', 'holds no text'),
    'latin.txt': (b'abc\xe9def', r'latin\.txt: byte 3 is 0xe9, .*UTF-8'),
    'cut.txt': ('é'.encode()[:1], r'cut\.txt: byte 0 is 0xc3'),
    'latin.jsonl': (b'{"text": "\xff"}', r'latin\.jsonl: byte 10 is 0xff'),
    'bad.jsonl': (jsonl('{"text": "a"}', '', '{"text": '), r'bad\.jsonl:3: not JSON'),
    'list.jsonl': (jsonl('{"text": "a"}', '["text"]'), r"list\.jsonl:2: .*object with the text in --field 'text'"),
    'field.jsonl': (jsonl('{"texts": "a"}'), r"field\.jsonl:1: no field --field 'text'; did you mean 'texts'\?"),
    'number.jsonl': (jsonl('{"text": 7}'), r"number\.jsonl:1: field 'text' is 7; it must be text"),
    'half.jsonl': (jsonl(r'{"text": "ab\ud800"}'), r'half\.jsonl:1: .*surrogate pair at character 2'),
    'not.gz': (b'plain', r'not\.gz: not a whole \.gz file'),
    'short.gz': (gzip.compress(TEXT.encode())[:-9], r'short\.gz: not a whole gzip file'),
    'changed.gz': (gzip.compress(TEXT.encode())[:-8] + bytes(8), r'changed\.gz: not a whole gzip file'),
    'not.zst': (b'plain', r'not\.zst: not a whole \.zst file'),
    'short.zst': (zstandard.compress(bytes(range(64)) * 9)[:-3], r'short\.zst: not a whole zstd file'),
    'latin.gz': (gzip.compress(b'a\xe9'), r'latin\.gz: byte 1 is 0xe9'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    data, message = MISTAKES[name]
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert name in str(caught.value)
    assert '\n' not in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    write(tmp_path / 'corpus.txt', TEXT)
    (tmp_path / 'hollow').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    for path, message in {
        tmp_path / 'corpsu.txt': r"--data=.*corpsu\.txt: no such file .*did you mean '.*corpus\.txt'",
        tmp_path / '*.rst': 'no file matches it as a glob',
        tmp_path / 'gone' / 'corpus.txt': 'no such file',
        tmp_path / ('x' * 5000): 'no such file',
        tmp_path / 'hollow': 'holds no text',
        tmp_path / 'pipe': 'must be a regular file',
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / 'corpus.txt', path)
        assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match=r'data\.source=.*corpsu'):
        list(documents(DataConfig(source=str(tmp_path / 'corpsu.txt')), []))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / 'secret.txt', TEXT)

    def deny(name: Path, *_: int) -> int:
        raise PermissionError(13, 'Permission denied', str(name))

    monkeypatch.setattr(os, 'open', deny)  # root may read everything, so a mode would not do
    with pytest.raises(UserError, match=r'secret\.txt: cannot be read \(Permission denied\)'):
        read(path)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('source', ''),
        ('source', ()),
        ('source', ('a', '')),
        ('field', ''),
        ('vocabulary', 299),
        ('vocabulary', 262_145),
        ('validation_share', 0.0),
        ('validation_share', 0.51),
        ('validation_share', float('nan')),
    ],
)
def test_config_names_the_field_that_is_out_of_range(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf'^data\.{field}='):
        DataConfig(**{field: value})
