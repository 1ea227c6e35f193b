"""What signals do to a script: it ends in order, with 128 plus the signal's number, and in one line at most.

SIGHUP and SIGTERM raise `Stopped` in the main thread, SIGINT KeyboardInterrupt as Python has it. Training only has them noted
(`noted`), and SIGUSR1 too, and looks after each step. Modules written in C are not made for exceptions while they are being
imported (some end in a segmentation fault): an exception waits until no import is under way, and nothing is being written.

The system's handler writes each number into a pipe, and a thread here reads it. It does what a handler cannot: a handler of
Python waits while the main thread is in a compiler, and may have interrupted the very print that it wants to make. So the
thread ends the process where an orderly end takes too long or is asked for again, and has another thread speak: whoever prints
waits for whoever reads.

In another program's process, as a notebook's, signals are that program's: `noted` takes them for as long as it lasts.
"""

import _thread
import contextlib
import dataclasses
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from weft.runtime import rendezvous as peers
from weft.runtime import streams

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WAKING = signal.SIGURG  # ends what the main thread waits in; the system itself passes it over
GRACE = 5.0  # seconds that a script's orderly end may take
AGAIN = 0.05  # seconds after which the main thread is told once more
SPEAKING = 1.0  # seconds that saying so may take at the end of a training
IMPORT = '<frozen importlib._bootstrap>'  # the file of Python's own lines that import
# Seconds in which launchers, shells and the kernel may say the same twice.
ONCE = {signal.SIGHUP: float('inf'), signal.SIGINT: 0.1, signal.SIGTERM: 1.0}


class Stopped(BaseException):
    """A signal asks the script to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclasses.dataclass
class Noted:
    """What signals have asked of a training."""

    saves: bool  # it is to be saved
    say: Callable[[int], None]
    stop: int = 0  # the number of the first signal that asks it to end
    saying: threading.Thread | None = None

    def hear(self, number: int) -> None:
        """Says that a signal has come, in a thread that nobody needs: the main thread may hold what it is said with."""
        self.saying = threading.Thread(target=self.say, args=(number,), name='signals: say', daemon=True)
        self.saying.start()

    def take(self) -> int:
        """The number that asks it to end, again and again; else that of SIGUSR1, once each time; else 0."""
        found = self.stop or (int(signal.SIGUSR1) if self.saves else 0)
        self.saves = False
        return found


_noted: Noted | None = None
_saves = False  # SIGUSR1 came before there was anything to save
_raised = False  # the main thread is on its way out
_leaving = False  # it is, or done
_over = False  # nothing is left to be put in order
_begun = False
_entered = False  # the script's main has begun: before, there is nothing to be put in order
_heard: list[tuple[signal.Signals, float]] = []  # signals that ask for the end, and when
_pipe: int | None = None  # where the system's handler writes; a thread reads its other end
_hearing = threading.Lock()  # held while a signal is heard, and while it changes whose signals they are


def install_handlers() -> None:
    """Takes the signals of this process: until `enter` each ends it at once. Use it in the main thread.

    SIGHUP stays ignored where nohup has it so, and SIGINT where a shell has it so for what it starts in the background.
    """
    global _begun, _pipe
    _begun = True
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    if _pipe is None:
        reader, _pipe = os.pipe()
        os.set_blocking(_pipe, False)
        threading.Thread(target=_watch, args=(reader,), name='signals', daemon=True).start()
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    for number in SIGNALS:
        # None: a library's own, which Python cannot put back.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _handle)
    signal.signal(WAKING, lambda number, frame: None)


def enter(saves: bool) -> None:
    """From now on a signal ends the script in order. With `saves` SIGUSR1 asks for that, and SIGINT is never ignored."""
    global _entered
    if not _begun:
        install_handlers()
    _entered = True
    if saves:
        signal.signal(signal.SIGINT, _handle)
    elif signal.getsignal(signal.SIGUSR1) is _handle:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@contextlib.contextmanager
def noted(say: Callable[[int], None]) -> Iterator[Noted]:
    """Within the block signals are noted and raise nothing; `say` is called, in another thread, for one that asks for the end.

    SIGINT or SIGTERM again ends the process at once. In a process of another program its signals are its own after the block.
    """
    global _noted
    assert _noted is None, 'one training at a time'
    strange = not _begun and threading.current_thread() is threading.main_thread()
    _noted = found = Noted(_saves, say)
    try:
        with _lent() if strange else contextlib.nullcontext():
            try:
                yield found
            finally:
                if found.saying is not None:
                    found.saying.join(SPEAKING)
    finally:
        _noted = None


@contextlib.contextmanager
def _lent() -> Iterator[None]:
    """Takes the signals of a process that is another program's, and gives them back as they were."""
    global _begun, _entered, _saves, _raised
    handlers = {number: signal.getsignal(number) for number in (WAKING, *SIGNALS)}
    hook, wakeup = sys.unraisablehook, signal.set_wakeup_fd(-1)
    try:
        with _hearing:
            enter(saves=True)
        yield
    finally:
        with _hearing:
            _begun = _entered = _saves = _raised = False
            _heard.clear()
            signal.set_wakeup_fd(wakeup)
            sys.unraisablehook = hook
            for number, handler in handlers.items():  # SIGINT last: from then on it may raise, here too
                if handler is not None:
                    signal.signal(number, handler)


def leave() -> None:
    """From now on no signal raises anything: the script is on its way out, for which it has `GRACE` seconds after a signal."""
    global _raised, _leaving
    _raised = _leaving = True


def over() -> None:
    """From now on a signal ends the process at once: all has been said and written."""
    global _over
    _over = True


def _handle(number: int, frame: FrameType | None) -> None:
    """In the main thread, between two of its steps."""
    global _saves, _raised
    if _noted is not None:
        if number == signal.SIGUSR1:
            _noted.saves = True
        else:
            _noted.stop = _noted.stop or number
    elif number == signal.SIGUSR1:
        _saves = True
    elif _over or not _entered:
        os._exit(128 + number)
    elif not _raised and not streams.writing and not _importing(frame):
        _raised = True
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            return True
        frame = frame.f_back
    return False


def _unraisable(otherwise: Callable[[Any], object], about: Any) -> None:
    """Python cannot raise within a destructor or a callback, and would tell: it is raised again a moment later."""
    global _raised
    if issubclass(about.exc_type, (Stopped, KeyboardInterrupt)):
        _raised = _leaving
    else:
        otherwise(about)


def _watch(reader: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    repeated = 0  # numbers that will come out of the pipe because they were sent here
    while True:
        waits = bool(_heard) and _begun and not (_raised or _over or _noted)
        if not select.select([reader], [], [], AGAIN if waits else None)[0]:
            repeated += 1
            # The handler had to let it pass, or the main thread is in a compiler.
            _thread.interrupt_main(_heard[0][0])
            signal.pthread_kill(main, WAKING)  # else it sleeps on, where it has begun to
            continue
        for number in os.read(reader, 1):
            if number == WAKING:
                continue
            # A script may have a handler of its own for a while, as chat.py has while it answers.
            if repeated:
                repeated -= 1
                continue
            with _hearing:
                if number in ENDING and signal.getsignal(number) is _handle:
                    _hear(signal.Signals(number))


def _hear(number: signal.Signals) -> None:
    now = time.monotonic()
    before = [when for other, when in _heard if number in (other, signal.SIGINT)]
    _heard.append((number, now))
    if before and now - before[0] > ONCE[number]:
        _end(number)
    if len(_heard) > 1:
        return
    if _noted is not None:
        _noted.hear(number)
    else:
        last = threading.Timer(GRACE, _end, [number])
        last.daemon = True
        last.start()


def _end(number: signal.Signals) -> NoReturn:
    streams.say('')
    peers.fail(128 + number, f'{number.name}: ended at once')
