"""Bytes of activations on one device in a training step: what is kept for the backward pass, and what is there at once.

Letters: t tokens of one device inside a block, where it has all of its sequence over `tensor`; n devices of `tensor`.
"""

import dataclasses
import math

import jax.numpy as jnp

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.ops.cross_entropy import CHUNK
from weft.model.stack import is_unrolled
from weft.planner.weights import Group
from weft.sharding.mesh import MeshConfig

FLOAT32 = 4
HIDDEN = 6  # arrays that a loop keeps of an MLP's hidden units: what goes into each product, and the activation's steps


@dataclasses.dataclass(frozen=True)
class Device:
    """What one device works on at once."""

    config: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    rows: float  # of one part of a step, or of one microbatch
    columns: int  # of each row, all devices of `context` together
    platform: str

    @property
    def number(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.compute.dtype).itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number in which sums are made."""
        return max(self.number, FLOAT32)

    @property
    def tokens(self) -> float:
        """t."""
        return self.rows * self.columns / self.mesh.context

    @property
    def x(self) -> float:
        """Bytes of the activations between blocks."""
        return self.tokens / self.mesh.tensor * self.config.model_dim * self.number


def kept_by(group: Group, device: Device) -> float:
    """Bytes that the layers of a group keep from their forward pass for their backward pass."""
    layers = group.held(device.mesh)
    if device.compute.remat == 'none':
        made, whole = residuals(group, device)
        if not is_unrolled(math.ceil(layers), group.config, device.compute.remat, False, device.platform):
            made = stacked(group, device)
        return layers * (made + whole)
    kept = device.x
    if device.compute.remat == 'dots':
        kept += dots(group, device)
    return layers * kept


def at_work(group: Group, device: Device) -> tuple[float, float]:
    """Bytes while the backward pass of a layer runs: of activations and their gradients, and of whole weights and theirs.

    Beside what it needs, the gradient of the hidden units and, where devices of `tensor` joined it, that of the layer's
    output. Gradients of gate and up take the place of gate and up, but not on a TPU, where one fused matmul makes them.
    """
    made, whole = residuals(group, device)
    c, t, n, b = group.config, device.tokens, device.mesh.tensor, device.number
    hidden = t * c.mlp.dim / n * b
    if group.experts:
        assert c.moe is not None
        hidden = expert_rows(c, device) * (c.moe.mlp_dim / n + c.model_dim) * b
    elif device.platform == 'tpu':
        hidden *= 2
    if n > 1:
        hidden += t * c.model_dim * b
    if device.compute.remat == 'none':
        return hidden, whole
    return made + hidden, 2 * whole


def residuals(group: Group, device: Device) -> tuple[float, float]:
    """Bytes that one layer's backward pass needs: activations; whole weights."""
    c, t, n, b = group.config, device.tokens, device.mesh.tensor, device.number
    whole = sum(w.used(device.mesh) for w in group.weights if w.gathered) * b
    joined = t * c.model_dim * b
    heads = t * (c.attention.heads / n) * b
    kv_heads = t * max(c.attention.kv_heads / n, 1) * b
    made = 3 * device.x  # x, twice with a part added, and normed
    made += (
        joined
        + heads * (c.attention.query_dim + c.attention.value_dim)
        + kv_heads * (c.attention.query_dim + c.attention.value_dim)
    )
    made += t * c.attention.heads / n * device.wide  # log-sum-exps
    if c.encoder and group.where != 'encoder':
        made += device.x + joined + 2 * heads * c.attention.query_dim + 2 * kv_heads * c.attention.query_dim
    return made + inner(group, device) + joined, whole


def stacked(group: Group, device: Device) -> float:
    """Bytes of activations that a loop over layers keeps of each where nothing is computed again.

    Layers that are written out keep what their backward passes need; a loop keeps each array that JAX's own rules ask for:
    of a norm its input and its output, wide, of an activation what it is made of at each step. Equal ones are kept once.
    """
    c, t, n, b = group.config, device.tokens, device.mesh.tensor, device.number
    wide_x = device.x / b * device.wide
    heads, kv_heads = t * (c.attention.heads / n), t * max(c.attention.kv_heads / n, 1)
    made = (4 + bool(group.experts)) * wide_x + t * c.model_dim * b
    made += (
        heads * (c.attention.query_dim + 2 * c.attention.value_dim) * b
        + kv_heads * (c.attention.query_dim + c.attention.value_dim) * b
    )
    made += heads * device.wide  # log-sum-exps
    if c.attention.qk_norm:
        made += 2 * (heads + kv_heads) * c.attention.query_dim * device.wide
    if not group.experts:
        return made + t * c.model_dim * b + HIDDEN * t * c.mlp.dim / n * b
    m = c.moe
    assert m is not None
    if device.platform == 'gpu' and device.compute.dispatch != 'all_to_all':
        return made + inner(group, device)  # our kernels' own backward pass
    rows, masks = expert_rows(c, device), 2  # a byte for each number
    made += rows * (2 * c.model_dim * b + masks * c.model_dim + HIDDEN * m.mlp_dim / n * b)
    return made + HIDDEN * t * m.shared_dim / n * b


def inner(group: Group, device: Device) -> float:
    """Bytes of the hidden units of a layer's MLP or experts."""
    c, t, n, b = group.config, device.tokens, device.mesh.tensor, device.number
    matrices = 3 if c.mlp.gated else 2
    if not group.experts:
        return matrices * t * c.mlp.dim / n * b
    m = c.moe
    assert m is not None
    rows = expert_rows(c, device)
    routed = rows * (2 * c.model_dim + matrices * m.mlp_dim / n) * b
    return routed + matrices * t * m.shared_dim / n * b


def expert_rows(c: ModelConfig, device: Device) -> float:
    """Rows of the buffer in which a device's experts find their tokens."""
    m, mesh = c.moe, device.mesh
    assert m is not None
    t = device.tokens
    if device.compute.dispatch == 'all_to_all':
        each = min(t / mesh.tensor, math.ceil(device.compute.capacity_factor * t / mesh.tensor * m.top_k / m.experts))
        return m.experts * each * mesh.tensor
    if device.compute.dispatch == 'ragged':
        return mesh.expert * t * min(m.top_k, m.experts / mesh.expert)
    return mesh.expert * t * m.top_k


def dots(group: Group, device: Device) -> float:
    """Bytes of the results of one layer's plain matmuls."""
    c, t, n, b = group.config, device.tokens, device.mesh.tensor, device.number
    made = (
        t * (c.attention.heads * c.attention.query_dim + 2 * max(c.attention.kv_heads, n) * c.attention.head_dim) / n
        + t * c.model_dim
    )
    if not group.experts:
        made += t * (2 if c.mlp.gated else 1) * c.mlp.dim / n  # what the last one makes, no gradient needs
    return made * b


def in_loss(device: Device) -> tuple[float, float]:
    """Numbers of the LM head, whose gradient is added up in float32; bytes of a chunk's logits and of their gradient."""
    columns = device.config.padded_vocabulary / device.mesh.tensor
    return columns * device.config.model_dim, min(CHUNK, device.tokens) * columns * (device.wide + device.number)
