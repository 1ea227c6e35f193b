"""A disk that loses its power: what may be left of a folder after any of the changes made to it, for pessimists.

POSIX promises of a file that it is on the disk once it was synced, and of a name once its folder was. All else may be there, or
not, or a file may have some of its bytes, until then.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Change = tuple[str, Path, Any]  # as storage/files.py tells them


@dataclass(eq=False)
class File:
    now: bytes
    kept: bytes = b''


@dataclass(eq=False)
class Folder:
    now: 'dict[str, File | Folder]' = field(default_factory=dict)
    kept: 'dict[str, File | Folder]' = field(default_factory=dict)


Tree = dict[str, Any]  # names to bytes, or to trees


class Recorder:
    """An observer for `storage.files.watched`: all changes below a folder, in their order."""

    def __init__(self, root: Path):
        self.root, self.changes = root.resolve(), list[Change]()

    def __call__(self, action: str, path: Path, what: Any) -> None:
        if not path.resolve().is_relative_to(self.root) or (path.resolve() == self.root and action == 'folder'):
            return
        if action == 'declare':
            what = stored(path)
        if action == 'rename':
            what = what.absolute()
        self.changes.append((action, path.absolute(), what))


def stored(path: Path) -> Tree:
    """What stands on the real disk below a folder."""
    return {one.name: stored(one) if one.is_dir() else one.read_bytes() for one in sorted(path.iterdir())}


class Disk:
    """What a system shows of a folder, and what is on the disk of it."""

    def __init__(self, root: Path):
        self.root, self.top = root.resolve(), Folder()

    def do(self, action: str, path: Path, what: Any) -> None:
        """One change."""
        if action == 'sync':
            self.at(path).kept = dict(found.now) if isinstance(found := self.at(path), Folder) else found.now
            return
        folder, name = self.at(path.parent).now, path.name
        match action:
            case 'write':
                folder[name] = File(what)
            case 'append':
                folder[name].now += what
            case 'folder':
                folder[name] = Folder()
            case 'rename':
                self.at(what.parent).now[what.name] = folder.pop(name)
            case 'remove':
                del folder[name]
            case 'declare':
                self.declare(folder.setdefault(name, Folder()), what)
            case _:
                raise AssertionError(action)

    def declare(self, folder: Folder, tree: Tree) -> None:
        for name in [name for name in folder.now if name not in tree]:
            del folder.now[name]
        for name, content in tree.items():
            known = folder.now.get(name)
            if isinstance(content, dict):
                if not isinstance(known, Folder):
                    known = folder.now[name] = Folder()
                self.declare(known, content)
            elif not isinstance(known, File):
                folder.now[name] = File(content)
            else:
                known.now = content

    def at(self, path: Path) -> Any:
        found: Any = self.top
        for part in path.resolve().relative_to(self.root).parts:
            found = found.now[part]
        return found

    def left(self, dice: random.Random) -> Iterator[tuple[str, Tree]]:
        """What a power cut may leave, in several ways."""
        yield 'all is lost that was not synced', view(self.top, lambda f: f.kept, lambda f: f.kept)
        yield 'nothing is lost', view(self.top, lambda f: f.now, lambda f: f.now)
        yield 'names without content', view(self.top, lambda f: f.now, lambda f: f.kept)
        yield 'content without names', view(self.top, lambda f: f.kept, lambda f: f.now)
        yield 'names with half of the content', view(self.top, lambda f: f.now, lambda f: half(f))
        yield 'by chance', view(self.top, lambda f: some(f, dice), lambda f: dice.choice([f.kept, f.now, half(f)]))


def half(file: File) -> bytes:
    """Some of its bytes are there."""
    return file.now if file.kept == file.now else max(file.kept, file.now[: len(file.now) // 2], key=len)


def some(folder: Folder, dice: random.Random) -> 'dict[str, File | Folder]':
    """Each name is the old one or the new one."""
    found = {}
    for name in sorted({*folder.kept, *folder.now}):
        one = dice.choice([folder.kept, folder.now]).get(name)
        if one is not None:
            found[name] = one
    # A rename is one transaction: what it moves is under the old name or the new one, or under both, but not gone.
    for name, one in folder.now.items():
        if one in folder.kept.values() and one not in found.values():
            found[name] = one
    return found


def view(folder: Folder, names: Any, content: Any) -> Tree:
    """A tree of what some rule leaves."""
    return {
        name: view(one, names, content) if isinstance(one, Folder) else content(one)
        for name, one in names(folder).items()
    }


def frozen(tree: Tree) -> tuple:
    """A tree as a key: equal for equal trees."""
    return tuple((name, frozen(one) if isinstance(one, dict) else one) for name, one in sorted(tree.items()))


def states(root: Path, changes: list[Change]) -> Iterator[tuple[int, str, Tree]]:
    """Each different tree that a power cut may leave: after how many changes, and how."""
    model, seen, dice = Disk(root), set[tuple](), random.Random(0)
    for number in range(len(changes) + 1):
        for how, tree in model.left(dice):
            if (key := frozen(tree)) not in seen:
                seen.add(key)
                yield number, how, tree
        if number < len(changes):
            model.do(*changes[number])


def make(tree: Tree, at: Path) -> Path:
    """A tree made real."""
    at.mkdir(parents=True)
    for name, one in tree.items():
        if isinstance(one, dict):
            make(one, at / name)
        else:
            (at / name).write_bytes(one)
    return at


class Looked:
    """What a function says of a tree, which it is asked only once for equal ones; the tree is real meanwhile."""

    def __init__(self, look: Callable[[Path], Any], scratch: Path):
        self.look, self.scratch, self.known = look, scratch, dict[tuple, Any]()

    def __call__(self, tree: Tree) -> Any:
        key = frozen(tree)
        if key not in self.known:
            self.known[key] = self.look(make(tree, self.scratch))
            shutil.rmtree(self.scratch)
        return self.known[key]
