"""Which files a path, a folder or a glob names, in the same order each time; and what of a folder is left out.

Links to folders are followed, each folder being entered once, so that links in circles end.
"""

import fnmatch
import glob
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data.reading import kind_of
from sharding.errors import UserError, nearest_path, shown

MOST_FILES = 2_000_000  # of a folder or glob: a list of them is held
COMPILED = frozenset({'__pycache__'})


class LeftOut(NamedTuple):
    """Something that was not read."""

    path: str
    why: str


def told(left_out: Iterable[LeftOut]) -> str:
    """How many were left out and why, as the tail of a message; nothing for none."""
    count = Counter(one.why for one in left_out)
    return '; left out: ' + ', '.join(f'{n} × {why}' for why, n in sorted(count.items())) if count else ''


def files_of(given: str, option: str, left_out: list[LeftOut]) -> list[Path]:
    """The files that a path, a folder (without hidden files) or a glob names, sorted. A name that exists is no glob.

    What stands there and is no file is added to `left_out`, with the reason. Raises UserError for what leads nowhere.
    """
    path = os.path.expanduser(given)
    name = f'{option}={shown(given)}'
    if '\0' in path:
        raise UserError(f'{name}: a path holds no NUL')
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return _matches(path, name, left_out)
    if stat.S_ISDIR(kind):
        root = Path(path)
        return [root / file for file in _relative(root, COMPILED, left_out, hidden=False)]
    if not stat.S_ISREG(kind):
        raise UserError(f'{name}: is {kind_of(kind)}; it must be a regular file, a folder or a glob')
    return [Path(path)]


def _matches(path: str, name: str, left_out: list[LeftOut]) -> list[Path]:
    """The files that a glob names."""
    if os.path.islink(path):
        target = shown(os.readlink(path))
        raise UserError(f'{name}: is a link to {target}, which is not there or leads back to it; mend the link')
    found = list(islice(_glob(path), MOST_FILES))
    files = [Path(match) for match in sorted(found) if os.path.isfile(match)]
    left_out += [LeftOut(one, _why(one)) for one in found if not os.path.isfile(one) and not os.path.isdir(one)]
    if files:
        return files
    beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*'))
    hint = nearest_path(path, beside) if len(beside) <= MOST_FILES else ''
    hint = hint if hint.startswith('; did') else ''  # a list of whatever stands there says little
    raise UserError(f'{name}: no such file or folder, and no file matches it as a glob{hint}')


def _glob(path: str) -> Iterator[str]:
    """As `glob.iglob`, where `**` follows links without going round in circles."""
    parts = Path(path).parts
    if '**' not in parts:
        yield from glob.iglob(path)
        return
    first = parts.index('**')
    pattern = re.compile(''.join(map(_part, parts[first:-1])) + (_last(parts[-1])))
    hidden = any(part.startswith('.') for part in parts[first:])
    for base in sorted(glob.glob(os.path.join(*parts[:first]))) if first else ['']:
        root = Path(base)
        yield from (
            str(root / file)
            for file in _relative(root, frozenset(), [], hidden, every_link=True)
            if pattern.fullmatch(file.as_posix())
        )


def _part(part: str) -> str:
    return r'(?:[^/.][^/]*/)*' if part == '**' else _name(part) + '/'


def _last(part: str) -> str:
    return r'(?:[^/.][^/]*/)*[^/.][^/]*' if part == '**' else _name(part)


def _name(part: str) -> str:
    """A pattern for one name: a star is for no slash, and for no dot that a name begins with."""
    translated = fnmatch.translate(part).removeprefix('(?s:').removesuffix(r')\Z')
    return ('' if part.startswith('.') else r'(?!\.)') + f'(?:{translated.replace(".*", "[^/]*")})'


def _relative(
    root: Path, skip: frozenset[str], left_out: list[LeftOut], hidden: bool, every_link: bool = False
) -> list[Path]:
    """The files under a folder as paths from there, sorted within each folder."""
    found = [path.relative_to(root) for path in walk(root, skip, left_out, hidden, True, every_link)]
    return sorted(found, key=lambda path: [(len(path.parts) - 1 > at, part) for at, part in enumerate(path.parts)])


def walk(
    root: Path,
    skip: frozenset[str],
    left_out: list[LeftOut],
    hidden: bool = True,
    follow: bool = False,
    every_link: bool = False,
) -> Iterator[Path]:
    """Files under `root`, sorted within each folder, without folders that `skip` names; those in linked folders come last.

    With `follow` each linked folder is entered that has not been; with `every_link` the others too, but not the links in them,
    so that a file is found under each link's name.
    """

    def fail(error: OSError) -> None:
        raise UserError(
            f'{shown(error.filename)}: cannot be read ({error.strerror}); make it readable or name other paths'
        ) from None

    seen: set[tuple[int, int]] = set()
    linked = deque([str(root)])
    count = 0
    while linked:
        begin = linked.popleft()
        for folder, folders, names in os.walk(begin, onerror=fail):
            here = os.stat(folder)
            known = (here.st_dev, here.st_ino) in seen
            if known and not every_link:
                folders[:] = []
                continue
            seen.add((here.st_dev, here.st_ino))
            # Those that os.walk enters, in this order.
            folders[:] = sorted(name for name in set(folders) - skip if hidden or not name.startswith('.'))
            if follow and not known:
                linked += [link for name in folders if os.path.islink(link := os.path.join(folder, name))]
            for name in sorted(name for name in names if hidden or not name.startswith('.')):
                count += 1
                if count > MOST_FILES:
                    raise UserError(
                        f'{shown(root)}: holds more than {MOST_FILES:,} files; put the text into fewer of them'
                    )
                path = Path(folder) / name
                if os.path.isfile(path):
                    yield path
                else:
                    left_out.append(LeftOut(str(path), _why(path)))


def _why(path: str | Path) -> str:
    """Why something is no file that can be read."""
    try:
        return kind_of(os.stat(path).st_mode)
    except OSError:
        return 'a link to nowhere' if os.path.islink(path) else 'not there'
