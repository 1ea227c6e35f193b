"""RMSNorm and LayerNorm, from one device's view.

Letters: B rows, T sequence, D model, N heads times their width.
"""

import jax
from flax import nnx
from jax import P, lax

from weft.model.config import ModelConfig
from weft.model.parameters import Role, parameter
from weft.sharding.collectives import psum, upcast


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Zhang and Sennrich 2019 (arXiv:1910.07467), in at least float32; the result in x's dtype."""
    h = upcast(x)
    h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + epsilon)
    return (h * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dim."""

    def __init__(self, c: ModelConfig, part: str = 'norms'):
        self.config = c
        self.scale_D = parameter((c.model_dim,), P(None), Role.SCALE, value=1.0 - c.norm.offset, part=part)
        if c.norm.bias:
            self.bias_D = parameter((c.model_dim,), P(None), Role.BIAS, part=part)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        scale_D = offset(self.scale_D[...], c)
        if c.norm.kind == 'rmsnorm':
            return rms_norm(x_BTD, scale_D, c.norm.epsilon)
        h = upcast(x_BTD)
        h = h - h.mean(-1, keepdims=True)
        h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + c.norm.epsilon) * scale_D[None, None]
        return (h + upcast(self.bias_D[...])[None, None] if c.norm.bias else h).astype(x_BTD.dtype)


def offset(scale_D: jax.Array, c: ModelConfig) -> jax.Array:
    """The scale that a norm multiplies by, of the one that is kept, in at least float32."""
    return upcast(scale_D) + c.norm.offset if c.norm.offset else upcast(scale_D)


def norm_of_all(x_BTN: jax.Array, scale_N: jax.Array, heads: int, c: ModelConfig) -> jax.Array:
    """RMSNorm over all `heads` heads of all devices of `tensor`; heads of which several devices have copies count once."""
    h, n = upcast(x_BTN), lax.axis_size('tensor')
    copies = max(n // heads, 1)
    squares = psum((h * h).sum(-1, keepdims=True), 'tensor') / copies
    h = h * lax.rsqrt(squares / (heads * c.attention.head_dim) + c.norm.epsilon)
    return (h * scale_N[None, None]).astype(x_BTN.dtype)
