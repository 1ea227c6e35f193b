"""What is asked of every change to a model, wherever it is made: the same numbers on any mesh, whole checkpoints, a true plan.

A test of a change makes a `RunConfig` and calls these. Between them the two meshes split rows, weights, the sequence,
experts and heads.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from weft.model import stack
from weft.model.batch import Batch
from weft.model.block import has_costs
from weft.model.config import ModelConfig
from weft.model.dots import dots
from weft.model.forward import place
from weft.planner import communication
from weft.planner.flops import executed
from weft.planner.memory import optimizer_bytes, stored
from weft.planner.traffic.tables import difference
from weft.planner.traffic.traced import jaxpr_traffic
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage.checkpoint import Checkpoints
from weft.training.config import RunConfig, TrainingConfig, dump
from weft.training.loss import loss_and_gradient
from weft.training.state import abstract_model, abstract_state, items, restore
from weft.training.step import State, init, train_step

ROWS, COLUMNS, VOCABULARY = 8, 16, 96
TRAINING = TrainingConfig(steps=4, batch=ROWS, sequence_length=COLUMNS)
# Backends whose every product is a dot of known size, and that are those of every platform.
COUNTABLE = {'attention': 'reference', 'grouped_matmul': 'ragged', 'dispatch': 'all_gather'}
ONE_DEVICE = MeshConfig()
MESHES = (MeshConfig(data=2, context=2, tensor=2), MeshConfig(expert=2, context=2, tensor=2))


@contextlib.contextmanager
def on(mesh: MeshConfig) -> Iterator[None]:
    """On a mesh, with loops over layers, which compile in half the time of layers written out one by one."""
    with mock.patch.object(stack, 'UNROLLED', {}), jax.set_mesh(make_mesh(mesh)):
        yield


def run_of(model: ModelConfig, **fields: Any) -> RunConfig:
    """A run of a model; `fields` are those of RunConfig."""
    return RunConfig(name='x', model=model, training=TRAINING, **fields)


def batch_of(step: int) -> Batch:
    """Rows of several documents, some of them with padding at the end; int32 [8, 16] each."""
    r = np.random.default_rng(step)
    token_BT = r.integers(0, VOCABULARY, (ROWS, COLUMNS + 1), np.int32)
    segment_BT = 1 + (r.random((ROWS, COLUMNS)) < 0.1).cumsum(1, dtype=np.int32)
    segment_BT[:, -2:] = np.where(r.random((ROWS, 1)) < 0.5, 0, segment_BT[:, -2:])
    column_BT = np.broadcast_to(np.arange(COLUMNS, dtype=np.int32), segment_BT.shape)
    begins_BT = np.diff(segment_BT, axis=1, prepend=0) != 0
    position_BT = column_BT - np.maximum.accumulate(np.where(begins_BT, column_BT, 0), axis=1)
    return Batch(token_BT[:, :-1], token_BT[:, 1:], position_BT, segment_BT)


def named(tree: Any) -> dict[str, np.ndarray]:
    """A tree's arrays on the host, by their paths."""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def check_gradients(config: RunConfig, tolerance: float = 1e-9, idle: Collection[str] = ()) -> dict[str, Any]:
    """Asserts that loss and gradients of a batch on both meshes are those of one device. Returns its metrics.

    Every weight must have a gradient, but those in whose name one of `idle` stands, which must have none. Ask for float64,
    in which another order of sums is no excuse. `tolerance` is relative to the largest number of an array.
    """
    wanted, metrics = _gradient(config, ONE_DEVICE)
    for name, gradient in wanted.items():
        assert np.any(gradient) != any(part in name for part in idle), (
            f'{name} has {"a" if np.any(gradient) else "no"} gradient'
        )
    for mesh in MESHES:
        _check_equal(_gradient(config, mesh)[0], wanted, tolerance, mesh)
    return metrics


def _gradient(config: RunConfig, mesh: MeshConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with on(mesh):
        model = initial(config)
        (loss, metrics), gradient = jax.jit(lambda *given: loss_and_gradient(*given))(model, place(batch_of(0)))
        return named(gradient) | {'the loss': np.asarray(loss)}, jax.device_get(metrics)


def initial(config: RunConfig) -> Any:
    """A run's model on the current mesh, as born but that what begins with zeros has other numbers: those hide what reads it.

    It is made on one device, for to compile that takes as long as a step.
    """
    layouts = jax.tree.map(lambda x: x.sharding, abstract_model(config))
    return jax.tree.map(jax.device_put, _born(config), layouts)


@functools.lru_cache(maxsize=2)
def _born(config: RunConfig) -> Any:
    with on(ONE_DEVICE):
        return jax.tree.map(_filled, jax.device_get(jax.jit(lambda: init(config).model)()))


def _filled(w: np.ndarray) -> np.ndarray:
    if w.dtype.kind in 'iu':  # codes of rounded weights, of which none is a NaN of fp8
        return (1 + np.arange(w.size) * 37 % 97).astype(w.dtype).reshape(w.shape)
    return w if w.any() else np.sin(1 + np.arange(w.size, dtype=w.dtype)).reshape(w.shape) / 8


def check_training(config: RunConfig, tolerance: float = 1e-9) -> None:
    """Asserts that two steps of training on both meshes give the losses and weights of one device; as `check_gradients`."""
    wanted = _trained(config, ONE_DEVICE)
    for mesh in MESHES:
        _check_equal(_trained(config, mesh), wanted, tolerance, mesh)


def _trained(config: RunConfig, mesh: MeshConfig) -> dict[str, np.ndarray]:
    config = dataclasses.replace(config, mesh=mesh)
    with on(mesh):
        state = jax.jit(functools.partial(init, config))()
        before, step = state, jax.jit(functools.partial(train_step, config))
        for number in range(2):
            state, metrics = step(state, place(batch_of(number)))
        check_layouts(state, before)
        return named(state.model) | {'the loss': np.asarray(metrics['loss'])}


def check_layouts(found: Any, wanted: Any) -> None:
    """Asserts that each array of a tree is laid out as that of another."""

    def check(x, y):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)

    jax.tree.map(check, found, wanted)


def _check_equal(found: dict, wanted: dict, tolerance: float, mesh: MeshConfig) -> None:
    assert jax.config.read('jax_enable_x64'), 'in float32 a wrong sum may hide'
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        error = np.abs(found[name] - array).max() / max(np.abs(array).max(), 1e-30)
        assert error <= tolerance, f'{name} on {mesh}: {error:.1e} off'


def check_checkpoint(config: RunConfig, folder: Path) -> None:
    """Asserts that the whole state, the optimizer's too, comes back bit for bit on another mesh, in that mesh's layout."""
    first, second = (dataclasses.replace(config, mesh=mesh) for mesh in MESHES)

    def worn() -> State:
        """A state none of whose arrays is made of equal numbers."""
        state = init(first)
        wear = lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape, out_sharding=jax.typeof(x).sharding)
        return State(*jax.tree.map(wear, state[:3]), state.key)

    with on(first.mesh):
        state, checkpoints = jax.jit(worn)(), Checkpoints(folder)
        checkpoints.save(1, items(state), {}, {'config.yaml': dump(first).encode()})
        checkpoints.wait()
        saved = named(state._replace(key=jax.random.key_data(state.key)))
    with on(second.mesh):
        again, wanted = restore(checkpoints, 1, second), abstract_state(second)
        check_layouts(again, wanted)
        found = named(again._replace(key=jax.random.key_data(again.key)))
    assert found.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def check_plan(config: RunConfig) -> None:
    """Asserts that the plan is of what a device really keeps and does: bytes of weights and optimizer, FLOPs, what is sent."""
    for mesh in MESHES:
        run = dataclasses.replace(config, mesh=mesh)
        run.check_sizes()
        with on(mesh):
            state = abstract_state(run)
        assert stored(run.model, run.compute, mesh) == bytes_on_a_device(state.model), mesh
        assert optimizer_bytes(run) == bytes_on_a_device(state.optimizer), mesh
        compute = dataclasses.replace(run.compute, **COUNTABLE)
        with on(mesh):
            model = abstract_model(dataclasses.replace(run, compute=compute))
            step = jax.make_jaxpr(loss_and_gradient)(model, place(batch_of(0)))
        if run.model.moe is None:  # else devices of `expert` have buffers with rows that visit none of their experts
            planned = executed(run.model, compute, 'train', rows=ROWS, length=COLUMNS, mesh=mesh)
            assert sum(planned.values()) == dots(step, make_mesh(mesh).shape).flops, mesh
        if not has_costs(run.model):  # else it is by formula, which leaves scalars out
            sent = communication.training(run.model, compute, mesh, ROWS, COLUMNS)
            assert not (found := difference(sent, jaxpr_traffic(step, make_mesh(mesh).shape))), found


def bytes_on_a_device(tree: Any) -> int:
    """Bytes of one device's shards of all arrays, which may be abstract."""
    width = lambda x: 8 if 'key' in str(x.dtype) else x.dtype.itemsize
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * width(x) for x in jax.tree.leaves(tree))
