"""The mesh, and the rows at once, with which a model serves best on so many chips, by the roofline."""

import bisect
import collections
import dataclasses
import functools
from collections.abc import Iterator

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.sizes import sizes
from weft.planner.chips import Chip
from weft.planner.layouts import meshes_of
from weft.planner.memory import Memory, serving_memory
from weft.planner.roofline import StepTime, decode_time, prefill_time
from weft.planner.search import Candidate, SearchResult, rank, strategy
from weft.runtime.errors import UserError
from weft.sharding.mesh import BATCH, Divides, MeshConfig, check_divides

MOST_ROWS = 2**14  # of all devices together, that a search without --rows tries


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingTarget:
    """What is asked of serving; of neither the fastest step counts."""

    # Seconds between two tokens of a row at most: then the most tokens a second win.
    latency: float | None = None
    # Tokens a second at least, all rows together: then the shortest time between tokens wins.
    throughput: float | None = None


@dataclasses.dataclass(frozen=True)
class ServingCandidate(Candidate):
    """One way to serve; a step is one more token in each row."""

    model: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    chip: Chip
    rows: int  # at once, all devices together
    length: int  # slots of the cache for each
    prompt: int  # tokens of each that are read first
    target: ServingTarget

    @functools.cached_property
    def memory(self) -> Memory:  # type: ignore[override]
        """Of a chip while it decodes, or while it reads prompts, one row a device at a time, whichever needs more."""
        memory = functools.partial(serving_memory, self.model, self.compute, self.mesh, platform=self.chip.platform)
        decode = memory(self.rows, self.length)
        prefill = memory(self.mesh.span(BATCH), self.length, self.prompt)
        prefill = dataclasses.replace(prefill, cache=decode.cache)
        return max(decode, prefill, key=lambda memory: memory.total)

    @functools.cached_property
    def time(self) -> StepTime:  # type: ignore[override]
        """Of one more token in each row."""
        return decode_time(self.model, self.compute, self.mesh, self.chip, self.rows, self.length)

    @functools.cached_property
    def prefill(self) -> StepTime:
        """Of reading one prompt a device of the batch's axes."""
        return prefill_time(self.model, self.compute, self.mesh, self.chip, self.mesh.span(BATCH), self.prompt)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.rows / self.seconds

    @property
    def reaches(self) -> bool:
        """Whether it does what is asked."""
        t = self.target
        return (t.latency is None or self.seconds <= t.latency) and (
            t.throughput is None or self.tokens_per_second >= t.throughput
        )

    @property
    def cost(self) -> float:
        """What is to be small: chip time a token where a latency is given, else the time between tokens."""
        return self.seconds / self.rows if self.target.latency is not None else self.seconds

    @property
    def settings(self) -> dict[str, str | int]:
        return super().settings | {'rows': self.rows}


def search_serving(asked: ServingCandidate, chips: int, rows: int | None) -> SearchResult:
    """The ways to serve on so many chips, the best first, one for each set of mesh axes.

    Of `asked` the mesh and the rows are not looked at. `rows` None: as many as reach the target best. Raises UserError where
    nothing divides the model or reaches the target.
    """
    target = asked.target
    tried = collections.defaultdict[tuple[str, ...], list[ServingCandidate]](list)
    meshes, near = [*serving_meshes(asked.model, chips, rows)], list[ServingCandidate]()
    for mesh in meshes:
        options, large = by_rows(asked, mesh, rows)
        if large:
            tried[strategy(mesh)].append(large[0])
        if not options:
            continue
        # More rows take longer, but not as much longer as they are more.
        if target.latency is not None:
            place = bisect.bisect_left(options, True, key=lambda option: not option.reaches) - 1
        else:
            place = bisect.bisect_left(options, True, key=lambda option: option.reaches)
        if 0 <= place < len(options):
            tried[strategy(mesh)].append(options[place])
        else:
            near.append(options[max(0, min(place, len(options) - 1))])
    of_rows = f'{rows} rows' if rows else ''
    if not meshes:
        raise UserError(
            f'--chips {chips}: no mesh of {chips} devices divides this model{of_rows and f" and {of_rows}"}'
        )
    if near and not any(candidate.fits for candidates in tried.values() for candidate in candidates):
        nearest = min(near, key=lambda option: option.seconds if target.latency else -option.tokens_per_second)
        latency = None if target.latency is None else f'--latency {target.latency * 1e3:g}'
        raise UserError(
            f'{latency or f"--throughput {target.throughput:g}"}: no mesh of {chips} chips reaches it'
            f'{of_rows and f" with {of_rows}"}; nearest: '
            f'{nearest.mesh} with {nearest.rows} rows, {nearest.seconds * 1e3:.3g} ms between tokens, '
            f'{nearest.tokens_per_second:,.0f} tokens/s of all rows together'
        )
    return rank(tried.values(), len(meshes))


def by_rows(
    asked: ServingCandidate, mesh: MeshConfig, rows: int | None
) -> tuple[list[ServingCandidate], list[ServingCandidate]]:
    """Candidates on one mesh, the fewest rows first: those that fit, and those that do not.

    `rows` None: one for each part that the mesh makes of them, and doubles of it.
    """
    each = mesh.span(BATCH)
    counts = [rows] if rows else [each << n for n in range((MOST_ROWS // each).bit_length())]
    options = [dataclasses.replace(asked, mesh=mesh, rows=count) for count in counts]
    fitting = bisect.bisect_left(options, True, key=lambda option: not option.fits)  # more rows need more memory
    return options[:fitting], options[fitting:]


def check_serves(candidate: ServingCandidate) -> None:
    """Raises UserError where the mesh cannot hold the model or the rows."""
    check_divides(candidate.mesh, [*sizes(candidate.model), *rules_of_serving(candidate.rows)])


def serving_meshes(c: ModelConfig, chips: int, rows: int | None) -> Iterator[MeshConfig]:
    """Meshes that can decode the model, and so many rows."""
    return meshes_of(c, chips, rules_of_serving(rows))


def rules_of_serving(rows: int | None) -> list[Divides]:
    """What a mesh must divide to decode so many rows."""
    rules = [Divides(('stage',), 'decoding, which has no pipeline', 1)]
    return [*rules, Divides(BATCH, '--rows', rows)] if rows else rules
