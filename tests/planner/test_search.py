"""The search's first choice is the best of everything there is, by the same roofline."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import pytest

from weft.model.sizes import batch_sizes, sizes
from weft.planner.chips import CHIPS, Chip
from weft.planner.layouts import divisors, meshes
from weft.planner.search import ALIKE, REMAT, TrainingCandidate, search_training, ways, why
from weft.planner.serving import ServingCandidate, ServingTarget, search_serving, serving_meshes
from weft.proof.search_cases import CASES, LARGE, MIXTURE, NARROW, SMALL, WIDE, run_of
from weft.runtime.errors import UserError
from weft.sharding.mesh import AXES, MeshConfig, factorizations
from weft.training.config import RunConfig


def everything(run: RunConfig, chip: Chip, among: Iterable[MeshConfig]) -> Iterator[TrainingCandidate]:
    """Every way to train on any of the meshes that works: the search without its shortcuts."""
    rules = [*sizes(run.model), *batch_sizes(run.training.batch, run.training.sequence_length)]
    for mesh in among:
        if all(rule.holds(mesh) for rule in rules):
            for remat in REMAT:
                yield from itertools.chain.from_iterable(ways(run, mesh, chip, remat))


@pytest.mark.parametrize('case', CASES)
def test_first_choice_is_the_best_of_everything(case):
    run, chip, chips = CASES[case].run, CASES[case].chip, CASES[case].chips
    found = search_training(run, CHIPS[chip], chips)
    every_mesh = [MeshConfig(**dict(zip(AXES, shape, strict=True))) for shape in factorizations(chips, len(AXES))]
    candidates = everything(run, CHIPS[chip], every_mesh)
    best = min((choice.seconds for choice in candidates if choice.fits), default=None)
    assert best is not None, 'a case in which nothing fits shows nothing'
    assert found.best.mesh.size == chips
    assert found.best.fits
    assert found.best.seconds <= ALIKE**2 * best
    assert all(why(choice, found.best) for choice in found.ranked)


def test_where_nothing_fits_the_smallest_comes_first_and_says_so():
    found = search_training(run_of(LARGE, 8, 4096), CHIPS['v5e'], 8)
    assert found.best is None
    run = run_of(LARGE, 8, 4096)
    assert found.ranked[0].total == min(choice.total for choice in everything(run, CHIPS['v5e'], meshes(run, 8)))
    assert 'does not fit' in why(found.ranked[0], None)


def test_a_number_of_chips_that_divides_nothing_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r'--chips 7: no mesh of 7 devices .* nearest that works: 8'):
        search_training(run_of(SMALL, 32, 4096), CHIPS['h100'], 7)


def test_meshes_are_all_that_the_rules_allow():
    run = run_of(SMALL, 8, 64)
    listed = {*meshes(run, 8)}
    for shape in (
        (r, s, d, c, t)
        for r in divisors(8)
        for s in divisors(8)
        for d in divisors(8)
        for c in divisors(8)
        for t in divisors(8)
    ):
        mesh = MeshConfig(**dict(zip(('replica', 'stage', 'data', 'context', 'tensor'), shape, strict=True)))
        if mesh.size == 8:
            try:
                dataclasses.replace(run, mesh=mesh).check_sizes()
            except UserError:
                assert mesh not in listed
            else:
                assert mesh in listed


@pytest.mark.parametrize(('model', 'chip', 'chips'), [(SMALL, 'h100', 8), (WIDE, 'h200', 8), (MIXTURE, 'v6e', 16)])
@pytest.mark.parametrize(
    'target', [ServingTarget(), ServingTarget(latency=0.03), ServingTarget(throughput=3000.0)], ids=str
)
def test_serving_finds_the_best_for_its_target(model, chip, chips, target):
    asked = ServingCandidate(model, NARROW, MeshConfig(), CHIPS[chip], 1, 4096, 1024, target)
    found = search_serving(asked, chips, None if target != ServingTarget() else 64)
    assert found.best.fits
    assert found.best.reaches
    rows = [64] if target == ServingTarget() else [2**power for power in range(15)]
    for mesh in serving_meshes(model, chips, None):
        for count in rows:
            if count % mesh.span(('replica', 'data', 'expert')) == 0:
                other = dataclasses.replace(asked, mesh=mesh, rows=count)
                assert not (other.fits and other.reaches and other.cost < found.best.cost / ALIKE**2)


def test_serving_that_cannot_be_fast_enough_is_answered_with_the_nearest():
    target = ServingTarget(latency=1e-6)
    asked = ServingCandidate(SMALL, NARROW, MeshConfig(), CHIPS['h100'], 1, 4096, 1024, target)
    with pytest.raises(
        UserError, match=r'--latency 0\.001: no mesh of 8 chips reaches it; nearest: .* ms between tokens'
    ):
        search_serving(asked, 8, None)
