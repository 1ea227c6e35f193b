"""Signals while a script prepares, compiles, validates, saves, decodes, imports and exports.

The moment is known by what the script has printed, what stands in its folder, and processor time since then, not by a clock.
A run that was told to end has a checkpoint if it had begun to train; it and all else is complete after the next start.
"""

import dataclasses
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import Case, commands, note
from tests.fuzz.commands import (
    Command,
    Ended,
    base_of,
    copied,
    finish,
    goes_on,
    half_made,
    made_again,
    start,
    steps,
    wrong,
)

NAME = 'signals'
LAST = 12  # steps of a run that trains
TICKS = os.sysconf('SC_CLK_TCK')
NUMBERS = {
    'SIGHUP': [signal.SIGHUP],
    'SIGINT': [signal.SIGINT],
    'SIGINT twice': [signal.SIGINT, signal.SIGINT],
    'Ctrl-C': [signal.SIGINT],  # to all that the command has started, too
    'SIGTERM': [signal.SIGTERM],
    'SIGPIPE': [signal.SIGPIPE],
    'SIGUSR1': [signal.SIGUSR1],
    'SIGKILL': [signal.SIGKILL],
}
CODES = {
    'SIGHUP': {129},
    'SIGINT': {130},
    'SIGINT twice': {130},
    'Ctrl-C': {130},
    'SIGTERM': {143},
    'SIGKILL': {137},
    'SIGPIPE': {0},
    'SIGUSR1': {0},
}


@dataclass(frozen=True)
class Phase:
    """A time in a command's life: it has come when `said` is in what it printed, something is there whose path below the
    scratch folder matches `there`, and `worked` seconds of the processor have passed since.

    `trained`: a run that is told to end in this phase has begun to train.
    """

    command: Command
    said: str = ''
    there: str = ''
    worked: float = 0.0
    trained: bool = False
    variables: tuple[tuple[str, str], ...] = ()


def train(*more: str) -> Command:
    words = (
        'train',
        '{base}/tiny.yaml',
        'data.source={base}/many',
        f'training.steps={LAST}',
        '--runs',
        '{scratch}/runs',
    )
    return Command('train', (*words, 'name=many', 'metrics.validation_rows=100000', *more), 'runs/many')


ANEW = (('JAX_ENABLE_COMPILATION_CACHE', 'false'), ('JAX_DISABLE_MOST_OPTIMIZATIONS', '0'))
SELDOM = 'checkpoint.every=1000'
PHASES = {
    'preparing': Phase(train('data.vocabulary=2000', SELDOM), said='data: ', worked=0.1),
    'compiling': Phase(train(SELDOM), said='compiling the first step', worked=0.3, trained=True, variables=ANEW),
    'validating': Phase(train(SELDOM, 'metrics.validate_every=5'), said='step 4/', worked=0.3, trained=True),
    'saving': Phase(train('checkpoint.every=5'), there=r'runs/many/checkpoints/saving/5', trained=True),
    'decoding': Phase(
        Command(
            'decode',
            (
                *('decode', '{base}/runs/tiny', '--prompt', 'def', '--json', '--temperature', '1'),
                *('-n', '640', '--max-new-tokens', '24'),
            ),
        ),
        said='"prompt"',
    ),
    'chatting': Phase(
        Command('chat', ('chat', '{base}/runs/talks', '--max-new-tokens', '5'), None, 'Hi\n'), said='ends here)'
    ),
    'importing': Phase(
        Command('import', ('convert', 'import', '{base}/large', '{scratch}/runs/made'), 'runs/made'),
        there=r'runs/\.made\.\w+\.partial/checkpoints/saving/0/model/.+',
    ),
    'exporting': Phase(
        Command('export', ('convert', 'export', '{base}/runs/large', '{scratch}/exported'), 'exported'),
        there=r'\.exported\.\w+\.partial/.+',
    ),
}
COUNT, QUICK, SECONDS, IN_PROCESS = len(NUMBERS) * len(PHASES), 0, 3 * commands.LIMIT, False


def cases(seed: int, count: int) -> Iterator[Case]:
    """Each signal in each phase: what varies with the seed is nothing."""
    every = [(sent, phase) for phase in PHASES for sent in NUMBERS]
    for number, (sent, phase) in enumerate(every[:count]):
        yield Case(number, f'{sent} while {phase}', (sent, phase))


def check(case: Case, scratch: Path) -> str | None:
    sent, phase = case.content
    return signalled(PHASES[phase], sent, phase, scratch, base_of(scratch))


def signalled(phase: Phase, sent: str, name: str, scratch: Path, base: Path) -> str | None:
    """What is wrong with how a command ends that gets a signal in a phase, and with what it leaves."""
    command = phase.command
    if command.name == 'train' and name != 'preparing':
        copied(base / 'runs' / 'many', scratch / command.result)
    with (scratch / 'stdout').open('wb') as out, (scratch / 'stderr').open('wb') as err:
        process = start(
            command.line(base, scratch),
            scratch,
            base,
            stdin=subprocess.PIPE if command.typed else subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            grouped=sent == 'Ctrl-C',
            PYTHONUNBUFFERED='1',
            **dict(phase.variables),
        )
        if command.typed:  # and it waits for more
            process.stdin.write(command.typed.encode())
            process.stdin.flush()
        if not reached(phase, process, scratch):
            ended = finished(process, scratch, limit=5)
            return f'it was not seen {name}: {wrong(ended, {0}) or "it came to its end"}'
        for index, number in enumerate(NUMBERS[sent]):
            time.sleep(0.02 * index)
            if sent == 'Ctrl-C':
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        ended = finished(process, scratch)
    note(f'exit code {ended.code}')
    codes = CODES[sent]
    if sent == 'SIGUSR1' and command.name != 'train':
        codes = {0, 138}  # nothing is said of it: as the system has it
    fault = wrong(ended, codes)
    if not fault and command.name == 'train':
        fault = checkpointed(steps(scratch / command.result), phase, sent, scratch)
    return fault or after(command, ended.code, scratch, base)


def finished(process: subprocess.Popen, scratch: Path, limit: float | None = None) -> Ended:
    """How a command ended whose streams are files."""
    ended = finish(process, limit=limit)
    return dataclasses.replace(ended, out=(scratch / 'stdout').read_bytes(), err=(scratch / 'stderr').read_bytes())


def checkpointed(found: list[int], phase: Phase, sent: str, scratch: Path) -> str | None:
    """What is wrong with the steps of a run's checkpoints; the one of step 2 was there before."""
    new = [step for step in found if step > 2]
    if sent in ('SIGINT twice', 'SIGKILL'):  # at once
        return None
    if sent in ('SIGPIPE', 'SIGUSR1') and LAST not in new:
        return f'exit code 0, and its checkpoints are {found}'
    if sent == 'SIGUSR1' and phase.trained and len(new) < 2:
        return f'it has not saved: its checkpoints are {found}'
    if phase.trained and not new:
        return f'it has not saved: its checkpoints are {found}'
    return None


def after(command: Command, code: int, scratch: Path, base: Path) -> str | None:
    """What is wrong after the next start."""
    if command.result is None:
        return None
    result = scratch / command.result
    if command.name == 'train':
        return goes_on(command, scratch, base, LAST)
    if result.exists() and code == 0:
        return half_made(scratch)
    if result.exists():
        return f'exit code {code}, and {command.result} has its name'
    return made_again(command, scratch, base)


def reached(phase: Phase, process: subprocess.Popen, scratch: Path) -> bool:
    """Waits until a command is in a phase; False if it ended before."""
    printed = scratch / 'stdout', scratch / 'stderr'
    said: Callable[[], bool] = lambda: any(phase.said.encode() in path.read_bytes() for path in printed)
    there: Callable[[], bool] = lambda: (
        not phase.there
        or any(
            re.fullmatch(phase.there, os.path.relpath(os.path.join(folder, name), scratch))
            for folder, folders, names in os.walk(scratch)  # what is gone meanwhile is passed over
            for name in (*folders, *names)
        )
    )
    if not until(lambda: said() and there(), process):
        return False
    begun = processor_seconds(process.pid)
    return until(lambda: processor_seconds(process.pid) >= begun + phase.worked, process)


def until(true: Callable[[], bool], process: subprocess.Popen) -> bool:
    """Waits until it is true; False if the process ended before, or after a command's limit."""
    deadline = time.monotonic() + commands.LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.002)
    return False


def processor_seconds(pid: int) -> float:
    """Of the processor, that a process has had; infinitely many where it has ended."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return float('inf')
    return (int(fields[11]) + int(fields[12])) / TICKS
