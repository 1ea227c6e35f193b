"""The mesh, remat policy and microbatches with which a model trains or serves fastest on so many chips, by the roofline.

Every mesh that divides the model and the batch is looked at. For each, and for each remat policy, the fewest parts of a step
(`training.accumulation`) that fit are taken: more of them use less memory and are never faster. A mesh is left as soon as its
time with all memory in the world is above what is found already. Both leave the result that of trying everything.
"""

import bisect
import dataclasses
import functools
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weft.model.compute import Remat
from weft.model.sizes import batch_sizes
from weft.planner.chips import Chip
from weft.planner.layouts import divisors, meshes, nearest_count
from weft.planner.memory import Memory, gradient_bytes, optimizer_bytes, stored, training_memory
from weft.planner.roofline import StepTime, least_time, train_time
from weft.runtime.device_memory import gib
from weft.runtime.errors import UserError
from weft.sharding.mesh import AXES, BATCH, MeshConfig
from weft.training.config import RunConfig

FAR = 2.0  # times as long as the fastest: not looked at any closer
ALIKE = 1.01  # times as long that counts as equal: the simpler wins
REMAT: tuple[Remat, ...] = ('none', 'dots', 'block')
MOST_MICROBATCHES = 16  # a stage: the bubble is below a seventeenth of the work by then


class Candidate:
    """A way to use chips, by what each needs: `memory`, and the `time` of a step."""

    mesh: MeshConfig
    chip: Chip
    memory: Memory
    time: StepTime

    @functools.cached_property
    def total(self) -> float:
        """Bytes that a chip needs."""
        return self.memory.total

    @property
    def available(self) -> float:
        """Bytes of a chip."""
        return self.chip.memory_bytes

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def seconds(self) -> float:
        return self.time.predicted

    @property
    def cost(self) -> float:
        """What a search makes small."""
        return self.seconds

    @property
    def settings(self) -> dict[str, str | int]:
        """What a search chooses, as config keys."""
        return {f'mesh.{axis}': size for axis, size in dataclasses.asdict(self.mesh).items()}


@dataclasses.dataclass(frozen=True)
class TrainingCandidate(Candidate):
    """One way to train."""

    run: RunConfig
    chip: Chip

    @functools.cached_property
    def memory(self) -> Memory:  # type: ignore[override]
        return training_memory(self.run, self.chip.platform)

    @functools.cached_property
    def time(self) -> StepTime:  # type: ignore[override]
        return train_time(self.run, self.chip)

    @property
    def mesh(self) -> MeshConfig:  # type: ignore[override]
        return self.run.mesh

    @property
    def settings(self) -> dict[str, str | int]:
        """The mesh, what is computed again, and the parts of a step."""
        r = self.run
        found = super().settings | {'compute.remat': r.compute.remat, 'training.accumulation': r.training.accumulation}
        return found | ({'training.microbatches': r.microbatches} if r.mesh.stage > 1 else {})


def complexity(mesh: MeshConfig) -> float:
    """Less is simpler: axes that are on, and how much of the mesh is not along `data`."""
    return len(strategy(mesh)) + math.log2(mesh.size / mesh.data) / 64


def strategy(mesh: MeshConfig) -> tuple[str, ...]:
    """The axes that are on."""
    return tuple(axis for axis in AXES if getattr(mesh, axis) > 1)


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    # Candidates of one kind, of each set of axes the best: what fits, the fastest first, then the smallest.
    ranked: tuple[Any, ...]
    meshes: int  # that divide the model and the batch

    @property
    def best(self) -> Any:
        return self.ranked[0] if self.ranked[0].fits else None


def search_training(run: RunConfig, chip: Chip, chips: int) -> SearchResult:
    """The ways to train on so many chips, the best first, one for each set of mesh axes.

    The batch, the sequence and the model stay as `run` has them. Raises UserError where no mesh divides them.
    """
    options = [*meshes(run, chips)]
    if not options:
        raise UserError(
            f'--chips {chips}: no mesh of {chips} devices divides this model and a batch of {run.training.batch} rows of '
            f'{run.training.sequence_length} tokens; nearest that works: {nearest_count(run, chips)}'
        )
    tried: dict[tuple[str, ...], list[TrainingCandidate]] = {strategy(mesh): [] for mesh in options}
    fastest = dict.fromkeys(tried, math.inf)  # of what fits
    floor = [least_memory(run, mesh) for mesh in options]
    # The shortest time first. It is worked out where the bound that is found sooner does not settle that a mesh is too slow.
    least: dict[int, TrainingCandidate | None] = {}
    queue: list[tuple[float, bool, int]] = []
    for n, mesh in enumerate(options):
        if floor[n] <= chip.memory_bytes:
            bounds = (least_time(way, chip) for way in _in_one_part(run, mesh))  # each at most the time of `_fastest`
            heapq.heappush(queue, (min(bounds, default=0.0), False, n))
    while queue:
        bound, exact, n = heapq.heappop(queue)
        key = strategy(options[n])
        far = bound > FAR * min(fastest.values())
        if tried[key] if far else bound > ALIKE * fastest[key]:
            continue
        if not exact:
            least[n] = soonest = _fastest(run, options[n], chip)
            heapq.heappush(queue, (soonest.seconds if soonest else 0.0, True, n))
            continue
        found = (least[n] if far else None) or best_of_mesh(run, options[n], chip)
        tried[key].append(found)
        fastest[key] = min(fastest[key], found.seconds if found.fits else math.inf)
    # What cannot fit is looked at to name the smallest where nothing does.
    for n in sorted(range(len(options)), key=lambda n: floor[n]):
        mine = tried[strategy(options[n])]
        if floor[n] > chip.memory_bytes and all(not c.fits and c.total > floor[n] for c in mine):
            mine.append(best_of_mesh(run, options[n], chip))
    return rank(tried.values(), len(options))


def least_memory(run: RunConfig, mesh: MeshConfig) -> float:
    """Bytes that a chip needs at least: of the weights, their gradients and the optimizer."""
    weights = stored(run.model, run.compute, mesh) + gradient_bytes(run.model, run.compute, mesh)
    return weights + optimizer_bytes(dataclasses.replace(run, mesh=mesh))


def rank(tried: Iterable[Sequence[Candidate]], count: int) -> SearchResult:
    """The best of each list, the best of all first."""
    ranked = sorted((_first(candidates) for candidates in tried), key=_key)
    if ranked[0].fits:
        first = _first(ranked)
        ranked = [first, *(candidate for candidate in ranked if candidate is not first)]
    return SearchResult(tuple(ranked), count)


def _key(candidate: Candidate) -> tuple[bool, float]:
    """What fits before what does not; the cheapest of the first, the smallest of the second."""
    return not candidate.fits, candidate.cost if candidate.fits else candidate.total


def _first(candidates: Sequence[Candidate]) -> Candidate:
    """The best; of what fits and costs as much within ALIKE, the simplest."""
    best = min(candidates, key=_key)
    alike = [c for c in candidates if c.fits == best.fits and (not c.fits or c.cost <= ALIKE * best.cost)]
    return min(alike, key=lambda candidate: (complexity(candidate.mesh) if best.fits else 0, *_key(candidate)))


def why(candidate: Candidate, best: Candidate | None) -> str:
    """Why a candidate is not the best, in a few words."""
    if not candidate.fits:
        name, size = max(candidate.memory.parts().items(), key=lambda part: part[1])
        return f'does not fit: {gib(candidate.total)} of {gib(candidate.available)}, {gib(size)} of it {name}'
    if best is None or candidate is best:
        return 'the best that fits'
    theirs, mine = best.time, candidate.time
    more = {f'works {mine.work:.3g} s instead of {theirs.work:.3g} s': mine.work - theirs.work}
    unhidden = lambda time: max(0.0, time.sending('anywhere') - time.work)
    more[f'its weights take {mine.sending("anywhere"):.3g} s to send'] = unhidden(mine) - unhidden(theirs)
    waited = (send.axes for send in mine.collectives if send.hides != 'anywhere' and send.seconds > 0.1 * mine.waits)
    axes = '+'.join(dict.fromkeys(waited))
    more[f'waits {mine.waits:.3g} s for {axes} instead of {theirs.waits:.3g} s'] = mine.waits - theirs.waits
    text, most = max(more.items(), key=lambda one: one[1])
    ratio = candidate.cost / best.cost
    if ratio <= ALIKE:
        return 'as fast, with more axes' if most < 0.1 * theirs.ideal else f'as fast; {text}'
    return f'{ratio:.2f} times as long: {text}'


def _fastest(run: RunConfig, mesh: MeshConfig, chip: Chip) -> TrainingCandidate | None:
    """The fastest way on one mesh, whether it fits or not: without remat, in one part."""
    best: TrainingCandidate | None = None
    for way in sorted(_in_one_part(run, mesh), key=lambda way: least_time(way, chip)):
        if best is None or least_time(way, chip) < best.seconds:
            candidate = TrainingCandidate(way, chip)
            best = candidate if best is None or candidate.seconds < best.seconds else best
    return best


def _in_one_part(run: RunConfig, mesh: MeshConfig) -> list[RunConfig]:
    """A step on one mesh without remat, not cut but into microbatches."""
    return [_with(run, mesh, REMAT[0], 1, count) for count, parts in _cuts(run, mesh) if 1 in parts]


def best_of_mesh(run: RunConfig, mesh: MeshConfig, chip: Chip) -> TrainingCandidate:
    """The fastest way on one mesh that fits; where none does, the one that needs least memory."""
    found = []
    all_ways = (ways(run, mesh, chip, remat) for remat in REMAT)
    for *kept, frugal in zip(*all_ways, strict=True):  # for each number of microbatches
        smallest = _fewest_parts(frugal)
        found.append(smallest)
        if smallest.fits:
            found += [candidate for candidate in map(_fewest_parts, kept) if candidate.fits]
    best = found[0]
    for candidate in sorted(found, key=lambda candidate: least_time(candidate.run, chip)):
        if not (best.fits and least_time(candidate.run, chip) >= best.seconds):
            best = min(best, candidate, key=_key)
    return best


def ways(run: RunConfig, mesh: MeshConfig, chip: Chip, remat: Remat) -> Iterator[list[TrainingCandidate]]:
    """Ways to train on one mesh: for each number of microbatches the parts that a step may have, the fewest first."""
    for microbatches, parts in _cuts(run, mesh):
        yield [TrainingCandidate(_with(run, mesh, remat, n, microbatches), chip) for n in parts]


def _fewest_parts(options: list[TrainingCandidate]) -> TrainingCandidate:
    """The first that fits, or the smallest. From the second on each is smaller than the one before; the first keeps no sums."""
    if options[0].fits:
        return options[0]
    if not options[-1].fits:
        return min(options[0], options[-1], key=lambda candidate: candidate.total)
    return options[bisect.bisect_left(options, True, lo=1, key=lambda candidate: candidate.fits)]


def _cuts(run: RunConfig, mesh: MeshConfig) -> Iterator[tuple[int | None, list[int]]]:
    """How many microbatches the pipeline may cut a device's rows into, and the parts that a step may then have."""
    t, rows = run.training, run.training.batch // mesh.span(BATCH)
    counts: Iterable[int | None] = [None]
    if mesh.stage > 1:
        counts = (n for n in range(mesh.stage, MOST_MICROBATCHES * mesh.stage + 1, mesh.stage) if rows % n == 0)
    for count in counts:
        rules = lambda parts, count=count: batch_sizes(t.batch, t.sequence_length, parts, count)
        yield count, [parts for parts in divisors(t.batch) if all(rule.holds(mesh) for rule in rules(parts))]


def _with(run: RunConfig, mesh: MeshConfig, remat: Remat, accumulation: int, microbatches: int | None) -> RunConfig:
    compute = dataclasses.replace(run.compute, remat=remat)
    training = dataclasses.replace(run.training, accumulation=accumulation, microbatches=microbatches)
    return dataclasses.replace(run, mesh=mesh, compute=compute, training=training)


def with_settings(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A run with other values of keys of its `mesh`, `compute` and `training`, as a candidate's `settings` names them."""
    parts: dict[str, dict[str, Any]] = {'mesh': {}, 'compute': {}, 'training': {}}
    for key, value in settings.items():
        part, _, field = key.partition('.')
        parts[part][field] = value
    changes = {part: dataclasses.replace(getattr(run, part), **fields) for part, fields in parts.items()}
    return dataclasses.replace(run, **changes)
