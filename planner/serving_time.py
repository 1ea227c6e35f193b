"""How long a step of serving takes: decoding one token in each row, and reading prompts."""

import functools

import jax.numpy as jnp

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.planner import communication
from weft.planner.chips import Chip
from weft.planner.flops import executed
from weft.planner.memory import cache_bytes
from weft.planner.roofline import Time, layer_bytes, rows_as_data, step_time
from weft.planner.weights import inventory
from weft.sharding.mesh import BATCH, MeshConfig


@functools.lru_cache(maxsize=2**12)
def decode_flops(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, rows: int, length: int) -> dict[str, float]:
    """By part of one more token in each row, all devices together."""
    source = length if c.encoder else 0
    return executed(c, compute, 'decode', rows=rows, length=length, source=source, mesh=mesh, attention='flash')


def decode_time(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, chip: Chip, rows: int, length: int) -> Time:
    """Of one more token in each of `rows` sequences (all devices together), whose cache is for `length` tokens."""
    flops = decode_flops(c, compute, rows_as_data(mesh), rows, length)
    held, b, mine = inventory(c), jnp.dtype(compute.dtype).itemsize, rows / mesh.span(BATCH)
    moved: dict[str, float] = {}
    for group in held.groups:
        if group.where == 'ahead' or group.where == 'encoder':
            continue
        for name, size in layer_bytes(group, compute, mesh, mine, 1, 1, rows).items():
            moved[name] = moved.get(name, 0.0) + group.layers * size
    moved['attention'] = cache_bytes(c, compute, mesh, rows, length, chip.platform)
    moved['head'] = (c.model_dim + mine) * c.padded_vocabulary / mesh.tensor * b
    return step_time(compute, mesh, chip, flops, moved, communication.decoding(c, compute, mesh, rows))


def prefill_time(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, chip: Chip, rows: int, length: int) -> Time:
    """Of reading a prompt of `length` tokens in each of `rows` sequences, all devices together."""
    source = length if c.encoder else 0
    flops = executed(c, compute, 'prefill', rows=rows, length=length, source=source, mesh=mesh, attention='flash')
    tokens = rows / mesh.span(BATCH) * length / mesh.context
    moved: dict[str, float] = {}
    for group in inventory(c).groups:
        if group.where == 'ahead':
            continue
        for name, size in layer_bytes(group, compute, mesh, tokens, 1, 1).items():
            moved[name] = moved.get(name, 0.0) + group.layers * size
    return step_time(compute, mesh, chip, flops, moved, communication.prefill(c, compute, mesh, rows, length))
