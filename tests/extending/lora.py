"""A LoRA adapter (Hu et al. 2021, arXiv:2106.09685) beside the linear maps that a config names, which learn no more themselves.

R is the rank; `first` and `second` are named after the two dims of the weight as it is kept, before which experts have theirs.
"""

import dataclasses
from typing import Literal

from flax import nnx
from jax import P

from weft.model.linear import linear, linear_back
from weft.model.parameters import Parameter, Role, parameter
from weft.model.parts.linear_forms import LinearForm
from weft.model.parts.registry import ADAPTERS
from weft.sharding.collectives import unshard


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(LinearForm):
    """`model: {adapter: {kind: lora, rank: 4, targets: [attention.q, attention.v]}}`"""

    kind: Literal['lora'] = 'lora'
    rank: int = 4
    alpha: float = 8.0


class LoRA(nnx.Module):
    """x A B · alpha / rank beside x W. What the inputs meet first begins with random numbers, the other with 0."""

    def __init__(self, weight: Parameter, config: LoRAConfig):
        (*experts, first, second), rank = weight.shape, config.rank
        *split, over_first, over_second = weight.layout
        self.scale, self.out_first, self.gathered = config.alpha / rank, weight.out_first, weight.gathered
        self.dim = len(experts)  # the one that is gathered
        role = Role.EXPERT if experts else Role.MATRIX
        inner, outer = (0.0, second**-0.5) if weight.out_first else (first**-0.5, 0.0)
        one = {'gathered': weight.gathered, 'part': 'adapters'}
        self.first = parameter((*experts, first, rank), P(*split, over_first, None), role, scale=inner, **one)
        layout = P(*split, None, over_second)
        self.second = parameter(
            (*experts, rank, second), layout, role, scale=outer, part='adapters', repeats=weight.repeats
        )

    def factors(self, dtype, columns):
        """Both, in the compute dtype: […, first, R] and […, R, second]."""
        return unshard(self.first[...], dtype, self.gathered, self.dim), columns(self.second.astype(dtype))

    def delta(self, dtype, columns=lambda w: w):
        """What is added to the weight."""
        first, second = self.factors(dtype, columns)
        return first @ second * self.scale

    def __call__(self, x_BTI, columns):
        """What is added to the outputs."""
        first, second = self.factors(x_BTI.dtype, columns)
        if self.out_first:
            return linear_back(linear_back(x_BTI, second), first) * self.scale
        return linear(linear(x_BTI, first), second) * self.scale


ADAPTERS.register('lora', LoRAConfig, LoRA)
