"""Whole steps as programs: traced or compiled from shapes alone, on the mesh of a config."""

import functools

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from weft.inference.step import decode, empty_cache
from weft.model.batch import Batch
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import ModelConfig
from weft.sharding.mesh import BATCH, MeshConfig
from weft.training.config import RunConfig, TrainingConfig
from weft.training.optimizers import AdamW, OptimizerConfig
from weft.training.state import abstract_state
from weft.training.step import train_step

SLOTS = 16  # of a row in the cache of a decode step, where no other number is given


def run_config(
    model: ModelConfig,
    mesh: MeshConfig,
    batch: int,
    sequence_length: int,
    compute: ComputeConfig = DEFAULT,
    optimizer: OptimizerConfig | None = None,
    **training,
) -> RunConfig:
    """A run of one step; `training` are fields of TrainingConfig."""
    t = TrainingConfig(steps=1, batch=batch, sequence_length=sequence_length, **training)
    optimizer = optimizer or AdamW()
    return RunConfig(name='traffic', mesh=mesh, model=model, compute=compute, training=t, optimizer=optimizer)


def rows(*shape: int) -> jax.ShapeDtypeStruct:
    """int32 numbers, rows first, as they come to a step on the current mesh."""
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(jax.sharding.get_mesh(), P(BATCH)))


def training_step(config: RunConfig):
    """The step of training as a function, and its arguments' shapes. Under `jax.set_mesh`."""
    t = config.training
    batch = Batch(*[rows(t.batch, t.sequence_length)] * 4)
    return functools.partial(train_step, config), (abstract_state(config), batch)


def decode_step(config: RunConfig, length: int = SLOTS):
    """The step that decodes one token in each row of at most `length`, and its arguments' shapes. Under `jax.set_mesh`."""
    model, B = abstract_state(config).model, config.training.batch
    on_mesh = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)
    )
    cache = jax.tree.map(on_mesh, jax.eval_shape(lambda model: empty_cache(model, B, length), model))
    return decode, (model, cache, rows(B), rows(B))


def mesh_shape() -> dict[str, int]:
    """Devices along each axis of the current mesh."""
    return dict(jax.sharding.get_mesh().shape)
