"""Strangers' files: what is none, too large, too deep or changes meanwhile is told in one line, and nothing waits for it."""

import contextlib
import itertools
import json
import os
import random
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from weft.hub import tensor_files
from weft.runtime.errors import UserError
from weft.storage import foreign
from weft.storage.foreign import MOST_DEPTH, MOST_DIGITS, read_file, read_json, read_object, shown_path


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 400
    return line


def with_socket(path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as one, contextlib.chdir(path.parent):
        one.bind(path.name)


NO_FILES = {
    'a folder': (lambda path: path.mkdir(), 'is a folder: it must be a file'),
    'a pipe': (os.mkfifo, 'is a pipe: it must be a file'),
    'a socket': (with_socket, 'is a socket: it must be a file'),
    'a device': (lambda path: path.symlink_to('/dev/zero'), 'is a device: it must be a file'),
    'a loop': (lambda path: path.symlink_to(path.name), 'cannot be read: Too many levels of symbolic links'),
    'nothing': (lambda path: path.symlink_to('none'), 'cannot be read: No such file or directory'),
    'large': (lambda path: (path.touch(), os.truncate(path, 2**40)), f'has {2**40} bytes: at most 1000 are read'),
}


@pytest.mark.parametrize('kind', NO_FILES)
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
    make, words = NO_FILES[kind]
    make(tmp_path / 'x.json')
    assert refusal(lambda: read_file(tmp_path / 'x.json', 1000)) == f'{tmp_path}/x.json: {words}' + (
        ' of such a file' if kind == 'large' else ''
    )


def test_a_file_of_as_many_bytes_as_are_allowed_is_read(tmp_path):
    (tmp_path / 'x').write_bytes(b'0123456789')
    assert read_file(tmp_path / 'x', 10) == b'0123456789'
    assert 'has 10 bytes: at most 9' in refusal(lambda: read_file(tmp_path / 'x', 9))


deep = lambda depth: b'{"a":' * (depth - 1) + b'[]' + b'}' * (depth - 1)
JSON = {
    'too many values': (b'[' + b'[],' * 20 + b'[]]', 'has 42 lists, objects and commas: at most 40 are read'),
    'too deep': (deep(MOST_DEPTH + 1), f'too deep: at most {MOST_DEPTH} are read'),
    'much too deep': (b'[' * 39, 'not readable as JSON: Expecting value'),
    'a name twice': (b'{"x": {"a\\u001b": 1, "a\\u001b": 2}}', "an object in it has 'a\\x1b' twice"),
    'a long number': (b'{"a": -' + b'1' * MOST_DIGITS + b'}', f'a whole number of {MOST_DIGITS + 1} digits'),
    'half a character': (b'{"a": ["\\ud800"]}', "has the text '\\ud800': a lone surrogate is not Unicode text"),
    'half a name': (b'{"\\udfff": 1}', "has the text '\\udfff'"),
    'no UTF-8': (b'{"a": "\xff"}', 'not readable as JSON'),
    'UTF-16': ('{"a": 1}'.encode('utf-16'), 'not readable as JSON'),
    'nothing': (b'', 'not readable as JSON: Expecting value'),
    'two': (b'{}{}', 'not readable as JSON: Extra data'),
    'a NUL': (b'{}\0', 'not readable as JSON: Extra data'),
    'a list': (b'[]', 'must be a JSON object, not list'),
    'null': (b'null', 'must be a JSON object, not NoneType'),
}


@pytest.mark.parametrize('name', JSON)
def test_json_is_refused_in_one_line(name):
    content, words = JSON[name]
    most = 40 if name == 'too many values' else foreign.MOST_VALUES
    line = refusal(lambda: read_object(content, 'x.json', most))
    assert line.startswith('x.json: ')
    assert words in line


def test_deep_json_is_refused_where_python_itself_gives_up():
    assert 'too deep' in refusal(lambda: read_object(b'[' * 100_000, 'x.json'))


def test_json_within_the_bounds_is_read_as_it_is():
    said = {'a': ['\U0001f600', 'é', '\0', -1, 2**63, 1.5, None, True], '': {'b': {}}}
    for text in (json.dumps(said), json.dumps(said, ensure_ascii=False), '\ufeff' + json.dumps(said)):
        assert read_json(text.encode(), 'x.json') == said
    assert read_json(deep(MOST_DEPTH), 'x.json')['a']
    assert read_json(b'{"a": ' + b'1' * MOST_DIGITS + b'}', 'x.json') == {'a': int('1' * MOST_DIGITS)}
    assert read_json(b'{"a": ["x", {"b": 1}, {"b": 1}]}', 'x.json') == {'a': ['x', {'b': 1}, {'b': 1}]}
    assert read_json(b'7', 'x.json') == 7


def test_a_path_in_a_message_troubles_no_terminal():
    assert shown_path(Path('/a/\x1b[2J\n.bin')) == '/a/\\x1b[2J\\n.bin'
    assert shown_path(Path('a') / ('x' * 255)) == 'a/' + 'x' * 99 + '…'
    assert [shown_path(Path(name)) for name in ('/a/b', 'b', '.', '/')] == ['/a/b', 'b', '.', '/']


def changed_file(path: Path) -> foreign.SteadyFile:
    path.write_bytes(bytes(range(100)))
    return foreign.SteadyFile.of(path)


CHANGES = {
    'cut off': lambda path: os.truncate(path, 50),
    'longer': lambda path: os.truncate(path, 101),
    'another': lambda path: (path.unlink(), path.write_bytes(bytes(range(100))), os.utime(path, ns=(0, 7))),
    'written': lambda path: (path.write_bytes(bytes(100)), os.utime(path, ns=(0, 7))),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_file_that_changes_meanwhile_is_told(change, tmp_path):
    file = changed_file(tmp_path / 'x')
    assert file.read(3, 2) == b'\3\4'
    CHANGES[change](tmp_path / 'x')
    for begin in (3, 60):
        line = refusal(lambda begin=begin: file.read(begin, 2))
        assert line == f'{tmp_path}/x: changed while it was read: try again when nothing writes to it'


@pytest.mark.parametrize('field', ['st_ino', 'st_dev'])
def test_a_file_may_have_another_number_each_time_it_is_opened(field, tmp_path, monkeypatch):
    """As on disks over a network."""
    found, looks = os.fstat, itertools.count(1)
    index = getattr(stat, field.upper())

    def fstat(descriptor):
        fields = list(found(descriptor))
        fields[index] += next(looks)
        times = {name: getattr(found(descriptor), name) for name in ('st_atime_ns', 'st_mtime_ns', 'st_ctime_ns')}
        return os.stat_result(fields, times)

    monkeypatch.setattr(os, 'fstat', fstat)
    file = changed_file(tmp_path / 'x')
    assert file.read(3, 2) == b'\3\4'
    assert file.read(5, 1) == b'\5'


def test_a_file_that_is_gone_meanwhile_is_told(tmp_path):
    file = changed_file(tmp_path / 'x')
    (tmp_path / 'x').unlink()
    assert 'No such file' in refusal(lambda: file.read(3, 2))


@pytest.mark.parametrize(('near', 'at_once'), [(2**15, 2**24), (1, 2**24), (2**30, 64), (500, 1000)])
def test_any_part_of_an_array_is_what_numpy_takes(near, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, 'NEAR', near)
    monkeypatch.setattr(tensor_files, 'AT_ONCE', at_once)
    draw = random.Random(near)
    arrays = {}
    for i in range(30):
        shape = tuple(draw.choice((1, 2, 3, 5, 17, 300)) for _ in range(draw.randrange(5)))
        shape = shape if np.prod(shape) < 10**6 else shape[:2]
        arrays[f'{i}'] = np.arange(np.prod(shape)).astype(draw.choice(('f4', 'u1'))).reshape(shape)
    kinds = {name: (x.dtype, x.shape) for name, x in arrays.items()}
    tensor_files.write(tmp_path / 'x', kinds, arrays.__getitem__)
    stored = tensor_files.header(tmp_path / 'x')
    for name, x in arrays.items():
        for _ in range(20):
            dims = list(enumerate(x.shape))[: draw.randrange(x.ndim + 1)]
            take = tuple(part(draw, dim, size) for dim, size in dims)
            first = take[0] if take and isinstance(take[0], np.ndarray) else slice(None)
            wanted = x[first][(slice(None), *take[1:])] if isinstance(first, np.ndarray) else x[take]
            found = stored[name].read(take)
            assert (found.shape, found.dtype, found.tobytes()) == (wanted.shape, wanted.dtype, wanted.tobytes())


def part(draw: random.Random, dim: int, size: int):
    how = draw.random()
    if how < 0.15:
        return draw.randrange(size)
    if how < 0.3:
        return slice(None)
    if dim == 0 and how < 0.45:
        return np.array(draw.sample(range(size), draw.randrange(1, size + 1)))
    begin = draw.randrange(size)
    return slice(begin, draw.randrange(begin, size + 1), draw.choice((1, 1, 1, 2, 3)))
