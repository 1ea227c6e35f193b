"""The search's first choices compiled, kept as records like those of proof/compiled_pairs.py.

`python -m weft.proof.compiled_searched` makes them.
What has a record of the same choice is not compiled again. A case whose chip has no compiler here is left out.
"""

import functools
import time
from pathlib import Path
from typing import NamedTuple

from weft.planner.aot import Compiled, compile_step
from weft.planner.chips import CHIPS
from weft.planner.search import TrainingCandidate, search_training
from weft.proof.compiled_pairs import RECORDS, read_record, write_record
from weft.proof.search_cases import CASES, SearchCase
from weft.runtime.errors import UserError


def record_of(name: str) -> Path:
    """Where the record of a case is, or would be."""
    return RECORDS / 'searched' / f'{name.replace(" ", "-")}.json'


class Searched(NamedTuple):
    """A case, what the search chose, and what a compiler made of that; None: it has no record."""

    name: str
    case: SearchCase
    choice: TrainingCandidate
    compiled: Compiled | None

    @property
    def request(self) -> dict[str, object]:
        """What a record is of: another choice is compiled anew."""
        return {'case': self.name, 'chip': self.case.chip, 'choice': self.choice.settings}


@functools.cache
def searched() -> list[Searched]:
    found = []
    for name, case in CASES.items():
        choice = search_training(case.run, CHIPS[case.chip], case.chips).best
        assert choice is not None, f'nothing fits: {name}'
        one = Searched(name, case, choice, None)
        if record_of(name).exists():
            request, compiled = read_record(record_of(name))
            if request == one.request:
                one = one._replace(compiled=compiled)
        found.append(one)
    return found


def main() -> None:
    for one in searched():
        if one.compiled:
            continue
        began = time.perf_counter()
        try:
            compiled = compile_step(one.choice.run, one.case.chip)
        except UserError as error:
            print(f'{one.name}: {error}')
            continue
        write_record(record_of(one.name), one.request, compiled)
        total, planned = compiled.memory.get('total', 0) / 1e9, one.choice.total / 1e9
        print(
            f'{one.name}: {one.choice.mesh}, {compiled.status}, {planned:.2f} GB planned, {total:.2f} GB, '
            f'{time.perf_counter() - began:.0f} s {compiled.message[-300:]}',
            flush=True,
        )


if __name__ == '__main__':
    main()
