"""The cases of `scripts/prove.py`, and what is kept of them.

A case is a name such as `gradient/dense/stage=2 tensor=4` and a function that computes its figures. Results are kept by
case and by the hash of the code that they were computed with, so that a run that was interrupted goes on where it was.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from weft.proof.code_hash import code_hash
from weft.proof.equivalence import (
    LONG,
    LOSSES_TOLERANCE,
    MESHES,
    MODELS,
    RUNS,
    TOLERANCE,
    gradient_error,
    initial_error,
    losses_dtype,
    losses_error,
)
from weft.proof.faults import FAULTS, caught, fault_error
from weft.runtime.errors import UserError, shown
from weft.storage.files import write

ROOT = Path(__file__).parents[1]
CODE = (  # what a result rests on, beside the version of jax
    'proof/equivalence.py',
    'proof/faults.py',
    'model',
    'sharding',
    'training/loss.py',
    'training/step.py',
)
COUNTS = (
    'model/cost.py',
    'model/dots.py',
)  # in one of those folders, and yet no result rests on them: they count by shapes


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    partial = functools.partial
    return {
        **{f'gradient/{kind}/{mesh}': partial(gradient_error, kind, mesh) for kind in MODELS for mesh in MESHES},
        # Every kind of weight is in this one.
        **{f'initial/all_gather/{mesh}': partial(initial_error, 'all_gather', mesh) for mesh in MESHES},
        **{f'losses/{kind}/{mesh}': partial(losses_error, kind, mesh) for kind in RUNS for mesh in LONG},
        **{f'fault/{fault.what}/{fault.kind}/{fault.mesh}': partial(fault_error, fault) for fault in FAULTS},
    }


def holds(case: str, found: dict[str, Any]) -> bool:
    """Whether a case came out as it must."""
    part, kind, *_ = case.split('/')
    if part == 'fault':
        return caught(found)
    if part == 'losses':
        of_20, of_50 = LOSSES_TOLERANCE[losses_dtype(kind)]
        return found['error'] <= of_20 and found['error of 50'] <= of_50
    return found['error'] <= TOLERANCE[part] and found.get('loss', 0.0) <= TOLERANCE[part]


def figures_line(found: dict[str, Any]) -> str:
    return ', '.join(
        f'{name} {value:.2g}' if isinstance(value, float) else f'{name} {value}' for name, value in found.items()
    )


class Results:
    """Figures by case, one JSON object a line; those of other code are not read."""

    def __init__(self, path: Path):
        self.path, self.code = (
            path,
            code_hash((ROOT / name for name in CODE), jax.__version__, {ROOT / name for name in COUNTS}),
        )
        self.found: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        whole, end, cut = path.read_bytes().rpartition(b'\n')
        if cut:  # a kill while it was written
            write(path, whole + end)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                code, case = row.pop('code'), row.pop('case')
            except (ValueError, LookupError, AttributeError, TypeError):
                raise UserError(
                    f'--results {shown(str(path))}:{number}: no figures of a case; take the file away, and all is computed anew'
                ) from None
            if code == self.code:
                self.found[case] = row

    def run(self, case: str, compute: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The case's figures, and whether they were there already."""
        if case in self.found:
            return self.found[case], True
        began = time.perf_counter()
        row = compute() | {'seconds': round(time.perf_counter() - began, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('a', encoding='utf-8') as file:
            file.write(json.dumps({'case': case, 'code': self.code, **row}) + '\n')
        self.found[case] = row
        return row, False
