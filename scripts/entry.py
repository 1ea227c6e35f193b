"""What every script does around its work: one line for what a user can mend, and the exit codes of the contract."""

import gc
import os
import sys
import traceback
from collections.abc import Callable

from sharding import background, peers
from sharding.errors import Diverged, MachineError, NotTogether, OutOfMemory, UserError


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's main and exits.

    0 done; 2 the user's mistake and 1 what this machine or this run cannot do, each in one line on stderr; what main returns;
    1 with a traceback for anything else. Of several processes one that fails ends all with its code.
    """
    # Imports and tracing make many objects that stay or go at once, and hardly a cycle: looking for cycles as often as usual
    # takes a sixth of a short script's time.
    gc.set_threshold(100_000, 20, 20)
    try:
        code = main() or 0
        peers.leave()
        sys.stdout.flush()
        gc.freeze()  # the end comes a third of a second sooner where nothing is looked through once more
        sys.exit(code)
    except (UserError, MachineError, OutOfMemory, Diverged, NotTogether) as error:
        if not peers.first():
            peers.give_word()  # a mistake that all make is the first's to tell
        line, code = f'error: {error}', 2 if isinstance(error, UserError) else 1
        print(line, file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        sys.stderr.close()
        line, code = 'its output is closed', 1
    except KeyboardInterrupt:
        line, code = 'interrupted', 130
        print(line, file=sys.stderr)
    except Exception as error:
        if not peers.several():
            raise
        peers.give_word()  # when a process is lost, its collectives fail in all others
        traceback.print_exc()
        line, code = f'{type(error).__name__}: {error}', 1
    if peers.several():
        peers.fail(code, line)
    # Weights that are being read, or a compiler: the interpreter would wait for them. A script that another program has
    # imported does not end that one.
    if main.__module__ == '__main__' and background.under_way():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
