"""The device mesh: its axes, which of them carry what, and whether a model's sizes can be laid out on it.

The mesh shape is the strategy: an axis of size 1 turns its parallelism off.

    replica  rows of the batch, across slow links: every replica has all weights, and gradients are averaged once a step
    stage    layers: a pipeline, through which microbatches of the rows go one after another
    data     rows of the batch; weights and optimizer state are split along it too
    context  the sequence: keys and values go round; weights and optimizer state are split along it too
    expert   rows of the batch, and the experts of a mixture; other weights are split along it too
    tensor   heads, hidden units and the vocabulary; between blocks, the sequence

Neighbours along the last axes are neighbours in the machine: `tensor` wants the fastest links, `replica` bears the slowest.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType

from weft.runtime import program_cache
from weft.runtime.errors import UserError, shown

AXES = ('replica', 'stage', 'data', 'context', 'expert', 'tensor')
BATCH = ('replica', 'data', 'expert')  # axes that split the rows of a batch
FSDP = ('data', 'context', 'expert')  # axes that split a weight which every token meets, and over which it is gathered
SEQUENCE = ('context', 'tensor')  # axes that split the sequence between blocks
IN_ORDER = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
SEARCHED = 1024  # devices at most of a mesh that is proposed in an error
SIMULATED = 1024  # devices at most that one CPU plays: from about 4,000 on JAX ends without a word
LARGEST = 1 << 24  # devices at most of a mesh

# A layout then names the axes that split something alone, and nothing varies over one device (see sharding/collectives.py).
jax.config.update('jax_remove_size_one_mesh_axis_from_type', True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis."""

    replica: int = 1
    stage: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(
                    f'mesh.{axis} is {getattr(self, axis)}; an axis needs at least 1 device, and 1 turns it off'
                )
        if self.size > LARGEST:
            raise UserError(f'mesh ({self}) asks for {self.size} devices; at most {LARGEST} work')

    @functools.cached_property
    def size(self) -> int:
        """Devices in all."""
        return self.span(AXES)

    def span(self, axes: Iterable[str]) -> int:
        """Devices along some of the axes together."""
        return math.prod([getattr(self, axis) for axis in axes])

    def __str__(self) -> str:
        """The axes that are on, as in `data=4 tensor=2`; `data=1` where none is."""
        return ' '.join(f'{axis}={getattr(self, axis)}' for axis in AXES if getattr(self, axis) > 1) or 'data=1'


def split_axes(layout: Iterable[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """The mesh axes that split some dim of an array of a layout (a PartitionSpec)."""
    return tuple(axis for axes in layout if axes for axis in as_axes(axes))


def as_axes(axes: str | Iterable[str] | None) -> tuple[str, ...]:
    """One axis, several or none, as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def parse_mesh(text: str, option: str = '--mesh') -> MeshConfig:
    """`'expert=2,tensor=2'` as a MeshConfig; axes left out are 1."""
    sizes: dict[str, int] = {}
    given = shown(text, quoted=True)
    for part in filter(None, map(str.strip, text.split(','))):
        axis, equals, size = (word.strip() for word in part.partition('='))
        if axis not in AXES:
            raise UserError(f'{option} {given}: no axis {shown(axis, 60, quoted=True)}; the axes are {", ".join(AXES)}')
        if not equals or not (size.isascii() and size.isdecimal()) or len(size) > 9:
            raise UserError(f'{option} {given}: {axis} needs a whole number of at most 9 digits, as in {axis}=2')
        if axis in sizes:
            raise UserError(f'{option} {given}: {axis} stands twice; leave one of them out')
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def abstract_mesh(config: MeshConfig, platform: str = 'tpu') -> jax.sharding.AbstractMesh:
    """The explicit mesh of so many devices, none of which need exist: to trace programs under `use_abstract_mesh`."""
    device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    shape, explicit = tuple(getattr(config, axis) for axis in AXES), (AxisType.Explicit,) * len(AXES)
    return jax.sharding.AbstractMesh(shape, AXES, axis_types=explicit, abstract_device=device)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The explicit mesh over the first devices (or over the given ones), laid out so that the last axes have the best links.

    Where the devices are several slices of a TPU, which only a data centre's network joins, `replica` (and after it
    `stage`) goes across slices. Raises UserError where there are fewer devices than the mesh asks for, or where replica ×
    stage does not split them at the slices' borders.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < config.size:
        kind = devices[0].device_kind
        raise UserError(
            f'mesh ({config}) asks for {config.size} devices; this machine has {len(devices)} ({kind}): '
            f'choose sizes whose product is at most {len(devices)}'
        )
    devices = devices[: config.size]
    sends = max(config.context, config.stage) > 1
    if devices[0].platform == 'cpu' and config.size > 1 and (sends or program_cache.keeps_programs()):
        compile_anew()
    shape = tuple(getattr(config, axis) for axis in AXES)
    explicit = (AxisType.Explicit,) * len(AXES)
    # Hosts with GPUs say that they are slices too, but what joins them is fast enough for every axis.
    slices = len({getattr(device, 'slice_index', 0) for device in devices if device.platform == 'tpu'})
    if slices <= 1:
        # An axis may be part of one of a TPU's rings, where it is no product of whole ones.
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(laid_out, AXES, axis_types=explicit)
    across = slow_shape(config, slices)
    within = tuple(n // m for n, m in zip(shape, across, strict=True))
    return jax.sharding.Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=explicit)


def compile_anew() -> None:
    """Turns JAX's compilation cache off in this process, for programs of several CPU devices that send to each other.

    All of a program's ppermutes have one channel. Devices that a CPU simulates issue them in one order, but not in a program
    that comes out of the cache: there one send may meet another, and the numbers are wrong. Seen in jaxlib 0.10.2.
    """
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()


def slow_shape(config: MeshConfig, slices: int) -> tuple[int, ...]:
    """How many of the slices lie along each axis: along `replica` as many as it takes, the rest along `stage`."""
    replica = math.gcd(config.replica, slices)
    stage = slices // replica
    if config.stage % stage:
        raise UserError(
            f'mesh.replica is {config.replica} and mesh.stage {config.stage}, and the devices are {slices} slices: replica × '
            f'stage must be a multiple of the slices, which only slow links join; nearest that works: '
            f'mesh.replica={-(-config.replica // slices) * slices}'
        )
    return (replica, stage, *(1,) * (len(AXES) - 2))


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the current mesh is made of (a topology that is only compiled for counts as itself)."""
    mesh = jax.sharding.get_abstract_mesh()
    name = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return 'gpu' if name in ('cuda', 'rocm') else name


def check_mesh_is_set() -> None:
    """Raises UserError where work on a model is begun without a mesh of all axes."""
    if not set(AXES) <= set(jax.sharding.get_abstract_mesh().shape):
        raise UserError('no mesh of this project is set: work on a model stands under `with jax.set_mesh(run.mesh):`')


def configure_jax(devices: int, dtype: str, processes: int = 1) -> None:
    """Settles what JAX must know before anything asks it for devices: 64 bits, how many devices a CPU plays, what it keeps.

    A process on its own keeps its compiled programs for the next one (runtime/program_cache.py).

    `devices` are those of the whole mesh, of which each of the `processes` has its part. A machine with an accelerator has
    its own devices. Where JAX has started already (a notebook), it keeps those that it has, and `make_mesh` judges whether
    they suffice.
    """
    if devices // processes > SIMULATED:
        raise UserError(
            f'the mesh asks for {devices // processes:,} devices of this machine: at most {SIMULATED:,} work; choose sizes '
            'whose product is no more, or run on several machines'
        )
    if dtype == 'float64':
        jax.config.update('jax_enable_x64', True)
    run_in_order()
    if processes == 1:
        program_cache.keep_programs()
    try:
        jax.config.update('jax_num_cpu_devices', devices // processes)
    except RuntimeError as error:
        if 'before backends are initialized' not in str(error):
            raise


def run_in_order() -> None:
    """Has CPU programs keep the order of their steps, also of those that do not wait for each other; before JAX starts.

    Else the devices that a CPU simulates may start their collectives in different orders, and wait for each other for ever.
    Seen in jaxlib 0.10.2 with experts by `ragged` in a pipeline.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if IN_ORDER.partition('=')[0] not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {IN_ORDER}'.strip()


@dataclasses.dataclass(frozen=True)
class Divides:
    """The devices along `axes` must divide `size`, the value of `field`; with `or_repeats` they may be a multiple of it.

    With `twice` it is twice their number that must divide it, where they are more than one.
    """

    axes: tuple[str, ...]
    field: str
    size: int
    or_repeats: bool = False
    twice: bool = False

    def ways(self, mesh: MeshConfig) -> int:
        """What must divide the size."""
        n = mesh.span(self.axes)
        return 2 * n if self.twice and n > 1 else n

    def holds(self, mesh: MeshConfig) -> bool:
        """Whether the mesh keeps the rule."""
        n = self.ways(mesh)
        return (self.size > 0 and self.size % n == 0) or (self.or_repeats and n % self.size == 0)


def check_divides(mesh: MeshConfig, rules: Iterable[Divides]) -> None:
    """Raises UserError for the first rule that the mesh breaks, naming the nearest meshes that keep all of them."""
    rules = list(rules)
    for rule in rules:
        if not rule.holds(mesh):
            on = [axis for axis in rule.axes if getattr(mesh, axis) > 1] or rule.axes
            axes = ('2 × ' if rule.twice else '') + ' × '.join(f'mesh.{axis}' for axis in on)
            verb = 'must divide or be a multiple of' if rule.or_repeats else 'must divide'
            options = list(itertools.islice(nearest_meshes(mesh, rules), 3))
            works = '; '.join(f'({option})' for option in options)
            raise UserError(
                f'{axes} is {rule.ways(mesh)} and {rule.field} is {rule.size}: the first {verb} the second; '
                f'nearest meshes that work: {works}'
            )


def nearest_meshes(mesh: MeshConfig, rules: Iterable[Divides]) -> Iterator[MeshConfig]:
    """Meshes that keep the rules: first those of the same number of devices, the most alike first, then of fewer devices."""
    rules = list(rules)
    for devices in range(min(mesh.size, SEARCHED), 0, -1):
        alike = [MeshConfig(**dict(zip(AXES, shape, strict=True))) for shape in factorizations(devices, len(AXES))]
        working = [option for option in alike if all(rule.holds(option) for rule in rules)]
        yield from sorted(working, key=lambda option: (_distance(option, mesh), dataclasses.astuple(option)))


def factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write n as a product of `parts` whole numbers."""
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            yield from ((first, *rest) for rest in factorizations(n // first, parts - 1))


def _distance(a: MeshConfig, b: MeshConfig) -> float:
    return sum(abs(math.log2(getattr(a, axis) / getattr(b, axis))) for axis in AXES)
