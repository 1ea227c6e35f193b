"""The plan before a run: whether its step fits into the memory of this machine's devices, and the nearest that does."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.model.sizes import batch_sizes, sizes
from weft.planner import chips
from weft.planner.layouts import divisors
from weft.planner.memory import training_memory
from weft.planner.roofline import train_time
from weft.runtime.device_memory import gib
from weft.runtime.errors import UserError
from weft.sharding.mesh import AXES, Divides, MeshConfig, nearest_meshes
from weft.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Room:
    """What one device of this machine can hold."""

    bytes: float
    of: str  # what that is, for a person


def plan_first(run: RunConfig, device: Any, processes: int = 1, force: bool = False) -> str:
    """One line on a run's memory, and on a chip that is described its time.

    Raises UserError where a step cannot fit, with the nearest that does, unless `force` is given. `device` is one of this
    process; the vocabulary of a run whose tokenizer is still to be made is what data.vocabulary asks for.
    """
    run = run if run.model.vocabulary else run.with_vocabulary(run.data.vocabulary)
    room = room_of(device, run.mesh, processes)
    platform = 'gpu' if device.platform in ('gpu', 'cuda', 'rocm') else device.platform
    memory = training_memory(run, platform)
    chip = chips.find(device.device_kind)
    line = f'plan: {gib(memory.total)} a device'
    if room:
        line += f' of {gib(room.bytes)}'
    fits = room is None or memory.total <= room.bytes
    if not fits:
        line += ': does not fit, and is tried as --force says'
    elif chip:
        time = train_time(run, chip)
        line += f', {time.bound:.3g} s a step at least, {time.predicted:.3g} s predicted'
    if room and not fits and not force:
        name, size = max(memory.parts().items(), key=lambda part: part[1])
        works = nearest_that_fits(run, platform, room)
        raise UserError(
            f'a step of this run needs {gib(memory.total)} on each device, {gib(size)} of it {name}, and there are '
            f'{gib(room.bytes)} ({room.of}); {works}; --force tries it nevertheless'
        )
    return line


def room_of(device: Any, mesh: MeshConfig, processes: int) -> Room | None:
    """Of one device; None where nobody says. Devices that a CPU simulates share what this machine has left."""
    if device.platform == 'cpu':
        left, here = available_memory(), max(1, mesh.size // processes)
        shared = f', shared by {here} simulated devices' if here > 1 else ''
        return None if left is None else Room(left / here, f'what this machine has left{shared}')
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
        return Room(stats['bytes_limit'], f'what JAX has of a {device.device_kind}')
    chip = chips.find(device.device_kind)
    return None if chip is None else Room(chip.memory_bytes, f'a {device.device_kind}')


def available_memory(proc: Path = Path('/proc/meminfo'), group: Path = Path('/sys/fs/cgroup')) -> float | None:
    """Bytes that this machine, or the group of processes that this one is in, has left; None where nobody says."""
    found = []
    try:
        lines = dict(line.split(':', 1) for line in proc.read_text(encoding='ascii').splitlines())
        found.append(int(lines['MemAvailable'].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        most, used = (int((group / f'memory.{name}').read_text(encoding='ascii')) for name in ('max', 'current'))
        found.append(most - used)
    except (OSError, ValueError):  # no such group, or one without a limit
        pass
    return min(found, default=None)


def nearest_that_fits(run: RunConfig, platform: str, room: Room) -> str:
    """The smallest change of a run that fits, in words."""
    for changes in changes_of(run):
        tried = changed(run, changes)
        if tried and training_memory(tried, platform).total <= room.bytes:
            return 'nearest that fits: ' + ' '.join(f'{key}={value}' for key, value in changes.items())
    return 'no other mesh, smaller batch or shorter rows fit: a smaller model or more devices are needed'


def changes_of(run: RunConfig) -> Iterator[dict[str, Any]]:
    """What may be changed, the least first: how the step is worked on, where, then the batch, then the rows' length."""
    t = run.training
    ways = [{}] if run.compute.remat == 'block' else [{}, {'compute.remat': 'block'}]
    for way, parts in itertools.product(ways, [n for n in divisors(t.batch) if n >= t.accumulation]):
        yield {'training.accumulation': parts, **way}
    tightest = {'compute.remat': 'block', 'training.accumulation': 1}
    for mesh in nearest_meshes(run.mesh, rules_of(run)):
        if mesh.size < run.mesh.size:
            break
        axes = {f'mesh.{axis}': getattr(mesh, axis) for axis in AXES if getattr(mesh, axis) != getattr(run.mesh, axis)}
        yield from ({**axes, **tightest, 'training.accumulation': parts} for parts in divisors(t.batch))
    for batch in reversed(divisors(t.batch)[:-1]):
        yield {'training.batch': batch, **tightest}
    length = t.sequence_length // 2
    while length >= 128:
        for batch in divisors(t.batch):
            yield {'training.sequence_length': length, 'training.batch': batch, **tightest}
        length //= 2


def rules_of(run: RunConfig) -> list[Divides]:
    """What the mesh must divide."""
    t = run.training
    microbatches = t.microbatches if run.mesh.stage > 1 else None
    return [*sizes(run.model), *batch_sizes(t.batch, t.sequence_length, t.accumulation, microbatches)]


def changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig | None:
    """A run with some of its keys changed; None where it does not work."""
    part = lambda name: {key.removeprefix(name): value for key, value in changes.items() if key.startswith(name)}
    try:
        tried = dataclasses.replace(
            run,
            mesh=dataclasses.replace(run.mesh, **part('mesh.')),
            compute=dataclasses.replace(run.compute, **part('compute.')),
            training=dataclasses.replace(run.training, **part('training.')),
        )
    except UserError:
        return None
    return tried if all(rule.holds(tried.mesh) for rule in rules_of(tried)) else None
