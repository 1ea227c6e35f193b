"""How a token's place in its document enters: by turning queries and keys, by what is added to embeddings or to scores."""

import dataclasses
from typing import Literal

from weft.model.parts.registry import POSITIONS, check_above_zero
from weft.runtime.errors import UserError

SECTION = 'model.positions'


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched to a longer context than the model was trained on; see `model.layers.rope`."""

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
    # longrope: by pair of dims, for rows of at most `original_positions` tokens, and for longer ones.
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_above_zero(f'{SECTION}.scaling', self, 'factor')
        if self.kind != 'linear' and (self.original_positions or 0) < 1:
            raise UserError(
                f'{SECTION}.scaling.original_positions is {self.original_positions}: {self.kind} needs the context that the '
                'model was trained on, in tokens'
            )
        if self.kind == 'longrope' and not (self.short_factors and self.long_factors):
            raise UserError(
                f'{SECTION}.scaling: longrope needs short_factors and long_factors, one for each pair of dims'
            )

    @property
    def old_context(self) -> int:
        """`original_positions`, which all kinds but linear have."""
        assert self.original_positions is not None
        return self.original_positions

    def check_pairs(self, pairs: int) -> None:
        """Raises UserError where there is not one factor for each pair of dims that turns."""
        for field in ('short_factors', 'long_factors'):
            factors = getattr(self, field)
            if factors is not None and len(factors) != pairs:
                raise UserError(
                    f'{SECTION}.scaling.{field} has {len(factors)} numbers: one is needed for each of the {pairs} pairs of '
                    'dims that turn'
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary positions (RoPE; Su et al. 2021, arXiv:2104.09864): pairs of a query's and a key's dims turn with the position."""

    kind: Literal['rotary'] = 'rotary'
    theta: float = 10_000.0  # base of the wavelengths
    local_theta: float | None = None  # of layers with a window, without scaling; None: as all others
    fraction: float = (
        1.0  # of each head's dims, from the first; the others do not turn. `mla` has a rotary part instead
    )
    layout: Literal['half', 'interleaved'] = 'half'  # dims h and h + H/2 turn together, or 2h and 2h + 1
    pattern: tuple[bool, ...] = (True,)  # which layers turn, over and over from the first; the others know no positions
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_above_zero(SECTION, self, 'theta', 'local_theta')
        if not 0 < self.fraction <= 1:
            raise UserError(f'{SECTION}.fraction is {self.fraction}: it must be above 0 and at most 1')
        if not self.pattern:
            raise UserError(f'{SECTION}.pattern is empty: [true] turns the queries and keys of every layer')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Positions that are rows of a table, added to the embeddings."""

    kind: str
    max: int  # rows: no document may be longer

    def __post_init__(self) -> None:
        if self.max < 1:
            raise UserError(f'{SECTION}.max is {self.max}: {self.kind} positions need a table of that many rows')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedConfig(TableConfig):
    """A vector for each position, learnt (GPT-2, BERT)."""

    kind: Literal['learned'] = 'learned'


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinusoidalConfig(TableConfig):
    """Sines and cosines of the position (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    kind: Literal['sinusoidal'] = 'sinusoidal'


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeConfig:
    """A bias on scores for each head and bucket of distances (T5; Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""

    kind: Literal['relative'] = 'relative'
    buckets: int = 32  # of distances between query and key, each with a bias for each head
    max_distance: int = 128  # from which on all share a bucket

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4:
            raise UserError(
                f'{SECTION}.buckets is {self.buckets}: it must be a multiple of 4, half of them for each direction and half '
                f'of those for single distances; nearest: {max(4, round(self.buckets / 4) * 4)}'
            )
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f'{SECTION}.max_distance is {self.max_distance} and {SECTION}.buckets {self.buckets}: distances below half '
                f'the buckets have their own; at least {self.buckets // 2 + 1}'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositions:
    """Order is known by the causal mask alone."""

    kind: Literal['none'] = 'none'


POSITIONS.register('rotary', RotaryConfig)
POSITIONS.register('learned', LearnedConfig)
POSITIONS.register('sinusoidal', SinusoidalConfig)
POSITIONS.register('relative', RelativeConfig)
POSITIONS.register('none', NoPositions)
