"""A real step of training compiled for accelerators that need not be there sends what it asks for, and nothing else.

Where the `cuda` or the `tpu` extra is installed; each compiler runs in a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from analysis import communication, traffic
from model.config import ModelConfig
from sharding.mesh import MeshConfig
from tests.model.test_attention_compiled import H100, ROOT

# Sizes in whole tiles; enough layers for a loop; more tokens than one chunk of the loss.
SIZES = {
    'vocabulary': 8192,
    'layers': 4,
    'model_dim': 1024,
    'heads': 8,
    'mlp_dim': 4096,
    'tied_embedding': False,  # a compiler gathers a tied one once for both its uses, where the code asks twice
    'dtype': 'bfloat16',
    'remat': 'block',
}
MESH = {'data': 4, 'tensor': 2}
B, T = 8, 2048

PROGRAM = """
import json, sys
import jax
from jax.experimental import topologies
from analysis import traffic
from model.config import ModelConfig
from sharding.mesh import MeshConfig, make_mesh
from tests.analysis.steps import mesh_shape, run_config, training_step

platform, target, arguments = sys.argv[1:]
sizes, mesh, batch, length = json.loads(arguments)
options = dict(target_config=target, topology='1x1x8') if platform == 'cuda' else {}
topology = topologies.get_topology_desc('' if options else 'v5p:2x2x2', platform=platform, **options)
config = run_config(ModelConfig(**sizes), MeshConfig(**mesh), batch, length)
with jax.set_mesh(make_mesh(config.mesh, topology.devices)):
    step, args = training_step(config)
    asked = traffic.asked(jax.make_jaxpr(step)(*args), mesh_shape())
    text = jax.jit(step, donate_argnums=0).lower(*args).compile().as_text()
    sent = traffic.compiled(text, mesh_shape())
print(json.dumps({'asked': traffic.to_json(asked), 'sent': traffic.to_json(sent)}))
"""


def tables(platform: str, target: str) -> tuple[traffic.Traffic, traffic.Traffic]:
    """What the step asks for, traced for that platform, and what it sends compiled for it."""
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'TPU_WORKER_HOSTNAMES': 'localhost'}
    env |= {'TPU_SKIP_MDS_QUERY': '1'}
    command = [sys.executable, '-c', PROGRAM, platform, target, json.dumps([SIZES, MESH, B, T])]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return traffic.from_json(found['asked']).lowered(), traffic.from_json(found['sent'])


def holds(asked: traffic.Traffic, sent: traffic.Traffic) -> None:
    """Axis by axis the bytes of the request and of the count by hand; no kind in place of another."""
    lines = traffic.difference(asked, sent, ignore=0.01)
    assert not lines, '\n'.join([*lines, 'asked:', str(asked), 'sent:', str(sent)])
    by_hand = communication.training(ModelConfig(**SIZES), MeshConfig(**MESH), B, T).bytes_by_axes()
    for axes, size in by_hand.items():
        assert asked.bytes_by_axes()[axes] == pytest.approx(size, rel=0.01), axes
        assert sent.bytes_by_axes()[axes] == pytest.approx(size, rel=0.01), f'{axes}\n{sent}'


@pytest.mark.skipif(importlib.util.find_spec('jax_cuda13_plugin') is None, reason='the cuda extra is not installed')
def test_a_step_for_eight_h100_sends_what_it_asks_for():
    holds(*tables('cuda', H100))


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='the tpu extra is not installed')
def test_a_step_for_eight_v5p_sends_what_it_asks_for():
    holds(*tables('tpu', ''))
