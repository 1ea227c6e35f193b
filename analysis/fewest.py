"""From how many chips on a model fits, whatever the time: what a plan names where nothing fits.

Numbers of chips are tried one after another, from the first that could hold the weights. On each the meshes count whose devices
hold the least of the weights, and the way to work on a step that needs least memory. Both are bounded, so what is found fits,
and now and then fewer chips would do.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from analysis.layouts import counts_of, meshes
from analysis.memory import stored
from analysis.search import REMAT, least_memory, ways
from analysis.serving import Serving, rules_of_serving, serving_meshes
from model.sizes import batch_sizes
from sharding.chips import Chip
from sharding.mesh import MeshConfig
from training.config import RunConfig

COUNTS = 32  # numbers of chips that are tried at most, from the first that could do
MESHES = 32  # of each


class Fitting(NamedTuple):
    """Chips that hold a model, and how."""

    chips: int
    settings: dict[str, str | int]  # as config keys


def fewest_to_train(run: RunConfig, chip: Chip) -> Fitting | None:
    """The fewest chips that are found to hold a step of training; the batch and the rows' length stay."""
    t = run.training
    counts = counts_of(run.model, batch_sizes(t.batch, t.sequence_length))

    def fitting(chips: int) -> Iterator[dict[str, Any]]:
        among = sorted(meshes(run, chips), key=lambda mesh: least_memory(run, mesh))
        for mesh in among[:MESHES]:
            for options in ways(run, mesh, chip, REMAT[-1]):
                yield from (choice.knobs for choice in (options[0], options[-1]) if choice.fits)

    return first_of(counts, 4 * stored(run.model, MeshConfig()) / chip.memory_bytes, fitting)


def fewest_to_serve(serving: Serving, rows: int | None) -> Fitting | None:
    """The fewest chips that are found to hold as many rows; with `rows` None, a row for each part that a mesh makes."""
    c = serving.model

    def fitting(chips: int) -> Iterator[dict[str, Any]]:
        for mesh in itertools.islice(serving_meshes(c, chips, rows), MESHES):
            tried = dataclasses.replace(serving, mesh=mesh, rows=rows or mesh.span(('replica', 'data', 'expert')))
            if tried.fits:
                yield tried.knobs

    alone = dataclasses.replace(serving, mesh=MeshConfig(), rows=1)
    return first_of(counts_of(c, rules_of_serving(rows)), alone.memory.parameters / serving.room, fitting)


def first_of(counts: list[int], least: float, fitting: Callable[[int], Iterator[dict[str, Any]]]) -> Fitting | None:
    """The first number of chips, `least` or more, of which there is a way that fits."""
    for chips in [n for n in counts if n >= least][:COUNTS]:
        found = next(fitting(chips), None)
        if found:
            return Fitting(chips, found)
    return None
