"""What BERT has beside its layers, from one device's view.

Letters: B rows, T sequence, D model, C classes.
"""

import jax
from flax import nnx

from weft.model.config import ModelConfig
from weft.model.layers.mlp import activation
from weft.model.layers.norm import Norm
from weft.model.linear import Linear, TransposedLinear
from weft.model.parameters import EVERY, Size


class HeadMlp(nnx.Module):
    """What BERT (arXiv:1810.04805; its published code) has between its layers and the LM head: dense, activation, norm."""

    def __init__(self, c: ModelConfig):
        self.config = c
        D = Size(c.model_dim, 'model.model_dim')
        self.dense = Linear(D, D, part='head', bias=True, split=(EVERY, None))
        self.norm = Norm(c, 'head')

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Of tokens in any layout."""
        return self.norm(activation(self.config)(self.dense(x_BTD)))


class Pooler(nnx.Module):
    """BERT's weights for whole rows, which no logit depends on: they are kept, so that what was read can be written again."""

    def __init__(self, c: ModelConfig):
        D = Size(c.model_dim, 'model.model_dim')
        self.dense = Linear(D, D, part='pooler', bias=True, split=(EVERY, None))
        if c.next_sentence:
            self.next = TransposedLinear(D, 2, part='pooler', bias=True, split=(None, None))
