"""What stands around the layers and between them: norms, the embedding, the LM head, an encoder, layers that predict ahead."""

import dataclasses
from typing import Literal

from weft.model.parts.registry import check_above_zero, check_at_least
from weft.runtime.errors import UserError

MOST_LAYERS = 10_000  # a mistake rather than a model


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """The norms, and where they stand in a layer."""

    kind: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'
    epsilon: float = 1e-5
    # x + f(norm(x)); norm(x + f(x)), as in 2017; x + norm(f(norm(x))); x + norm(f(x)), as in OLMo 2 (arXiv:2501.00656)
    order: Literal['pre', 'post', 'sandwich', 'output'] = 'pre'
    offset: float = 0.0  # added to each RMSNorm's scale (Gemma keeps scales as differences from 1)
    bias: bool = False  # of LayerNorm

    def __post_init__(self) -> None:
        check_above_zero('model.norm', self, 'epsilon')
        if self.bias and self.kind == 'rmsnorm':
            raise UserError('model.norm.bias is true and model.norm.kind rmsnorm, which has none; leave it out')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """From token ids to activations."""

    tied: bool = True  # the LM head is the embedding
    scale: float = 1.0  # on what the embedding gives
    token_types: int = 0  # rows of a table that is added by what text a token is of (BERT's sentences A and B)
    norm: bool = False  # a norm between the embedding and the first layer

    def __post_init__(self) -> None:
        check_at_least('model.embedding', self, 0, 'token_types')


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """From activations to logits."""

    mlp: bool = False  # before it a layer of model_dim units, with the MLP's activation and a norm (BERT)
    bias: bool = False
    scale: float = 1.0  # on the logits
    softcap: float | None = None  # c: logits become c tanh(logit / c)

    def __post_init__(self) -> None:
        check_above_zero('model.head', self, 'softcap')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """BERT's layer for its first token, which no logit of a token depends on."""

    next_sentence: bool = False  # two logits from it, whether one text follows the other


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): layers that predict one token further each."""

    layers: int = 0
    loss: float = 0.3  # weight of the mean of their losses

    def __post_init__(self) -> None:
        check_at_least('model.mtp', self, 0, 'layers', 'loss')
        check_layers('model.mtp', self.layers)


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

    def __post_init__(self) -> None:
        check_at_least('model.encoder', self, 1, 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp_dim')
        check_layers('model.encoder', self.layers)


def check_layers(section: str, layers: int) -> None:
    """Raises UserError for more layers than any model has."""
    if layers > MOST_LAYERS:
        raise UserError(f'{section}.layers is {layers}: at most {MOST_LAYERS} work')
