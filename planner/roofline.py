"""How long a step takes at least, and how long it is predicted to take, by what its chips can do at most.

A step does three things: it multiplies (FLOPs by the chip's peak), it moves numbers between memory and the units that multiply
(bytes by the memory's bandwidth), and it sends (bytes by the links of the group that exchanges them). Three figures come of
it, all of one device, since all do alike:

    bound        everything overlaps: the largest of all multiplying, all moving, and all sending over one set of axes
    apart        nothing overlaps: their sum
    predicted    parts follow one another, each as long as its multiplying or moving; weights are sent while others are used,
                 keys and values while others are attended to, activations while their device waits; all of it divided by
                 the chip's one efficiency

What moves is counted as if each matmul read its two sides and wrote its result once, and all that stands between matmuls
were fused into them: less than a program moves, so that the bound stays one.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Literal

import jax.numpy as jnp

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.cost import training_flops
from weft.model.parts.attention import SoftmaxConfig
from weft.planner import communication
from weft.planner.chips import Chip, group_rate
from weft.planner.flops import executed
from weft.planner.memory import optimizer_bytes
from weft.planner.traffic import Traffic
from weft.planner.weights import Group, Weight, inventory
from weft.sharding.mesh import AXES, BATCH, MeshConfig
from weft.training.config import RunConfig

WAITS = {'tensor', 'expert', 'stage'}  # axes that activations travel over alone, and a block cannot go on without them
Hides = Literal['nowhere', 'attention', 'anywhere']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a step on one device: all layers' together."""

    name: str
    flops: float
    bytes: float  # to and from memory
    compute: float  # seconds at the chip's peak
    memory: float  # seconds at its bandwidth

    @property
    def seconds(self) -> float:
        """The longer of the two, which overlap within a part."""
        return max(self.compute, self.memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Send:
    """What one device sends over one set of axes by one kind of collective in a step."""

    axes: str
    kind: str
    calls: float
    bytes: float
    seconds: float
    rate: float  # bytes/s
    latency: float  # seconds that its calls take however little they send
    hides: Hides  # behind what the device does meanwhile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """A step's seconds on one device."""

    parts: tuple[Part, ...]
    sends: tuple[Send, ...]
    efficiency: float

    @property
    def compute(self) -> float:
        """Seconds of multiplying."""
        return sum(part.compute for part in self.parts)

    @property
    def memory(self) -> float:
        """Seconds of moving."""
        return sum(part.memory for part in self.parts)

    @property
    def links(self) -> float:
        """Seconds of sending, one collective after another."""
        return sum(send.seconds for send in self.sends)

    @property
    def limits(self) -> dict[str, float]:
        """Seconds that each of what can limit a step takes alone."""
        found = {'compute': self.compute, 'memory': self.memory}
        for send in self.sends:
            found[f'links over {send.axes}'] = found.get(f'links over {send.axes}', 0.0) + send.seconds
        return found

    @property
    def limit(self) -> str:
        """What the bound is made of."""
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def bound(self) -> float:
        """Seconds if everything overlaps."""
        return max(self.limits.values())

    @property
    def apart(self) -> float:
        """Seconds if nothing does."""
        return self.compute + self.memory + self.links

    @property
    def ideal(self) -> float:
        """Seconds if parts follow one another, weights hide behind them, and activations do not."""
        return max(self.work, self.sending('anywhere')) + self.waits

    @property
    def work(self) -> float:
        """Seconds of all parts, one after another."""
        return sum(part.seconds for part in self.parts)

    @property
    def waits(self) -> float:
        """Seconds that a device waits for what it cannot go on without."""
        attention = sum(part.seconds for part in self.parts if part.name in ('attention', 'cross_attention'))
        return self.sending('nowhere') + max(0.0, self.sending('attention') - attention)

    def sending(self, hides: Hides) -> float:
        """Seconds of the sends that hide so, one after another; with what each takes at least, where a device waits."""
        found = [send for send in self.sends if send.hides == hides]
        return sum(send.seconds + (send.latency if hides != 'anywhere' else 0.0) for send in found)

    @property
    def predicted(self) -> float:
        """Seconds, by the chip's efficiency."""
        return self.ideal / self.efficiency


def train_time(run: RunConfig, chip: Chip) -> Time:
    """Of one step of a run, its batch whole, on as many chips as its mesh has devices."""
    return step_time(run.compute, run.mesh, chip, _flops_of(run), train_bytes(run), run_traffic(run))


def least_time(run: RunConfig, chip: Chip) -> float:
    """Seconds that `train_time` predicts at least, found much sooner: of the multiplying alone."""
    return sum(_flops_of(run).values()) / run.mesh.size / chip.flops(run.compute.dtype) / chip.efficiency


def _flops_of(run: RunConfig) -> dict[str, float]:
    t = run.training
    mesh = rows_as_data(run.mesh)
    return train_flops(run.model, run.compute, mesh, t.batch, t.sequence_length, t.accumulation, run.microbatches)


def rows_as_data(mesh: MeshConfig) -> MeshConfig:
    """A mesh on which all axes that split rows are `data`: devices multiply as much on it."""
    return MeshConfig(stage=mesh.stage, data=mesh.span(BATCH), context=mesh.context, tensor=mesh.tensor)


@functools.lru_cache(maxsize=2**12)
def train_flops(
    c: ModelConfig,
    compute: ComputeConfig,
    mesh: MeshConfig,
    batch: int,
    length: int,
    accumulation: int,
    microbatches: int,
) -> dict[str, float]:
    """By part of one step, all devices together."""
    return executed(
        c,
        compute,
        'train',
        rows=batch,
        length=length,
        source=length if c.encoder else 0,
        mesh=mesh,
        accumulation=accumulation,
        microbatches=microbatches,
        attention='flash',
    )


def step_time(
    compute: ComputeConfig,
    mesh: MeshConfig,
    chip: Chip,
    flops: dict[str, float],
    moved: dict[str, float],
    sent: Traffic,
) -> Time:
    """FLOPs of all devices together, bytes of one."""
    peak = chip.flops(compute.dtype)
    parts = []
    for name in [*flops, *(name for name in moved if name not in flops)]:
        mine, bytes_ = flops.get(name, 0.0) / mesh.size, moved.get(name, 0.0)
        parts.append(Part(name=name, flops=mine, bytes=bytes_, compute=mine / peak, memory=bytes_ / chip.bandwidth))
    return Time(parts=tuple(parts), sends=tuple(sends_of(sent, mesh, chip)), efficiency=chip.efficiency)


def sends_of(sent: Traffic, mesh: MeshConfig, chip: Chip) -> Iterable[Send]:
    """Each row of a table with its seconds, the longest first."""
    rows = []
    for (kind, axes), (calls, size) in sent.sent.items():
        label, _, groups = axes.partition(' (groups of ')
        names = label.split('+')
        joined = int(groups[:-1]) if groups else mesh.span(names)
        rate = group_rate(chip, mesh.size, joined, stride(mesh, names), kind)
        hides: Hides = 'nowhere' if set(names) <= WAITS or 'replica' in names else 'anywhere'
        if (kind, axes) == ('ppermute', 'context'):
            hides = 'attention'
        rows.append(
            Send(
                axes=axes,
                kind=kind,
                calls=calls,
                bytes=size,
                seconds=size / rate,
                rate=rate,
                latency=calls * chip.latency,
                hides=hides,
            )
        )
    return sorted(rows, key=lambda send: -send.seconds)


def stride(mesh: MeshConfig, axes: Iterable[str]) -> int:
    """How far apart neighbours of a group stand among the mesh's devices: by the last of its axes."""
    last = max(AXES.index(axis) for axis in axes)
    return mesh.span(AXES[last + 1 :])


def run_traffic(run: RunConfig) -> Traffic:
    """What one device sends in a step."""
    t = run.training
    step = (t.batch, t.sequence_length, t.accumulation, run.microbatches)
    return communication.training(run.model, run.compute, run.mesh, *step)


def train_bytes(run: RunConfig) -> dict[str, float]:
    """Bytes that one device moves in a step, by part."""
    c, compute, mesh, t = run.model, run.compute, run.mesh, run.training
    held, wide = inventory(c), compute.parameter_dtype.itemsize
    rows = t.batch / mesh.span(BATCH)
    tokens = rows * t.sequence_length / mesh.context
    moved: dict[str, float] = {}
    for group in held.groups:
        # A pipeline's bubble is worked on like the rest; what no stage owns is shared out by rows.
        layers = group.held(mesh)
        busy = tokens * (ticks_share(run) if group.where == 'pipeline' else 1 / mesh.stage)
        passes = (2 if compute.remat == 'block' else 1) + 2  # forward, again, and both gradients
        times = t.accumulation * (run.microbatches if group.where == 'pipeline' else 1)
        for name, size in layer_bytes(group, compute, mesh, busy, passes, times).items():
            moved[name] = moved.get(name, 0.0) + layers * size
    b = jnp.dtype(compute.dtype).itemsize
    width = c.padded_vocabulary / mesh.tensor
    logits = 3 * (c.model_dim + width) * tokens / mesh.stage * b  # forward, and both gradients
    moved['head'] = moved.get('head', 0.0) + logits + 3 * c.model_dim * width * b
    numbers = sum(count for _, count in held.held(mesh))
    # Weight, state and gradient are read, all but the last written.
    moved['optimizer'] = 3 * numbers * wide + 2 * optimizer_bytes(run)
    return moved


def ticks_share(run: RunConfig) -> float:
    """How many times its own microbatches a stage works on, its bubble's counted."""
    return (run.microbatches + run.mesh.stage - 1) / run.microbatches


def layer_bytes(
    group: Group,
    compute: ComputeConfig,
    mesh: MeshConfig,
    tokens: float,
    passes: int,
    times: int,
    rows: int | None = None,
) -> dict[str, float]:
    """Bytes that one layer moves in a step: each matrix and, for each token, both sides of its matmul, in each pass.

    With `rows`, tokens of all devices together, only the experts that one of them is expected to visit if choices are even.
    """
    c, n = group.config, mesh.tensor
    b = jnp.dtype(compute.dtype).itemsize
    found: dict[str, float] = {}
    for weight in group.weights:
        if len(weight.declared.shape) < 2 or ('tensor' not in weight.split and not weight.gathered):
            continue
        name = {'attention': 'projections', 'shared_experts': 'experts'}.get(weight.part, weight.part)
        name = name if group.where in ('pipeline', 'stack') else {'encoder': 'encoder', 'ahead': 'mtp'}[group.where]
        read = float(weight.used(mesh))
        if rows is not None and weight.part == 'experts':
            read *= 1 - (1 - c.moe.top_k / c.moe.experts) ** rows
        size = _matmul_bytes(c, weight, mesh, tokens) * passes + times * passes * read
        found[name] = found.get(name, 0.0) + size * b
    if group.where in ('pipeline', 'stack') and isinstance(a := c.attention, SoftmaxConfig):
        found['attention'] = tokens * (a.heads + a.kv_heads) * (a.query_dim + a.value_dim) / n * passes * b
    return found


def _matmul_bytes(c: ModelConfig, weight: Weight, mesh: MeshConfig, tokens: float) -> float:
    """Numbers that one matmul of a weight reads and writes beside it, for a device's tokens."""
    rows, columns = weight.declared.shape[-2:]
    mine = columns / mesh.tensor if 'tensor' in weight.split else columns
    visits = c.moe.top_k if c.moe and weight.part == 'experts' else 1
    return tokens * visits * (rows + mine)


def mfu(run: RunConfig, chip: Chip, seconds: float) -> float:
    """Model FLOPs (causal, nothing computed twice) by what the chips could have done in a step's seconds."""
    t = run.training
    needed = training_flops(run.model, t.sequence_length) * t.batch * t.sequence_length
    return needed / (seconds * chip.flops(run.compute.dtype) * run.mesh.size)
