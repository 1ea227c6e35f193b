"""Self-attention: with any grouping of query and KV heads (`gqa`), or from latent vectors (`mla`)."""

import dataclasses
from typing import ClassVar, Literal

from weft.model.parts.numbers import nearest_divisor
from weft.model.parts.registry import MIXERS, UNSET, check_above_zero, check_at_least, filled
from weft.runtime.errors import UserError

SECTION = 'model.attention'


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """What mixes the tokens of a row: attention, or another kind that a file registers with `MIXERS`."""

    kind: str

    def windowed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, sees no more than the window; such layers may have rotary positions of their own."""
        return False

    def reach(self, tokens: float, windowed: bool) -> float:
        """Of so many tokens, itself one of them, how many a query sees at most, in a layer that is `windowed` or not."""
        return tokens

    def resolve(self, model_dim: int) -> 'MixerConfig':
        """The config with what was left out filled in."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(MixerConfig):
    """What all kinds of softmax attention may say."""

    heads: int  # of queries
    qkv_bias: bool = False  # of the projections to queries, keys and values; of `mla` of those to latent vectors
    o_bias: bool = False  # of the output projection
    scale: float | None = None  # of the scores; None: 1 / √(width of a head's query)
    softcap: float | None = None  # c: scores become c tanh(score / c)
    window: int | None = None  # tokens that a query sees, itself one of them; None: all before it
    window_pattern: tuple[bool, ...] = (True,)  # which layers have the window, over and over from the first

    def __post_init__(self) -> None:
        check_at_least(SECTION, self, 1, 'heads', 'window')
        check_above_zero(SECTION, self, 'softcap', 'scale')
        if not self.window_pattern:
            raise UserError(f'{SECTION}.window_pattern is empty: [true] gives every layer the window')

    def windowed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, sees no more than the window."""
        return self.window is not None and self.window_pattern[layer % len(self.window_pattern)]

    def reach(self, tokens: float, windowed: bool) -> float:
        """Of so many tokens, itself one of them, how many a query sees at most, in a layer that is `windowed` or not."""
        return tokens if self.window is None or not windowed else min(self.window, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(SoftmaxConfig):
    """Multi-head, grouped-query (Ainslie et al. 2023, arXiv:2305.13245) or multi-query attention."""

    kind: Literal['gqa'] = 'gqa'
    kv_heads: int = UNSET  # left out: as many as heads (multi-head); 1: multi-query; between: grouped-query
    head_dim: int = UNSET  # of query, key and value; left out: model_dim / heads
    qk_norm: bool | Literal['full'] = False  # RMSNorm of each head's query and key; full: of all heads' together
    sinks: bool = False  # each head has one more score in the softmax, that stands for no token (gpt-oss)
    scale_by_layer: bool = False  # scores of layer l, from 0, are divided by l + 1 (an option of GPT-2's code)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(SECTION, self, 1, 'kv_heads', 'head_dim')
        kv_heads = filled(self.kv_heads, self.heads)
        if self.heads % kv_heads:
            raise UserError(
                f'{SECTION}.kv_heads is {kv_heads} and {SECTION}.heads {self.heads}: kv_heads must divide heads; '
                f'nearest that works: {nearest_divisor(self.heads, kv_heads)}'
            )

    def resolve(self, model_dim: int) -> 'AttentionConfig':
        """The config with kv_heads and head_dim. Raises UserError where model_dim does not divide into heads."""
        if self.head_dim is UNSET and model_dim % self.heads:
            raise UserError(
                f'{SECTION}.heads is {self.heads} and model.model_dim {model_dim}: heads must divide it, unless '
                f'{SECTION}.head_dim is given; nearest that works: {nearest_divisor(model_dim, self.heads)}'
            )
        kv_heads, head_dim = filled(self.kv_heads, self.heads), filled(self.head_dim, model_dim // self.heads)
        return dataclasses.replace(self, kv_heads=kv_heads, head_dim=head_dim)

    @property
    def query_dim(self) -> int:
        """Width of a head's query and key."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(SoftmaxConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from one vector a token."""

    kind: Literal['mla'] = 'mla'
    q_lora_rank: int | None = None  # of the queries' own latent vector; None: queries come from x itself
    kv_lora_rank: int  # of what is cached, beside the rotary part of the key
    qk_nope_head_dim: int  # of a head's query and key, the part without positions
    qk_rope_head_dim: int  # of a head's query and key, the rotary part; one such key for all heads
    v_head_dim: int  # of a head's value

    def __post_init__(self) -> None:
        super().__post_init__()
        dims = ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
        check_at_least(SECTION, self, 1, *dims)
        if self.qk_rope_head_dim % 2:
            raise UserError(
                f'{SECTION}.qk_rope_head_dim is {self.qk_rope_head_dim}: rotary positions turn pairs, so it must be even; '
                f'nearest: {self.qk_rope_head_dim + 1}'
            )

    # What grouped-query attention may have and this has not, for what works on both.
    qk_norm: ClassVar[bool | Literal['full']] = False
    sinks: ClassVar[bool] = False
    scale_by_layer: ClassVar[bool] = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values once they are made: one for each query head."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.query_dim

    @property
    def query_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.v_head_dim


MIXERS.register('gqa', AttentionConfig)
MIXERS.register('mla', MLAConfig)
