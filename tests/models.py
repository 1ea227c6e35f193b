"""Models for tests that ask nothing of how weights are born: making those takes longer to compile than most tests."""

import contextlib
import zlib

import jax
import numpy as np

from tests.extending import harness
from tests.families.loading import from_leaves
from weft.hub.tensor_table import array_shapes
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder, weights_of
from weft.model.parameters import Role
from weft.sharding.mesh import MeshConfig, make_mesh


def on(mesh: MeshConfig) -> contextlib.AbstractContextManager[object]:
    """On a mesh: one device has its layers written out one by one, several have loops, which compile in half the time."""
    return jax.set_mesh(make_mesh(mesh)) if mesh.size == 1 else harness.on(mesh)


def filled(c: ModelConfig, compute: ComputeConfig = DEFAULT, seed: int = 0, gain: float = 1.0) -> Decoder:
    """A decoder on the current mesh, the same on all. Matrices are about as large as at birth, norms and biases not trivial.

    `gain` is of the matrices.
    """
    found = {}
    for name, leaf in array_shapes(c, compute).items():
        noise = np.random.default_rng((seed, zlib.crc32(name.encode()))).standard_normal(leaf.shape)
        role = weights_of(c)[name].role
        if role.decays:
            value = gain * c.model_dim**-0.5 * noise
        else:
            value = (1 - c.norm.offset if role is Role.SCALE else 0) + 0.3 * noise
        found[name] = value.astype(leaf.dtype)
    return from_leaves(c, found, compute)
