"""Prepared data is read as it was written, or not at all: each block is hashed, at the start or when it is first read."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_prepare import content, corpus, make
from weft.data import prepared
from weft.data.packing import Rows
from weft.data.prepare import load
from weft.runtime.errors import UserError
from weft.storage.sealed import sealed, unsealed

assert corpus  # a fixture


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    make(tmp_path / 'run', corpus)
    return tmp_path / 'run'


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 bytes, all of the stream's hashed late."""
    monkeypatch.setattr(prepared, 'BLOCK', 256)
    monkeypatch.setattr(prepared, 'AT_ONCE', 0)


def change(path: Path, token: int) -> None:
    """Another token where one stands, of the same size."""
    array = np.load(path, mmap_mode='r+')
    array[token] += 1
    array.flush()


def touches(rows: Rows, row: int, stream: prepared.Stored, block: int) -> bool:
    """Whether a row has tokens of a block."""
    size = stream.dtype.itemsize
    pieces = range(*rows.first_R[row : row + 2].tolist())
    spans = [(rows.start_P[piece], rows.start_P[piece] + rows.length_P[piece] + 1) for piece in pieces]
    return any(
        stream.begin + begin * size < (block + 1) * 256 and stream.begin + end * size > block * 256
        for begin, end in spans
    )


@pytest.mark.parametrize('part', ['train', 'validation'])
@pytest.mark.parametrize('name', ['stream_S', 'start_P', 'length_P', 'first_R'])
def test_a_token_that_was_changed_is_noticed_at_the_start(run: Path, part: str, name: str) -> None:
    change(run / 'data' / f'{part}.{name}.npy', 7)
    with pytest.raises(
        UserError, match=rf'data/{part}\.{name}\.npy: block 0 \(of 16 MiB\).*altered.*--fresh'
    ) as caught:
        load(run, pytest.fail)
    assert '\n' not in str(caught.value)


def test_of_much_data_a_block_is_hashed_when_it_is_first_read(small_blocks: None, tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / 'run'
    wanted = make(run, corpus)
    found = load(run, pytest.fail)
    stream = found.train.stream_S
    assert isinstance(stream, prepared.Stored)
    assert stream.known == set()
    assert content(found) == content(wanted)
    blocks = -(-(run / 'data' / 'train.stream_S.npy').stat().st_size // 256)
    assert len(stream.known) >= blocks - 1 > 10, 'all but perhaps the header'
    assert found.train_bytes() == wanted.train_bytes()

    bad = len(stream) // 2
    change(run / 'data' / 'train.stream_S.npy', bad)
    block = (stream.begin + bad * stream.dtype.itemsize) // 256
    found = load(run, pytest.fail)
    right = wrong = 0
    for row in range(len(found.train)):
        lies_in = [n for n in range(len(stream.blocks)) if touches(found.train, row, stream, n)]
        if block in lies_in:
            wrong += 1
            with pytest.raises(UserError, match=rf'data/train\.stream_S\.npy: block {block} '):
                found.train.take([row])
            continue
        right += 1
        for value, same in zip(wanted.train.take([row])[:4], found.train.take([row])[:4], strict=True):
            np.testing.assert_array_equal(same, value)
    assert wrong >= 1
    assert right > wrong
    with pytest.raises(UserError, match=f'block {block} '):
        found.train_bytes()
    change(run / 'data' / 'train.start_P.npy', 3)  # which all rows need
    with pytest.raises(UserError, match=r'train\.start_P\.npy: block 0 '):
        load(run, pytest.fail)


def test_data_from_before_there_were_hashes_is_read_with_a_word(run: Path) -> None:
    path = run / 'data' / 'data.json'
    fields = unsealed(path.read_bytes())
    del fields['blocks']
    path.write_text(json.dumps(fields))
    lines: list[str] = []
    wanted = content(load(run, lines.append))
    assert lines == [f'{run}/data: prepared before files were hashed: their sizes are checked, and not what they hold']
    change(run / 'data' / 'train.stream_S.npy', 7)
    assert content(load(run, lines.append)) != wanted
    (run / 'data' / 'train.stream_S.npy').write_bytes(b'')
    with pytest.raises(UserError, match=r'train\.stream_S\.npy: 0 bytes where'):
        load(run, lines.append)


def test_a_description_that_was_altered_is_named(run: Path) -> None:
    path = run / 'data' / 'data.json'
    whole = path.read_bytes()
    fields = unsealed(whole)
    without = {name: value for name, value in fields.items() if name != 'facts'}
    odd = [
        whole.replace(b'"sequence_length": 32', b'"sequence_length": 33'),
        whole.replace(b'"sha256"', b'"sha257"'),
        sealed(without),
        sealed({**fields, 'facts': {}}),
        sealed({**fields, 'blocks': {}}),
        sealed({**fields, 'blocks': []}),
        sealed({**fields, 'sizes': {}}),
        sealed({**fields, 'sizes': {**fields['sizes'], '../../x': None}}),
        sealed({**fields, 'key': {**fields['key'], 'sequence_length': '32'}}),
        sealed({}),
        b'',
        b'null',
        b'[' * 10**6,
        b'[' + b'[],' * 10**7,
        b'\xff' * 100,
    ]
    for content_ in odd:
        assert content_ != whole
        path.write_bytes(content_)
        with pytest.raises(UserError, match=r'data/data\.json|data/train\.stream_S\.npy') as caught:
            load(run, pytest.fail)
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['data.json', 'train.stream_S.npy'])
@pytest.mark.parametrize('kind', ['folder', 'fifo', 'loop', 'nowhere', 'missing'])
def test_what_is_no_file_is_named_and_nothing_waits_for_it(run: Path, name: str, kind: str) -> None:
    path = run / 'data' / name
    path.unlink()
    if kind == 'folder':
        path.mkdir()
    elif kind == 'fifo':
        os.mkfifo(path)
    elif kind != 'missing':
        path.symlink_to({'loop': name, 'nowhere': 'nowhere'}[kind])
    with pytest.raises(UserError, match=name):
        load(run, pytest.fail)


@pytest.mark.parametrize('name', ['data.old', 'data.partial'])
def test_what_a_kill_left_is_removed_and_no_link_is_followed(
    run: Path, corpus: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'theirs').write_text('x')
    for make_it in (
        lambda: (run / name).symlink_to(outside),
        lambda: (run / name).write_text('x'),
        lambda: shutil.copytree(outside, run / name),
        lambda: os.mkfifo(run / name),
    ):
        make_it()
        make(run, corpus)
        assert not os.path.lexists(run / name)
        assert (outside / 'theirs').read_text() == 'x'


@pytest.mark.parametrize('name', ['stream_S', 'start_P', 'length_P', 'first_R'])
@pytest.mark.parametrize('hashed', ['at the start', 'late'])
def test_data_that_is_cut_off_while_it_is_read_is_told_in_one_line(
    run: Path, name: str, hashed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is mapped into memory would end the process."""
    monkeypatch.setattr(prepared, 'IN_MEMORY', 0)
    if hashed == 'late':
        monkeypatch.setattr(prepared, 'AT_ONCE', 0)
    wanted = load(run, pytest.fail).train.take([0, 1])
    found = load(run, pytest.fail)
    np.testing.assert_array_equal(found.train.take([0, 1])[:4], wanted[:4])
    path = run / 'data' / f'train.{name}.npy'
    os.truncate(path, 130)
    with pytest.raises(
        UserError, match=rf'train\.{name}\.npy: ends at byte \d+, where it was longer.*--fresh'
    ) as caught:
        found.train.take(range(len(found.train)))
    assert '\n' not in str(caught.value)


def test_any_slice_of_a_stored_array_is_as_numpy_has_it(tmp_path: Path) -> None:
    array = np.arange(100, dtype=np.int32)
    np.save(tmp_path / 'x.npy', array)
    stored = prepared.Stored(tmp_path / 'x.npy')
    assert (len(stored), stored.dtype, stored.tolist()) == (100, np.int32, array.tolist())
    for part in (slice(3, 9), slice(0), slice(-5, None), slice(90, 200), slice(100, 101), slice(7, 3), slice(None)):
        np.testing.assert_array_equal(stored[part], array[part])
    assert np.asarray(stored, np.int64).tolist() == array.tolist()


@pytest.mark.parametrize('size', [0, 5, 60, 127, 300, 527, 529])
def test_an_array_of_another_size_than_it_says_is_damaged(tmp_path: Path, size: int) -> None:
    np.save(tmp_path / 'x.npy', np.arange(100, dtype=np.int32))
    os.truncate(tmp_path / 'x.npy', size)
    with pytest.raises(UserError, match=r'x\.npy: damaged \(.*--fresh'):
        prepared.Stored(tmp_path / 'x.npy')


@pytest.mark.parametrize(
    'array', [np.ones(3), np.ones((2, 3), np.int32), np.array([None]), np.ones(3, '>i4'), np.int32(1)]
)
def test_what_is_no_row_of_whole_numbers_is_damaged(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / 'x.npy', array)
    with pytest.raises(UserError, match=r'x\.npy: damaged \(it does not begin as an array of whole numbers\)'):
        prepared.Stored(tmp_path / 'x.npy')
