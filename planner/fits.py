"""The plan before a run: whether its step fits into the memory of this machine's devices, and the nearest that does."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weft.planner.chips import chip_of_device
from weft.planner.layouts import divisors
from weft.planner.memory import training_memory
from weft.planner.roofline import train_time
from weft.planner.search import with_settings
from weft.runtime.device_memory import gib
from weft.runtime.errors import UserError
from weft.sharding.mesh import AXES, MeshConfig, nearest_meshes
from weft.training.config import RunConfig


class DeviceMemory(NamedTuple):
    """What one device of this machine can hold."""

    bytes: float
    of: str  # what that is, for a person


def plan_first(run: RunConfig, device: Any, processes: int = 1, force: bool = False) -> str:
    """One line on a run's memory, and on a chip that is described its time.

    Raises UserError where a step cannot fit, with the nearest that does, unless `force` is given. `device` is one of this
    process; the vocabulary of a run whose tokenizer is still to be made is what data.vocabulary asks for.
    """
    run = run.with_planned_vocabulary()
    available = memory_of(device, run.mesh, processes)
    platform = 'gpu' if device.platform in ('gpu', 'cuda', 'rocm') else device.platform
    memory = training_memory(run, platform)
    line = f'plan: {gib(memory.total)} a device' + (f' of {gib(available.bytes)}' if available else '')
    if available is None or memory.total <= available.bytes:
        if chip := chip_of_device(device.device_kind):
            time = train_time(run, chip)
            line += f', {time.bound:.3g} s a step at least, {time.predicted:.3g} s predicted'
        return line
    if force:
        return f'{line}: does not fit, and is tried as --force says'
    name, size = max(memory.parts().items(), key=lambda part: part[1])
    raise UserError(
        f'a step of this run needs {gib(memory.total)} on each device, {gib(size)} of it {name}, and there are '
        f'{gib(available.bytes)} ({available.of}); {nearest_that_fits(run, platform, available.bytes)}; --force tries it '
        'nevertheless'
    )


def memory_of(device: Any, mesh: MeshConfig, processes: int) -> DeviceMemory | None:
    """Of one device; None where nobody says. Devices that a CPU simulates share what this machine has left."""
    if device.platform == 'cpu':
        left, here = available_memory(), max(1, mesh.size // processes)
        shared = f', shared by {here} simulated devices' if here > 1 else ''
        return None if left is None else DeviceMemory(left / here, f'what this machine has left{shared}')
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
        return DeviceMemory(stats['bytes_limit'], f'what JAX has of a {device.device_kind}')
    chip = chip_of_device(device.device_kind)
    return DeviceMemory(chip.memory_bytes, f'a {device.device_kind}') if chip else None


def available_memory(proc: Path = Path('/proc/meminfo'), group: Path = Path('/sys/fs/cgroup')) -> float | None:
    """Bytes that this machine, or the group of processes that this one is in, has left; None where nobody says."""
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(':', 1) for line in proc.read_text(encoding='ascii').splitlines())
        found.append(int(lines['MemAvailable'].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # no such group, or one without a limit
        most, used = (int((group / f'memory.{name}').read_text(encoding='ascii')) for name in ('max', 'current'))
        found.append(most - used)
    return min(found, default=None)


def nearest_that_fits(run: RunConfig, platform: str, available: float) -> str:
    """The smallest change of a run with which a device needs no more than `available` bytes, in words."""
    for changes in changes_of(run):
        tried = changed(run, changes)
        if tried and training_memory(tried, platform).total <= available:
            return 'nearest that fits: ' + ' '.join(f'{key}={value}' for key, value in changes.items())
    return 'no other mesh, smaller batch or shorter rows fit: a smaller model or more devices are needed'


def changes_of(run: RunConfig) -> Iterator[dict[str, Any]]:
    """What may be changed, the least first: how the step is worked on, where, then the batch, then the rows' length."""
    t = run.training
    ways = [{}] if run.compute.remat == 'block' else [{}, {'compute.remat': 'block'}]
    for way, parts in itertools.product(ways, [n for n in divisors(t.batch) if n >= t.accumulation]):
        yield {'training.accumulation': parts, **way}
    tightest = {'compute.remat': 'block', 'training.accumulation': 1}
    for mesh in nearest_meshes(run.mesh, run.rules()):
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


def changed(run: RunConfig, changes: Mapping[str, Any]) -> RunConfig | None:
    """A run with some of its keys changed; None where it does not work."""
    try:
        tried = with_settings(run, changes)
    except UserError:
        return None
    return tried if all(rule.holds(tried.mesh) for rule in tried.rules()) else None
