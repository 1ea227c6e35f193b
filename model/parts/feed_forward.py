"""What works on each token alone: an MLP, or a mixture of them."""

import dataclasses
from typing import Literal

from weft.model.parts.numbers import nearest_divisor
from weft.model.parts.registry import FEED_FORWARDS, MIXTURES, check_above_zero, check_at_least
from weft.runtime.errors import UserError

Activation = Literal['swiglu', 'geglu', 'clamped_swiglu', 'gelu', 'gelu_exact', 'relu', 'silu']
GATED = ('swiglu', 'geglu', 'clamped_swiglu')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """An MLP of one hidden layer; experts of a mixture have its activation too."""

    kind: Literal['mlp'] = 'mlp'
    dim: int  # hidden units
    activation: Activation = 'swiglu'
    limit: float = 7.0  # of clamped_swiglu (gpt-oss), beyond which gate and up are cut off
    bias: bool = False

    def __post_init__(self) -> None:
        check_at_least('model.mlp', self, 1, 'dim')
        check_above_zero('model.mlp', self, 'limit')

    @property
    def gated(self) -> bool:
        """Whether there is a gate beside the up projection (Shazeer 2020, arXiv:2002.05202)."""
        return self.activation in GATED


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts layer. Every token visits its `top_k` experts and all shared ones.

    Of `compute.dispatch` `all_to_all` alone drops some.
    """

    kind: Literal['moe'] = 'moe'
    experts: int
    top_k: int = 2
    mlp_dim: int  # hidden units of one expert
    shared_experts: int = 0  # experts that every token visits, without a router
    shared_mlp_dim: int | None = None  # hidden units of one of those; None: as many as of the others
    shared_gate: bool = False  # what the shared experts give is weighed by a sigmoid of the token (Qwen2-MoE)
    first_dense_layers: int = 0  # layers before the first mixture, with a plain MLP: model.mlp
    pattern: tuple[bool, ...] = (True,)  # which layers are mixtures, over and over from the first; false: a plain MLP
    router: Literal['softmax', 'sigmoid'] = 'softmax'
    router_bias: bool = False  # of the router's logits
    bias: bool = False  # of each expert's projections
    renormalize: bool = True  # the chosen experts' weights add up to 1
    # Of experts side by side: a token chooses groups first (DeepSeek-V2, arXiv:2405.04434, section 2.1.3).
    groups: int = 1
    top_groups: int = 1  # groups that a token chooses
    group_score: Literal['max', 'top2'] = 'top2'  # of a group: its best expert's score, or the sum of its two best
    choice_bias: bool = False  # a bias on the scores by which experts are chosen; bias_update_rate moves it
    routed_scale: float = 1.0  # factor on the routed experts' sum
    balance_loss: float = 0.01  # weight of the sequence-level balance loss (DeepSeek-V3, arXiv:2412.19437, eq. 17–20)
    z_loss: float = 0.001  # weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5)
    # Step of the choice's bias (DeepSeek-V3, section 2.1.2: 0.001); above 0: there is one.
    bias_update_rate: float = 0.0

    @property
    def shared_dim(self) -> int:
        """Hidden units of all shared experts together, which are one MLP."""
        return self.shared_experts * (self.shared_mlp_dim or self.mlp_dim)

    @property
    def has_choice_bias(self) -> bool:
        """Whether experts are chosen by their scores and a bias."""
        return self.choice_bias or self.bias_update_rate > 0

    def mixes(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is a mixture."""
        return layer >= self.first_dense_layers and self.pattern[layer % len(self.pattern)]

    def __post_init__(self) -> None:
        check_at_least('model.moe', self, 1, 'experts', 'top_k', 'mlp_dim', 'shared_mlp_dim')
        check_at_least(
            'model.moe', self, 0, 'shared_experts', 'first_dense_layers', 'balance_loss', 'z_loss', 'bias_update_rate'
        )
        for field in ('shared_mlp_dim', 'shared_gate'):
            if getattr(self, field) and not self.shared_experts:
                raise UserError(
                    f'model.moe.{field} is given and model.moe.shared_experts 0: there is nothing that it is of; '
                    'nearest that works: model.moe.shared_experts=1'
                )
        if self.top_k > self.experts:
            raise UserError(
                f'model.moe.top_k is {self.top_k} and model.moe.experts {self.experts}: '
                f'a token cannot visit more than all; largest that works: {self.experts}'
            )
        if not self.pattern or not any(self.pattern):
            raise UserError(
                f'model.moe.pattern is {list(self.pattern)}: it must have a true; model.moe=null has no mixture'
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if self.groups < 1 or self.experts % self.groups:
            raise UserError(
                f'model.moe.groups is {self.groups} and model.moe.experts {self.experts}: the first must divide the second; '
                f'nearest that works: {nearest_divisor(self.experts, max(self.groups, 1))}'
            )
        room = self.experts // self.groups * min(self.top_groups, self.groups)
        if not 1 <= self.top_groups <= self.groups or room < self.top_k:
            raise UserError(
                f'model.moe.top_groups is {self.top_groups} of {self.groups} groups of {self.experts // self.groups} experts: '
                f'there must be at least one, no more than all, and room for top_k ({self.top_k}) experts in them'
            )
        if self.groups > 1 and self.group_score == 'top2' and self.experts // self.groups < 2:
            raise UserError('model.moe.group_score is top2 and a group has one expert; use max')


FEED_FORWARDS.register('mlp', MLPConfig)
MIXTURES.register('moe', MoEConfig)
