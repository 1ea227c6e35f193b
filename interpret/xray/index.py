"""Which texts fire each cell most: an index over a run's own training data, for the memory view of cells.py.

RUN/xray/index.safetensors has, for each cell of the dense layers, the k rows of data in which |h| of the cell is largest, each
with the place where that is (Geva et al. 2020, arXiv:2012.14913, section 3: trigger examples; the sign is kept beside), and
the rows themselves. It is written every few seconds and at the end, each time whole; what is begun is gone on with. Memory is
that of k places a cell, of the rows and of one batch.

Letters: M dense layers, F cells of a layer, k texts of a cell, R rows of data, T tokens of a row, B rows of a batch.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.data.packing import Samples
from weft.hub import tensor_files
from weft.interpret.xray import programs
from weft.interpret.xray.patching import CELLS
from weft.model.capture import capture
from weft.model.decoder import Decoder
from weft.model.forward import place
from weft.runtime.errors import UserError, shown
from weft.sharding.mesh import BATCH
from weft.storage import files as disk
from weft.storage.foreign import read_object

FOLDER, TENSORS, ABOUT = 'xray', 'index.safetensors', 'index.json'
TEXTS = 5  # of a cell
SAVE_EVERY = 30.0  # seconds
BEFORE, AFTER = 16, 8  # tokens around the one that fires a cell
NONE = -1  # the row of a place that is not taken yet


@dataclasses.dataclass
class Index:
    """Places of the texts that fire each cell most, and the texts."""

    activation_MFk: np.ndarray  # float32: h, of the largest |h| first
    row_MFk: np.ndarray  # int32; NONE: there was no text
    column_MFk: np.ndarray  # int32
    tokens_RT: np.ndarray  # int32: the rows
    segment_RT: np.ndarray  # int16: documents of a row; 0 is padding
    about: dict[str, Any]  # step, layers, source, digest, rows
    done: int = 0  # rows that are read

    @property
    def tokens(self) -> int:
        """How many have been read."""
        return int((self.segment_RT[: self.done] > 0).sum())

    def take(self, first: int, value_MFB: np.ndarray, column_MFB: np.ndarray) -> None:
        """Takes rows `first` on in: of each cell and row the activation of the largest |h| and where it is."""
        row_MFB = np.broadcast_to(np.arange(first, first + value_MFB.shape[2], dtype=np.int32), value_MFB.shape)
        value = np.concatenate([self.activation_MFk, value_MFB], -1)
        row = np.concatenate([self.row_MFk, row_MFB], -1)
        column = np.concatenate([self.column_MFk, column_MFB], -1)
        size = np.where(row == NONE, -1, np.abs(value))
        best_MFk = np.argsort(-size, -1, kind='stable')[..., : self.row_MFk.shape[-1]]
        pick = lambda a: np.take_along_axis(a, best_MFk, -1)
        self.activation_MFk, self.row_MFk, self.column_MFk = pick(value), pick(row), pick(column)
        self.done = first + value_MFB.shape[2]

    def texts(self, layer: int, cell: int) -> list[tuple[list[int], int, list[int], float]]:
        """Of a cell the tokens before, the one that fires it, those after, and the activation; largest first."""
        at, found = self.about['layers'].index(layer), []
        for k in range(self.row_MFk.shape[-1]):
            row, column = int(self.row_MFk[at, cell, k]), int(self.column_MFk[at, cell, k])
            if row == NONE:
                continue
            near = range(max(0, column - BEFORE), min(self.tokens_RT.shape[1], column + AFTER + 1))
            segment = self.segment_RT[row]
            some = {place: int(self.tokens_RT[row, place]) for place in near if segment[place] == segment[column]}
            before = [token for place, token in some.items() if place < column]
            after = [token for place, token in some.items() if place > column]
            found.append((before, some[column], after, float(self.activation_MFk[at, cell, k])))
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """What the file of tensors holds."""
        names = ('activation_MFk', 'row_MFk', 'column_MFk', 'tokens_RT', 'segment_RT')
        return {name: getattr(self, name) for name in names} | {'done': np.array([self.done], np.int64)}

    def save(self, folder: Path) -> None:
        """Writes it into a run's folder, each file whole or not at all."""
        place = folder / FOLDER
        disk.make_folder(place)
        about = self.about | {'tokens': self.tokens, 'rows_read': self.done, 'of_rows': len(self.tokens_RT)}
        disk.write(place / ABOUT, (json.dumps(about) + '\n').encode())
        arrays, path = self.arrays(), place / TENSORS
        left = disk.partial(path)
        left.unlink(missing_ok=True)
        with disk.writing(path):
            kinds = {name: (array.dtype, array.shape) for name, array in arrays.items()}
            tensor_files.write(left, kinds, arrays.__getitem__)
            disk.rename(left, path)


def load(folder: Path) -> Index | None:
    """The index of a run; None where there is none. Raises UserError for one that is damaged."""
    place = folder / FOLDER
    if not (place / TENSORS).is_file():
        return None
    mend = f'{shown(place)}: is damaged; remove the folder and make the index anew (scripts/xray.py index)'
    about = read_object(disk.read(place / ABOUT), str(place / ABOUT)) if (place / ABOUT).is_file() else {}
    arrays = {name: stored.read() for name, stored in tensor_files.header(place / TENSORS).items()}
    names = {field.name for field in dataclasses.fields(Index)} - {'about'}
    if set(arrays) != names or not {'step', 'layers', 'source', 'digest'} <= set(about):
        raise UserError(mend)
    done = int(arrays.pop('done')[0])
    found = Index(**arrays, about=about, done=done)
    rows, columns = found.tokens_RT.shape
    fits = found.activation_MFk.shape == found.row_MFk.shape == found.column_MFk.shape
    inside = (found.row_MFk < rows).all() and (found.column_MFk < columns).all() and (found.row_MFk >= NONE).all()
    if not (
        fits and inside and found.segment_RT.shape == (rows, columns) and len(about['layers']) == len(found.row_MFk)
    ):
        raise UserError(mend)
    return found


@jax.jit
def _fired(model: Decoder, rows: programs.Padded) -> tuple[jax.Array, jax.Array]:
    """Of each cell and row the activation of the largest |h| at a real token, [M, F, B], and its column."""
    hidden_LBTF = capture(model, [CELLS], rows.tokens_BT, rows.position_BT, rows.segment_BT)[CELLS]
    hidden_LBTF = jax.reshard(hidden_LBTF, P(None, BATCH, None, 'tensor'))
    live_BT = jax.reshard(rows.segment_BT, P(BATCH)) > 0
    size_LBTF = jnp.where(live_BT[None, :, :, None], jnp.abs(hidden_LBTF.astype(jnp.float32)), -1)
    column_LBF = size_LBTF.argmax(2)
    at_LBTF = column_LBF[:, :, None] == jnp.arange(hidden_LBTF.shape[2])[None, None, :, None]
    value_LBF = jnp.where(at_LBTF, hidden_LBTF.astype(jnp.float32), 0).sum(2)
    return value_LBF.transpose(0, 2, 1), column_LBF.transpose(0, 2, 1)


def build(
    model: Decoder,
    samples: Samples,
    numbers: np.ndarray,
    about: dict[str, Any],
    folder: Path | None,
    progress: Callable[[int, int], object] = lambda done, rows: None,
) -> Index:
    """The index over the rows `numbers` of a run's data, in this order.

    `about` has step, layers, source and digest. An index of the same in `folder` is gone on with, if it has the same rows or
    fewer; it is saved there every SAVE_EVERY seconds. None: nothing is saved.
    """
    T = samples.sequence_length
    columns = programs.columns_for(T)
    rows = programs.rows_for(columns)
    index = begun(folder, about, len(numbers)) if folder else None
    read = np.zeros((2, len(numbers), T), np.int32)
    if index is None:
        units, layers = model.config.mlp.dim, len(about['layers'])
        nothing = np.zeros((layers, units, TEXTS), np.float32)
        empty = np.full(nothing.shape, NONE, np.int32)
        index = Index(nothing, empty, np.zeros_like(empty), read[0], read[1].astype(np.int16), about)
    else:
        grow = ((0, len(numbers) - len(index.tokens_RT)), (0, 0))
        index.tokens_RT, index.segment_RT = np.pad(index.tokens_RT, grow), np.pad(index.segment_RT, grow)
    saved = time.monotonic()
    while index.done < len(numbers):
        first = index.done
        batch = samples.take(numbers[first : first + rows])
        arrays = [filled_rows(a_BT, rows, columns) for a_BT in (batch.tokens_BT, batch.position_BT, batch.segment_BT)]
        count = len(batch.tokens_BT)
        value_MFB, column_MFB = map(programs.host, _fired(model, place(programs.Padded(*arrays))))
        index.tokens_RT[first : first + count] = batch.tokens_BT
        index.segment_RT[first : first + count] = batch.segment_BT
        index.take(first, value_MFB[..., :count], column_MFB[..., :count])
        progress(index.done, len(numbers))
        if folder and time.monotonic() - saved > SAVE_EVERY:
            index.save(folder)
            saved = time.monotonic()
    if folder:
        index.save(folder)
    return index


def begun(folder: Path, about: dict[str, Any], rows: int) -> Index | None:
    """The index that is there, if it is of the same weights and data and of no more rows."""
    found = load(folder)
    same = found is not None and all(
        found.about[name] == about[name] for name in ('step', 'layers', 'source', 'digest')
    )
    return found if found is not None and same and found.done <= rows and len(found.tokens_RT) <= rows else None


def filled_rows(a_BT: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Rows and columns filled up with zeros, which are padding."""
    return np.pad(a_BT, ((0, rows - len(a_BT)), (0, columns - a_BT.shape[1])))


def numbers_of(samples: Samples, seed: int, tokens: int) -> np.ndarray:
    """The first rows, in the order in which a run is trained on them, that have about so many tokens; each once."""
    count = min(len(samples), max(1, -(-tokens // samples.sequence_length)))
    return samples.row_ids(seed, 0, count) if count else np.zeros(0, np.int64)


def check_cells(layers: Sequence[int]) -> None:
    """Raises UserError for a model without dense layers."""
    if not layers:
        raise UserError('model.moe: all layers are mixtures of experts: an index is of the cells of dense layers')
