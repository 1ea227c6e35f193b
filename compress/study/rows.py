"""The rows of the study: one JSON object a line, appended and on the disk as soon as a cell is measured.

A kill at any moment loses no more than the cell that was being measured: of a line that was being written the beginning may
stand at the end of the file, and goes, with a message, when the study goes on.
"""

import datetime
import functools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from weft.compress.study.cells import Cell
from weft.proof.code_hash import code_hash
from weft.runtime.errors import UserError, shown
from weft.storage import files as disk

ROOT = Path(__file__).parents[2]
# What a figure comes from: neither the page nor the list of cells is among it.
EVERY = (
    'compress/cloze.py',
    'compress/loss.py',
    'compress/methods/base.py',
    'compress/quality.py',
    'compress/spread.py',
    'compress/texts.py',
    'compress/transform.py',
    'compress/weights.py',
)
MEASURED = {
    'quality': ('compress/study/measure.py',),
    'recovered': (
        'compress/study/measure.py',
        'compress/study/recovery.py',
        'compress/compressed_run.py',
        'model/forms',
    ),
    'speed': ('compress/study/speed.py', 'compress/compressed_run.py', 'model/forms'),
    'diagnosis': ('compress/study/evidence.py', 'compress/outliers.py', 'compress/planted.py', 'compress/diagnosis.py'),
}
INPUTS = ('compress/activations.py', 'compress/input_sums.py')
ROUNDING = ('compress/methods/rounding.py', 'compress/numerics/rounding.py', 'compress/numerics/gptq.py', *INPUTS)
PAIRS = ('compress/methods/matrices.py', 'compress/numerics/svd.py', 'compress/numerics/bits.py', *INPUTS)
TENSORS = ('compress/methods/tensors.py', 'compress/diagnosis.py', 'compress/sharing.py', *PAIRS)
PRUNING = ('compress/numerics/pruning.py', *INPUTS)
METHOD = {
    **dict.fromkeys(('int8', 'fp8', 'int4', 'gptq-int8', 'gptq-int4'), ROUNDING),
    **dict.fromkeys(('svd', 'svd-slices', 'svd-shared'), PAIRS),
    **dict.fromkeys(('svd-int8', 'svd-int4'), ('compress/numerics/quantised_pair.py', *PAIRS, *ROUNDING)),
    **dict.fromkeys(('tucker', 'tucker-hooi'), ('compress/numerics/tucker.py', *TENSORS)),
    'cp': ('compress/numerics/cp.py', *TENSORS),
    'tensor-train': ('compress/numerics/tensor_train.py', *TENSORS),
    **dict.fromkeys(('magnitude', 'wanda', 'wanda-2:4'), ('compress/methods/pruning.py', *PRUNING)),
    **dict.fromkeys(('layers', 'experts', 'heads', 'hidden-units'), ('compress/methods/structure.py', *PRUNING)),
}
Row = dict[str, Any]


def measuring_code(cell: Cell) -> str:
    """A hash of the code that a cell's figures come from."""
    spread = ('compress/sensitivity.py',) if cell.spread == 'sensitivity' else ()
    return hash_of(tuple(sorted({*EVERY, *MEASURED[cell.measured], *METHOD.get(cell.method, ()), *spread})))


@functools.cache
def hash_of(code: tuple[str, ...]) -> str:
    """Of files and folders of code as they are when it is first asked for."""
    return code_hash(ROOT / name for name in code)


class Key(NamedTuple):
    """What a row holds for: with another it is stale."""

    model: str  # SHA-256 of the weights
    code: str
    settings: str  # JSON

    def why(self, other: 'Key') -> str:
        """In which parts another key differs."""
        names = {'model': 'the model’s weights', 'code': 'the code', 'settings': 'the settings'}
        return ' and '.join(text for field, text in names.items() if getattr(self, field) != getattr(other, field))


def key_of(cell: Cell, model: str, reading: dict[str, Any]) -> Key:
    """Of a cell that is to be measured; `reading`: how much text is read."""
    return Key(model, measuring_code(cell), json.dumps([cell.settings, reading], sort_keys=True))


def key_in(row: Row) -> Key:
    """That a row was measured with."""
    return Key(row['model_sha256'], row['code'], json.dumps([row['settings'], row['reading']], sort_keys=True))


def make_row(cell: Cell, key: Key, reading: dict[str, Any], figures: dict[str, Any], seconds: float) -> Row:
    """A row, with when and where it was measured."""
    return {
        'cell': cell.name,
        'model_sha256': key.model,
        'code': key.code,
        'settings': cell.settings,
        'reading': reading,
        'seconds': round(seconds, 2),
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'jax': jax.__version__,
        'figures': figures,
    }


def read_rows(path: Path, say: Callable[[str], object]) -> list[Row]:
    """The newest row of each cell, in the order of the file; [] where there is no file.

    A last line that does not end is told, and left out. Raises UserError for any other line that is no row.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    *lines, torn = content.split(b'\n')
    if torn:
        say(f'{path}: the last line was cut off while it was written: its cell is measured again')
    found: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key_in(row), row['cell'], row['figures']
        except (ValueError, LookupError, TypeError):
            raise UserError(f'{shown(path)}: line {number} is no row of the study; take it away') from None
        found.pop(row['cell'], None)  # the newest stands where it was written
        found[row['cell']] = row
    return list(found.values())


def mend(path: Path) -> None:
    """Takes a line that was cut off away, so that the next row begins a line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole = content.rfind(b'\n') + 1
    if whole < len(content):
        disk.write(path, content[:whole])


def append(path: Path, row: Row) -> None:
    """Writes a row; it is on the disk when this returns."""
    disk.make_folder(path.parent)
    file = disk.Appended(path)
    try:
        # JSON has no word for what is no number; figures say None for what was not measured.
        file.write((json.dumps(row, allow_nan=False) + '\n').encode())
        file.sync()
    finally:
        file.close()
