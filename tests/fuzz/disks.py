"""Every script that writes, on a disk that is full, becomes full, has no inodes left, or can only be read.

A disk is a tmpfs in a mount namespace of the worker's own, where the machine allows one. Where it does not, a limit of the
size of files stands for a full disk, and rights for one that can only be read; root is made to obey them.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import Case, note
from tests.fuzz.commands import (
    COMMANDS,
    STEPS,
    Command,
    Ended,
    base_of,
    goes_on,
    half_made,
    made_again,
    run,
    steps,
    wrong,
)

NAME = 'disks'
WRITES = {name: command for name, command in COMMANDS.items() if command.result}
KEPT = 'decode out'  # it keeps what was answered, under another name
# Kilobytes after which the disk is full; a case in which they suffice is a fault of this table.
AFTER = {
    'train': (24, 200, 440),
    'decode out': (4,),
    'score': (100,),
    'embeddings': (4,),
    'xray': (4,),
    'history': (24,),
    'import': (24,),
    'export': (24,),
    'compress': (24,),
    'quantise': (24,),
    'plan page': (4,),
    'prove': (4,),
    'sample': (24,),
}
INODES = 3
SIZE = 64 * 2**20  # bytes of a disk
NEWNS, NEWUSER, PRIVATE, REC = 0x20000, 0x10000000, 1 << 18, 1 << 14
WAYS: dict[str, set[int]] = {
    'full': {1},
    'without inodes': {1},
    'read-only': {1, 2},
    'small files': {1},
    'of the cache full': {0},
    'of temporary files full': {0, 1},
}
SECONDS, QUICK, IN_PROCESS = 200.0, 0, False


def pairs() -> list[tuple[str, str]]:
    """Each command with each way that applies to it: one that makes a single file needs no more than one inode."""
    every = [(name, way) for way in WAYS for name in WRITES]
    later = [(name, f'full after {size} kB') for name, sizes in AFTER.items() for size in sizes]
    return [(name, way) for name, way in every if way != 'without inodes' or run_like(name)] + later


def codes(way: str) -> set[int]:
    """The exit codes that are right."""
    return WAYS[way.split(' after ')[0]]


def run_like(name: str) -> bool:
    """Whether a command makes a folder."""
    return '.' not in Path(WRITES[name].result).name


def cases(seed: int, count: int) -> Iterator[Case]:
    """Each command on each disk: what varies with the seed is nothing."""
    for number, (name, way) in enumerate(pairs()[:count]):
        yield Case(number, f'{name}, disk {way}', (name, way))


COUNT = len(pairs())


def check(case: Case, scratch: Path) -> str | None:
    name, way = case.content
    command, base, folder = WRITES[name], base_of(scratch), scratch / 'disk'
    folder.mkdir()
    with disk(folder, 40 if way == 'without inodes' else 10_000) as mounted:
        ended = tried(command, way, folder, scratch, base, mounted)
        note(f'exit code {ended.code}')
        elsewhere = way.startswith('of ')
        place = scratch / 'out' if elsewhere else folder
        return wrong(ended, codes(way)) or left(command, ended, place, base)


def tried(command: Command, way: str, folder: Path, scratch: Path, base: Path, mounted: bool) -> Ended:
    """Runs a command on a disk that is in one of the WAYS, which it is no more when this returns."""
    if way.startswith('of '):
        out = scratch / 'out'
        out.mkdir()
        name = 'XDG_CACHE_HOME' if 'cache' in way else 'TMPDIR'
        with filled(folder, 0) if mounted else read_only(folder, mounted):
            return run(command, out, base, obeys=not mounted, **{name: str(folder)})
    if way == 'read-only':
        with read_only(folder, mounted):
            return run(command, folder, base, obeys=not mounted)
    if way == 'without inodes' and mounted:
        with no_names(folder, INODES):
            return run(command, folder, base)
    free = 1024 * int(way.split()[2]) if ' after ' in way else 0
    if way == 'small files' or not mounted:
        return run(command, folder, base, limited=f'-f {max(free // 512, 4)}')  # in blocks of 512 bytes
    with filled(folder, free):
        return run(command, folder, base)


def left(command: Command, ended: Ended, place: Path, base: Path) -> str | None:
    """What is wrong with what a command has left, and with the same once more where there is room."""
    result = place / command.result
    if ended.code == 0:
        return half_made(place) if result.exists() else f'exit code 0, and there is no {command.result}'
    if command.name == 'train':
        if STEPS in steps(result):
            return f'exit code {ended.code}, and its checkpoints are {steps(result)}'
        return goes_on(command, place, base, STEPS)
    if result.exists():
        return f'exit code {ended.code}, and {command.result} has its name'
    if command.name != KEPT and (fault := half_made(place)):
        return f'exit code {ended.code}, and {fault}'
    return made_again(command, place, base)


# Disks ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def mounts() -> bool:
    """Whether this process may mount: from here on what it mounts is seen by it and by what it starts alone."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    for flags, words in ((NEWNS, ['-m']), (NEWNS | NEWUSER, ['-U', '-r', '-m'])):
        trial = ['unshare', *words, 'mount', '-t', 'tmpfs', 'tmpfs', '/tmp']
        if subprocess.run(trial, check=False, capture_output=True).returncode or libc.unshare(flags):
            continue
        if flags & NEWUSER:
            for name, text in (('setgroups', 'deny'), ('uid_map', f'0 {user} 1'), ('gid_map', f'0 {group} 1')):
                Path(f'/proc/self/{name}').write_text(text)
        return libc.mount(b'none', b'/', None, PRIVATE | REC, None) == 0
    return False


@contextlib.contextmanager
def disk(folder: Path, inodes: int) -> Iterator[bool]:
    """A disk of SIZE bytes at a folder; False where there can be none and the folder is a plain one."""
    if not mounts():
        yield False
        return
    mount('-t', 'tmpfs', '-o', f'size={SIZE},nr_inodes={inodes}', 'tmpfs', folder)
    try:
        yield True
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def mount(*words: str | Path) -> None:
    subprocess.run(['mount', *words], check=True, capture_output=True)


@contextlib.contextmanager
def read_only(folder: Path, mounted: bool) -> Iterator[None]:
    """Nothing can be written into the folder meanwhile."""
    if mounted:
        mount('-o', 'remount,ro', folder)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if mounted:
            mount('-o', 'remount,rw', folder)
        else:
            folder.chmod(0o755)


@contextlib.contextmanager
def filled(folder: Path, free: int) -> Iterator[None]:
    """So many bytes are left on the disk meanwhile."""
    filler = folder / 'filler'
    room = os.statvfs(folder)
    with filler.open('wb') as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - free // room.f_frsize * room.f_frsize)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def no_names(folder: Path, free: int) -> Iterator[None]:
    """So many files and folders can be made on the disk meanwhile, and no more."""
    names = [folder / f'filler-{number}' for number in range(os.statvfs(folder).f_favail - free)]
    for name in names:
        name.touch()
    try:
        yield
    finally:
        for name in names:
            name.unlink()
        mount('-o', 'remount,nr_inodes=10000', folder)
