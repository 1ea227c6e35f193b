"""What every script does around its work: one line for what a user can mend, and the exit codes of the contract."""

import functools
import gc
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weft.runtime import background, signals, streams
from weft.runtime import rendezvous as peers
from weft.runtime.errors import MachineError, NotTogether, UserError, machine_fault, shown

GONE = 141  # whoever read standard output has gone, as in `… | head`: what a shell tells of a program that SIGPIPE ends
MOST = 2000  # characters of an error's line, which may hold what came out of a file
# What JAX says where a collective over several processes has failed.
COLLECTIVE = re.compile(r'[Gg]loo|NCCL|[Cc]oordination|UNAVAILABLE|DEADLINE_EXCEEDED')
FAULT = 'error: this is a fault of Weft, not of what you asked for: please report it, with the lines above'

# A script begins with this import: what it imports after it takes a second or more, in which a signal may come.
if Path(getattr(sys.modules['__main__'], '__file__', None) or '').parent == Path(__file__).parent:
    streams.occupy()  # signals take descriptors, which must not be those of a stream
    signals.install_handlers()


def run(main: Callable[[], int | None], lasting: bool = False) -> None:
    """Runs a script's main and exits.

    0 done; 2 the user's mistake and 1 what this machine or this run cannot do, each in one line on stderr; 75 another process
    was lost, or not found; 128 and its number after a signal; 141 where the reader of stdout has gone; what main returns; 1
    with a traceback for anything else. Of several processes one that fails ends all with its code.

    `lasting`: its results are files, and it goes on where nobody hears what it says.
    """
    # Imports and tracing make many objects that stay or go at once, and hardly a cycle: looking for cycles as often as usual
    # takes a sixth of a short script's time.
    gc.set_threshold(100_000, 20, 20)
    own = main.__module__ == '__main__'  # a script that another program has imported changes nothing of that one
    if own:
        sys.unraisablehook = functools.partial(_report, sys.unraisablehook)
        streams.set_up_streams(lasting)
        signals.enter(saves=lasting)
    try:
        try:
            code = main() or 0
            peers.leave()
            sys.stdout.flush()
        finally:
            if own:
                signals.leave()
    except BaseException as error:
        code, line = exit_code_and_line(error)
        if peers.several():
            peers.fail(code, line)
    if own:
        if lost := streams.finish():
            code = GONE if isinstance(lost, BrokenPipeError) else code or 1
        signals.over()
        # Weights that are being read, or a compiler: the interpreter would wait for them.
        if background.under_way():
            os._exit(code)
    gc.freeze()  # the end comes a third of a second sooner where nothing is looked through once more
    sys.exit(code)


def exit_code_and_line(error: BaseException) -> tuple[int, str]:
    """The exit code of what ended a main, and the line that says it, which is on stderr then."""
    if isinstance(error, SystemExit):  # of argparse, which has said what there is to say
        if error.code is None or isinstance(error.code, int):
            return flushed(error.code or 0)
        error = UserError(error.code)
    line, code = '', 1
    if isinstance(error, KeyboardInterrupt):
        line, code = 'interrupted', 130
    elif isinstance(error, signals.Stopped):
        line, code = f'stopped by {error}', 128 + error.number
    elif isinstance(error, BrokenPipeError) and error.filename == streams.OUTPUT:
        return GONE, 'its output is closed'
    elif isinstance(error, UserError):
        line, code = f'error: {shown(error, MOST)}', 2
    elif fault := machine_fault(error):
        line, code = f'error: {shown(fault, MOST)}', peers.LOSS if isinstance(error, NotTogether) else 1
    elif peers.several() and COLLECTIVE.search(str(error)):
        again = 'started again, the run goes on from its last checkpoint'
        line, code = f'error: the processes do not reach each other any more: {shown(error)}; {again}', peers.LOSS
    if isinstance(error, Exception) and not (peers.first() and isinstance(error, (UserError, MachineError))):
        # A mistake that all make is the first's to tell; and when a process is lost, collectives fail in all others.
        peers.give_word()
    if line:
        if peers.first() or isinstance(error, Exception):
            print(line, file=sys.stderr, flush=True)
        return code, line
    traceback.print_exception(error)
    print(FAULT, file=sys.stderr, flush=True)
    return code, f'{type(error).__name__}: {shown(error)}'


def _report(otherwise: Callable[[Any], object], about: Any) -> None:
    """What a library's own thread reports, but for parts of a failed save that end after it in tensorstore."""
    if not (about.exc_type is RuntimeError and str(about.exc_value) == 'Event loop is closed'):
        otherwise(about)


def flushed(code: int) -> tuple[int, str]:
    """An exit code, or that of a standard output that does not take what was said, as a full disk."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return exit_code_and_line(error)
    lost = streams.lost()
    return exit_code_and_line(lost) if lost else (code, '')


def as_json(figures: Any) -> str:
    """Figures as JSON, which has no word for what is no number: raises MachineError where one of them is none."""
    try:
        return json.dumps(figures, allow_nan=False)
    except ValueError:
        raise MachineError(f'{_not_finite(figures, "")} is no finite number: the figures are not told') from None


def _not_finite(value: Any, path: str) -> str:
    """Where the first number stands that is not finite; '' where there is none."""
    if isinstance(value, float):
        return '' if math.isfinite(value) else f'{path or "a figure"}, {value},'
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (_not_finite(part, f'{path}.{name}' if path else str(name)) for name, part in named)
    return next(filter(None, found), '')
