"""Which files a path, a folder or a glob names, in the same order each time; and what of a folder is left out.

Links to folders are followed, each folder being entered once, so that links in circles end.
"""

import fnmatch
import glob
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from weft.runtime.errors import UserError, nearest_path, shown
from weft.storage.files import kind_of

MOST_FILES = 2_000_000  # of a folder or glob: a list of them is held
COMPILED = frozenset({'__pycache__'})


class LeftOut(NamedTuple):
    """Something that was not read."""

    path: str
    why: str


def left_out_text(left_out: Iterable[LeftOut]) -> str:
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
        found = [path.relative_to(root).parts for path in walk(root, COMPILED, left_out, hidden=False, follow=True)]
        # What stands in a folder itself comes before what stands in those in it.
        found.sort(key=lambda parts: [(len(parts) - 1 > at, part) for at, part in enumerate(parts)])
        return [root.joinpath(*parts) for parts in found]
    if not stat.S_ISREG(kind):
        raise UserError(f'{name}: is {kind_of(kind)}; it must be a regular file, a folder or a glob')
    return [Path(path)]


def is_named(path: Path, given: str) -> bool:
    """Whether `files_of(given)` found a path because it was given itself, and not a folder or glob."""
    return path == Path(os.path.expanduser(given))


def _matches(path: str, name: str, left_out: list[LeftOut]) -> list[Path]:
    if os.path.islink(path):
        target = shown(os.readlink(path))
        raise UserError(f'{name}: is a link to {target}, which is not there or leads back to it; mend the link')
    found = list(islice(_glob(path, left_out), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise UserError(f'{name}: means more than {MOST_FILES:,} files; put the text into fewer of them')
    files = [Path(match) for match in sorted(found) if os.path.isfile(match)]
    left_out += [LeftOut(one, _why(one)) for one in found if not os.path.isfile(one) and not os.path.isdir(one)]
    if files:
        return files
    beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*'))
    hint = nearest_path(path, beside) if len(beside) <= MOST_FILES else ''
    hint = hint if hint.startswith('; did') else ''  # a list of whatever stands there says little
    raise UserError(f'{name}: no such file or folder, and no file matches it as a glob{hint}')


def _glob(path: str, left_out: list[LeftOut]) -> Iterator[str]:
    """As `glob.iglob`, where `**` follows links without going round in circles, and what is no file is left out."""
    parts = Path(path).parts
    if '**' not in parts:
        yield from glob.iglob(path)
        return
    first = parts.index('**')
    hidden = any(part.startswith('.') for part in parts[first:])
    for base in filter(os.path.isdir, glob.glob(os.path.join(*parts[:first]))) if first else ['']:
        yield from map(str, walk(Path(base), frozenset(), left_out, hidden, True, parts[first:]))


def _means(patterns: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a file, by the parts of its path, is one that a glob with `**` means.

    `**` stands for any number of folders without a hidden one; at the end, for a file in them.
    """
    end = len(patterns)
    places = {0}  # in the patterns, up to which the parts so far may have come
    for part in parts:
        after = set()
        for place in places:
            while place < end and patterns[place] == '**':
                if not part.startswith('.'):
                    after |= {place, end} if place == end - 1 else {place}
                place += 1
            if place < end and _names(patterns[place], part):
                after.add(place + 1)
        places = after
    return end in places


def _names(pattern: str, part: str) -> bool:
    return fnmatch.fnmatchcase(part, pattern) and (pattern.startswith('.') or not part.startswith('.'))


def walk(
    root: Path,
    skip: frozenset[str],
    left_out: list[LeftOut],
    hidden: bool = True,
    follow: bool = False,
    patterns: Sequence[str] = (),
) -> Iterator[Path]:
    """Files under `root`, sorted within each folder, without folders that `skip` names; those in linked folders come last.

    With `follow` each linked folder is entered that has not been. With the `patterns` of a glob only files that it means are
    looked at; the other linked folders are entered too, but not the links in them, so that a file is found under each link's
    name; and folders that cannot be read are left out.
    """

    def fail(error: OSError) -> None:
        if patterns:
            left_out.append(LeftOut(str(error.filename), 'a folder that cannot be read'))
            return
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
            if known and not patterns:
                folders[:] = []
                continue
            seen.add((here.st_dev, here.st_ino))
            # Those that os.walk enters, in this order.
            folders[:] = sorted(name for name in set(folders) - skip if hidden or not name.startswith('.'))
            if follow and not known:
                linked += [link for name in folders if os.path.islink(link := os.path.join(folder, name))]
            inside = Path(folder).relative_to(root).parts
            for name in sorted(name for name in names if hidden or not name.startswith('.')):
                if patterns and not _means(patterns, (*inside, name)):
                    continue
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
