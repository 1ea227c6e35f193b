"""python -m tests.fuzz [PART …] [--seed S] [--only NUMBER …] [--count N] [--page FILE]: see tests/fuzz/__init__.py."""

import argparse
import contextlib
import datetime
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.fuzz import PARTS, commands, page, workers

FOLDER = workers.ROOT / '.cache' / 'fuzz'


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__)
    parser.add_argument('parts', nargs='*', metavar='PART', help=f'of {", ".join(PARTS)}; all otherwise')
    parser.add_argument('--seed', type=int, default=int(datetime.date.today().strftime('%Y%m%d')))
    parser.add_argument(
        '--only', metavar='NUMBER', action='append', help='a case once more, or those whose name matches'
    )
    parser.add_argument('--count', type=int, help='cases of each part; what the part says otherwise')
    parser.add_argument('--page', type=Path, help='where the result goes, if all parts are run')
    options = parser.parse_args()
    for name in options.parts:
        if name not in PARTS:
            parser.error(f'{name}: the parts are {", ".join(PARTS)}')
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # with all that it has started
    began, found = time.monotonic(), dict[str, page.Found]()
    say(f'seed {options.seed}')
    for name in options.parts or PARTS:
        found[name] = part(name, options.seed, options.count, options.only)
    figures = page.Figures(options.seed, time.monotonic() - began, found)
    if options.page and not options.parts and not options.only and options.count is None:
        page.write(options.page, figures)
        say(f'{options.page} is written')
    faults = sum(one.wrong is not None for part in found.values() for one in part.results)
    cases = sum(len(part.results) for part in found.values())
    say(f'{cases:,} cases, {faults} of them wrong, {figures.seconds / 60:.1f} minutes, seed {options.seed}')
    return 1 if faults else 0


def part(name: str, seed: int, count: int | None, only: list[str] | None) -> page.Found:
    """Runs the cases of a part, or the chosen ones of them."""
    module, folder, began = workers.load(name), FOLDER / name, time.monotonic()
    names = workers.named(module, seed, count or module.COUNT)
    chosen = {number: one for number, one in names.items() if only is None or any(meant(number, one, x) for x in only)}
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    if not module.IN_PROCESS:
        commands.made(FOLDER)  # where it cannot be made, no case is at fault
    tell = workers.progress(name, len(chosen), say)
    results = workers.run(name, seed, chosen, folder, tell=tell)
    return page.Found(module, results, time.monotonic() - began)


def meant(number: int, name: str, asked: str) -> bool:
    """Whether a case is the one of this number, or its name holds the text or pattern."""
    return number == int(asked) if asked.isdecimal() else re.search(asked, name) is not None


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == '__main__':
    sys.exit(main())
