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

from weft.runtime.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device."""

    kinds: tuple[str, ...]  # how `device.device_kind` begins
    bfloat16_flops: float  # FLOP/s
    float32_flops: float  # FLOP/s of float32 matmuls at JAX's default precision: TF32 on GPUs, bfloat16 passes on TPUs
    float8_flops: float  # FLOP/s; the bfloat16 rate where a chip has no faster one
    memory_bytes: (
        float  # that a program can have: what the driver or the compiler says, a little less than the data sheet
    )
    bandwidth: float  # bytes/s of that memory
    links: float  # bytes/s that it sends to others of its domain or torus
    domain: int  # devices that those links join at most
    network: float  # bytes/s that it sends beyond
    latency: float  # seconds that a collective takes however little it sends; one whose sender waits for it
    torus: int = 0  # dims of the torus; 0: a switch
    wraps: int = 0  # a dim of the torus closes to a ring where its length is a multiple of this
    host: int = 8  # devices of one host
    watts: float | None = None  # at most, of the device alone; None: not published
    efficiency: float  # share of its time that a training step is predicted to use well; see benchmarks/plan_runs.md
    source: str

    @property
    def platform(self) -> str:
        """What JAX calls its kind of machine."""
        return 'tpu' if self.torus else 'gpu'

    def flops(self, dtype: str) -> float:
        """FLOP/s of matmuls in a dtype by its name."""
        return {'bfloat16': self.bfloat16_flops, 'float16': self.bfloat16_flops, 'float8': self.float8_flops}.get(
            dtype, self.float32_flops
        )


GIB = 2**30
NVIDIA = '; memory: nvidia-smi'
CLOUD = 'docs.cloud.google.com/tpu/docs, page of the version; memory: as libtpu reports it when a program does not fit'
# Efficiencies: as `python -m weft.proof.published_runs` fits them on published runs (benchmarks/plan_runs.md). Of GPUs that
# none was found of, that of the H100.
HOPPER = 0.47
NCCL = 1e-5  # latency: a small all_reduce of nccl-tests within a host
ICI = 1e-6  # latency: a hop (The JAX ML Scaling Book, part 2)

CHIPS = {
    'a100-40gb': Chip(
        kinds=('NVIDIA A100-SXM4-40GB',),
        bfloat16_flops=312e12,
        float32_flops=156e12,
        float8_flops=312e12,
        memory_bytes=40_536 * 2**20,
        bandwidth=1.555e12,
        links=300e9,  # NVLink 3: 600 GB/s both ways together
        domain=8,
        network=25e9,  # DGX A100: 8 × 200 Gb/s
        latency=NCCL,
        watts=400,
        efficiency=0.64,
        source='NVIDIA A100 data sheet, SXM4 40 GB; DGX A100 data sheet' + NVIDIA,
    ),
    'a100': Chip(
        kinds=('NVIDIA A100',),
        bfloat16_flops=312e12,
        float32_flops=156e12,
        float8_flops=312e12,
        memory_bytes=81_251 * 2**20,
        bandwidth=2.039e12,
        links=300e9,
        domain=8,
        network=25e9,
        latency=NCCL,
        watts=400,
        efficiency=0.64,
        source='NVIDIA A100 data sheet, SXM4 80 GB; DGX A100 data sheet' + NVIDIA,
    ),
    'h100': Chip(
        kinds=('NVIDIA H100 80GB', 'NVIDIA H100'),
        bfloat16_flops=989.4e12,
        float32_flops=494.7e12,
        float8_flops=1978.9e12,
        memory_bytes=81_079 * 2**20,
        bandwidth=3.35e12,
        links=450e9,  # NVLink 4: 900 GB/s both ways together
        domain=8,
        network=50e9,  # DGX H100: 8 × 400 Gb/s
        latency=NCCL,
        watts=700,
        efficiency=HOPPER,
        source='NVIDIA H100 data sheet, SXM5; DGX H100 data sheet' + NVIDIA,
    ),
    'h200': Chip(
        kinds=('NVIDIA H200',),
        bfloat16_flops=989.4e12,
        float32_flops=494.7e12,
        float8_flops=1978.9e12,
        memory_bytes=143_156 * 2**20,
        bandwidth=4.8e12,
        links=450e9,
        domain=8,
        network=50e9,
        latency=NCCL,
        watts=700,
        efficiency=HOPPER,
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
        domain=8,
        network=50e9,  # DGX B200: 8 × 400 Gb/s
        latency=NCCL,
        watts=1000,
        efficiency=HOPPER,
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
        latency=NCCL,
        host=4,
        watts=1200,
        efficiency=HOPPER,
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
        domain=8,
        network=50e9,  # 8 × 400 Gb/s a host
        latency=NCCL,
        watts=750,
        efficiency=HOPPER,
        source='AMD Instinct MI300X data sheet and platform data sheet; memory: rocm-smi',
    ),
    'v4': Chip(
        kinds=('TPU v4',),
        bfloat16_flops=275e12,
        float32_flops=275e12,
        float8_flops=275e12,
        memory_bytes=30.75 * GIB,
        bandwidth=1.228e12,
        links=300e9,  # 6 × 50 GB/s
        domain=4096,
        network=6.25e9,
        latency=ICI,
        torus=3,
        wraps=4,
        host=4,
        watts=192,  # the highest measured
        efficiency=0.7,
        source=CLOUD + '; power: Jouppi et al. 2023, arXiv:2304.01433',
    ),
    'v5e': Chip(
        kinds=('TPU v5 lite', 'TPU v5e'),
        bfloat16_flops=197e12,
        float32_flops=197e12,
        float8_flops=197e12,
        memory_bytes=15.75 * GIB,
        bandwidth=0.819e12,
        links=200e9,  # 4 × 50 GB/s: 400 GB/s both ways together
        domain=256,
        network=3.125e9,  # 2 × 100 Gb/s for 8 chips
        latency=ICI,
        torus=2,
        wraps=16,
        efficiency=0.75,
        source=CLOUD,
    ),
    'v5p': Chip(
        kinds=('TPU v5p', 'TPU v5'),
        bfloat16_flops=459e12,
        float32_flops=459e12,
        float8_flops=459e12,
        memory_bytes=95.74 * GIB,
        bandwidth=2.765e12,
        links=600e9,  # 6 × 100 GB/s: 1,200 GB/s both ways together
        domain=6144,
        network=6.25e9,  # 50 Gb/s
        latency=ICI,
        torus=3,
        wraps=4,
        host=4,
        efficiency=0.76,
        source=CLOUD,
    ),
    'v6e': Chip(
        kinds=('TPU v6 lite', 'TPU v6e'),
        bfloat16_flops=918e12,
        float32_flops=918e12,
        float8_flops=918e12,
        memory_bytes=31.25 * GIB,
        bandwidth=1.638e12,
        links=400e9,  # 4 × 100 GB/s: 800 GB/s both ways together
        domain=256,
        network=12.5e9,  # 100 Gb/s
        latency=ICI,
        torus=2,
        wraps=16,
        efficiency=0.53,
        source=CLOUD,
    ),
    # A chip has 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, 1,200 GB/s both ways together; a device is half of it.
    'v7x': Chip(
        kinds=('TPU7x', 'TPU v7'),
        bfloat16_flops=1153.5e12,
        float32_flops=1153.5e12,
        float8_flops=2307e12,
        memory_bytes=94.75 * GIB,
        bandwidth=3.69e12,
        links=300e9,
        domain=18432,
        network=6.25e9,
        latency=ICI,
        torus=3,
        wraps=4,
        efficiency=0.46,
        source=CLOUD + ' (TPU7x; half a chip)',
    ),
}


def find(device_kind: str) -> Chip | None:
    """The chip of a `device.device_kind`; None for one that is not described here (a CPU is measured instead)."""
    for chip in CHIPS.values():
        if any(device_kind.startswith(kind) for kind in chip.kinds):
            return chip
    return None


def named(name: str) -> Chip:
    """The chip of a name such as `h100`; UserError where there is none."""
    try:
        return CHIPS[name.lower()]
    except KeyError:
        raise UserError(f'--chip {name!r}: no such chip{nearest(name.lower(), CHIPS)}') from None


@functools.cache
def shape(chip: Chip, chips: int) -> tuple[int, ...]:
    """The most even torus (dims ascending) of so many chips of one slice; () for a switch."""
    if not chip.torus:
        return ()
    within = min(chips, chip.domain)
    options = (dims for dims in _products(within, chip.torus) if list(dims) == sorted(dims))
    return min(options, key=lambda dims: (sum(dims), dims))


def _products(n: int, parts: int):
    if parts == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        yield from ((first, *rest) for rest in _products(n // first, parts - 1))


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
    if (
        kind in EXCHANGES
    ):  # the middle of a line passes on a quarter of what all n send, and of a ring each place an eighth
        return link * (group - 1) / group / max(n / 8 if ring else n / 4 for n, ring in dims)
    return link * sum(2 if ring else 1 for _, ring in dims)


EXCHANGES = ('all_to_all', 'ragged_all_to_all')


@functools.cache
def _lies_along(chip: Chip, chips: int, group: int) -> list[tuple[int, bool]]:
    """Lengths of the dims of the torus that a group lies along, and which are rings: whole dims first, then a part of one."""
    dims = shape(chip, chips)
    ring = lambda n: n > 2 and n % chip.wraps == 0
    best: tuple[tuple[int, int], list[tuple[int, bool]]] = ((0, 0), [])
    for count in range(len(dims) + 1):
        for chosen in itertools.combinations(dims, count):
            filled = math.prod(chosen)
            if group % filled or (filled < group and count == len(dims)):
                continue
            along = [(n, ring(n)) for n in chosen if n > 1]
            along += [(group // filled, False)] if filled < group else []
            best = max(best, ((filled, sum(1 + ring for _, ring in along)), along))
    return best[1]
