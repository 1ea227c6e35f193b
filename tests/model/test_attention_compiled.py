"""The kernels compiled for accelerators that need not be there, where the `cuda` or the `tpu` extra is installed.

Each compiler runs in a process of its own, since only one may hold libtpu and this one computes on a CPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax import P
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from model.attention import attention, needs_unchecked

platform, backend, target, marker = sys.argv[1:]
options = dict(target_config=target, topology='1x1x8') if platform == 'cuda' else {}
topology = topologies.get_topology_desc('' if options else 'v5p:2x2x2', platform=platform, **options)
devices = np.array(topology.devices).reshape(2, 2, 2)
jax.set_mesh(Mesh(devices, ('data', 'expert', 'tensor'), axis_types=(AxisType.Explicit,) * 3))
rows = ('data', 'expert')

def compiled(T, K, G, H, window, dtype):
    def loss(q, k, v, *at):
        body = lambda q, k, v, *at: attention(q, k, v, at, at, window=window, backend=backend)
        checked = not needs_unchecked(backend)
        out = jax.shard_map(body, out_specs=P(rows, None, 'tensor'), check_vma=checked)(q, k, v, *at)
        return (out.astype(jnp.float32) ** 2).sum()

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), P(rows, *spec)))

    q = array((4, T, 2 * K, G, H), dtype, None, 'tensor')
    kv, at = array((4, T, 2 * K, H), dtype, None, 'tensor'), array((4, T), jnp.int32)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, at, at).compile()

for case in CASES:
    program = compiled(*case)
    assert program.as_text().count(marker) >= 3, case  # forward, dq, and dk with dv
    T, K, G, H, _, dtype = case
    scores = K * G * T * T * 4
    assert program.memory_analysis().temp_size_in_bytes < scores / 2, (case, program.memory_analysis())
print('compiled', len(CASES))
"""


def compile_in_a_process(platform: str, backend: str, target: str, marker: str, cases: str) -> str:
    program = PROGRAM.replace('CASES', cases)
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'TPU_WORKER_HOSTNAMES': 'localhost'}
    command = [sys.executable, '-c', program, platform, backend, target, marker]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


@pytest.mark.skipif(importlib.util.find_spec('jax_cuda13_plugin') is None, reason='the cuda extra is not installed')
def test_flash_compiles_for_an_h100_with_checked_axes():
    cases = """[
        (4096, 2, 4, 128, None, jnp.bfloat16),
        (1000, 1, 8, 96, 100, jnp.bfloat16),
        (2048, 1, 2, 256, None, jnp.bfloat16),
        (2048, 1, 2, 128, None, jnp.float32),
    ]"""
    assert 'compiled 4' in compile_in_a_process('cuda', 'flash', H100, '__gpu$xla.gpu.triton', cases)


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='the tpu extra is not installed')
def test_splash_compiles_for_a_v5p():
    cases = """[
        (4096, 2, 4, 128, None, jnp.bfloat16),
        (1000, 1, 2, 64, 300, jnp.bfloat16),
        (1500, 2, 1, 96, None, jnp.float32),
    ]"""
    assert 'compiled 3' in compile_in_a_process('tpu', 'splash', '', 'tpu_custom_call', cases)
