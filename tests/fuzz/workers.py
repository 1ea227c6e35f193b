"""Cases in processes of their own: one that dies, hangs or takes all memory is a fault of its case, and another process begins.

A worker is `python -m tests.fuzz.workers PART SEED COUNT FOLDER SAYS`: numbers of cases come on its stdin, a line each, and
what was found goes to the descriptor SAYS, a line of JSON each. What the code under test prints goes to FOLDER/log.
"""

import contextlib
import importlib
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fuzz import Case, TooLong, noted
from weft.runtime.errors import shown

ROOT = Path(__file__).parents[2]
MEMORY = 4 * 2**30  # bytes of address space of a worker whose cases are read in process
GRACE = 20.0  # seconds after a case's own limit until its worker is killed
IDLE = 3  # so many times longer may a case take whose processor is busy with others
BEGINNING = 180.0  # seconds that a worker may take for its imports
LONGEST = 2000  # characters that are kept of what is wrong


@dataclass(frozen=True)
class Result:
    """What came of a case: `wrong` is None where all was as it should be, `outcome` how it ended."""

    number: int
    name: str
    outcome: str
    wrong: str | None
    seconds: float


def load(part: str) -> Any:
    """The module of a part; of a test's own, with dots, too."""
    return importlib.import_module(part if '.' in part else f'tests.fuzz.{part}')


def check(part: Any, case: Case, folder: Path) -> Result:
    """Checks a case in this process, under its limit of time; nothing of its scratch folder is left."""
    scratch = folder / f'case-{case.number}'
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    noted()
    began = time.perf_counter()
    try:
        with limited(part.SECONDS, longest(part)):
            wrong = part.check(case, scratch)
    except TooLong as error:
        wrong = f'took more than {error}'
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library and SystemExit are no Exception
        wrong = described(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if wrong is not None:
        wrong = shown(wrong.replace(str(scratch), 'SCRATCH').replace(str(ROOT) + os.sep, ''), LONGEST)
    return Result(case.number, case.name, noted() if wrong is None else 'wrong', wrong, time.perf_counter() - began)


def prepare(part: Any, folder: Path) -> None:
    """What a part's cases share, where there is something."""
    if hasattr(part, 'prepare'):
        part.prepare(folder)


def longest(part: Any) -> float:
    """Seconds that a case may take: of one that is read in process the processor's are counted, and others are many more."""
    return IDLE * part.SECONDS if part.IN_PROCESS else part.SECONDS


@contextlib.contextmanager
def limited(processor: float, wall: float) -> Iterator[None]:
    """Raises TooLong in the main thread when so many seconds are over, and each second again: something may swallow it."""

    def over(number: int, _: Any) -> None:
        raise TooLong(f'{wall:g} s' if number == signal.SIGALRM else f'{processor:g} s of the processor')

    timers = {signal.SIGALRM: (signal.ITIMER_REAL, wall), signal.SIGPROF: (signal.ITIMER_PROF, processor)}
    before = {number: signal.signal(number, over) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds, 1.0)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def described(error: BaseException) -> str:
    """An error in a line, with the last places of Weft's own code that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    frames = [frame for frame in frames if f'{os.sep}.venv' not in frame.filename]
    places = ' < '.join(f'{os.path.relpath(one.filename, ROOT)}:{one.lineno}' for one in reversed(frames[-3:]))
    text = ' '.join(' '.join([*getattr(error, '__notes__', []), str(error)]).split())
    return f'{type(error).__name__}: {text[:500]} ({places or "no place in Weft"})'


def work(part: str, seed: int, count: int, folder: Path, says: int) -> None:
    """A worker's life: it ends when its stdin does, and after a case that left it without memory or time."""
    module = load(part)
    prepare(module, folder)
    if module.IN_PROCESS:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What it starts gets every signal, whoever has started the fuzzers: a shell's background and nohup pass some over.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    cases = module.cases(seed, count)
    with open(says, 'w', encoding='utf-8') as told:
        told.write('\n')  # imported
        told.flush()
        for line in sys.stdin:
            number = int(line)
            case = next(one for one in cases if one.number == number)
            result = check(module, case, folder)
            leaves = result.wrong is not None and result.wrong.startswith(('took more than', 'MemoryError'))
            told.write(json.dumps({'result': asdict(result), 'leaves': leaves}) + '\n')
            told.flush()
            if leaves:
                return


class Worker:
    """The parent's side of a worker."""

    def __init__(self, part: str, seed: int, count: int, folder: Path):
        self.folder, self.number = folder, None
        folder.mkdir(parents=True, exist_ok=True)
        reads, writes = os.pipe()
        command = [sys.executable, '-m', 'tests.fuzz.workers', part, str(seed), str(count), str(folder), str(writes)]
        with (folder / 'log').open('wb') as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writes],
                start_new_session=True,  # to be killed with all that it has started
            )
        os.close(writes)
        self.told = os.fdopen(reads, encoding='utf-8')
        self.deadline = time.monotonic() + BEGINNING

    def ask(self, number: int, seconds: float) -> None:
        """Gives it a case. One that has died meanwhile says so at its end."""
        self.number, self.began = number, time.monotonic()
        self.deadline = self.began + seconds
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f'{number}\n'.encode())
            self.process.stdin.flush()

    def kill(self) -> int:
        """Ends it and all that it has started; returns how it ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.told.close()
        return code

    def last_words(self) -> str:
        """The end of what it printed, in a line."""
        text = (self.folder / 'log').read_bytes()[-2000:].decode('utf-8', 'replace')
        return ' | '.join(line.strip() for line in text.splitlines() if line.strip())[-500:]


def environment() -> dict[str, str]:
    """Of a worker: Weft of this checkout, a CPU as one device, programs compiled quickly."""
    from tests.scripts.runs import QUICK

    kept = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
    return kept | {
        'PYTHONPATH': str(ROOT),
        'PYTHONFAULTHANDLER': '1',
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'XLA_FLAGS': QUICK,
        'OPENBLAS_NUM_THREADS': '1',  # each thread has a stack in the limited memory
        'RAYON_NUM_THREADS': '1',
    }


def run(
    part: str,
    seed: int,
    names: dict[int, str],
    folder: Path,
    workers: int = 2,
    tell: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Checks the cases of these numbers, in ascending order of theirs; `tell` hears of each as it is done."""
    module = load(part)
    waiting, found = sorted(names, reverse=True), list[Result]()
    count = max(names, default=-1) + 1
    begun: dict[Any, Worker] = {}
    fruitless = 0  # workers one after the other that ended before they had imported anything

    def done(result: Result) -> None:
        found.append(result)
        tell(result)

    with selectors.DefaultSelector() as selector:

        def begin(place: Path) -> None:
            worker = Worker(part, seed, count, place)
            begun[worker.told] = worker
            selector.register(worker.told, selectors.EVENT_READ)

        def end(worker: Worker) -> int:
            selector.unregister(worker.told)
            del begun[worker.told]
            code = worker.kill()
            for left in worker.folder.glob('case-*'):
                shutil.rmtree(left, ignore_errors=True)
            return code

        try:
            for number in range(min(workers, len(waiting))):
                begin(folder / f'worker-{number}')
            while begun:
                soonest = min(worker.deadline for worker in begun.values())
                for key, _ in selector.select(max(soonest - time.monotonic(), 0)):
                    worker = begun[key.fileobj]
                    line = worker.told.readline()
                    lives = line.endswith('\n')
                    if line.strip() and lives:
                        said = json.loads(line)
                        done(Result(**said['result']))
                        worker.number, lives = None, not said['leaves']
                    if lives and waiting:
                        fruitless = 0
                        worker.ask(waiting.pop(), longest(module) + GRACE)
                        continue
                    code = end(worker)
                    if worker.number is not None:
                        done(failed(worker, names, f'the worker died of {ended(code)}: {worker.last_words()}'))
                    elif code:
                        fruitless += 1
                        if fruitless > 3:
                            raise RuntimeError(f'workers of {part} do not begin: {worker.last_words()}')
                    if waiting:
                        begin(worker.folder)
                for worker in [one for one in begun.values() if one.deadline <= time.monotonic()]:
                    end(worker)
                    if worker.number is None:
                        raise RuntimeError(f'a worker of {part} took more than {BEGINNING:g} s to begin')
                    done(failed(worker, names, f'hangs: nothing came within {longest(module) + GRACE:g} s'))
                    if waiting:
                        begin(worker.folder)
        finally:
            for worker in list(begun.values()):
                end(worker)
    return sorted(found, key=lambda result: result.number)


def failed(worker: Worker, names: dict[int, str], wrong: str) -> Result:
    """What is said of the case that a worker did not survive."""
    return Result(worker.number, names[worker.number], 'wrong', shown(wrong, LONGEST), time.monotonic() - worker.began)


def ended(code: int) -> str:
    """How a process ended, by its return code."""
    return signal.Signals(-code).name if code < 0 else f'exit code {code}'


def named(part: Any, seed: int, count: int) -> dict[int, str]:
    """The cases of a seed: number -> name."""
    return {case.number: case.name for case in part.cases(seed, count)}


def progress(title: str, total: int, say: Callable[[str], None], every: float = 10.0) -> Callable[[Result], None]:
    """A teller of results that says each fault at once, and every few seconds how far it is."""
    began = last = time.monotonic()
    done = wrong = 0

    def tell(result: Result) -> None:
        nonlocal last, done, wrong
        done += 1
        if result.wrong is not None:
            wrong += 1
            say(f'{title} {result.number} ({result.name}): {result.wrong}')
        if time.monotonic() - last > every or done == total:
            last = time.monotonic()
            say(f'{title}: {done:,} of {total:,}, {wrong} wrong, {last - began:.0f} s')

    return tell


def in_process(part: Any, seed: int, numbers: Iterable[int], count: int, folder: Path) -> Iterator[Result]:
    """Checks cases in this process, one after the other."""
    wanted = set(numbers)
    prepare(part, folder)
    for case in part.cases(seed, count):
        if case.number in wanted:
            yield check(part, case, folder)


if __name__ == '__main__':
    _, part_, seed_, count_, folder_, says_ = sys.argv
    work(part_, int(seed_), int(count_), Path(folder_), int(says_))
