"""Where a step's time goes on the first device: its kernels by time, from the profiler's own trace."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from weft.runtime.errors import UserError


class Kernel(NamedTuple):
    """All runs of one kernel in a step."""

    name: str
    seconds: float  # a step
    calls: float  # a step


def kernels(step: Callable[[], Any], count: int = 3) -> list[Kernel]:
    """The kernels of `step`, which has run before, the longest first: averages over `count` runs. See `check_profiled`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                jax.block_until_ready(step())
        [trace] = Path(folder).rglob('*.xplane.pb')
        data = jax.profiler.ProfileData.from_file(str(trace))
    seconds, calls = collections.Counter[str](), collections.Counter[str]()
    for plane in data.planes:
        if re.fullmatch(r'/device:(GPU|TPU):0.*', plane.name):
            for line in plane.lines:
                if line.name.startswith('Stream') or line.name == 'XLA Ops':
                    for event in line.events:
                        seconds[event.name] += event.duration_ns / 1e9 / count
                        calls[event.name] += 1
    return [Kernel(name, time, calls[name] / count) for name, time in seconds.most_common()]


def check_profiled() -> None:
    """Raises UserError on a CPU, whose operations are threads', not a device's. To be asked before the work."""
    if jax.default_backend() == 'cpu':
        raise UserError('--profile: a CPU has no kernels to list; use an accelerator, or py-spy and perf')


def kernel_table(found: list[Kernel], step_seconds: float, rows: int) -> str:
    """The first `rows` of them as text, with what all of them take of a step."""
    lines = [f'{"ms a step":>10} {"calls":>7}  kernel']
    lines += [f'{kernel.seconds * 1e3:10.3f} {kernel.calls:7.0f}  {kernel.name[:100]}' for kernel in found[:rows]]
    busy = sum(kernel.seconds for kernel in found)
    return '\n'.join([*lines, f'{busy * 1e3:10.3f} of {step_seconds * 1e3:.3f} ms a step in {len(found)} kernels'])
