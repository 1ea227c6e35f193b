"""What a cell of the study measures: a model in another form, its bits and errors, and how good it is then.

A method whose forms stand for weights of the model as it was is evaluated by that model's own compiled program, with what the
forms stand for in place of its weights (tests hold both to each other). Others, and what is trained or decodes, become runs.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from weft.compress.compressed_run import write_run
from weft.compress.loss import with_weights
from weft.compress.methods.base import METHODS, Options
from weft.compress.methods.structure import STRUCTURES, numbers
from weft.compress.spread import outward
from weft.compress.study.cells import DELETED, ORIGINAL, PATTERNS, SMALLER, WEIGHED, Cell
from weft.compress.study.evidence import evidence
from weft.compress.study.recovery import RECOVERY, recover
from weft.compress.study.speed import compare_decoding
from weft.compress.study.subjects import MESH, Say, Subject, Subjects, config_of
from weft.compress.transform import CompressedModel, MapRow, compress_model
from weft.compress.weights import layer_arrays
from weft.inference.run import open_run

Figures = dict[str, Any]


def measure_cell(cell: Cell, subjects: Subjects, work: Path, say: Say) -> Figures:
    """A cell's figures; `work` is a folder for runs that are made on the way.

    Raises UserError where the method cannot do what the cell asks of this model.
    """
    subject = subjects.open(cell.model)
    if cell.measured == 'diagnosis':
        return evidence(subject)
    if cell.method == SMALLER:
        assert cell.layers is not None, 'the design says how many'
        return smaller(cell.layers, subject, subjects)
    if cell.method == ORIGINAL and cell.measured == 'quality':
        bits = 32 * sum(w.size for w in subject.arrays.values())
        return {'share': 1.0, 'bits': bits, 'bits_before': bits, 'quality': subject.own_quality.figures()}
    found = as_it_was(subject) if cell.method == ORIGINAL else compressed(cell, subject)
    figures: Figures = {'share': found.share, 'bits': found.bits, 'bits_before': found.bits_before}
    figures |= errors_of(found.maps)
    if cell.measured == 'quality' and found.dense is not None:
        with jax.set_mesh(subject.run.mesh):
            model = with_weights(subject.run.model, found.dense)
        return figures | {'quality': subject.quality(model).figures()}
    folder = work / cell.name.replace('/', '-')
    shutil.rmtree(folder, ignore_errors=True)  # of a study that was killed
    try:
        write_run(subject.run, folder, found.config, found.arrays, {'cell': cell.name})
        if cell.measured == 'speed':
            return figures | compare_decoding(Path(str(subject.run.folder)), folder)
        if cell.measured == 'recovered':
            figures |= {'before': quality_of(folder, subject), 'recovery': RECOVERY}
            recover(folder, say)
        return figures | {'quality': quality_of(folder, subject)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compressed(cell: Cell, subject: Subject) -> CompressedModel:
    """The model as the cell has it."""
    if cell.method == DELETED:
        return without_middle(cell, subject)
    method = METHODS.get(cell.method)
    weighs = cell.method in WEIGHED and cell.objective == 'whitened'
    measures = cell.method in STRUCTURES or weighs or (method is not None and method.measures)
    # Errors of outputs are told wherever statistics are there; they change nothing of a Frobenius fit.
    statistics = subject.statistics if measures or method is not None else None
    return compress_model(
        subject.run.config.model,
        subject.arrays,
        cell.method,
        cell.budget,
        Options(cell.objective, cell.order, cell.rank, cell.group),
        statistics,
        cell.spread,
        maps=PATTERNS[cell.maps],
        layers=cell.layers,
        loss=subject.loss if cell.spread == 'sensitivity' else None,
    )


def as_it_was(subject: Subject) -> CompressedModel:
    """The model in its own form."""
    bits = 32 * numbers(subject.run.config.model)
    return CompressedModel(subject.run.config.model, subject.arrays, None, bits, bits, ())


def without_middle(cell: Cell, subject: Subject) -> CompressedModel:
    """The layers from the middle outward, as many as the cell says, add nothing to the residual stream any more."""
    assert cell.layers is not None, 'the design says how many'
    c = subject.run.config.model
    gone = [f'layers.{layer}.' for layer in outward(list(range(c.layers)))[: cell.layers]]
    dense = dict(subject.arrays)
    for name, w in subject.arrays.items():
        if name.startswith(tuple(gone)) and ('.attention.o.' in name or '.mlp.down.' in name):
            dense[name] = 0 * w
    before = 32 * sum(w.size for w in subject.arrays.values())
    saved = 32 * sum(w.size for name, w in subject.arrays.items() if name.startswith(tuple(gone)))
    return CompressedModel(c, subject.arrays, dense, before - saved, before, ())


def smaller(layers: int, subject: Subject, subjects: Subjects) -> Figures:
    """A model with fewer layers, trained as long on the same text, beside the whole one."""
    folder = subjects.trained(config_of(subject.name, layers))
    run = open_run(folder, MESH, stacked=True)
    bits, before = (32 * sum(w.size for w in arrays.values()) for arrays in (arrays_of(run), subject.arrays))
    quality = subject.quality(run.model).figures()
    return {'share': bits / before, 'bits': bits, 'bits_before': before, 'quality': quality}


def arrays_of(run: Any) -> dict[str, Any]:
    """A run's weights by layers' numbers."""
    return layer_arrays(run.config.model, run.model)


def errors_of(maps: tuple[MapRow, ...]) -> Figures:
    """Of all maps that were compressed: root mean squares of their relative errors, each by its number of weights."""
    if not maps:
        return {}
    size = sum(row.bits_before for row in maps)

    def mean(values: Callable[[MapRow], float]) -> float | None:
        total = math.sqrt(sum(row.bits_before * values(row) ** 2 for row in maps) / size)
        return total if math.isfinite(total) else None

    def frobenius(row: MapRow) -> float:
        return row.frobenius

    def weighted(row: MapRow) -> float:
        return row.weighted

    return {'error_of_weights': mean(frobenius), 'error_of_outputs': mean(weighted)}


def quality_of(folder: Path, subject: Subject) -> Figures:
    """Of a run beside the model that it was made of."""
    return subject.quality(open_run(folder, MESH, stacked=True).model).figures()
