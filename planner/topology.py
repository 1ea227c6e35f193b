"""Accelerators as a compiler is told of them: machines of a chip and a count, which need not be there.

A TPU is named by its kind and the shape of its slice, as `v5p:8x8x16`; GPUs by slices, hosts and GPUs a host, as `1x16x8`,
and a description of one of them.
"""

import dataclasses

from weft.planner.chips import CHIPS, boxes
from weft.runtime.errors import UserError, nearest

HOST = 8  # GPUs


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """What `jax.experimental.topologies.get_topology_desc` is given."""

    platform: str  # 'tpu' or 'cuda'
    name: str  # of the topology
    description: str = ''  # of one GPU, in the text form of XLA's GpuTargetConfigProto


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA asks of a GPU, as its driver gives it."""

    name: str
    capability: tuple[int, int]
    cores: int
    shared_per_core: int  # bytes
    shared_per_block: int  # bytes, at most
    cache: int  # bytes of L2
    clock: float  # GHz
    bandwidth: int  # bytes/s
    memory: int  # bytes

    def description(self) -> str:
        major, minor = self.capability
        return f"""
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_per_core} threads_per_core_limit: 2048 core_count: {self.cores}
  fpus_per_core: {64 if major == 8 else 128} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


GPUS = {
    'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 233472, 232448, 52428800, 1.98, 3352320000000, 84978434048),
    'h200': Gpu('NVIDIA H200', (9, 0), 132, 233472, 232448, 62914560, 1.98, 4814950000000, 150119055360),
    'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 167936, 166912, 41943040, 1.41, 2039040000000, 84974239744),
    'b200': Gpu('NVIDIA B200', (10, 0), 148, 233472, 232448, 132644864, 1.965, 7672320000000, 191498092544),
}
TPUS = {'v4': 'v4', 'v5p': 'v5p', 'v7x': 'tpu7x', 'v5e': 'v5e', 'v6e': 'v6e'}  # the compiler's names
DEVICES = {'v7x': 2}  # JAX devices a chip, where they are not 1


def compile_target(chip: str, count: int) -> CompileTarget:
    """The machine of `count` JAX devices of a kind. Raises UserError where the compilers know none."""
    if chip in GPUS:
        hosts, rest = divmod(count, HOST)
        if rest and hosts:
            raise UserError(
                f'--chips is {count}: GPUs come {HOST} a host; nearest that works: {HOST * max(1, round(count / HOST))}'
            )
        return CompileTarget('cuda', f'1x{hosts or 1}x{rest or HOST}', GPUS[chip].description())
    if chip not in TPUS:
        raise UserError(f'--compile: there is no compiler here for chip {chip!r}{nearest(chip, [*TPUS, *GPUS])}')
    each = DEVICES.get(chip, 1)
    shape = slice_shape(chip, count // each) if count % each == 0 else None
    if shape is None:
        works = [n for n in range(1, 2 * count) if slice_shape(chip, n)]
        best = min(works, key=lambda n: abs(n * each - count)) * each
        raise UserError(f'--chips is {count}: no slice of {chip} has so many; nearest that works: {best}')
    return CompileTarget('tpu', f'{TPUS[chip]}:{"x".join(map(str, shape))}')


def slice_shape(chip: str, chips: int) -> tuple[int, ...] | None:
    """The most compact slice: of two dims 2^n wide and at most twice as long; of three whole cubes of 4x4x4, or part of one.

    None where there is none.
    """
    dims, most = CHIPS[chip].torus, CHIPS[chip].domain
    found = boxes(chips, dims)
    if dims == 2:
        found = [box for box in found if box[0].bit_count() == 1 and box[1] <= 2 * box[0] and chips <= most]
    else:
        found = [box for box in found if all(n % 4 == 0 for n in box) or set(box) <= {1, 2, 4}]
    if not found:
        return None
    shape = min(found, key=sum)
    # The chips of a host stand 2x2x1.
    return tuple(sorted(shape, reverse=shape[0] == 1 and dims == 3))
