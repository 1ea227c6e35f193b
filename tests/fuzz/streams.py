"""Every script with its streams closed, full, in another encoding, or with a reader that goes away.

Where stdout has the result (decode, plan …) a full one is the machine's trouble (1), and a reader that went is 141, quietly.
Where a file or folder is the result it is there when the exit code is 0. Training goes on without its terminal.
"""

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
    finish,
    goes_on,
    half_made,
    made_again,
    run,
    start,
    steps,
    wrong,
)

NAME = 'streams'
WAYS = {
    'stdout closed': {0, 1},
    'stdout full': {0, 1},
    'stdout in ASCII': {0},
    'stdout in Latin-1': {0},
    'an ASCII locale': {0, 2},  # there words beyond ASCII are no text for Python
    'reader gone': {0, 141},
    'reader leaves': {0, 141},
    'stderr closed': {0},
    'stdin closed': {0},
}
COUNT, QUICK, SECONDS, IN_PROCESS = len(COMMANDS) * len(WAYS), 0, 200.0, False
REDIRECTED = {
    'stdout closed': '>&-',
    'stdout full': '>/dev/full',
    'stderr closed': '2>&-',
    'stdin closed': '<&-',
}
VARIABLES = {
    'stdout in ASCII': {'PYTHONIOENCODING': 'ascii'},
    'stdout in Latin-1': {'PYTHONIOENCODING': 'latin-1'},
    'an ASCII locale': {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
}


def cases(seed: int, count: int) -> Iterator[Case]:
    """Each command in each way: what varies with the seed is nothing."""
    every = [(command, way) for way in WAYS for command in COMMANDS]
    for number, (command, way) in enumerate(every[:count]):
        yield Case(number, f'{command}, {way}', (command, way))


def check(case: Case, scratch: Path) -> str | None:
    name, way = case.content
    command, base = COMMANDS[name], base_of(scratch)
    ended = ended_in(way, command, scratch, base)
    note(f'exit code {ended.code}')
    quiet = 0 if ended.code == 141 and name != 'chat' else None  # what was said before was said
    return wrong(ended, right(name, way), quiet) or left(command, ended, scratch, base)


def ended_in(way: str, command: Command, scratch: Path, base: Path) -> Ended:
    """Runs a command in one of the WAYS."""
    if way == 'reader gone':
        reads, writes = os.pipe()
        os.close(reads)
        try:
            return run(command, scratch, base, stdout=writes)
        finally:
            os.close(writes)
    if way == 'reader leaves':
        stdin = subprocess.PIPE if command.typed else subprocess.DEVNULL
        process = start(command.line(base, scratch), scratch, base, stdin=stdin, PYTHONUNBUFFERED='1')
        if command.typed:
            process.stdin.write(command.typed.encode())
            process.stdin.flush()
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        process.stdout = None
        return finish(process)
    return run(command, scratch, base, redirected=REDIRECTED.get(way, ''), **VARIABLES.get(way, {}))


def right(name: str, way: str) -> set[int]:
    """The exit codes that are right for a command."""
    command = COMMANDS[name]
    if name == 'train' and way in ('stdout closed', 'stdout full'):
        return {0}
    if command.result is None and way == 'stdout full':
        return {1}
    if command.result is None and way == 'reader gone':
        return {141}
    if name == 'chat' and way == 'stdin closed':
        return {0, 2}
    return WAYS[way]


def left(command: Command, ended: Ended, scratch: Path, base: Path) -> str | None:
    """What is wrong with what a command has left in its folder."""
    if command.result is None:
        made = sorted(path.name for path in scratch.iterdir())
        return f'it made {made}' if made else None
    result = scratch / command.result
    if command.name == 'train':
        if not steps(result):
            return f'exit code {ended.code}, and no checkpoint is left'
        if ended.code == 0 and steps(result)[-1] != STEPS:
            return f'exit code 0, and its checkpoints are {steps(result)}'
        return goes_on(command, scratch, base, STEPS) if ended.code else half_made(scratch)
    if ended.code == 0 and not result.exists():
        return f'exit code 0, and there is no {command.result}'
    if fault := half_made(scratch):
        return f'exit code {ended.code}, and {fault}'
    if ended.code and not result.exists():
        return made_again(command, scratch, base)
    return None
