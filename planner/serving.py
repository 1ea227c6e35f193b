"""The mesh, and the rows at once, with which a model serves best on so many chips, by the roofline."""

import bisect
import dataclasses
import functools
from collections.abc import Iterator

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.sizes import sizes
from weft.planner.chips import Chip
from weft.planner.layouts import meshes_of
from weft.planner.memory import Memory, serving_memory
from weft.planner.roofline import Time
from weft.planner.search import Found, Planned, rank, strategy
from weft.planner.serving_time import decode_time, prefill_time
from weft.runtime.errors import UserError
from weft.sharding.mesh import AXES, BATCH, Divides, MeshConfig, check_divides

MOST_ROWS = 2**14  # of all devices together, that a search without --rows tries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked of serving; of neither the fastest step counts."""

    latency: float | None = None  # seconds between two tokens of a row at most: then the most tokens a second win
    throughput: float | None = (
        None  # tokens a second at least, all rows together: then the shortest time between tokens wins
    )


@dataclasses.dataclass(frozen=True)
class Serving(Planned):
    """One way to serve, and what it costs; a step is one more token in each row."""

    model: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    chip: Chip
    rows: int  # at once, all devices together
    length: int  # slots of the cache for each
    prompt: int  # tokens of each that are read first
    target: Target

    @functools.cached_property
    def memory(self) -> Memory:  # type: ignore[override]
        """Of a chip while it decodes, or while it reads prompts, whichever needs more."""
        decode = serving_memory(
            self.model, self.compute, self.mesh, self.rows, self.length, platform=self.chip.platform
        )
        rows = self.mesh.span(BATCH)  # prompts are read one row a device at a time
        prefill = serving_memory(
            self.model, self.compute, self.mesh, rows, self.length, self.prompt, self.chip.platform
        )
        prefill = dataclasses.replace(prefill, cache=decode.cache)
        return max(decode, prefill, key=lambda memory: memory.total)

    @functools.cached_property
    def time(self) -> Time:  # type: ignore[override]
        """Of one more token in each row."""
        return decode_time(self.model, self.compute, self.mesh, self.chip, self.rows, self.length)

    @functools.cached_property
    def prefill(self) -> Time:
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
    def knobs(self) -> dict[str, str | int]:
        """What the search chose."""
        return {f'mesh.{axis}': getattr(self.mesh, axis) for axis in AXES} | {'rows': self.rows}


def search_serving(
    c: ModelConfig,
    compute: ComputeConfig,
    chip: Chip,
    chips: int,
    rows: int | None,
    length: int,
    prompt: int,
    target: Target,
) -> Found:
    """The ways to serve on so many chips, the best first, one for each set of mesh axes.

    `rows` None: as many as reach the target best. Raises UserError where nothing divides the model or reaches the target.
    """
    tried: dict[tuple[str, ...], list[Serving]] = {}
    count, near = 0, list[Serving]()
    for mesh in serving_meshes(c, chips, rows):
        count += 1
        options = [
            Serving(c, compute, mesh, chip, n, length, prompt, target) for n in ([rows] if rows else rows_on(mesh))
        ]
        # More rows need more memory, and take longer, but not as much longer as they are more.
        fitting = bisect.bisect_left(options, True, key=lambda serving: not serving.fits)
        if options[fitting:]:
            tried.setdefault(strategy(mesh), []).append(options[fitting])
        if not fitting:
            continue
        options = options[:fitting]
        if target.latency is not None:
            place = bisect.bisect_left(options, True, key=lambda serving: not serving.reaches) - 1
        else:
            place = bisect.bisect_left(options, True, key=lambda serving: serving.reaches)
        if 0 <= place < fitting:
            tried.setdefault(strategy(mesh), []).append(options[place])
        else:
            near.append(options[max(0, min(place, fitting - 1))])
    if not count:
        raise UserError(
            f'--chips {chips}: no mesh of {chips} devices divides this model{f" and {rows} rows" if rows else ""}'
        )
    if near and not any(serving.fits for choices in tried.values() for serving in choices):
        nearest = min(near, key=lambda serving: serving.seconds if target.latency else -serving.tokens_per_second)
        raise UserError(
            f'{_asked(target)}: no mesh of {chips} chips reaches it{f" with {rows} rows" if rows else ""}; nearest: '
            f'{nearest.mesh} with {nearest.rows} rows, {nearest.seconds * 1e3:.3g} ms between tokens, '
            f'{nearest.tokens_per_second:,.0f} tokens/s of all rows together'
        )
    return rank(tried.values(), count)


def check_serves(serving: Serving) -> None:
    """Raises UserError where the mesh cannot hold the model or the rows."""
    check_divides(serving.mesh, [*sizes(serving.model), *rules_of_serving(serving.rows)])


def serving_meshes(c: ModelConfig, chips: int, rows: int | None) -> Iterator[MeshConfig]:
    """Meshes that can decode the model, and so many rows."""
    return meshes_of(c, chips, rules_of_serving(rows))


def rules_of_serving(rows: int | None) -> list[Divides]:
    """What a mesh must divide to decode so many rows."""
    rules = [Divides(('stage',), 'decoding, which has no pipeline', 1)]
    return [*rules, Divides(BATCH, '--rows', rows)] if rows else rules


def rows_on(mesh: MeshConfig) -> Iterator[int]:
    """Numbers of rows to try where none is given: one for each part that the mesh makes of them, and doubles of it."""
    rows = mesh.span(BATCH)
    while rows <= MOST_ROWS:
        yield rows
        rows *= 2


def _asked(target: Target) -> str:
    if target.latency is not None:
        return f'--latency {target.latency * 1e3:g}'
    return f'--throughput {target.throughput:g}'
