"""The page of `make fuzz`: what was tried, where, how it ended, and every failure in full."""

import datetime
import os
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tests.fuzz.workers import Result
from weft.storage import files


@dataclass(frozen=True)
class Found:
    """What came of a part, and how long it took."""

    part: Any
    results: list[Result]
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What came of all parts."""

    seed: int
    seconds: float
    parts: dict[str, Found]


def write(path: Path, figures: Figures) -> None:
    """Replaces the page."""
    files.write(path, text(figures).encode())


def text(figures: Figures) -> str:
    """The page."""
    cases = sum(len(one.results) for one in figures.parts.values())
    wrong = sum(len(faults(one)) for one in figures.parts.values())
    lines = [
        '# Fuzzers',
        '',
        f'`make fuzz SEED={figures.seed}`, {datetime.date.today()}, {machine()}: {cases:,} cases in '
        f'{figures.seconds / 60:.0f} minutes, {wrong or "none"} of them wrong. What a case must do stands in tests/fuzz/; '
        '`python -m tests.fuzz PART --seed SEED --only NUMBER` repeats one.',
        '',
        '| part | what | cases | wrong | how they ended | minutes |',
        '|---|---|---:|---:|---|---:|',
    ]
    for name, one in figures.parts.items():
        counted = Counter(result.outcome for result in one.results if result.wrong is None)
        ended = ', '.join(f'{outcome} {count:,}' for outcome, count in counted.most_common())
        title = one.part.__doc__.split('\n')[0].rstrip('.')
        row = (name, title, f'{len(one.results):,}', len(faults(one)), ended or '–', f'{one.seconds / 60:.1f}')
        lines.append('| ' + ' | '.join(map(cell, row)) + ' |')
    for name, one in figures.parts.items():
        if faults(one):
            lines += ['', f'## Wrong: {name}', '', '| number | case | what is wrong |', '|---:|---|---|']
            lines += [f'| {fault.number} | {cell(fault.name)} | {cell(fault.wrong)} |' for fault in faults(one)]
    return '\n'.join(lines) + '\n'


def faults(found: Found) -> list[Result]:
    """The cases that were not as they should be."""
    return [result for result in found.results if result.wrong is not None]


def cell(value: object) -> str:
    """A value in a table of Markdown: on one line, nothing in it is markup."""
    plain = ''.join(c if c.isprintable() else f'\\u{ord(c):04x}' for c in str(value))
    return re.sub(r'([|`*_<>\[\]\\])', r'\\\1', plain)


def machine() -> str:
    """What the cases ran on, as far as it tells."""
    cpu = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', cpu.read_text()) if cpu.exists() else []
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return (
        f'{cores} cores ({names[0] if names else platform.machine()}), {memory:.0f} GiB, {platform.system()}, '
        f'Python {platform.python_version()}, jax {jax.__version__}'
    )
