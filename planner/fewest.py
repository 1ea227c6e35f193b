"""From how many chips on a model fits, whatever the time: what a plan names where nothing fits.

Numbers of chips are tried one after another, from the first that could hold the weights. To serve, all meshes are tried. To
train, the meshes count whose devices hold the least of the weights, and the way to work on a step that needs least memory. Both
are bounded, so what is found fits, and now and then fewer chips would do.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from weft.model.sizes import batch_sizes
from weft.planner.chips import Chip
from weft.planner.layouts import counts_of, meshes
from weft.planner.memory import stored
from weft.planner.search import REMAT, least_memory, ways
from weft.planner.serving import Serving, Target, rows_on, rules_of_serving, serving_meshes
from weft.sharding.mesh import MeshConfig
from weft.training.config import RunConfig

COUNTS = 32  # numbers of chips that are tried at most, from the first that could do
MESHES = 32  # of each, to train


class Fitting(NamedTuple):
    """Chips that hold a model, and how."""

    chips: int
    settings: dict[str, str | int]  # as config keys
    without: str | None = (
        None  # 'latency' or 'throughput' that was asked of serving and is reached on no chips that were tried
    )


def fewest_to_train(run: RunConfig, chip: Chip) -> Fitting | None:
    """The fewest chips that are found to hold a step of training; the batch and the rows' length stay."""
    t = run.training
    counts = counts_of(run.model, batch_sizes(t.batch, t.sequence_length))

    def fitting(chips: int) -> Iterator[dict[str, Any]]:
        among = sorted(meshes(run, chips), key=lambda mesh: least_memory(run, mesh))
        for mesh in among[:MESHES]:
            for options in ways(run, mesh, chip, REMAT[-1]):
                yield from (choice.knobs for choice in (options[0], options[-1]) if choice.fits)

    return first_of(counts, 4 * stored(run.model, run.compute, MeshConfig()) / chip.memory_bytes, fitting)


def fewest_to_serve(serving: Serving, rows: int | None) -> Fitting | None:
    """The fewest chips that hold as many rows and reach the target; where none reaches it, that hold them.

    With `rows` None as many rows are held as reach the target soonest: a row for each part that a mesh makes, or for a
    throughput as many as fit.
    """
    c, target = serving.model, serving.target

    def fitting(chips: int) -> Iterator[Serving]:
        for mesh in serving_meshes(c, chips, rows):
            options = [dataclasses.replace(serving, mesh=mesh, rows=n) for n in ([rows] if rows else rows_on(mesh))]
            # More rows need more memory.
            if count := bisect.bisect_left(options, True, key=lambda one: not one.fits):
                yield options[0 if target.throughput is None else count - 1]

    alone = dataclasses.replace(serving, mesh=MeshConfig(), rows=1)
    counts, least = counts_of(c, rules_of_serving(rows)), alone.memory.parameters / serving.room
    found = first_of(counts, least, lambda chips: (tried.knobs for tried in fitting(chips) if tried.reaches))
    if found or target == Target():
        return found
    found = first_of(counts, least, lambda chips: (tried.knobs for tried in fitting(chips)))
    return found and found._replace(without='throughput' if target.latency is None else 'latency')


def first_of(counts: list[int], least: float, fitting: Callable[[int], Iterator[dict[str, Any]]]) -> Fitting | None:
    """The first number of chips, `least` or more, of which there is a way that fits."""
    for chips in [n for n in counts if n >= least][:COUNTS]:
        found = next(fitting(chips), None)
        if found:
            return Fitting(chips, found)
    return None
