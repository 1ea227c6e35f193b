"""A folder's files are found whatever links, pipes and odd names stand there, and what is left out is counted."""

import glob
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft.data import walk
from weft.data.config import DataConfig
from weft.data.prepare import prepare
from weft.data.sources import texts
from weft.data.walk import LeftOut, left_out_text
from weft.runtime.errors import UserError


def read(*paths: Path | str) -> tuple[list[str], str]:
    """The texts, and what is said of the rest."""
    left_out: list[LeftOut] = []
    return [text for _, text in texts([str(path) for path in paths], skipped=left_out)], left_out_text(left_out)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ('plain/a.txt', 'real/b.txt', 'real/deep/c.txt', 'other/d.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_linked_folders_are_read_once_each(place: Path) -> None:
    (place / 'plain/linked').symlink_to('../real')
    (place / 'plain/again').symlink_to('../real/deep')
    assert read(place / 'plain') == (['plain/a.txt', 'real/deep/c.txt', 'real/b.txt'], '')
    (place / 'plain/link.txt').symlink_to('a.txt')
    assert len(read(place / 'plain')[0]) == 3
    # Within one folder the real one keeps its name, and a link to it brings nothing new.
    (place / 'a link').symlink_to('real')
    names = [name for name, _ in texts([str(place / 'real'), str(place / 'a link')])]
    assert names == [str(place / 'real/b.txt'), str(place / 'real/deep/c.txt')]


def test_a_glob_finds_a_linked_folder_under_its_own_name(place: Path) -> None:
    (place / 'linked').symlink_to('real')
    (place / '.hidden').mkdir()
    (place / 'shown').symlink_to('.hidden')
    (place / '.hidden/e.txt').write_text('e')
    assert read(f'{place}/**/linked/*.txt')[0] == ['real/b.txt']
    assert read(f'{place}/**/linked/**')[0] == ['real/b.txt', 'real/deep/c.txt']
    assert read(f'{place}/**')[0].count('e') == read(place)[0].count('e') == 1


def test_links_in_circles_end_soon(place: Path) -> None:
    for number in range(30):
        (place / f'plain/up{number}').symlink_to('.')
        (place / f'real/deep/top{number}').symlink_to('../..')
    (place / 'plain/self').symlink_to('self')
    wanted = ['other/d.txt', 'plain/a.txt', 'real/b.txt', 'real/deep/c.txt']
    assert read(place) == (wanted, '; left out: 1 × a link to nowhere')
    for pattern in ('**', '**/*', '**/*.txt', '*/**/?.txt', '**/**/*.txt'):
        assert read(f'{place}/{pattern}')[0] == wanted, pattern
    assert read(f'{place}/**/deep/*.txt')[0] == ['real/deep/c.txt']


def test_a_glob_with_stars_matches_as_globs_do(tmp_path: Path) -> None:
    for folder in ('a/x/b/', 'a/x/', 'a/', 'b/', '', 'q/deep/', '.h/', 'a/.h/', 'odd[1]/'):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ('a', 'a_b', 'a.txt', '.f.txt', '[x]', 'x\ny', 'x.md'):
            place = tmp_path / folder / name
            if not place.exists():
                place.write_text(str(place))
    draw = random.Random(0)
    parts = [
        '**',
        '**',
        '*',
        '?',
        'a?b',
        '[!x]',
        '[!x]*',
        'a',
        'x',
        '.h',
        '.*',
        '*.txt',
        '[ab]*',
        '[.]f*',
        'a**',
        '[[]x]',
        'x?y',
    ]
    drawn = ['/'.join(draw.choice(parts) for _ in range(draw.randint(1, 4))) for _ in range(300)]
    given = [
        '**/?/*',
        '**/a?b',
        '**/[!x]',
        '**/[!x]/*',
        '.h/**',
        '*/**/a',
        'odd[[]1]/**/*',
        '**/**',
        '**/a/**',
        '**/.f.txt',
    ]
    for pattern in (*given, *('**/' + pattern for pattern in drawn)):
        wanted = {path for path in glob.glob(f'{tmp_path}/{pattern}', recursive=True) if os.path.isfile(path)}
        if wanted:
            assert read(f'{tmp_path}/{pattern}')[0] == sorted(wanted), pattern
        else:
            with pytest.raises(UserError, match='no file matches it'):
                read(f'{tmp_path}/{pattern}')


def test_a_glob_leaves_out_folders_that_cannot_be_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def deny(path: str | None = None) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith('deep'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)

    monkeypatch.setattr(os, 'scandir', deny)  # root may read everything, so a mode would not do
    os.mkfifo(place / 'plain/pipe.txt')
    wanted = '; left out: 1 × a folder that cannot be read, 1 × a pipe'
    assert read(f'{place}/**/*.txt') == (['other/d.txt', 'plain/a.txt', 'real/b.txt'], wanted)
    with pytest.raises(UserError, match=r'real/deep: cannot be read \(Permission denied\)'):
        read(place)


def test_only_files_that_a_glob_means_count_towards_its_limit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, 'MOST_FILES', 3)
    assert read(f'{place}/**/[ab].txt')[0] == ['plain/a.txt', 'real/b.txt']
    for given, message in {
        f'{place}/**/*.txt': 'holds more than 3 files',
        f'{place}/*/../*/*.txt': 'means more than 3 files',
        str(place): 'holds more than 3 files',
    }.items():
        with pytest.raises(UserError, match=message):
            read(given)


def test_what_is_no_file_is_left_out_and_counted(place: Path) -> None:
    os.mkfifo(place / 'plain/pipe.txt')
    (place / 'plain/gone.txt').symlink_to('nowhere')
    (place / 'plain/zero').symlink_to('/dev/zero')
    (place / 'plain/empty.txt').write_text('')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(place / 'plain/socket'))
        wanted = '; left out: 1 × a device, 1 × a link to nowhere, 1 × a pipe, 1 × a socket, 1 × an empty file'
        assert read(place / 'plain') == (['plain/a.txt'], wanted)
        assert read(f'{place}/plain/*') == (['plain/a.txt'], wanted)


def test_paths_that_are_no_files_are_told_at_once(place: Path) -> None:
    os.mkfifo(place / 'pipe')
    (place / 'gone').symlink_to('nowhere')
    (place / 'self').symlink_to('self')
    for path, message in {
        str(place / 'pipe'): 'is a pipe; it must be a regular file',
        '/dev/zero': 'is a device; it must be',
        '/dev/null': 'is a device',
        str(place / 'gone'): 'is a link to nowhere, which is not there',
        str(place / 'self'): 'is a link to self, which is not there or leads back to it',
        str(place / 'plain/a.txt/b'): 'no such file',
        'a\0b': 'a path holds no NUL',
        'x' * 5000: 'no such file',
        '~nobody-of-this-name/x': 'no such file',
        '[abc': 'no such file',
        '/nope': 'no such file',
        str(place / 'esc\x1b[2J\n'): r'esc\x1b[2J\n: no such file',
    }.items():
        with pytest.raises(UserError) as caught:
            read(path)
        line = str(caught.value)
        assert message in line, line
        assert line.isprintable()
        assert len(line) < 600
    with pytest.raises(UserError) as caught:
        read(place / 'plian')
    assert f"did you mean '{place}/plain'?" in str(caught.value)
    for name, near in (('A.TXT', 'a.txt'), ('a.text', 'a.txt'), ('nope.txt', None), ('b.txt', None)):
        with pytest.raises(UserError) as caught:
            read(place / 'plain' / name)
        assert (f"did you mean '{place}/plain/{near}'?" in str(caught.value)) is (near is not None)


def test_names_that_are_no_utf_8_are_read_and_shown_escaped(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b'/odd'
    os.mkdir(folder)
    for number in range(12):
        with open(folder + b'/\xff\xfe%d.txt' % number, 'w') as file:
            file.write(f'def f{number}(x):\n    return {number}\n' * 20)
    open(folder + b'/\xff.txt', 'w').close()
    said: list[str] = []
    config = DataConfig(source=os.fsdecode(folder), vocabulary=300, validation_share=0.2)
    for _ in range(2):  # made, then loaded
        dataset = prepare(config, tmp_path / 'run', 32, said.append)
        assert dataset.facts['documents'] == 12
    assert '1 × an empty file' in said[0]
    with pytest.raises(UserError) as caught:
        read(os.fsdecode(folder + b'/\xff.txt'))
    assert r'\udcff.txt' in str(caught.value)
    assert str(caught.value).isprintable()
