"""The parts of a model's config that are configs themselves, and how layers of several kinds are grouped."""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from weft.runtime.errors import UserError

MOST_TRIED = 2**20  # divisors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched to a longer context than the model was trained on; see `model.rope`."""

    kind: Literal['linear', 'dynamic', 'yarn', 'llama3', 'longrope']
    factor: float  # new context by old
    original_positions: int | None = None  # the old context, in tokens; linear needs none
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp begins and ends at whole dims
    attention_factor: float | None = None  # yarn, longrope: on queries and keys alike; None: the paper's, of `factor`
    mscale_all_dim: float = 0.0  # yarn: scores grow by (0.1 · this · ln factor + 1)², as in DeepSeek-V2's code
    short_factors: tuple[float, ...] | None = (
        None  # longrope: by pair of dims, for rows of at most `original_positions`
    )
    long_factors: tuple[float, ...] | None = None  # longrope: for longer rows

    def __post_init__(self):
        if not self.factor > 0:
            raise UserError(f'model.rope_scaling.factor is {self.factor}: it must be above 0')
        if self.kind != 'linear' and (self.original_positions or 0) < 1:
            raise UserError(
                f'model.rope_scaling.original_positions is {self.original_positions}: {self.kind} needs the context that the '
                'model was trained on, in tokens'
            )
        if self.kind == 'longrope' and not (self.short_factors and self.long_factors):
            raise UserError(
                'model.rope_scaling: longrope needs short_factors and long_factors, one for each pair of dims'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from one vector a token."""

    q_rank: int | None = None  # of the queries' own latent vector; None: queries come from x itself
    kv_rank: int  # of what is cached, beside the rotary part of the key
    plain_dim: int  # of a head's query and key, the part without positions
    rotary_dim: int  # of a head's query and key, the rotary part; one such key for all heads
    value_dim: int  # of a head's value

    def __post_init__(self):
        for field in ('q_rank', 'kv_rank', 'plain_dim', 'rotary_dim', 'value_dim'):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f'model.latent.{field} is {getattr(self, field)}: it must be at least 1')
        if self.rotary_dim % 2:
            raise UserError(
                f'model.latent.rotary_dim is {self.rotary_dim}: rotary positions turn pairs, so it must be even; '
                f'nearest: {self.rotary_dim + 1}'
            )


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What tells one layer of a stack from another."""

    experts: bool = False  # a mixture of experts; else an MLP
    windowed: bool = False  # attention sees `window` tokens, and turns by `local_rope_theta`; else all of them
    turned: bool = True  # where positions are rotary: queries and keys turn; else the layer knows no positions


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers in a row that repeat one sequence of kinds: what one scan goes over."""

    specs: tuple[LayerSpec, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.specs) * self.repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts layer. Every token visits its `top_k` experts and all shared ones.

    Of `compute.dispatch` `all_to_all` alone drops some.
    """

    experts: int
    top_k: int = 2
    mlp_dim: int  # hidden units of one expert
    shared_experts: int = 0  # experts that every token visits, without a router
    shared_mlp_dim: int | None = None  # hidden units of one of those; None: as many as of the others
    shared_gate: bool = False  # what the shared experts give is weighed by a sigmoid of the token (Qwen2-MoE)
    first_dense_layers: int = 0  # layers before the first mixture, with a plain MLP of model.mlp_dim
    pattern: tuple[bool, ...] = (True,)  # which layers are mixtures, over and over from the first; false: a plain MLP
    router: Literal['softmax', 'sigmoid'] = 'softmax'
    router_bias: bool = False  # of the router's logits
    bias: bool = False  # of each expert's projections
    renormalize: bool = True  # the chosen experts' weights add up to 1
    groups: int = (
        1  # of experts side by side: a token chooses groups first (DeepSeek-V2, arXiv:2405.04434, section 2.1.3)
    )
    top_groups: int = 1  # groups that a token chooses
    group_score: Literal['max', 'top2'] = 'top2'  # of a group: its best expert's score, or the sum of its two best
    choice_bias: bool = False  # a bias on the scores by which experts are chosen; bias_update_rate moves it
    routed_scale: float = 1.0  # factor on the routed experts' sum
    balance_loss: float = 0.01  # weight of the sequence-level balance loss (DeepSeek-V3, arXiv:2412.19437, eq. 17–20)
    z_loss: float = 0.001  # weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5)
    bias_update_rate: float = (
        0.0  # step of the choice's bias (DeepSeek-V3, section 2.1.2: 0.001); above 0: there is one
    )

    @property
    def shared_dim(self) -> int:
        """Hidden units of all shared experts together, which are one MLP."""
        return self.shared_experts * (self.shared_mlp_dim or self.mlp_dim)

    @property
    def has_choice_bias(self) -> bool:
        """Whether experts are chosen by their scores and a bias."""
        return self.choice_bias or self.bias_update_rate > 0

    def __post_init__(self):
        for field in ('experts', 'top_k', 'mlp_dim', 'shared_mlp_dim'):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f'model.moe.{field} is {getattr(self, field)}: it must be at least 1')
        for field in ('shared_experts', 'first_dense_layers', 'balance_loss', 'z_loss', 'bias_update_rate'):
            if not getattr(self, field) >= 0:
                raise UserError(f'model.moe.{field} is {getattr(self, field)}: it cannot be negative; nearest: 0')
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder, whose output each layer of the decoder attends to; in what is not said here it is like the decoder.

    It sees all of its row, and shares the decoder's embedding.
    """

    layers: int
    heads: int | None = None  # None: as the decoder, here and below
    kv_heads: int | None = None  # None: as the decoder, or with heads of its own as many as those
    head_dim: int | None = None
    mlp_dim: int | None = None
    start_token: int | None = None  # what the decoder reads first; None: the tokenizer's start of a document

    def __post_init__(self):
        for field in ('layers', 'heads', 'kv_heads', 'head_dim', 'mlp_dim'):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f'model.encoder.{field} is {getattr(self, field)}: it must be at least 1')


@functools.cache
def group_layers(specs: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """Splits the layers into repeated patterns to scan: fewest traced layers, then fewest scans, then the longest first scan.

    A dynamic program from the last layer back: the best split of the layers from `first` on is a group of some n layers and
    the best split of the layers after those. Vectors over n make it L steps of NumPy, for models of thousands of layers.
    """
    L = len(specs)
    number = {spec: i for i, spec in enumerate(dict.fromkeys(specs))}
    spec_L = np.array([number[spec] for spec in specs])
    # Of the best split of the layers from each one on: layers traced, groups, and the first group's pattern and layers.
    traced, groups, pattern, layers = np.zeros((4, L + 1), np.int64)
    same = np.zeros(L + 1, np.int64)  # [d]: so many layers from `first` on equal those d further on
    for first in reversed(range(L)):
        left = L - first
        same[1:left] = np.where(spec_L[first + 1 :] == spec_L[first], same[1:left] + 1, 0)
        patterns = _shortest_patterns(same[:left])
        # [n - 1], of a first group of n layers; the two costs in one number, for there are at most L groups.
        cost = (patterns[1:] + traced[first + 1 :]) * (L + 1) + 1 + groups[first + 1 :]
        n = left - int(np.argmin(cost[::-1]))  # the longest of those that cost the least
        traced[first], groups[first] = divmod(int(cost[n - 1]), L + 1)
        pattern[first], layers[first] = patterns[n], n
    found, first = list[LayerGroup](), 0
    while first < L:
        unit, n = int(pattern[first]), int(layers[first])
        found.append(LayerGroup(specs[first : first + unit], n // unit))
        first += n
    return tuple(found)


def _shortest_patterns(same: np.ndarray) -> np.ndarray:
    """[n]: the layers of the shortest pattern that the next n layers repeat a whole number of times, at worst n itself.

    `same[d]`: so many of the next layers equal those d further on. A pattern of d layers is then repeated by n layers where d
    divides n and n - d <= same[d].
    """
    left = len(same)
    shortest = np.arange(left + 1)
    repeated = 1 + np.flatnonzero(same[1:] >= shortest[1:left])  # patterns that stand there twice at least, ascending
    while len(repeated):
        d = repeated[0]
        multiples = slice(d, d + same[d] + 1, d)
        shortest[multiples] = np.minimum(shortest[multiples], d)
        repeated = repeated[1:][shortest[repeated[1:]] == repeated[1:]]  # others only repeat a shorter pattern
    return shortest


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to `wanted`, the smaller of two; of the largest n among those that are soon found."""
    small = [d for d in range(1, min(math.isqrt(n), MOST_TRIED) + 1) if n % d == 0]
    return min([*small, *(n // d for d in small)], key=lambda d: (abs(d - wanted), d))
