"""What a decoder is made of. No mesh in here: the same config runs on any mesh whose axes divide its sizes (see `sizes`)."""

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp

from sharding.errors import UserError, nearest
from sharding.mesh import BATCH, FSDP, SEQUENCE, Divides

Dispatch = Literal['auto', 'all_gather', 'all_to_all', 'ragged']
VOCABULARY_MULTIPLE = 128  # the embedding's rows are rounded up to it, on every mesh alike, so that they split evenly


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts layer. Every token visits its `top_k` experts and all shared ones; `all_to_all` alone drops some."""

    experts: int
    top_k: int = 2
    mlp_dim: int  # hidden units of one expert
    shared_experts: int = 0  # experts that every token visits, without a router
    first_dense_layers: int = 0  # layers before the first mixture, with a plain MLP of model.mlp_dim
    router: Literal['softmax', 'sigmoid'] = 'softmax'
    renormalize: bool = True  # the chosen experts' weights add up to 1
    routed_scale: float = 1.0  # factor on the routed experts' sum
    balance_loss: float = 0.01  # weight of the sequence-level balance loss (DeepSeek-V3, arXiv:2412.19437, eq. 17–20)
    z_loss: float = 0.001  # weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5)
    bias_update_rate: float = 0.0  # step of the choice's bias (DeepSeek-V3, section 2.1.2: 0.001); 0: there is no bias
    dispatch: Dispatch = 'auto'  # how tokens reach their experts: see model/dispatch.py
    capacity_factor: float = (
        1.25  # all_to_all: rows of an expert's buffer by its even share; what does not fit is dropped
    )

    def __post_init__(self):
        for field in ('experts', 'top_k', 'mlp_dim'):
            if getattr(self, field) < 1:
                raise UserError(f'model.moe.{field} is {getattr(self, field)}: it must be at least 1')
        for field in ('shared_experts', 'first_dense_layers', 'balance_loss', 'z_loss', 'bias_update_rate'):
            if not getattr(self, field) >= 0:
                raise UserError(f'model.moe.{field} is {getattr(self, field)}: it cannot be negative; nearest: 0')
        if self.top_k > self.experts:
            raise UserError(
                f'model.moe.top_k is {self.top_k} and model.moe.experts {self.experts}: '
                f'a token cannot visit more than all; largest that works: {self.experts}'
            )
        if self.dispatch not in get_args(Dispatch):
            raise UserError(
                f'model.moe.dispatch is {self.dispatch!r}: no such way{nearest(self.dispatch, get_args(Dispatch))}'
            )
        if not 0 < self.capacity_factor < math.inf:
            raise UserError(
                f'model.moe.capacity_factor is {self.capacity_factor}: it must be a number above 0; 1 makes room for even '
                f'choices, model.moe.dispatch=ragged for any'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder stack. Sizes are counts of units; positions are rotary."""

    vocabulary: int | None = None  # tokens; None: as many as the run's tokenizer has
    layers: int
    model_dim: int
    heads: int
    kv_heads: int | None = None  # None: as many as heads (multi-head); 1: multi-query; between: grouped-query
    head_dim: int | None = None  # None: model_dim / heads
    mlp_dim: int
    activation: Literal['swiglu', 'geglu', 'gelu', 'relu'] = 'swiglu'
    norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    window: int | None = None  # tokens that a query sees, itself one of them; None: all before it
    qk_norm: bool = False  # RMSNorm of each head's query and key
    qkv_bias: bool = False
    bias: bool = False  # of the output and MLP projections and of LayerNorm
    tied_embedding: bool = True  # the LM head is the embedding
    dropout: float = 0.0  # of the embedding and of each block's output, in training
    moe: MoEConfig | None = None
    dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'  # of compute; parameters are at least float32
    remat: Literal['none', 'dots', 'block'] = 'none'  # kept for the backward pass: all; matmul results; a layer's input
    attention: Literal['auto', 'reference', 'blockwise', 'flash', 'splash'] = 'auto'
    experts: Literal['auto', 'reference', 'blocked', 'ragged'] = 'auto'  # backend of the experts' grouped matmul

    def __post_init__(self):
        set_default = lambda field, value: (
            object.__setattr__(self, field, value) if getattr(self, field) is None else None
        )
        for field in ('layers', 'model_dim', 'heads', 'mlp_dim', 'vocabulary', 'kv_heads', 'head_dim', 'window'):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f'model.{field} is {getattr(self, field)}: it must be at least 1')
        set_default('kv_heads', self.heads)
        if self.head_dim is None and self.model_dim % self.heads:
            raise UserError(
                f'model.heads is {self.heads} and model.model_dim {self.model_dim}: heads must divide it, unless '
                f'model.head_dim is given; nearest that works: {_nearest_divisor(self.model_dim, self.heads)}'
            )
        set_default('head_dim', self.model_dim // self.heads)
        if self.head_dim % 2:
            raise UserError(
                f'model.head_dim is {self.head_dim}: rotary positions turn pairs, so it must be even; '
                f'nearest: {self.head_dim + 1}'
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f'model.kv_heads is {self.kv_heads} and model.heads {self.heads}: kv_heads must divide heads; '
                f'nearest that works: {_nearest_divisor(self.heads, self.kv_heads)}'
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

    @property
    def parameter_dtype(self):
        """Of parameters, gradients and optimizer state: at least float32."""
        return jnp.promote_types(self.dtype, 'float32')

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding."""
        assert self.vocabulary is not None, 'the tokenizer decides; see training.config.resolve'
        return -(-self.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def gated(self) -> bool:
        """Whether an MLP has a gate beside its up projection."""
        return self.activation in ('swiglu', 'geglu')

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """Runs of like layers, first to last: ('dense' or 'moe', how many)."""
        dense = self.moe.first_dense_layers if self.moe else self.layers
        return tuple((kind, n) for kind, n in (('dense', dense), ('moe', self.layers - dense)) if n)

    @property
    def longest_group(self) -> int:
        """Which of the groups a pipeline splits over its stages; the later one of two as long."""
        return max(range(len(self.groups)), key=lambda number: (self.groups[number][1], number))


def sizes(c: ModelConfig) -> list[Divides]:
    """What the mesh must divide to hold this model."""
    rules = [
        Divides(('tensor',), 'model.heads', c.heads),
        Divides(('tensor',), 'model.kv_heads', c.kv_heads, or_repeats=True),
        Divides(('tensor',), 'model.kv_heads × model.head_dim', c.kv_heads * c.head_dim),
        Divides(FSDP, 'model.model_dim', c.model_dim),
        Divides(('tensor',), 'model.model_dim', c.model_dim),
        Divides(
            (*FSDP, 'tensor'),
            'the padded vocabulary',
            VOCABULARY_MULTIPLE if c.vocabulary is None else c.padded_vocabulary,
        ),
    ]
    kind, layers = c.groups[c.longest_group]
    name = 'model.layers' if len(c.groups) == 1 else f'the number of {kind} layers in a row'
    rules.append(Divides(('stage',), name, layers))
    if any(kind == 'dense' for kind, _ in c.groups):
        rules.append(Divides(('tensor',), 'model.mlp_dim', c.mlp_dim))
    if c.moe:
        rules += [
            Divides(('expert',), 'model.moe.experts', c.moe.experts),
            Divides(('tensor',), 'model.moe.mlp_dim', c.moe.mlp_dim),
        ]
    return rules


def batch_sizes(
    batch: int, sequence_length: int, accumulation: int = 1, microbatches: int | None = None
) -> list[Divides]:
    """What the mesh must divide to hold a training batch."""
    part = 'training.batch' if accumulation == 1 else 'training.batch / training.accumulation'
    rules = [
        Divides((*BATCH, 'stage'), part, batch // accumulation),
        Divides(SEQUENCE, 'training.sequence_length', sequence_length),
        Divides(('context',), 'training.sequence_length', sequence_length, twice=True),
    ]
    if microbatches is not None:
        rules += [
            Divides(('stage',), 'training.microbatches', microbatches),
            Divides(BATCH, f'{part} / training.microbatches', batch // accumulation // microbatches),
        ]
    return rules


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
