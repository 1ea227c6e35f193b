"""What is given as a run is one, or one line says what to give instead; what cannot become one is told before any work."""

import os
from pathlib import Path

import pytest

from weft.runtime.errors import UserError
from weft.training.run_folder import check_new, run_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / 'runs/demo/checkpoints/400').mkdir(parents=True)
    for folder in ('runs/demo', 'runs/demo/checkpoints/400'):
        (tmp_path / folder / 'config.yaml').write_text('name: demo\n')
    (tmp_path / 'runs/file').write_text('')
    (tmp_path / 'runs/hollow').mkdir()
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'runs/gone').symlink_to('nowhere')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_taken(place: Path) -> None:
    for given in ('runs/demo', 'runs/demo/', Path('runs/demo'), place / 'runs/demo'):
        assert run_folder(given) == Path(given)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ('runs/demo/checkpoints/400', 'give the run: runs/demo, with --step 400 for this checkpoint'),
        ('runs/demo/checkpoints/', 'give the run: runs/demo'),
        ('runs/demo/config.yaml', 'give the run: runs/demo'),
        ('runs/dmeo', "not a run, for it has no config.yaml; did you mean 'runs/demo'?"),
        ('runs/hollow', 'not a run, for it has no config.yaml; known: runs/demo'),
        ('runs/xyz', 'not a run, for it has no config.yaml; known: runs/demo'),
        ('runs/file', 'is a file; a run is a folder'),
        ('runs/file/x', 'not a run'),
        ('loop', 'Too many levels of symbolic links'),
        ('x' * 300, 'File name too long'),
        ('a\0b', r'a\x00b: '),
        ('a\n\x1b[2Jb', r'a\n\x1b[2Jb: not a run'),
        ('ftp://x/y', 'ftp://x/y: a run folder is a local path'),
        ('', 'not a run'),
    ],
)
def test_anything_else_is_told_with_what_to_give(place: Path, given: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_folder(given)
    line = str(caught.value)
    assert message in line
    assert line.isprintable()
    assert len(line) < 500


def test_a_folder_that_cannot_be_a_run_is_told_first(place: Path) -> None:
    for runs, name, message in (
        ('/dev/null', 'x', '--runs /dev/null: /dev/null is no folder'),
        ('runs/file', 'x', 'runs/file is no folder'),
        ('runs/file/deep', 'x', 'runs/file is no folder'),
        ('runs', 'file', 'runs/file: is there and is no folder'),
        ('runs', 'gone', 'runs/gone: is there and is no folder'),
        ('runs', 'x' * 300, 'File name too long'),
    ):
        with pytest.raises(UserError) as caught:
            check_new(Path(runs), name)
        assert message in str(caught.value)
    for runs, name in (('runs', 'demo'), ('runs', 'new'), ('new', 'new'), ('new/deep', 'new')):
        check_new(Path(runs), name)
    assert sorted(os.listdir(place)) == ['loop', 'runs']
