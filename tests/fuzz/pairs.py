"""Two processes of one run, one of which stops without ending: the other says so within the limit, and exits with 75."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import Case, note
from tests.fuzz.commands import Command, base_of, finish, goes_on, rows, start, wrong
from tests.fuzz.signals import until

NAME = 'pairs'
WAITS = 60.0  # seconds that a process waits for another by default
SOON = 30.0  # seconds that it may take beyond that
STEPS = 2000
IMPATIENT = 5.0  # seconds, where they are said
PHASES = ('training', 'compiling')
COUNT, QUICK, SECONDS, IN_PROCESS = 2 * len(PHASES), 0, 4 * WAITS, False


def cases(seed: int, count: int) -> Iterator[Case]:
    """Either process stops: what varies with the seed is nothing."""
    every = [(victim, phase) for phase in PHASES for victim in range(2)]
    for number, (victim, phase) in enumerate(every[:count]):
        yield Case(number, f'process {victim} of 2 stopped by SIGSTOP while {phase}', (victim, phase))


def check(case: Case, scratch: Path) -> str | None:
    victim, phase = case.content
    return stopped(victim, scratch, base_of(scratch), command(STEPS), phase)


def command(steps: int) -> Command:
    """Training on two devices until a step that nobody waits for."""
    words = ('train', '{base}/tiny.yaml', 'name=made', '--runs', '{scratch}/runs', 'mesh.data=2', 'checkpoint.every=20')
    return Command('train', (*words, f'training.steps={steps}'), 'runs/made')


def stopped(victim: int, scratch: Path, base: Path, both: Command, phase: str = 'training') -> str | None:
    """Stops one of two processes in a phase: what is wrong with how the other ends, and with what it leaves."""
    with socket.create_server(('localhost', 0)) as server:
        told = {'WEFT_COORDINATOR': f'localhost:{server.getsockname()[1]}', 'WEFT_PROCESSES': '2'}
    if phase == 'compiling':  # anew, for a program that is kept is there at once
        told |= {'WEFT_PATIENCE': f'{IMPATIENT:g}', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    said, run_folder = scratch / 'said', scratch / both.result
    with said.open('wb') as out:
        pair = [
            start(both.line(base, scratch), scratch, base, stdout=out, **told, WEFT_PROCESS=str(process))
            for process in range(2)
        ]
    reached = {
        'training': lambda: len(rows(run_folder)) > 25,
        'compiling': lambda: b'compiling the first step' in said.read_bytes(),
    }
    try:
        if not until(reached[phase], pair[0]):
            return f'it was not seen {phase}: {wrong(finish(pair[0], limit=5), {0}) or "it came to its end"}'
        pair[victim].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        ended = finish(pair[1 - victim], limit=(WAITS if phase == 'training' else IMPATIENT) + SOON)
        note(f'exit code {ended.code} after {time.monotonic() - began:.0f} s')
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    if fault := wrong(ended, {75}, 1):
        return fault
    if f'process {victim} ' not in ended.err.decode():
        return f'its line does not name process {victim}: {ended.err.decode().strip()}'
    saved = [int(path.name) for path in (run_folder / 'checkpoints').glob('*') if path.name.isdecimal()]
    last = max(saved, default=0) + 20
    return goes_on(command(last), scratch, base, last)
