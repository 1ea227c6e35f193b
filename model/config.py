"""What a decoder is made of. No mesh in here: the same config runs on any mesh that divides its sizes (model/sizes.py).

How it is computed (dtypes, rematerialisation, backends) is `ComputeConfig`'s: model/compute.py.
"""

import dataclasses
import functools
from typing import Any, Literal

from weft.model.config_parts import (
    EncoderConfig,
    LayerGroup,
    LayerSpec,
    MLAConfig,
    MoEConfig,
    RopeScaling,
    group_layers,
    nearest_divisor,
)
from weft.runtime.errors import UserError

MOST_LAYERS = 10_000  # a mistake rather than a model
MOST_COMPUTED = (
    2**28
)  # numbers of a table of positions that no file holds: it is computed as often as a program is traced
VOCABULARY_MULTIPLE = 128  # the embedding's rows are rounded up to it, on every mesh alike, so that they split evenly


# Fields of a model that matter to training alone: no logit depends on them.
OF_TRAINING = ('dropout', 'mtp_loss', 'moe.balance_loss', 'moe.z_loss', 'moe.bias_update_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of layers, and what stands before and after it. Sizes are counts of units."""

    vocabulary: int | None = None  # tokens; None: as many as the run's tokenizer has
    layers: int
    model_dim: int
    heads: int
    kv_heads: int | None = None  # None: as many as heads (multi-head); 1: multi-query; between: grouped-query
    head_dim: int | None = None  # None: model_dim / heads
    mlp_dim: int
    activation: Literal['swiglu', 'geglu', 'clamped_swiglu', 'gelu', 'gelu_exact', 'relu', 'silu'] = 'swiglu'
    activation_limit: float = 7.0  # of clamped_swiglu (gpt-oss), beyond which gate and up are cut off
    norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'
    norm_epsilon: float = 1e-5
    # x + f(norm(x)); norm(x + f(x)), as in 2017; x + norm(f(norm(x))); x + norm(f(x)), as in OLMo 2 (arXiv:2501.00656)
    norm_order: Literal['pre', 'post', 'sandwich', 'output'] = 'pre'
    norm_offset: float = 0.0  # added to each RMSNorm's scale (Gemma keeps scales as differences from 1)
    positions: Literal['rotary', 'learned', 'sinusoidal', 'relative', 'none'] = 'rotary'
    max_positions: int | None = None  # rows of the table of learned or sinusoidal positions
    relative_buckets: int = 32  # of distances between query and key, each with a bias for each head (T5)
    relative_most: int = 128  # distance from which on all share a bucket
    causal: bool = True  # a token sees those before it; false: all of its document, as in BERT
    encoder: EncoderConfig | None = None  # what the layers attend to beside their own row
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0  # of each head's dims, from the first; the others do not turn
    rotary_pairs: Literal['halves', 'neighbours'] = 'halves'  # dims h and h + H/2 turn together, or 2h and 2h + 1
    rotary_pattern: tuple[bool, ...] = (True,)  # which layers turn, over and over from the first
    local_rope_theta: float | None = None  # of layers with a window, without scaling; None: as all others
    window: int | None = None  # tokens that a query sees, itself one of them; None: all before it
    window_pattern: tuple[bool, ...] = (True,)  # which layers have the window, over and over from the first
    latent: MLAConfig | None = None  # keys and values from a latent vector, instead of kv_heads and head_dim
    query_scale: float | None = None  # of the scores; None: 1 / √(width of a head's query)
    query_scale_by_layer: bool = (
        False  # scores of layer l, from 0, are divided by l + 1 (GPT-2's code has it as an option)
    )
    attention_softcap: float | None = None  # c: scores become c tanh(score / c)
    attention_sinks: bool = False  # each head has one more score in the softmax, that stands for no token
    qk_norm: bool | Literal['full'] = False  # RMSNorm of each head's query and key; full: of all heads' together
    qkv_bias: bool = False  # of the projections to queries, keys and values; with `latent` of those to latent vectors
    o_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False
    bias: bool = False  # of the output and MLP projections and of LayerNorm
    # Without an LM head a model gives its last hidden states, and is there to embed texts.
    head: bool = True
    tied_embedding: bool = True  # the LM head is the embedding
    embedding_scale: float = 1.0  # on what the embedding gives
    segment_kinds: int = 0  # rows of a table that is added to the embedding by what text a token is of (BERT's A and B)
    embedding_norm: bool = False  # a norm between the embedding and the first layer
    head_mlp: bool = False  # before the LM head a layer of model_dim units, with `activation` and a norm (BERT)
    head_bias: bool = False  # of the LM head
    pooler: bool = False  # BERT's layer for its first token, which no logit depends on
    next_sentence: bool = False  # BERT's two logits from that, whether one text follows the other
    logit_scale: float = 1.0  # on the head's logits
    logit_softcap: float | None = None  # c: logits become c tanh(logit / c)
    dropout: float = 0.0  # of the embedding and of each block's output, in training
    moe: MoEConfig | None = None
    # More layers, each of which predicts one token further ahead (DeepSeek-V3, arXiv:2412.19437, section 2.2).
    mtp_layers: int = 0
    mtp_loss: float = 0.3  # weight of the mean of their losses

    def __post_init__(self):
        set_default = lambda field, value: (
            object.__setattr__(self, field, value) if getattr(self, field) is None else None
        )
        for field in ('layers', 'model_dim', 'heads', 'mlp_dim', 'vocabulary', 'kv_heads', 'head_dim', 'window'):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f'model.{field} is {getattr(self, field)}: it must be at least 1')
        set_default('kv_heads', self.heads)
        for field in ('layers', 'mtp_layers'):
            if getattr(self, field) > MOST_LAYERS:
                raise UserError(f'model.{field} is {getattr(self, field)}: at most {MOST_LAYERS} work')
        for field in ('mtp_layers', 'mtp_loss'):
            if not getattr(self, field) >= 0:
                raise UserError(f'model.{field} is {getattr(self, field)}: it cannot be negative; nearest: 0')
        if self.latent:
            set_default('head_dim', self.query_dim)
            if self.head_dim != self.query_dim:
                raise UserError(
                    f'model.head_dim is {self.head_dim}: with model.latent a head is plain_dim + rotary_dim = {self.query_dim} '
                    'wide; leave head_dim out'
                )
        if self.head_dim is None and self.model_dim % self.heads:
            raise UserError(
                f'model.heads is {self.heads} and model.model_dim {self.model_dim}: heads must divide it, unless '
                f'model.head_dim is given; nearest that works: {nearest_divisor(self.model_dim, self.heads)}'
            )
        set_default('head_dim', self.model_dim // self.heads)
        if self.head_dim % 2 and self.positions == 'rotary' and not self.latent:
            raise UserError(
                f'model.head_dim is {self.head_dim}: rotary positions turn pairs, so it must be even; '
                f'nearest: {self.head_dim + 1}'
            )
        if not 0 < self.rotary_fraction <= 1:
            raise UserError(f'model.rotary_fraction is {self.rotary_fraction}: it must be above 0 and at most 1')
        for field in ('short_factors', 'long_factors'):
            factors = getattr(self.rope_scaling, field, None)
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise UserError(
                    f'model.rope_scaling.{field} has {len(factors)} numbers: one is needed for each of the '
                    f'{self.rotary_dim // 2} pairs of dims that turn'
                )
        if self.positions in ('learned', 'sinusoidal') and (self.max_positions or 0) < 1:
            raise UserError(
                f'model.max_positions is {self.max_positions}: {self.positions} positions need a table of that many rows'
            )
        if self.positions == 'sinusoidal' and self.max_positions * self.model_dim > MOST_COMPUTED:
            raise UserError(
                f'model.max_positions is {self.max_positions}: a table of sinusoidal positions is computed for them all; '
                f'nearest that works: {max(MOST_COMPUTED // self.model_dim, 1)}'
            )
        if self.positions == 'sinusoidal' and self.model_dim % 2:
            raise UserError(
                f'model.model_dim is {self.model_dim}: half of sinusoidal positions are sines and half cosines, so it must be '
                f'even; nearest: {self.model_dim + 1}'
            )
        if self.positions == 'relative' and (self.relative_buckets < 4 or self.relative_buckets % 4):
            raise UserError(
                f'model.relative_buckets is {self.relative_buckets}: it must be a multiple of 4, half of them for each '
                f'direction and half of those for single distances; nearest: {max(4, round(self.relative_buckets / 4) * 4)}'
            )
        if self.positions == 'relative' and self.relative_most <= self.relative_buckets // 2:
            raise UserError(
                f'model.relative_most is {self.relative_most} and model.relative_buckets {self.relative_buckets}: distances '
                f'below half the buckets have their own; at least {self.relative_buckets // 2 + 1}'
            )
        if self.encoder and not self.causal:
            raise UserError('model.causal is false and model.encoder is given: a decoder with an encoder is causal')
        if self.mtp_layers and not self.causal:
            raise UserError(
                f'model.mtp_layers is {self.mtp_layers} and model.causal false: there is no next token; set it to 0'
            )
        if self.latent and (self.encoder or not self.causal or self.positions == 'relative'):
            raise UserError('model.latent: attention from latent vectors is causal, without an encoder, and rotary')
        if self.encoder:
            for field in ('moe', 'qk_norm', 'attention_sinks', 'mtp_layers'):
                if getattr(self, field):
                    raise UserError(
                        f'model.{field} is given and model.encoder too: an encoder–decoder has none; leave it out'
                    )
        start = self.encoder.start_token if self.encoder else None
        if start is not None and self.vocabulary is not None and not 0 <= start < self.vocabulary:
            raise UserError(
                f'model.encoder.start_token is {start}: it must be at least 0 and less than model.vocabulary, which is '
                f'{self.vocabulary}'
            )
        if self.next_sentence and not self.pooler:
            raise UserError('model.next_sentence is true: its logits are made of the pooler; set model.pooler=true')
        if not self.window_pattern:
            raise UserError('model.window_pattern is empty: [true] gives every layer the window')
        if not self.rotary_pattern:
            raise UserError('model.rotary_pattern is empty: [true] turns the queries and keys of every layer')
        if not self.head:
            for field in ('encoder', 'mtp_layers', 'head_mlp', 'head_bias', 'next_sentence'):
                if getattr(self, field):
                    raise UserError(f'model.head is false and model.{field} given: it needs the LM head; leave it out')
        if self.latent and (self.query_scale_by_layer or not all(self.rotary_pattern)):
            raise UserError(
                'model.latent: attention from latent vectors has no query_scale_by_layer, and a rotary_pattern of [true]'
            )
        if self.encoder and self.query_scale_by_layer:
            raise UserError(
                'model.query_scale_by_layer is true: it is for models without model.encoder; set it to false'
            )
        if self.latent and (self.kv_heads != self.heads or self.qk_norm or self.attention_sinks):
            raise UserError(
                'model.latent: attention from latent vectors has as many kv_heads as heads, and no qk_norm or attention_sinks'
            )
        for field in ('attention_softcap', 'logit_softcap', 'activation_limit', 'query_scale', 'local_rope_theta'):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise UserError(f'model.{field} is {getattr(self, field)}: it must be above 0')
        if self.heads % self.kv_heads:
            raise UserError(
                f'model.kv_heads is {self.kv_heads} and model.heads {self.heads}: kv_heads must divide heads; '
                f'nearest that works: {nearest_divisor(self.heads, self.kv_heads)}'
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f'model.dropout is {self.dropout}: it must be at least 0 and less than 1')
        for field in ('norm_epsilon', 'rope_theta'):
            if not getattr(self, field) > 0:
                raise UserError(f'model.{field} is {getattr(self, field)}: it must be above 0')
        if self.moe and self.moe.first_dense_layers >= self.layers:
            raise UserError(
                f'model.moe.first_dense_layers is {self.moe.first_dense_layers} and model.layers {self.layers}: '
                f'at most {self.layers - 1} can be dense; model.moe=null makes all of them so'
            )
        if self.moe and not any(kind.experts for kind in self.layer_specs):
            raise UserError(
                f'model.moe.pattern is {list(self.moe.pattern)} and model.layers {self.layers}: no layer would be a mixture; '
                'model.moe=null says so'
            )
        if self.encoder:
            try:
                self.of_encoder  # noqa: B018  (made for its checks)
            except UserError as error:
                raise UserError(str(error).replace('model.', 'model.encoder.')) from None

    @property
    def of_encoder(self) -> 'ModelConfig':
        """The encoder as a stack of its own, which has no vocabulary: the decoder's embedding is its too."""
        e = self.encoder
        assert e is not None
        sizes = {field: getattr(e, field) for field in ('heads', 'kv_heads', 'head_dim', 'mlp_dim')}
        own: dict[str, Any] = {field: value for field, value in sizes.items() if value is not None}
        if e.heads is not None:
            own = {'kv_heads': None, **own}
        own |= dict.fromkeys(('embedding_norm', 'head_mlp', 'head_bias', 'pooler', 'next_sentence'), False)
        return dataclasses.replace(
            self, encoder=None, vocabulary=None, causal=False, layers=e.layers, segment_kinds=0, **own
        )

    @functools.cached_property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """All layers, first to last, as few different ones as can be."""
        return group_layers(self.layer_specs)

    @functools.cached_property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Of each layer, first to last."""

        def kind(layer: int) -> LayerSpec:
            m = self.moe
            experts = m is not None and layer >= m.first_dense_layers and m.pattern[layer % len(m.pattern)]
            windowed = self.window is not None and self.window_pattern[layer % len(self.window_pattern)]
            turned = self.rotary_pattern[layer % len(self.rotary_pattern)] if self.positions == 'rotary' else True
            return LayerSpec(bool(experts), windowed, turned)

        return tuple(kind(layer) for layer in range(self.layers))

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding."""
        assert self.vocabulary is not None, 'the tokenizer decides; see training.config.resolve'
        return -(-self.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def gated(self) -> bool:
        """Whether an MLP has a gate beside its up projection."""
        return self.activation in ('swiglu', 'geglu', 'clamped_swiglu')

    @functools.cached_property
    def pipelined_group(self) -> int:
        """Which of the runs a pipeline splits over its stages; the later one of two as long."""
        return max(range(len(self.layer_groups)), key=lambda number: (self.layer_groups[number].layers, number))

    @property
    def query_dim(self) -> int:
        """Width of a head's query and key."""
        return self.latent.plain_dim + self.latent.rotary_dim if self.latent else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that turn with the position."""
        return self.latent.rotary_dim if self.latent else 2 * int(self.head_dim * self.rotary_fraction / 2)

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.latent.value_dim if self.latent else self.head_dim


def needs_head(c: ModelConfig, what: str) -> None:
    """Raises UserError for a model without an LM head."""
    if not c.head:
        raise UserError(
            f'model.head is false: {what} needs an LM head, which this model has not; scripts/score.py gives its hidden '
            'states (--logits) and embeddings of texts (--embeddings)'
        )
