"""What BERT has beside its layers, from one device's view.

Letters: B rows, T sequence, D model, C classes.
"""

from flax import nnx
from jax import P

from weft.model.config import ModelConfig
from weft.model.layers.mlp import activation
from weft.model.layers.norm import Norm
from weft.model.linear import linear
from weft.model.parameters import EVERY, constant, weight
from weft.sharding.collectives import unshard


class HeadMlp(nnx.Module):
    """What BERT (arXiv:1810.04805; its published code) has between its layers and the LM head: dense, activation, norm."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        D = c.model_dim
        self.up_DD = weight(rngs, c, (D, D), P(EVERY, None), fan_in=D)
        self.up_bias_D = constant(c, 0.0, (D,), P(None))
        self.norm = Norm(c)

    def __call__(self, x_BTD):
        """Of tokens in any layout."""
        dtype = x_BTD.dtype
        h_BTD = linear(x_BTD, unshard(self.up_DD[...], dtype, EVERY)) + self.up_bias_D.astype(dtype)[None, None]
        return self.norm(activation(self.config)(h_BTD))


class Pooler(nnx.Module):
    """BERT's weights for whole rows, which no logit depends on: they are kept, so that what was read can be written again."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        D = c.model_dim
        self.up_DD = weight(rngs, c, (D, D), P(EVERY, None), fan_in=D)
        self.up_bias_D = constant(c, 0.0, (D,), P(None))
        if c.next_sentence:
            self.next_CD = weight(rngs, c, (2, D), P(None, None), fan_in=D)
            self.next_bias_C = constant(c, 0.0, (2,), P(None))
