"""A part whose cases fail in every way that a case may."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import Case, note

NAME, COUNT, QUICK, SECONDS, IN_PROCESS = 'fake', 12, 0, 0.5, True
WAYS = (
    *('right', 'said', 'raises', 'swallows', 'panics', 'leaves', 'loops', 'memory', 'dies', 'exits', 'hangs'),
    *('noted', 'leaves files', 'random'),
)


class Panic(BaseException):
    """As a Rust library's: no Exception."""


def cases(seed: int, count: int) -> Iterator[Case]:
    for number, way in enumerate(WAYS[:count]):
        yield Case(number, way, seed)


def check(case: Case, scratch: Path) -> str | None:
    assert not any(scratch.iterdir())
    way = case.name
    if way == 'said':
        return f'{scratch}/file is not as it should be'
    if way == 'raises':
        raise ValueError('two\nlines')
    if way == 'panics':
        raise Panic('index out of bounds')
    if way == 'leaves':
        sys.exit(0)
    if way == 'swallows':
        while True:
            try:
                time.sleep(60)
            except Exception:
                continue
    if way == 'loops':
        subprocess.Popen(['sleep', '1000'])  # goes with its worker
        while True:
            pass
    if way == 'memory':
        bytearray(8 * 2**30)
    if way == 'dies':
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == 'exits':
        print('terminate called', flush=True)
        os._exit(3)
    if way == 'hangs':
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as compiled code that returns to Python never
        time.sleep(1000)
    if way == 'noted':
        note('refused')
    if way == 'leaves files':
        (scratch / 'file').write_text('x')
        (scratch.parent / 'shared').mkdir(exist_ok=True)
    return None
