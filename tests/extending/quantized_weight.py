"""A quantised weight: an MLP whose matrices are rounded to 8 bits as they are used, and learn as if they were not.

Straight-through gradients: Bengio et al. 2013, arXiv:1308.3432. Letters: I inputs, O outputs.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import lax

from weft.model.config import ModelConfig
from weft.model.layers.mlp import Mlp
from weft.model.linear import Linear, TransposedLinear
from weft.model.parameters import Size
from weft.model.parts.feed_forward import MLPConfig
from weft.model.parts.registry import FEED_FORWARDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedConfig(MLPConfig):
    """`model: {mlp: {kind: quantized, dim: 1024}}`"""

    kind: Literal['quantized'] = 'quantized'


def rounded(w, dim: int):
    """w as int8 with one scale along `dim`, and back; its gradient is that of w."""
    scale = jnp.maximum(abs(w).max(dim, keepdims=True), 1e-8) / 127
    return w + lax.stop_gradient(jnp.round(w / scale) * scale - w)


class Int8Linear(Linear):
    """A scale for each output, whose inputs are all here once the weight is gathered."""

    def kernel(self, dtype):
        return rounded(super().kernel(dtype), 0)


class Int8TransposedLinear(TransposedLinear):
    """A scale for each hidden unit: `tensor` splits what an output sums over."""

    def kernel(self, dtype):
        return rounded(super().kernel(dtype), 0)


class QuantizedMlp(Mlp):
    def __init__(self, c: ModelConfig):
        super().__init__(c)
        D, F = Size(c.model_dim, 'model.model_dim'), Size(c.mlp.dim, 'model.mlp.dim')
        self.gate, self.up = Int8Linear(D, F, part='mlp'), Int8Linear(D, F, part='mlp')
        self.down = Int8TransposedLinear(F, D, part='mlp')


FEED_FORWARDS.register('quantized', QuantizedConfig, QuantizedMlp)
