"""Weights: each is declared on one line with its global shape, layout and scale, and born sharded.

Outside `jax.shard_map` a module holds global arrays, whose types carry their layout (`specs` reads it off). Inside, the same
module holds this device's shards.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from weft.model.config import ModelConfig
from weft.sharding.mesh import FSDP

_PARAMETER_DTYPE = contextvars.ContextVar[jnp.dtype]('_PARAMETER_DTYPE')


@contextlib.contextmanager
def stored_as(dtype: jnp.dtype) -> Iterator[None]:
    """Weights that are made inside have this dtype."""
    token = _PARAMETER_DTYPE.set(dtype)
    try:
        yield
    finally:
        _PARAMETER_DTYPE.reset(token)


def parameter_dtype() -> jnp.dtype:
    """Of the weights that are being made: see `stored_as`."""
    return _PARAMETER_DTYPE.get()


def weight(rngs: nnx.Rngs, c: ModelConfig, shape, spec: P, fan_in: int, gain: float = 1.0) -> nnx.Param:
    """A normal weight of scale gain / √fan_in, born in its layout: no device ever holds all of it.

    Its values depend on the key and the shape, not on the mesh.
    """
    return nnx.Param(
        jax.random.normal(rngs.params(), shape, parameter_dtype(), out_sharding=spec) * (gain * fan_in**-0.5)
    )


def constant(c: ModelConfig, value: float, shape, spec: P) -> nnx.Param:
    """A weight that starts the same everywhere: a norm's scale, a bias."""
    return nnx.Param(jnp.full(shape, value, parameter_dtype(), out_sharding=spec))


def specs(tree):
    """The PartitionSpec of every array, read off its type."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def is_matrix(path) -> bool:
    """Whether the weight at a tree path is a matrix, which its name tells: q_DN is, scale_D and up_bias_EF are not."""
    return names_matrix(next(part.name for part in reversed(path) if '_' in getattr(part, 'name', '')))


def names_matrix(name: str) -> bool:
    """Whether a weight of this name is a matrix: its dims, the last part, are more than one."""
    return len(name.rpartition('_')[2]) > 1 and '_bias_' not in name


def residual_gain(c: ModelConfig) -> float:
    """Scale of the projections that write to the residual stream (GPT-2, section 2.3): 2 per layer add up to about 1."""
    return (2 * c.layers) ** -0.5


EVERY = (*FSDP, 'tensor')  # axes that split a weight of tokens that are not joined
