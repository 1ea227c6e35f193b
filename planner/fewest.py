"""From how many chips on a model fits, whatever the time: what a plan names where nothing fits.

Numbers of chips are tried one after another, from the first that could hold the weights. To serve, all meshes are tried. To
train, the meshes count whose devices hold the least of the weights, and the way to work on a step that needs least memory. Both
are bounded, so what is found fits, and now and then fewer chips would do.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from weft.model.sizes import batch_sizes
from weft.planner.chips import Chip
from weft.planner.layouts import counts_of, meshes
from weft.planner.memory import stored
from weft.planner.search import REMAT, Candidate, least_memory, ways
from weft.planner.serving import ServingCandidate, ServingTarget, by_rows, rules_of_serving, serving_meshes
from weft.sharding.mesh import MeshConfig
from weft.training.config import RunConfig

COUNTS = 32  # numbers of chips that are tried at most, from the first that could do
MESHES = 32  # of each, to train


class FewestChips(NamedTuple):
    """Chips that hold a model, and how."""

    chips: int
    settings: dict[str, str | int]  # as config keys
    without: str | None = None  # 'latency' or 'throughput' that was asked for and no chips that were tried reach


def fewest_to_train(run: RunConfig, chip: Chip) -> FewestChips | None:
    """The fewest chips that are found to hold a step of training; the batch and the rows' length stay."""
    t = run.training
    counts = counts_of(run.model, batch_sizes(t.batch, t.sequence_length))

    def fitting(chips: int) -> Iterator[Candidate]:
        among = sorted(meshes(run, chips), key=lambda mesh: least_memory(run, mesh))
        for mesh in among[:MESHES]:
            for options in ways(run, mesh, chip, REMAT[-1]):
                yield from (candidate for candidate in (options[0], options[-1]) if candidate.fits)

    return first_of(counts, 4 * stored(run.model, run.compute, MeshConfig()) / chip.memory_bytes, fitting)


def fewest_to_serve(asked: ServingCandidate, rows: int | None) -> FewestChips | None:
    """The fewest chips that hold as many rows and reach the target; where none reaches it, that hold them.

    With `rows` None as many rows are held as reach the target soonest: a row for each part that a mesh makes, or for a
    throughput as many as fit.
    """
    c, target = asked.model, asked.target

    def fitting(chips: int) -> Iterator[ServingCandidate]:
        for mesh in serving_meshes(c, chips, rows):
            options, _ = by_rows(asked, mesh, rows)
            if options:
                yield options[0 if target.throughput is None else -1]

    alone = dataclasses.replace(asked, mesh=MeshConfig(), rows=1)
    counts, least = counts_of(c, rules_of_serving(rows)), alone.memory.parameters / asked.available
    found = first_of(counts, least, lambda chips: (candidate for candidate in fitting(chips) if candidate.reaches))
    if found or target == ServingTarget():
        return found
    found = first_of(counts, least, fitting)
    return found and found._replace(without='throughput' if target.latency is None else 'latency')


def first_of(counts: list[int], least: float, fitting: Callable[[int], Iterator[Candidate]]) -> FewestChips | None:
    """The first number of chips, `least` or more, for which there is a candidate that fits."""
    for chips in [n for n in counts if n >= least][:COUNTS]:
        if found := next(fitting(chips), None):
            return FewestChips(chips, found.settings)
    return None
