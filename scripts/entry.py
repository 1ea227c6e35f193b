"""What every script does around its work: one line for a user's mistake, the exit codes of the contract, simulated devices."""

import sys
from collections.abc import Callable

from sharding.errors import UserError


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's main and exits: 0 done, 2 the user's mistake in one line on stderr, else what main returns or 1 with a traceback."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        sys.stderr.close()
        code = 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    sys.exit(code)
