"""A run's data is made once, whole or not at all, and its held-out part is not in its training part."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.data.baseline import xz_bits_per_byte
from weft.data.config import DataConfig
from weft.data.prepare import Dataset, prepare
from weft.data.prepared import Stored
from weft.data.split import split_of
from weft.runtime.errors import UserError
from weft.storage import files as disk

LENGTH = 32


def story(i: int, lines: int = 12) -> str:
    """A text that no other number's text shares a line with."""
    return ''.join(f'Line {line} of story {i}: \u2581 é {i * 1000 + line}\n' for line in range(lines))


def quiet(_: str) -> None:
    pass


def make(folder: Path, source: Path | tuple[Path, ...], **options: Any) -> Dataset:
    paths = tuple(str(path) for path in source) if isinstance(source, tuple) else str(source)
    options = {'vocabulary': 320, 'validation_share': 0.2, **options}
    return prepare(DataConfig(source=paths, **options), folder, LENGTH, quiet)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 20 files of one size, two of them copies of each other."""
    folder = tmp_path / 'corpus'
    folder.mkdir()
    for i in range(20):
        (folder / f'{i:02}.txt').write_text(story(min(i, 18)), encoding='utf-8')
    return folder


def content(dataset: Dataset) -> tuple[bytes, ...]:
    arrays = (dataset.train.take(range(len(dataset.train))), dataset.validation.take(range(len(dataset.validation))))
    return dataset.tokenizer.model, *(value.tobytes() for split in arrays for value in split[:4])


def test_files_are_split_whole_and_every_byte_is_kept(tmp_path: Path, corpus: Path) -> None:
    dataset = make(tmp_path / 'run', corpus)
    train, validation = dataset.train_bytes().decode(), dataset.validation_bytes().decode()
    held_out = [i for i in range(20) if story(min(i, 18)) in validation]
    assert not set(train.splitlines()) & set(validation.splitlines())
    assert train == ''.join(story(min(i, 18)) for i in range(20) if i not in held_out)
    assert validation == ''.join(story(min(i, 18)) for i in held_out)
    assert 0.1 <= len(validation.encode()) / len((train + validation).encode()) <= 0.2
    facts = dataset.facts
    assert facts['split']['by'] == 'file'
    assert facts['documents'] == 20
    assert facts['bytes'] == len((train + validation).encode()) == dataset.train.bytes + dataset.validation.bytes
    assert facts['characters'] == len(train + validation)
    assert facts['tokens'] == dataset.train.tokens + dataset.validation.tokens
    assert json.loads(json.dumps(facts)) == facts


def test_the_tokenizer_learns_from_the_training_part_only(tmp_path: Path, corpus: Path) -> None:
    dataset = make(tmp_path / 'run', corpus)
    held_out = Path(dataset.facts['split']['validation_groups'][0])
    held_out.write_text(''.join(reversed(held_out.read_text(encoding='utf-8'))), encoding='utf-8')
    assert make(tmp_path / 'other', corpus).tokenizer.model == dataset.tokenizer.model


def test_one_jsonl_file_is_split_by_document_and_copies_stay_together(tmp_path: Path) -> None:
    path = tmp_path / 'corpus.jsonl'
    path.write_text(''.join(json.dumps({'text': story(i % 20)}) + '\n' for i in range(40)), encoding='utf-8')
    dataset = make(tmp_path / 'run', path)
    train, validation = dataset.train_bytes().decode(), dataset.validation_bytes().decode()
    assert dataset.facts['split']['by'] == 'document'
    assert not set(train.splitlines()) & set(validation.splitlines())
    assert 0.1 <= len(validation) / len(train + validation) <= 0.2


@pytest.mark.parametrize('files', [1, 2])
def test_few_files_are_cut_at_a_line_end(tmp_path: Path, files: int) -> None:
    paths = tuple(tmp_path / f'{i}.txt' for i in range(files))
    for i, path in enumerate(paths):
        path.write_text(story(i, 100), encoding='utf-8')
    dataset = make(tmp_path / 'run', paths)
    train, validation = dataset.train_bytes().decode(), dataset.validation_bytes().decode()
    assert dataset.facts['split']['by'] == 'end'
    assert train.endswith('\n')
    for i in range(files):
        lines = [line for line in (train + validation).splitlines() if f'story {i}:' in line]
        assert lines == story(i, 100).splitlines()
    assert abs(len(validation) / len(train + validation) - 0.2) < 0.02


def test_stdlib_is_split_by_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / 'lib'
    for i in range(20):
        for j in range(2):
            (library / f'package{i}').mkdir(parents=True, exist_ok=True)
            (library / f'package{i}' / f'{j}.py').write_text(story(2 * i + j), encoding='utf-8')
    (library / 'os.py').write_text(story(99), encoding='utf-8')
    (library / 'latin.py').write_bytes(b'\xe9')
    monkeypatch.setattr('weft.data.sources.sysconfig.get_path', lambda _: str(library))
    facts = prepare(DataConfig(vocabulary=320, validation_share=0.2), tmp_path / 'run', LENGTH, quiet).facts
    assert facts['split']['by'] == 'package'
    assert len(facts['split']['validation_groups']) >= 3
    assert all(name.startswith('package') or name == 'os.py' for name in facts['split']['validation_groups'])
    assert facts['skipped'] == {'count': 1, 'first': ['latin.py']}


def test_loaded_data_is_what_was_prepared_even_if_the_source_changed(tmp_path: Path, corpus: Path) -> None:
    prepared = make(tmp_path / 'run', corpus)
    shutil.rmtree(corpus)
    loaded = make(tmp_path / 'run', corpus)
    assert content(loaded) == content(prepared)
    assert loaded.facts == prepared.facts
    assert (loaded.train.bytes, loaded.validation.bytes) == (prepared.train.bytes, prepared.validation.bytes)
    assert isinstance(loaded.train.stream_S, Stored), 'tokens stay on the disk'


def test_the_same_text_gives_the_same_data_elsewhere(tmp_path: Path, corpus: Path) -> None:
    assert content(make(tmp_path / 'run', corpus)) == content(make(tmp_path / 'other', corpus))


def test_another_config_makes_other_data(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / 'run'
    first = make(run, corpus)
    second = make(run, corpus, vocabulary=330)
    assert first.tokenizer.vocabulary != second.tokenizer.vocabulary
    assert content(make(run, corpus, vocabulary=330)) == content(second)
    assert content(make(run, corpus)) == content(first)


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing is cleaned up after it."""


@pytest.mark.parametrize('before', [None, 330], ids=['empty folder', 'data of another config'])
def test_a_kill_at_any_moment_leaves_a_whole_or_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, before: int | None
) -> None:
    wanted = content(make(tmp_path / 'wanted', corpus))
    run = tmp_path / 'run'
    changes_left = 0

    def kill(action: str, path: Path, _: object) -> None:
        nonlocal changes_left
        changes_left -= 1
        if changes_left < 0:
            if action == 'remove' and path.is_dir():  # a part of it may have gone; data.json is the part that matters
                next(iter(sorted(path.iterdir()))).unlink()
            raise KilledError

    moments = 0
    while True:
        shutil.rmtree(run, ignore_errors=True)
        if before:
            make(run, corpus, vocabulary=before)
        changes_left = moments
        try:
            with disk.watched(kill):
                make(run, corpus)
            break
        except KilledError:
            moments += 1
        assert content(make(run, corpus)) == wanted
        assert not list(run.glob('data.*'))
        assert content(make(run, corpus)) == wanted
    assert moments >= 12


@pytest.mark.parametrize('name', ['data/train.stream_S.npy', 'data/validation.first_R.npy', 'data/data.json'])
def test_a_truncated_or_missing_file_is_named(tmp_path: Path, corpus: Path, name: str) -> None:
    make(tmp_path / 'run', corpus)
    path = tmp_path / 'run' / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=path.name):
        make(tmp_path / 'run', corpus)
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        make(tmp_path / 'run', corpus)


def test_another_runs_tokenizer_is_noticed(tmp_path: Path, corpus: Path) -> None:
    make(tmp_path / 'run', corpus)
    make(tmp_path / 'other', corpus, vocabulary=330)
    shutil.copy(tmp_path / 'other' / 'tokenizer.model', tmp_path / 'run' / 'tokenizer.model')
    with pytest.raises(UserError, match=r'tokenizer\.model: not the tokenizer that made'):
        make(tmp_path / 'run', corpus)


def test_too_little_text_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / 'tiny.txt'
    path.write_text('tiny', encoding='utf-8')
    with pytest.raises(UserError, match=r'data\.source: \d characters of training text are too few'):
        make(tmp_path / 'run', path)
    with pytest.raises(UserError, match=r'training\.sequence_length=0'):
        prepare(DataConfig(source=str(path)), tmp_path / 'run', 0, quiet)
    assert not (tmp_path / 'run').exists()


def test_a_source_that_changes_under_way_is_noticed(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of

    def split_and_change(*arguments: Any) -> Any:
        (corpus / '05.txt').write_text('changed', encoding='utf-8')
        return split(*arguments)

    monkeypatch.setattr('weft.data.prepare.split_of', split_and_change)
    with pytest.raises(UserError, match='changed while it was read'):
        make(tmp_path / 'run', corpus)
    assert not (tmp_path / 'run').exists()


def test_a_large_text_is_sampled_for_the_tokenizer(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('weft.data.prepare.TOKENIZER_CHARACTERS', 5000)
    facts = make(tmp_path / 'run', corpus).facts
    assert facts['tokenizer']['trained_on'] == 'one in 2 blocks of the training text'


def test_xz_needs_less_for_text_that_it_has_seen() -> None:
    first, second = (np.random.default_rng(seed).integers(0, 256, 20_000, np.uint8).tobytes() for seed in (0, 1))
    assert 8 <= xz_bits_per_byte(first) < 8.1
    assert 7.9 < xz_bits_per_byte(first, given=second) < 8.1
    assert xz_bits_per_byte(first, given=second + first) < 0.3  # a match of xz is at most 273 bytes
    assert xz_bits_per_byte(b'a' * 20_000) < 0.1
