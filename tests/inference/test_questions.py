"""Prompts come out of files as they were written there, whatever ends their lines and whatever the file is called."""

import gzip
import json
import os
import threading
from pathlib import Path

import pytest

from weft.inference import questions
from weft.inference.questions import read_prompts_file, read_questions
from weft.runtime.errors import UserError
from weft.scripts import score


def prompts(path: Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [question.prompt for question in read_prompts_file(str(path))]


def test_only_line_feeds_end_a_prompt(tmp_path: Path) -> None:
    for data, wanted in {
        b'a\rb\nc': ['a\rb', 'c'],
        b'a\r\n\r\nb\r\n': ['a', 'b'],
        'a\u2028b\x0bc\x85d\ne'.encode(): ['a\u2028b\x0bc\x85d', 'e'],
        b'\xef\xbb\xbfa\nb': ['a', 'b'],
        b'  \n a \n': ['  ', ' a '],
        b'': [],
        b'\n\n': [],
        b'a\0b': ['a\0b'],
        b'"a"\n{b}\n[c]\n{"d": 1}': ['"a"', '{b}', '[c]', '{"d": 1}'],
    }.items():
        assert prompts(tmp_path / 'a.txt', data) == wanted
        assert prompts(tmp_path / 'a', data) == wanted


@pytest.mark.parametrize('name', ['a.jsonl', 'a.JSONL', 'a.ndjson', 'a.json', 'array.json', 'a.jsonl.gz', 'plain'])
def test_a_prompt_of_several_lines_comes_as_json(tmp_path: Path, name: str) -> None:
    objects = [{'prompt': 'one\ntwo', 'id': 12345678901234567890123}, {'prompt': 'three\r\n'}]
    data = json.dumps(objects) if name == 'array.json' else '\n'.join(map(json.dumps, objects))
    path = tmp_path / name
    path.write_bytes(gzip.compress(data.encode()) if name.endswith('.gz') else data.encode())
    found = read_prompts_file(str(path))
    assert [question.prompt for question in found] == ['one\ntwo', 'three\r\n']
    assert [question.id for question in found] == [12345678901234567890123, None]


def test_a_long_path_keeps_its_line(tmp_path: Path) -> None:
    for name, data in (('a.txt', 'x\ny'), ('a.jsonl', '{"prompt": "x"}\n{"prompt": "y"}')):
        path = tmp_path / ('long' * 50) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(data)
        assert [question.where[-3:] for question in read_prompts_file(str(path))] == ['…:1', '…:2']


@pytest.mark.parametrize('name', ['a.json', 'a.JSON.gz'])
@pytest.mark.parametrize(
    'content',
    [
        json.dumps({'messages': [{'role': 'user', 'content': 'Hi'}]}, indent=2),
        json.dumps([{'role': 'user', 'content': 'Hi'}], indent=2),
        json.dumps([{'role': 'user', 'content': 'Hi'}]),
        json.dumps({'prompt': 'a'}, indent=2),
        json.dumps(['a', 'b']),
        'a\nb',
    ],
)
def test_json_that_holds_no_prompts_is_not_read_as_lines(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith('.gz') else content.encode())
    with pytest.raises(UserError, match=r'an object with either "prompt" or "messages".* give it as --chat'):
        read_prompts_file(str(path))
    path.write_bytes(gzip.compress(b'\n') if name.endswith('.gz') else b'\n')
    assert read_prompts_file(str(path)) == []


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')
    writer = threading.Thread(target=(tmp_path / 'pipe').write_bytes, args=[b'a\nb\n'])
    writer.start()
    assert [question.prompt for question in read_prompts_file(str(tmp_path / 'pipe'))] == ['a', 'b']
    writer.join()


def test_a_file_that_cannot_be_prompts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, 'LONGEST', 1 << 21)
    (tmp_path / 'latin.txt').write_bytes(b'a\nb\xff')
    (tmp_path / 'wide.txt').write_bytes('hello'.encode('utf-16'))
    (tmp_path / 'deep.jsonl').write_text('{"prompt": "a", "id": ' + '[' * 100_000)
    (tmp_path / 'twice.jsonl').write_text('\n{"prompt": "a", "prompt": "b"}')
    for path, message in {
        tmp_path / 'latin.txt': 'byte 3 is 0xff',
        tmp_path / 'wide.txt': 'is UTF-16 text',
        tmp_path / 'deep.jsonl': 'deep.jsonl:1: not JSON (nested too deeply)',
        tmp_path / 'twice.jsonl': "twice.jsonl:2: not JSON (an object in it has 'prompt' twice",
        tmp_path: 'is a folder',
        tmp_path / 'none': 'No such file',
        Path('/dev/zero'): 'a text of more than 2,097,152 characters',
        Path('a\0b'): 'null byte',
        Path('x' * 300): 'File name too long',
    }.items():
        with pytest.raises(UserError) as caught:
            read_prompts_file(str(path))
        line = str(caught.value)
        assert message in line, line
        assert line.isprintable()
        assert len(line) < 500
    with pytest.raises(UserError, match='no prompt: give --prompt TEXT'):
        read_questions([], ['/dev/null'], [], [])


def test_texts_to_embed_are_bounded_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(score, 'MOST_TEXTS', 1 << 20)
    with pytest.raises(UserError, match='--texts /dev/zero: a text of more than 1,048,576 characters'):
        score.read_texts('/dev/zero')
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone\rand\n\ntwo\n')
    assert score.read_texts(str(tmp_path / 'a.txt')) == ['one\rand', '', 'two']
