"""The command `scripts/compress.py study`: measures the study's cells, as far as they are missing, and writes its page.

python scripts/compress.py study                       all cells, then docs/compression.md: about an hour on two idle cores
python scripts/compress.py study --short               those of the verdict at three budgets, in about twenty minutes
python scripts/compress.py study dense --part 1/3      the first third of the dense model's cells

It may be stopped at any moment, and goes on at its next cell. Cells whose model, settings or code changed are measured again.
"""

import argparse
import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path

from weft.runtime.errors import LONGEST, UserError, nearest, shown
from weft.scripts.options import Parser

RESULTS = Path('benchmarks/compression.jsonl')
PAGE = Path('docs/compression.md')
WORK = Path('.cache/compression')


def study(argv: Sequence[str]) -> None:
    """Does what the arguments after `study` ask for."""
    options = arguments(argv)
    # Two cores are one study's: threads of BLAS and of XLA would wait for each other.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    from weft.sharding.mesh import configure_jax

    configure_jax(1, 'float32')
    from weft.compress.study.cells import design, published, short
    from weft.compress.study.page import write_page
    from weft.compress.study.rows import read_rows
    from weft.compress.study.run import run_cells, stale_rows
    from weft.compress.study.subjects import PUBLISHED, Reading, Subjects

    say = lambda line: print(line, flush=True)
    every = [*design(), *published()]
    cells = short() if options.short else every
    names = list(dict.fromkeys(cell.model for cell in every))
    for name in options.models:
        if name not in names:
            raise UserError(f'{shown(name, quoted=True)}: the study has no such model{nearest(name, names)}')
    # What is published is not always there, and is measured where it is, or asked for.
    chosen = options.models or [
        name for name in names if name not in PUBLISHED or (options.runs / name / 'config.yaml').exists()
    ]
    cells = [cell for cell in cells if cell.model in chosen and fnmatch.fnmatch(cell.name, options.only)]
    if not cells:
        raise UserError(f'--only {shown(options.only, quoted=True)}: no cell has such a name; --list names them all')
    cells = part_of(cells, options.part)
    if options.list:
        print('\n'.join(cell.name for cell in cells))
        return
    if not options.page_only:
        run_cells(by_model(cells), Subjects(options.runs, Reading(), say), options.results, options.work, say)
    rows = read_rows(options.results, say)
    stale = stale_rows(rows, every, lambda name: None)
    for name, why in stale.items():
        say(f'{name}: stale: {why}')
    wanted = [cell.name for cell in every if cell.model not in PUBLISHED or cell.model in chosen]
    missing = write_page(rows, stale, wanted, options.out)
    say(f'{shown(options.out, LONGEST)}: of {len(rows)} rows{missing}')


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = Parser(prog='compress.py study', description=__doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='such as dense; all that there are otherwise')
    parser.add_argument('--short', action='store_true', help='the verdict’s cells at three budgets')
    parser.add_argument('--part', metavar='N/M', type=part, help='the N-th of M parts of the cells')
    parser.add_argument('--only', metavar='PATTERN', default='*', help="cells of such names, as 'dense/svd/*'")
    parser.add_argument('--list', action='store_true', help='names of the cells, none of them measured')
    parser.add_argument('--page-only', action='store_true', help='the page, of the rows that are there')
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='FILE', help='a row a cell')
    parser.add_argument('--out', type=Path, default=PAGE, metavar='FILE', help='the page; pictures go beside it')
    parser.add_argument('--runs', type=Path, default=Path('runs'), metavar='PATH', help='where its models are, or go')
    parser.add_argument('--work', type=Path, default=WORK, metavar='PATH', help='for runs made on the way')
    return parser.parse_args(list(argv))


def part(text: str) -> tuple[int, int]:
    """`2/3`."""
    found = re.fullmatch(r'(\d+)/(\d+)', text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f'{text!r}: it must be N/M with N from 1 to M, such as 1/3')
    return int(found[1]), int(found[2])


def part_of(cells: list, of: tuple[int, int] | None) -> list:  # type: ignore[type-arg]
    """Every M-th cell, from the N-th on: each part has some of all kinds."""
    return cells if of is None else cells[of[0] - 1 :: of[1]]


def by_model(cells: list) -> list:  # type: ignore[type-arg]
    """The cells, those of a model together, in the order of the models' first cells."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    return [cell for model in models for cell in cells if cell.model == model]
