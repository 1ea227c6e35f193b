"""Fuzzers: many odd inputs, streams, signals and disks, each of which must end as docs say, and no traceback.

    make fuzz                                         all parts, with today as the seed; writes benchmarks/fuzz.md
    make fuzz SEED=7 ONLY=folders                     one part, other cases
    python -m tests.fuzz folders --seed 7 --only 31   one case once more, or those whose name has a text

A part is a module of this folder with the attributes of `Part`. Parts whose cases are read in process (`IN_PROCESS`) are in
`make test` too, with their first `QUICK` cases of seed 0 (test_parts.py).

A case is a pure function of (seed, number): case 31 of seed 7 is the same whatever the count and whichever worker makes it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PARTS = ('folders', 'run_files', 'sources', 'streams', 'signals', 'disks', 'pairs')  # modules of this folder, in turn


@dataclass(frozen=True)
class Case:
    """One odd input: its number in (seed, number), what is odd about it in a few words, and what `check` needs to make it."""

    number: int
    name: str
    content: Any = field(default=None, repr=False, compare=False)


class Part(Protocol):
    """What a module of this folder has.

    COUNT: how many cases `make fuzz` tries; QUICK: how many of them `make test` does (about 15 s on an idle core; 0: none).
    IN_PROCESS: its cases are read by Weft's functions in the worker, under a limit of memory; otherwise they start whole
    commands. SECONDS: what one case may take, in process of the processor's time.
    """

    NAME: str
    COUNT: int
    QUICK: int
    SECONDS: float
    IN_PROCESS: bool

    def cases(self, seed: int, count: int) -> Iterator[Case]:
        """The cases 0 … count - 1 of a seed. Making one takes no time worth a word: what does is left to `check`."""

    def check(self, case: Case, scratch: Path) -> str | None:
        """None if all is as it should be; otherwise what is wrong, in one line.

        `scratch` is a new empty folder of this case's own. `scratch.parent` stays as long as the fuzzer runs and is one
        worker's: what cases share, such as a base folder or a trained run, is there. A part that has `prepare(folder)` makes
        it with that, before the first case and outside its limits; it is called again when another worker follows.

        What it raises is a fault of the case, too: let through what Weft must not raise, and catch only what is right
        (UserError, whose message is one line and not long). It runs under a limit of time (a signal raises `TooLong`, which
        is no Exception) and of memory (MemoryError). A worker that dies or hangs is a fault of its case, and another begins.
        """


class TooLong(BaseException):
    """A case took longer than its part allows."""


def rng(seed: int, number: int, part: str) -> random.Random:
    """The randomness of one case, and of nothing else."""
    return random.Random(f'{part} {seed} {number}')


_outcome: list[str] = []


def note(outcome: str) -> None:
    """Called by a check: how its case ended, such as 'refused' or 'imported', for the counts on the page."""
    _outcome[:] = [outcome]


def noted() -> str:
    """What the last check noted, once."""
    said = _outcome[0] if _outcome else 'right'
    _outcome.clear()
    return said
