"""A script that trains nothing and takes a signal: in the right way, or with the fault that its first word names.

It works until a signal comes, the first time; started again it goes on to step 12. `result` is its second word: a run's
folder, or a file that is there as a whole or not at all.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FAULT, RESULT = sys.argv[1], Path(sys.argv[2])
TRAINS = RESULT.suffix == ''
BEFORE = RESULT.with_name(RESULT.name + '.begun')


def save(steps: range) -> None:
    (RESULT / 'checkpoints' / str(steps[-1])).mkdir(parents=True, exist_ok=True)
    with (RESULT / 'metrics.jsonl').open('a') as file:
        file.writelines(json.dumps({'step': step}) + '\n' for step in steps)


def stop(number: int, _: object) -> None:
    if FAULT == 'hangs':
        return
    if FAULT == 'traceback':
        raise RuntimeError('what a user must not see')
    if FAULT == 'aborts':
        os.abort()
    if FAULT == 'two lines':
        print('error: one\nerror: two', file=sys.stderr)
        os._exit(1)
    if FAULT == 'named too early':
        RESULT.write_text('half')
    if TRAINS and FAULT != 'saves nothing':
        save(range(1, 4))
    os._exit(0 if FAULT == 'exits 0' else 128 + number)


if BEFORE.exists():
    if FAULT == 'does not go on':
        print('error: it is damaged', file=sys.stderr)
        sys.exit(2)
    if FAULT == 'leaves a half':
        RESULT.with_name(RESULT.name + '.partial').touch()
    if TRAINS:
        done = len((RESULT / 'metrics.jsonl').read_text().splitlines())
        save(range(done + (2 if FAULT == 'skips a step' else 1), 13))
    elif FAULT != 'makes nothing':
        RESULT.write_text('whole')
else:
    BEFORE.touch()
    if FAULT == 'ends too soon':
        sys.exit(0)
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, stop)
    print('working', flush=True)
    while True:
        time.sleep(0.01)
