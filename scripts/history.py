"""Trains how models of language came to be transformers, each on one corpus and one budget, and writes the page that shows it.

python scripts/history.py                                  all of it, into docs/history.md (about half an hour on two cores)
python scripts/history.py training.steps=50 --out small.md              a smaller budget, of all models
python scripts/history.py --only 'norm-*'                  some pieces of work; no page, unless all others are there

A run that was interrupted goes on where it was: figures are kept with a hash of the config and the code that they came from.
"""

import fnmatch
import time
from pathlib import Path

from weft.runtime.errors import LONGEST, UserError, nearest, shown
from weft.scripts.entry import run
from weft.scripts.options import Parser
from weft.storage.files import check_output

WORK = Path('.cache/history')


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='of all models, such as training.steps=50')
    parser.add_argument('--out', type=Path, default=Path('docs/history.md'), help='the page; pictures go beside it')
    parser.add_argument('--only', metavar='PATTERN', default='*', help='pieces of work to do, such as norm-*')
    parser.add_argument('--list', action='store_true', help='names of the pieces, none of them done')
    parser.add_argument('--work', type=Path, default=WORK, help='where corpus, runs and figures are kept')
    options = parser.parse_intermixed_args()
    check_output('--out', options.out)

    from weft.sharding.mesh import configure_jax

    configure_jax(1, 'float32')

    from weft.interpret.history.page import write_page
    from weft.interpret.history.suite import suite

    say = lambda line: print(f'    {line}', flush=True)
    found = suite(options.work, options.overrides, say)
    chosen = fnmatch.filter(found.pieces, options.only)
    if not chosen:
        raise UserError(
            f'--only {shown(options.only, quoted=True)}: no piece has such a name{nearest(options.only, found.pieces)}'
        )
    if options.list:
        print('\n'.join(chosen))
        return 0
    for number, name in enumerate(chosen, start=1):
        print(f'{number}/{len(chosen)}  {name}', flush=True)
        began = time.perf_counter()
        figures, known = found.run(name, say)
        bits = f'{figures["bits_per_byte"]:.4f} bits/byte  ' if 'bits_per_byte' in figures else ''
        print(
            f'{number}/{len(chosen)}  {name}  {bits}{"kept" if known else f"{time.perf_counter() - began:.0f} s"}',
            flush=True,
        )
    if missing := [name for name in found.pieces if found.find(name) is None]:
        print(f'no page: {len(missing)} of {len(found.pieces)} pieces are missing: {", ".join(missing)}')
        return 0
    write_page(found, options.out)
    print(f'{shown(options.out, LONGEST)}: {len(found.pieces)} pieces')
    return 0


if __name__ == '__main__':
    run(main, lasting=True)
