"""What a model is made of. No mesh in here: the same config runs on any mesh that divides its sizes (model/sizes.py).

How it is computed (dtypes, rematerialisation, backends) is `ComputeConfig`'s: model/compute.py. The parts check themselves,
each in its file under model/parts/; here stands what crosses them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any

from weft.model.layer_groups import LayerGroup, LayerSpec, group_layers
from weft.model.parts.attention import AttentionConfig, MLAConfig
from weft.model.parts.ends import (
    EmbeddingConfig,
    EncoderConfig,
    HeadConfig,
    MTPConfig,
    NormConfig,
    PoolerConfig,
    check_layers,
)
from weft.model.parts.feed_forward import MLPConfig, MoEConfig
from weft.model.parts.linear_forms import LinearForm
from weft.model.parts.positions import (
    LearnedConfig,
    NoPositions,
    RelativeConfig,
    RopeScaling,
    RotaryConfig,
    SinusoidalConfig,
    TableConfig,
)
from weft.model.parts.registry import (
    ADAPTERS,
    FEED_FORWARDS,
    MIXERS,
    MIXTURES,
    POSITIONS,
    WEIGHTS,
    check_at_least,
)
from weft.runtime.errors import UserError
from weft.runtime.registry import Registry

# Numbers of a table of positions that no file holds: it is computed as often as a program is traced.
MOST_COMPUTED = 2**28
VOCABULARY_MULTIPLE = 128  # the embedding's rows are rounded up to it, on every mesh alike, so that they split evenly
# Fields of a model that matter to training alone: no logit depends on them.
OF_TRAINING = ('dropout', 'mtp.loss', 'moe.balance_loss', 'moe.z_loss', 'moe.bias_update_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of layers, and what stands before and after it. Sizes are counts of units."""

    vocabulary: int | None = None  # tokens; None: as many as the run's tokenizer has
    layers: int
    model_dim: int  # of the activations between layers
    # The kinds that come with the project, for type checkers; the registries have those that other files add, too.
    attention: Annotated[AttentionConfig | MLAConfig, MIXERS]
    positions: Annotated[RotaryConfig | LearnedConfig | SinusoidalConfig | RelativeConfig | NoPositions, POSITIONS] = (
        RotaryConfig()
    )
    mlp: Annotated[MLPConfig, FEED_FORWARDS]
    moe: Annotated[MoEConfig, MIXTURES] | None = None  # in the place of the MLP, in the layers that it says
    norm: NormConfig = NormConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    # None: the model gives its last hidden states, and is there to embed texts.
    head: HeadConfig | None = HeadConfig()
    pooler: PoolerConfig | None = None
    encoder: EncoderConfig | None = None  # what the layers attend to beside their own row
    mtp: MTPConfig = MTPConfig()
    # Of layers' linear maps: what is learnt beside them, and how their weights are kept (model/linear_forms.py).
    adapter: Annotated[LinearForm, ADAPTERS] | None = None
    weights: tuple[Annotated[LinearForm, WEIGHTS], ...] | None = None
    causal: bool = True  # a token sees those before it; false: all of its document, as in BERT
    dropout: float = 0.0  # of the embedding and of each block's output, in training

    def __post_init__(self) -> None:
        check_at_least('model', self, 1, 'layers', 'model_dim', 'vocabulary')
        check_layers('model', self.layers)
        if not 0 <= self.dropout < 1:
            raise UserError(f'model.dropout is {self.dropout}: it must be at least 0 and less than 1')
        object.__setattr__(self, 'attention', self.attention.resolve(self.model_dim))
        self._check_positions()
        self._check_direction()
        self._check_mixture()
        if self.encoder:
            self._check_encoder()
        if self.head is None:
            for field, given in (
                ('encoder', self.encoder),
                ('mtp.layers', self.mtp.layers),
                ('pooler.next_sentence', self.next_sentence),
            ):
                if given:
                    raise UserError(f'model.head is null and model.{field} given: it needs the LM head; leave it out')

    def _check_positions(self) -> None:
        p, a = self.positions, self.attention
        if p.kind == 'rotary':
            if a.kind == 'gqa' and a.head_dim % 2:
                raise UserError(
                    f'model.attention.head_dim is {a.head_dim}: rotary positions turn pairs, so it must be even; '
                    f'nearest: {a.head_dim + 1}'
                )
            if a.kind == 'mla' and not all(p.pattern):
                raise UserError(
                    f'model.positions.pattern is {list(p.pattern)}: with model.attention.kind mla all layers turn; leave it out'
                )
            if p.scaling:
                p.scaling.check_pairs(self.rotary_dim // 2)
        if p.kind == 'sinusoidal':
            if p.max * self.model_dim > MOST_COMPUTED:
                raise UserError(
                    f'model.positions.max is {p.max}: a table of sinusoidal positions is computed for them all; '
                    f'nearest that works: {max(MOST_COMPUTED // self.model_dim, 1)}'
                )
            if self.model_dim % 2:
                raise UserError(
                    f'model.model_dim is {self.model_dim}: half of sinusoidal positions are sines and half cosines, so it '
                    f'must be even; nearest: {self.model_dim + 1}'
                )

    def _check_direction(self) -> None:
        if self.attention.kind == 'mla' and (self.encoder or not self.causal or self.positions.kind != 'rotary'):
            raise UserError(
                'model.attention.kind is mla: it is causal, without model.encoder, and its positions rotary'
            )
        if self.causal:
            return
        if self.encoder:
            raise UserError('model.causal is false and model.encoder is given: a decoder with an encoder is causal')
        if self.mtp.layers:
            raise UserError(
                f'model.mtp.layers is {self.mtp.layers} and model.causal false: there is no next token; set it to 0'
            )

    def _check_mixture(self) -> None:
        m = self.moe
        if m and m.first_dense_layers >= self.layers:
            raise UserError(
                f'model.moe.first_dense_layers is {m.first_dense_layers} and model.layers {self.layers}: '
                f'at most {self.layers - 1} can be dense; model.moe=null makes all of them so'
            )
        if m and not any(m.mixes(layer) for layer in range(self.layers)):
            raise UserError(
                f'model.moe.pattern is {list(m.pattern)} and model.layers {self.layers}: no layer would be a mixture; '
                'model.moe=null says so'
            )

    def _check_encoder(self) -> None:
        e, a = self.encoder, self.attention
        assert e is not None
        if not isinstance(a, AttentionConfig):
            raise UserError(f'model.attention.kind is {a.kind} and model.encoder is given: an encoder–decoder has gqa')
        unfit = {
            'moe': self.moe,
            'attention.qk_norm': a.qk_norm,
            'attention.sinks': a.sinks,
            'mtp.layers': self.mtp.layers,
        }
        for field, given in unfit.items():
            if given:
                raise UserError(
                    f'model.{field} is given and model.encoder too: an encoder–decoder has none; leave it out'
                )
        if a.scale_by_layer:
            raise UserError(
                'model.attention.scale_by_layer is true: it is for models without model.encoder; set it to false'
            )
        if e.start_token is not None and self.vocabulary is not None and not 0 <= e.start_token < self.vocabulary:
            raise UserError(
                f'model.encoder.start_token is {e.start_token}: it must be at least 0 and less than model.vocabulary, which '
                f'is {self.vocabulary}'
            )
        try:
            self.of_encoder  # noqa: B018  (made for its checks)
        except UserError as error:
            raise UserError(encoder_field(str(error))) from None

    @property
    def of_encoder(self) -> 'ModelConfig':
        """The encoder as a stack of its own, which has no vocabulary: the decoder's embedding is its too."""
        e, a = self.encoder, self.attention
        assert e is not None
        heads: dict[str, Any] = {} if e.heads is None else {'heads': e.heads, 'kv_heads': e.heads}
        heads |= {field: getattr(e, field) for field in ('kv_heads', 'head_dim') if getattr(e, field) is not None}
        return dataclasses.replace(
            self,
            encoder=None,
            vocabulary=None,
            causal=False,
            layers=e.layers,
            attention=dataclasses.replace(a, **heads),
            mlp=self.mlp if e.mlp_dim is None else dataclasses.replace(self.mlp, dim=e.mlp_dim),
            embedding=dataclasses.replace(self.embedding, token_types=0, norm=False),
            head=self.head and dataclasses.replace(self.head, mlp=False, bias=False),
            pooler=None,
        )

    @functools.cached_property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """All layers, first to last, as few different ones as can be."""
        return group_layers(self.layer_specs)

    @functools.cached_property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Of each layer, first to last."""
        turns = self.positions.pattern if self.positions.kind == 'rotary' else (True,)
        return tuple(
            LayerSpec(
                experts=self.moe is not None and self.moe.mixes(layer),
                windowed=self.attention.windowed(layer),
                turned=turns[layer % len(turns)],
                forms=self.forms_of(layer),
            )
            for layer in range(self.layers)
        )

    def forms_of(self, layer: int) -> tuple[int, ...]:
        """Which of `weights` name a layer; those of `mtp` follow the stack's."""
        return tuple(number for number, form in enumerate(self.weights or ()) if form.names(layer))

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding."""
        assert self.vocabulary is not None, 'the tokenizer decides: see RunConfig.with_vocabulary'
        return -(-self.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @functools.cached_property
    def pipelined_group(self) -> int:
        """Which of the groups of layers a pipeline splits over its stages; the later one of two as long."""
        return max(range(len(self.layer_groups)), key=lambda number: (self.layer_groups[number].layers, number))

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that turn with the position, where positions are rotary."""
        if self.attention.kind == 'mla':
            return self.attention.qk_rope_head_dim
        fraction = self.positions.fraction if self.positions.kind == 'rotary' else 1.0
        return 2 * int(self.attention.head_dim * fraction / 2)

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """Of rotary positions; None: there is none."""
        return self.positions.scaling if self.positions.kind == 'rotary' else None

    @property
    def max_positions(self) -> int | None:
        """Tokens that a document may have at most; None: any number, for there is no table of positions."""
        return self.positions.max if isinstance(self.positions, TableConfig) else None

    @property
    def head_mlp(self) -> bool:
        """Whether a layer stands before the LM head."""
        return self.head is not None and self.head.mlp

    @property
    def head_bias(self) -> bool:
        """Whether the LM head has a bias."""
        return self.head is not None and self.head.bias

    @property
    def next_sentence(self) -> bool:
        """Whether there are BERT's two logits for the next sentence."""
        return self.pooler is not None and self.pooler.next_sentence


# The registries of the fields that have kinds, and the dataclasses of those that have none.
PARTS: dict[str, Registry | type] = {
    'attention': MIXERS,
    'positions': POSITIONS,
    'mlp': FEED_FORWARDS,
    'moe': MIXTURES,
    'norm': NormConfig,
    'embedding': EmbeddingConfig,
    'head': HeadConfig,
    'pooler': PoolerConfig,
    'encoder': EncoderConfig,
    'mtp': MTPConfig,
    'adapter': ADAPTERS,
    'weights': WEIGHTS,
}


def model_of(fields: Mapping[str, Any]) -> ModelConfig:
    """The model of dotted fields, as overrides name them: `{'layers': 2, 'attention.heads': 8, 'positions.kind': 'learned'}`.

    A part may also be given whole (`{'moe': MoEConfig(…)}`), and some of its fields beside it, which count.
    """
    whole: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        part, dot, field = key.partition('.')
        if dot:
            inner.setdefault(part, {})[field] = value
        else:
            whole[key] = value
    for part, values in inner.items():
        found = PARTS[part]
        if whole.get(part) is not None:
            whole[part] = _replaced(whole[part], values)
        else:
            make = found.config(values.pop('kind', None)) if isinstance(found, Registry) else found
            whole[part] = make(**values)
    return ModelConfig(**whole)


def _replaced(part: Any, values: Mapping[str, Any]) -> Any:
    """A part with other values of its fields, those of a part of it dotted (`scaling.factor`)."""
    own = {field: value for field, value in values.items() if '.' not in field}
    for key in values.keys() - own.keys():
        inner, _, field = key.partition('.')
        own[inner] = _replaced(own.get(inner, getattr(part, inner)), {field: values[key]})
    return dataclasses.replace(part, **own)


def changed(c: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
    """The model with other values of dotted fields; a part whose `kind` is among them begins with that kind's own defaults."""
    now = {field.name: getattr(c, field.name) for field in dataclasses.fields(c)}
    for key in fields:
        part, _, field = key.partition('.')
        if field == 'kind' and isinstance(PARTS[part], Registry):
            del now[part]
    return model_of({**now, **fields})


def encoder_field(text: str) -> str:
    """A message on an encoder as a stack of its own, with its fields as `model.encoder` has them."""
    text = text.replace('model.attention.', 'model.').replace('model.mlp.dim', 'model.mlp_dim')
    return text.replace('model.', 'model.encoder.')


def needs_head(c: ModelConfig, what: str) -> None:
    """Raises UserError for a model without an LM head."""
    if not c.head:
        raise UserError(
            f'model.head is null: {what} needs an LM head, which this model has not; scripts/score.py gives its hidden '
            'states (--logits) and embeddings of texts (--embeddings)'
        )
