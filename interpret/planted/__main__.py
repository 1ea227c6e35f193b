"""Trains small models on something known and says whether the instruments find it; docs/interpret.md has what came of it.

python -m weft.interpret.planted                        all three, with three seeds each: two and a half minutes on two cores
python -m weft.interpret.planted facts --seeds 5        one of copying, senses and facts
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from weft.runtime.errors import UserError, nearest

NAMES = ('copying', 'senses', 'facts')
EVERY = 5.0  # seconds between lines that say how far the work is
MOST = 1000  # seeds


def main(arguments: Sequence[str]) -> None:
    """Exits with 1 where something that was planted was not found."""
    parser = argparse.ArgumentParser(
        prog='python -m weft.interpret.planted',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(NAMES)} (default: all)')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='so many, from 0 (default: 3)')
    parser.add_argument('--json', action='store_true', help='figures on stdout')
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            raise UserError(f'{name!r}: there is no such experiment{nearest(name, NAMES)}')
    if not 1 <= options.seeds <= MOST:
        raise UserError(f'--seeds is {options.seeds}: it must be from 1 to {MOST}')

    import jax

    from weft.interpret.planted import copying, facts, senses
    from weft.sharding.mesh import MeshConfig, make_mesh

    each: dict[str, Any] = {'copying': copying, 'senses': senses, 'facts': facts}
    found = list[dict[str, Any]]()
    with jax.set_mesh(make_mesh(MeshConfig())):
        for name in options.names or NAMES:
            for seed in range(options.seeds):
                begin = time.monotonic()
                result = each[name].measure(seed, teller())
                seconds = round(time.monotonic() - begin, 1)
                line = {'experiment': name, 'seed': seed, 'found': result.found, 'seconds': seconds}
                found.append(line | result.figures())
                if not options.json:
                    first = f'{name}, seed {seed}: {"found" if result.found else "NOT FOUND"} in {seconds:.0f} s'
                    print(f'{first}, {result.steps} steps\n    {result.told()}', flush=True)
    if options.json:
        print(json.dumps(found, indent=1))
    if not all(one['found'] for one in found):
        sys.exit(1)


def teller() -> Callable[[str], None]:
    """Says on stderr how far the training is, now and then."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return tell


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
