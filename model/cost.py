"""What a model costs by its shapes alone: parameters, matmul FLOPs per token, bytes read per decoded token.

Conventions. A multiplication and an addition are 2 FLOPs; only matmuls count (no norms, softmax, rotations or lookups). A
backward pass is twice its forward pass; what rematerialisation repeats is not counted. Attention is the causal triangle:
in a row of T tokens that are one document a token sees (T + 1) / 2 keys on average, fewer with a window. Of the experts,
those that a token visits. The vocabulary is the real one, unpadded. Of an encoder–decoder a token is one of the target
together with one of the source.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from weft.model.batch import Source
from weft.model.block import Block, has_costs
from weft.model.compute import ComputeConfig
from weft.model.config import LayerSpec, ModelConfig, changed
from weft.model.costs import CostCounter, What
from weft.model.decoder import declared_decoder, weights_of
from weft.model.dots import dots
from weft.model.forward import hidden_states, logits
from weft.model.kv_cache import CacheArray, CacheSize
from weft.model.layers.norm import Norm
from weft.model.linear_forms import take_forms
from weft.model.parameters import Parameter, abstract, declared
from weft.model.stack import declared_cache
from weft.sharding.mesh import MeshConfig, abstract_mesh


def parameters(c: ModelConfig) -> dict[str, int]:
    """Parameters by part; the sum is what a checkpoint holds (with the embedding's padding rows)."""
    parts = Counter[str]()
    for name, weight in weights_of(c).items():
        part = next((whole for whole in ('mtp', 'encoder') if name.startswith(f'{whole}.')), weight.part)
        parts[part] += math.prod(weight.global_shape)
    return dict(parts)


def layer_matrices(c: ModelConfig, spec: LayerSpec, part: str) -> list[tuple[int, ...]]:
    """Rows and columns of each matrix of one part of a layer."""
    shapes = [tuple(map(int, weight.shape)) for weight in _layer_weights(c, spec) if weight.part == part]
    return [shape for shape in shapes if len(shape) > 1]


def layer_parameters(c: ModelConfig, spec: LayerSpec) -> dict[str, int]:
    """Parameters of one layer by part."""
    found = Counter[str]()
    for weight in _layer_weights(c, spec):
        found[weight.part] += weight.size
    return dict(found)


def _layer_weights(c: ModelConfig, spec: LayerSpec) -> Iterable[Parameter]:
    layer = Block(c, spec)
    take_forms(c, [(layer, spec.forms)], whole=False)
    return declared(layer).values()


def norm_parameters(c: ModelConfig) -> int:
    """Parameters of one norm."""
    return sum(weight.size for weight in declared(Norm(c)).values())


def active_parameters(c: ModelConfig) -> int:
    """Parameters that one token meets while decoding: all but `mtp` and the experts that it does not visit."""
    parts = parameters(c)
    parts.pop('mtp', None)
    idle = parts['experts'] * (c.moe.experts - c.moe.top_k) // c.moe.experts if c.moe else 0
    return sum(parts.values()) - idle


def keys_seen_in(c: ModelConfig, spec: LayerSpec, sequence_length: int) -> float:
    """Keys that a token of a row sees in one layer, itself one of them, on average."""
    window = c.attention.reach(sequence_length, spec.windowed)
    if not c.causal:  # as far ahead as behind
        return ((2 * window - 1) * sequence_length - window * (window - 1)) / sequence_length
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


def keys_seen(c: ModelConfig, sequence_length: int) -> float:
    """Keys that a token of a row sees, itself one of them, on average over tokens and layers."""
    return sum(keys_seen_in(c, spec, sequence_length) for spec in c.layer_specs) / c.layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCounter(CostCounter):
    """Adds up by part what one token asks for, on one device that computes nothing twice."""

    compute: ComputeConfig = ComputeConfig(dispatch='all_gather')
    found: dict[str, float] = dataclasses.field(default_factory=dict)
    keys: float = 0.0
    source_keys: float = 0.0

    def keys_seen(self, c: ModelConfig, spec: LayerSpec) -> float:
        return self.keys

    def matmul(self, part: str, tokens: float, inputs: float, outputs: float, last: bool = False) -> None:
        self.grouped_matmul(part, tokens, inputs, outputs)

    def grouped_matmul(self, part: str, rows: float, inputs: float, outputs: float) -> None:
        self.found[part] = self.found.get(part, 0.0) + self.times * 2.0 * rows * inputs * outputs

    def attend(self, part: str, heads: float, query_width: float, value_width: float, keys: float) -> None:
        self.grouped_matmul(part, heads, query_width + value_width, keys)


def forward_flops(
    c: ModelConfig, keys: float, source_keys: float | None = None, what: What = 'score'
) -> dict[str, float]:
    """Matmul FLOPs of one token's forward pass by part, where it sees `keys` keys in each layer on average.

    With an encoder a token of its source sees `source_keys`, and so does the decoder's token; None: as many as `keys`. With
    `decode` as `what` keys and values are in a cache, of an encoder's output too.
    """
    source_keys = keys if source_keys is None else source_keys
    count = TokenCounter(what=what, source=1, keys=keys, source_keys=source_keys)
    if not has_costs(c):
        count.found['layers'] = _traced_layers(c, max(int(keys), 1))
    for kind, times in Counter(c.layer_specs).items() if has_costs(c) else ():
        Block.costs(c, kind, dataclasses.replace(count, times=times))
    count.found['head'] = 2.0 * c.model_dim * (c.vocabulary or 0) * bool(c.head) + 2.0 * c.model_dim**2 * c.head_mlp
    if c.encoder and what != 'decode' and has_costs(c):
        count.found['encoder'] = sum(forward_flops(c.of_encoder, source_keys).values())
    return count.found


@functools.lru_cache(maxsize=256)
def _traced_layers(c: ModelConfig, tokens: int) -> float:
    """FLOPs of one token, and of one of a source, in all layers: traced in rows of so many tokens that see each other."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig())):
        model = abstract(declared_decoder(c, ComputeConfig(attention='reference', grouped_matmul='ragged')), 'float32')
        row_BT = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        if not c.encoder:
            return dots(jax.make_jaxpr(hidden_states)(model, *[row_BT] * 3)).flops / tokens
        score = functools.partial(logits, source=Source(*[row_BT] * 3))
        found = dots(jax.make_jaxpr(score)(model, *[row_BT] * 3))
    return found.flops / tokens - 2.0 * c.model_dim * c.padded_vocabulary


def training_flops(c: ModelConfig, sequence_length: int) -> float:
    """Matmul FLOPs of one token's forward and backward pass, those of `mtp` among them."""
    return sum(flops_per_token(c, 'train', sequence_length).values())


def flops_per_token(c: ModelConfig, what: Literal['train', 'prefill', 'decode'], context: float) -> dict[str, float]:
    """Matmul FLOPs of one token by part.

    Args:
        c: a model with its vocabulary.
        what: `train` forward and backward, the mean over a row of `context` tokens; `prefill` the mean over a prompt of
            `context` tokens, of which the last alone has logits; `decode` one token that sees `context` keys, itself one of
            them, whose keys and values the cache has (of an encoder's output too: as many).
        context: tokens.
    """
    if what == 'decode':
        seen = sum(c.attention.reach(context, kind.windowed) for kind in c.layer_specs) / c.layers
        return forward_flops(c, seen, context, 'decode')
    forward = forward_flops(c, keys_seen(c, int(context)), context)
    if what == 'prefill':
        return forward | {'head': forward['head'] / context}
    if c.mtp.layers:
        last = c.layer_specs[-1]
        count = TokenCounter(keys=keys_seen_in(c, last, int(context)))
        if has_costs(c):
            Block.costs(c, last, count)
        layer = sum(count.found.values()) if has_costs(c) else forward['layers'] / c.layers
        each = layer + forward['head'] + 2 * 2 * c.model_dim**2
        forward['mtp'] = c.mtp.layers * each
    return {part: 3 * flops for part, flops in forward.items()}


def decode_bytes(c: ModelConfig, rows: int, keys: float, weight_bytes: int, cache_bytes: int) -> float:
    """Bytes that decoding one token reads, where `rows` sequences share each reading of the weights.

    Experts: those that at least one of the rows is expected to visit if choices are even. The embedding is a lookup, unless it
    is the head too. `weight_bytes` and `cache_bytes` are bytes a number.
    """
    parts: dict[str, float] = dict(parameters(c))
    parts.pop('mtp', None)
    if not (c.head and c.embedding.tied):
        parts.pop('embedding')
    if c.moe:
        parts['experts'] *= 1 - (1 - c.moe.top_k / c.moe.experts) ** rows
    seen = sum(c.attention.reach(keys, kind.windowed) for kind in c.layer_specs) / c.layers
    return sum(parts.values()) * weight_bytes / rows + cache_numbers_per_token(c) * seen * cache_bytes + state_bytes(c)


def cache_numbers_per_token(c: ModelConfig) -> int:
    """Numbers in every layer's cache for one more token while no window is full: keys and values, or a latent vector."""
    return sum(math.prod(two.shape) - math.prod(one.shape) for one, two in _cache_arrays(c))


def state_bytes(c: ModelConfig) -> int:
    """Bytes that every layer's cache has for a row of any length, such as a recurrent state; computed in bfloat16."""
    sizes = (
        (jnp.dtype(one.dtype).itemsize, math.prod(one.shape), math.prod(two.shape)) for one, two in _cache_arrays(c)
    )
    return sum(width * (2 * one - two) for width, one, two in sizes)


def _cache_arrays(c: ModelConfig) -> Iterator[tuple[CacheArray, CacheArray]]:
    """The arrays of a cache for a row of one token and of two, as if no layer had a window; without what TPUs fill up."""
    if getattr(c.attention, 'window', None):
        c = changed(c, {'attention.window': None})
    caches = (declared_cache(c, CacheSize(rows=1, length=tokens, dtype='bfloat16')) for tokens in (1, 2))
    for one, two in zip(*caches, strict=True):
        yield from zip(one.arrays, two.arrays, strict=True)
