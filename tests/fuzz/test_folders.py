"""Folders that nobody spoiled are accepted, and what a spoiled one must not lead to is seen where it is led to."""

from pathlib import Path

import pytest

from tests.fuzz import Case, folders
from weft.runtime.errors import UserError
from weft.training import importing


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp('folders')
    folders.prepare(place)
    folders.prepare(place)  # as a worker does that follows one which died
    return place


@pytest.mark.parametrize('base', folders.BASES)
def test_a_folder_that_nobody_spoiled_becomes_a_run(base, place, tmp_path):
    assert folders.outcome(place / 'bases' / base, tmp_path / 'run') == 'accepted'


def refuses(message: str, writes: bool = False):
    def examined(folder: Path, run: Path, mesh: object) -> None:
        if writes:
            (folder / 'left').touch()
        raise UserError(message)

    return examined


@pytest.mark.parametrize(
    ('examined', 'told'),
    [
        (refuses('config.json: vocab_size is 0: it must be at least 1'), None),
        (refuses('config.json: \x1b[2J is no field'), 'unspoiled: what troubles a terminal'),
        (refuses('x' * 9000), 'unspoiled: a message of 9000 characters'),
        (refuses('config.json: no', writes=True), 'unspoiled: refused, and something was written'),
    ],
)
def test_what_is_wrong_with_a_refusal_is_told(place, monkeypatch, examined, told):
    def unspoiled(folder: Path, draw: object) -> str:
        return 'unspoiled'

    monkeypatch.setattr(importing, 'examine', examined)
    scratch = place / 'case-0'
    scratch.mkdir()
    try:
        found = folders.check(Case(0, 'unspoiled', ('llama', unspoiled, 0)), scratch)
    finally:
        folders.shutil.rmtree(scratch)
    assert found is None if told is None else found.startswith(told), found


def test_weights_that_are_not_the_files_are_a_fault(place, monkeypatch, tmp_path):
    monkeypatch.setattr(folders, '_numbers', lambda folder: folders_with_zeros(folder))
    with pytest.raises(folders.Fault, match='is not what the file says'):
        folders.outcome(place / 'bases' / 'llama', tmp_path / 'run')


def folders_with_zeros(folder: Path) -> dict:
    return {name: x * 0 for name, x in NUMBERS(folder).items()}


NUMBERS = folders._numbers
