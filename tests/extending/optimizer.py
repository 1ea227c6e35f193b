"""An optimizer: momentum whose step has one length, whatever the gradient's (Cutkosky and Mehta 2020, arXiv:2002.03305)."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from weft.training.optimizers import OptimizerConfig, decays, register


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizedMomentum(OptimizerConfig):
    """`optimizer: {kind: normalized_momentum, learning_rate: 0.1}`"""

    kind: Literal['normalized_momentum'] = 'normalized_momentum'
    momentum: float = 0.95

    def rule(self, rate: optax.Schedule, roles: Any) -> optax.GradientTransformation:
        def normalize(moments, weights=None):
            length = optax.tree.norm(moments)
            return jax.tree.map(lambda m: m / length, moments)

        return optax.chain(
            optax.ema(self.momentum),
            optax.stateless(normalize),
            optax.add_decayed_weights(self.weight_decay, decays(roles)),
            optax.scale_by_learning_rate(rate),
        )
