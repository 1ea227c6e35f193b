"""The kernels compiled for accelerators that need not be there: `make compiled`.

Each compiler runs in a process of its own, since only one may hold libtpu and this one computes on a CPU.
"""

import os
import subprocess

from weft.planner.aot import ROOT, interpreter
from weft.planner.topology import compile_target

BEGIN = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax import P
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

platform, name, description = sys.argv[1:]
options = dict(target_config=description) if description else {}
if platform == 'cuda':
    options |= dict(topology=name)
topology = topologies.get_topology_desc('' if platform == 'cuda' else name, platform=platform, **options)
devices = np.array(topology.devices).reshape(2, 2, 2)
jax.set_mesh(Mesh(devices, ('data', 'expert', 'tensor'), axis_types=(AxisType.Explicit,) * 3))

def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), P(*spec)))
"""

ATTENTION = """
from weft.model.ops.attention import attention, needs_unchecked
rows = ('data', 'expert')

def compiled(T, K, G, H, window, dtype):
    def loss(q, k, v, *at):
        body = lambda q, k, v, *at: attention(q, k, v, at, at, window=window, backend=BACKEND)
        checked = not needs_unchecked(BACKEND)
        out = jax.shard_map(body, out_specs=P(rows, None, 'tensor'), check_vma=checked)(q, k, v, *at)
        return (out.astype(jnp.float32) ** 2).sum()

    q = array((4, T, 2 * K, G, H), dtype, rows, None, 'tensor')
    kv, at = array((4, T, 2 * K, H), dtype, rows, None, 'tensor'), array((4, T), jnp.int32, rows)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, at, at).compile()

for case in CASES:
    program = compiled(*case)
    assert program.as_text().count(MARKER) >= 3, case  # forward, dq, and dk with dv
    T, K, G, H, _, dtype = case
    scores = K * G * T * T * 4
    assert program.memory_analysis().temp_size_in_bytes < scores / 2, (case, program.memory_analysis())
print('compiled', len(CASES))
"""

EXPERTS = """
from weft.model.ops.grouped_matmul import grouped_matmul

def compiled(R, E, D, F, dtype):
    def loss(x, w, sizes):
        body = lambda x, w, sizes: grouped_matmul(x, w, sizes[0], backend='gmm')
        out = jax.shard_map(body, out_specs=P('data', 'tensor'))(x, w, sizes)
        return (out.astype(jnp.float32) ** 2).sum()

    arrays = array((2 * R, D), dtype, 'data'), array((E, D, 2 * F), dtype, None, None, 'tensor')
    sizes = array((2, E), jnp.int32, 'data')
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays, sizes).compile()

for case in CASES:
    program = compiled(*case)
    assert program.as_text().count(MARKER) >= 3, case  # forward, gradients of rows and of weights
    R, E, D, F, dtype = case
    once_an_expert = E * R * D * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < once_an_expert / 2, (case, program.memory_analysis())
print('compiled', len(CASES))
"""


def compile_in_a_process(chip: str, program: str, marker: str, cases: str) -> str:
    """What the program prints. Asserts that it ends well."""
    machine = compile_target(chip, 8)
    program = BEGIN + program.replace('MARKER', repr(marker)).replace('CASES', cases)
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'TPU_WORKER_HOSTNAMES': 'localhost'}
    env |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    command = [interpreter(machine.platform), '-c', program, machine.platform, machine.name, machine.description]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


TRITON = '__gpu$xla.gpu.triton'


def test_flash_compiles_for_an_h100_with_checked_axes():
    cases = """[
        (4096, 2, 4, 128, None, jnp.bfloat16),
        (1000, 1, 8, 96, 100, jnp.bfloat16),
        (2048, 1, 2, 256, None, jnp.bfloat16),
        (2048, 1, 2, 128, None, jnp.float32),
    ]"""
    assert 'compiled 4' in compile_in_a_process('h100', ATTENTION.replace('BACKEND', "'flash'"), TRITON, cases)


def test_the_grouped_matmul_compiles_for_an_h100_with_checked_axes():
    cases = '[(8192, 8, 2048, 1024, jnp.bfloat16), (1000, 4, 720, 96, jnp.bfloat16), (2048, 8, 512, 256, jnp.float32)]'
    assert 'compiled 3' in compile_in_a_process('h100', EXPERTS, TRITON, cases)


def test_splash_compiles_for_a_v5p():
    cases = """[
        (4096, 2, 4, 128, None, jnp.bfloat16),
        (1000, 1, 2, 64, 300, jnp.bfloat16),
        (1500, 2, 1, 96, None, jnp.float32),
    ]"""
    assert 'compiled 3' in compile_in_a_process(
        'v5p', ATTENTION.replace('BACKEND', "'splash'"), 'tpu_custom_call', cases
    )
