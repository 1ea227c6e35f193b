"""What chips can do at most, from their makers' data sheets: arithmetic, memory, links, power. Dense figures, without sparsity.

Units are bytes, FLOP/s, bytes/s and watts of one JAX device. A TPU v7x chip is two of them, all others are one. Links are
counted one way, all of a device's links together: what it can send at once.

Two kinds of machine. GPUs stand in switched domains: within one (`domain` devices) each pair has the full `links`, and
beyond it every GPU has a port of its own into the network. TPUs stand in a torus: each chip has two links along each of
its two or three dims, and only the dims that a group of chips lies along carry what the group sends. Beyond the largest
torus there is the data centre's network.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

from weft.planner.layouts import divisors
from weft.runtime.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device."""

    kinds: tuple[str, ...]  # how `device.device_kind` begins
    bfloat16_flops: float  # FLOP/s
    float32_flops: float  # FLOP/s of float32 matmuls at JAX's default precision: TF32 on GPUs, bfloat16 passes on TPUs
    float8_flops: float  # FLOP/s; the bfloat16 rate where a chip has no faster one
    memory_bytes: float  # that a program can have, by the driver or the compiler: a little less than the data sheet's
    bandwidth: float  # bytes/s of that memory
    links: float  # bytes/s that it sends to others of its domain or torus
    domain: int = 8  # devices that those links join at most
    network: float  # bytes/s that it sends beyond
    latency: float = 1e-5  # seconds that a collective takes however little it sends: a small all_reduce of nccl-tests
    torus: int = 0  # dims of the torus; 0: a switch
    wraps: int = 0  # a dim of the torus closes to a ring where its length is a multiple of this
    host: int = 8  # devices of one host
    watts: float | None = None  # at most, of the device alone; None: not published
    # Share of its time that a training step is predicted to use well, as `python -m weft.proof.published_runs` fits it on
    # published runs (benchmarks/plan_runs.md). Of GPUs that none was found of, that of the H100.
    efficiency: float = 0.47
    source: str

    @property
    def platform(self) -> str:
        """What JAX calls its kind of machine."""
        return 'tpu' if self.torus else 'gpu'

    def flops(self, dtype: str) -> float:
        """FLOP/s of matmuls in a dtype by its name."""
        narrow = {'bfloat16': self.bfloat16_flops, 'float16': self.bfloat16_flops, 'float8': self.float8_flops}
        return narrow.get(dtype, self.float32_flops)


NVIDIA = '; memory: nvidia-smi'
CLOUD = 'docs.cloud.google.com/tpu/docs, page of the version; memory: as libtpu reports it when a program does not fit'


def _tpu(*, torus: int, flops: float, gib: float, **figures: Any) -> Chip:
    """A TPU whose torus has so many dims: FLOP/s in every dtype, GiB of memory, and other fields of `Chip`."""
    usual: dict[str, Any] = {'float8_flops': flops, 'source': CLOUD}
    return Chip(
        torus=torus,
        wraps={2: 16, 3: 4}[torus],
        bfloat16_flops=flops,
        float32_flops=flops,
        memory_bytes=gib * 2**30,
        latency=1e-6,  # a hop (The JAX ML Scaling Book, part 2)
        **usual | figures,
    )


A100 = Chip(
    kinds=('NVIDIA A100',),
    bfloat16_flops=312e12,
    float32_flops=156e12,
    float8_flops=312e12,
    memory_bytes=81_251 * 2**20,
    bandwidth=2.039e12,
    links=300e9,  # NVLink 3: 600 GB/s both ways together
    network=25e9,  # DGX A100: 8 × 200 Gb/s
    watts=400,
    efficiency=0.64,
    source='NVIDIA A100 data sheet, SXM4 80 GB; DGX A100 data sheet' + NVIDIA,
)
H100 = Chip(
    kinds=('NVIDIA H100 80GB', 'NVIDIA H100'),
    bfloat16_flops=989.4e12,
    float32_flops=494.7e12,
    float8_flops=1978.9e12,
    memory_bytes=81_079 * 2**20,
    bandwidth=3.35e12,
    links=450e9,  # NVLink 4: 900 GB/s both ways together
    network=50e9,  # DGX H100: 8 × 400 Gb/s
    watts=700,
    source='NVIDIA H100 data sheet, SXM5; DGX H100 data sheet' + NVIDIA,
)
CHIPS = {
    'a100-40gb': dataclasses.replace(
        A100,
        kinds=('NVIDIA A100-SXM4-40GB',),
        memory_bytes=40_536 * 2**20,
        bandwidth=1.555e12,
        source='NVIDIA A100 data sheet, SXM4 40 GB; DGX A100 data sheet' + NVIDIA,
    ),
    'a100': A100,
    'h100': H100,
    'h200': dataclasses.replace(
        H100,
        kinds=('NVIDIA H200',),
        memory_bytes=143_156 * 2**20,
        bandwidth=4.8e12,
        source='NVIDIA H200 data sheet, SXM5; DGX H200 data sheet' + NVIDIA,
    ),
    'b200': Chip(
        kinds=('NVIDIA B200',),
        bfloat16_flops=2250e12,
        float32_flops=1100e12,
        float8_flops=4500e12,
        memory_bytes=180e9,
        bandwidth=8e12,
        links=900e9,  # NVLink 5: 1.8 TB/s both ways together
        network=50e9,  # DGX B200: 8 × 400 Gb/s
        watts=1000,
        source='NVIDIA DGX B200 data sheet, an eighth of it (1,440 GB, 64 TB/s); memory: as sold',
    ),
    'gb200': Chip(
        kinds=('NVIDIA GB200',),
        bfloat16_flops=2500e12,
        float32_flops=1250e12,
        float8_flops=5000e12,
        memory_bytes=186e9,
        bandwidth=8e12,
        links=900e9,
        domain=72,
        network=50e9,
        host=4,
        watts=1200,
        source='NVIDIA GB200 NVL72 data sheet, a 72nd of it, sparse figures halved (13.4 TB, 576 TB/s); memory: as sold',
    ),
    'mi300x': Chip(
        kinds=('AMD Instinct MI300X',),
        bfloat16_flops=1307.4e12,
        float32_flops=653.7e12,
        float8_flops=2614.9e12,
        memory_bytes=196_592 * 2**20,
        bandwidth=5.3e12,
        links=448e9,  # 7 × 64 GB/s, one link to each of the other seven
        network=50e9,  # 8 × 400 Gb/s a host
        watts=750,
        source='AMD Instinct MI300X data sheet and platform data sheet; memory: rocm-smi',
    ),
    'v4': _tpu(
        kinds=('TPU v4',),
        torus=3,
        flops=275e12,
        gib=30.75,
        bandwidth=1.228e12,
        links=300e9,  # 6 × 50 GB/s
        domain=4096,
        network=6.25e9,
        host=4,
        watts=192,  # the highest measured
        efficiency=0.7,
        source=CLOUD + '; power: Jouppi et al. 2023, arXiv:2304.01433',
    ),
    'v5e': _tpu(
        kinds=('TPU v5 lite', 'TPU v5e'),
        torus=2,
        flops=197e12,
        gib=15.75,
        bandwidth=0.819e12,
        links=200e9,  # 4 × 50 GB/s: 400 GB/s both ways together
        domain=256,
        network=3.125e9,  # 2 × 100 Gb/s for 8 chips
        efficiency=0.75,
    ),
    'v5p': _tpu(
        kinds=('TPU v5p', 'TPU v5'),
        torus=3,
        flops=459e12,
        gib=95.74,
        bandwidth=2.765e12,
        links=600e9,  # 6 × 100 GB/s: 1,200 GB/s both ways together
        domain=6144,
        network=6.25e9,  # 50 Gb/s
        host=4,
        efficiency=0.76,
    ),
    'v6e': _tpu(
        kinds=('TPU v6 lite', 'TPU v6e'),
        torus=2,
        flops=918e12,
        gib=31.25,
        bandwidth=1.638e12,
        links=400e9,  # 4 × 100 GB/s: 800 GB/s both ways together
        domain=256,
        network=12.5e9,  # 100 Gb/s
        efficiency=0.53,
    ),
    # A chip has 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, 1,200 GB/s both ways together; a device is half of it.
    'v7x': _tpu(
        kinds=('TPU7x', 'TPU v7'),
        torus=3,
        flops=1153.5e12,
        gib=94.75,
        float8_flops=2307e12,
        bandwidth=3.69e12,
        links=300e9,
        domain=18432,
        network=6.25e9,
        efficiency=0.46,
        source=CLOUD + ' (TPU7x; half a chip)',
    ),
}


def chip_of_device(device_kind: str) -> Chip | None:
    """The chip of a `device.device_kind`; None for one that is not described here (a CPU is measured instead)."""
    return next((chip for chip in CHIPS.values() if device_kind.startswith(chip.kinds)), None)


def chip_named(name: str) -> Chip:
    """The chip of a name such as `h100`; UserError where there is none."""
    try:
        return CHIPS[name.lower()]
    except KeyError:
        raise UserError(f'--chip {name!r}: no such chip{nearest(name.lower(), CHIPS)}') from None


@functools.cache
def torus_shape(chip: Chip, chips: int) -> tuple[int, ...]:
    """The most even torus (dims ascending) of so many chips of one slice; () for a switch."""
    if not chip.torus:
        return ()
    return min(boxes(min(chips, chip.domain), chip.torus), key=lambda dims: (sum(dims), dims))


def boxes(n: int, dims: int) -> list[tuple[int, ...]]:
    """The shapes of n devices in so many dims, each ascending."""
    return [box for box in itertools.combinations_with_replacement(divisors(n), dims) if math.prod(box) == n]


EXCHANGES = ('all_to_all', 'ragged_all_to_all')


@functools.cache
def group_rate(chip: Chip, chips: int, group: int, stride: int, kind: str) -> float:
    """Bytes/s that each device can send within groups of `group` devices that stand `stride` apart, of `chips` in all.

    What the machine allows while nothing else is sent, for groups that lie along whole dims of a torus where they can. `kind`
    of collective: what is gathered or summed is passed on by each that has it, `all_to_all` and `ppermute` are not.
    """
    if group == 1:
        return math.inf
    if stride * group > chip.domain:
        # Of a group's devices in one domain each takes its share of what all of them receive, so that a gathered byte enters a
        # domain once. What is meant for one device has that device's port alone.
        near = max(1, min(group, chip.domain // stride))
        if kind == 'ppermute':
            return min(chip.links, chip.network)
        outside = chip.network * (group - 1) / max(1, group - near)
        return min(chip.links, outside if kind in EXCHANGES else outside * near)
    if not chip.torus:
        return chip.links
    link = chip.links / (2 * chip.torus)
    if kind == 'ppermute':
        return link
    dims = _lies_along(chip, chips, group)
    if kind in EXCHANGES:
        # The middle of a line passes on a quarter of what all n send, and of a ring each place an eighth.
        return link * (group - 1) / group / max(n / 8 if ring else n / 4 for n, ring in dims)
    return link * sum(2 if ring else 1 for _, ring in dims)


@functools.cache
def _lies_along(chip: Chip, chips: int, group: int) -> list[tuple[int, bool]]:
    """Lengths of the dims of the torus that a group lies along, and which are rings: whole dims first, then a part of one."""
    dims = torus_shape(chip, chips)
    options = []
    for count in range(len(dims) + 1):
        for chosen in itertools.combinations(dims, count):
            filled = math.prod(chosen)
            if group % filled == 0 and (filled == group or count < len(dims)):
                along = [(n, n > 2 and n % chip.wraps == 0) for n in chosen if n > 1]
                along += [(group // filled, False)] if filled < group else []
                options.append((filled, sum(1 + ring for _, ring in along), along))
    return max(options)[-1]
