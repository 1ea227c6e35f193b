"""What every script does around its work: one line for what a user can mend, and the exit codes of the contract."""

import sys
from collections.abc import Callable

from sharding.errors import Diverged, OutOfMemory, UserError


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's main and exits.

    0 done; 2 the user's mistake and 1 what this machine or this run cannot do, each in one line on stderr; what main returns;
    1 with a traceback for anything else.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except (UserError, OutOfMemory, Diverged) as error:
        print(f'error: {error}', file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        sys.stderr.close()
        code = 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    sys.exit(code)
