"""All weights of a model by its config alone: shape, the mesh axes that split each, those over which it is gathered to be used.

What the modules of model/ declare, written down once more so that a plan needs neither a mesh nor JAX's tracing: tests hold
it to the model's own shapes and layouts. Layers that are alike are one `Group`, so that nothing here grows with the depth.

Letters as in model/layers.py; Q and R are the latent vectors of queries and of keys and values, r a rotary key.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Literal

from weft.model.config import ModelConfig
from weft.sharding.mesh import FSDP, MeshConfig

EVERY = (*FSDP, 'tensor')
EXPERTS = ('expert', 'data', 'context', 'tensor')
Where = Literal['pipeline', 'stack', 'encoder', 'ahead']


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array; of a layer that is stacked with others, the array of one layer."""

    name: str  # as in the model
    part: (
        str  # of the bill: embedding, head, norms, attention, cross_attention, mlp, router, experts, shared_experts, …
    )
    shape: tuple[int, ...]
    split: tuple[str, ...] = ()  # axes that split one of its dims
    gathered: tuple[str, ...] = ()  # those of them over which it is gathered where it is used
    wide: bool = False  # kept in float32 even where the others are narrower

    @functools.cached_property
    def size(self) -> int:
        """Numbers in all."""
        return math.prod(self.shape)

    def shard(self, mesh: MeshConfig) -> float:
        """Numbers of one device."""
        return self.size / mesh.span(self.split)

    @property
    def narrow_in_use(self) -> bool:
        """Whether decoding keeps it in the compute dtype: see `inference.run.in_compute_dtype`."""
        name = self.name.rpartition('.')[2]
        return len(name.rpartition('_')[2]) > 1 and '_bias_' not in name and name != 'router_DE'

    @property
    def of_source(self) -> bool:
        """Whether it makes keys or values of what an encoder has read."""
        return self.part == 'cross_attention' and self.name[0] in 'kv'

    def used(self, mesh: MeshConfig) -> float:
        """Numbers of one device once the weight is gathered."""
        return self.size / mesh.span(self.left)

    @functools.cached_property
    def left(self) -> tuple[str, ...]:
        """Axes that still split it once it is gathered."""
        return tuple(axis for axis in self.split if axis not in self.gathered)


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of one kind that are worked on in one way."""

    where: Where  # `pipeline`: the layers are split over `stage`; `stack`: every stage has all of them; the encoder's; `mtp`
    experts: bool  # whether they are mixtures of experts
    layers: int  # of all stages together
    ends: int  # of them the last of what is computed once more for the backward pass in one go (`model.decoder.remat`)
    written: int  # of them those that a program writes down: the units of kinds that its loops repeat
    config: ModelConfig  # the encoder's for its layers
    weights: tuple[Weight, ...]  # of one layer

    def held(self, mesh: MeshConfig) -> int:
        """Layers on one device."""
        return self.layers // self.stages(mesh)

    def stages(self, mesh: MeshConfig) -> int:
        """Into how many parts its layers are split."""
        return mesh.stage if self.where == 'pipeline' else 1

    @functools.cached_property
    def kept_alike(self) -> tuple[tuple[Weight, int], ...]:
        """One for all weights of a layer that are split and stored alike, with their numbers together; how many they are."""
        return _joined(self.weights, lambda weight: (weight.split, weight.wide, weight.narrow_in_use))

    @functools.cached_property
    def gathered_alike(self) -> tuple[tuple[Weight, int], ...]:
        """The same of those that are gathered alike, and as wide; keys and values of a source apart."""
        key = lambda w: (w.gathered, w.left, w.name == 'router_DE', w.of_source)
        return _joined([weight for weight in self.weights if weight.gathered], key)


def _joined(weights: Iterable[Weight], key: Callable[[Weight], Hashable]) -> tuple[tuple[Weight, int], ...]:
    alike: dict[Hashable, list[Weight]] = {}
    for weight in weights:
        alike.setdefault(key(weight), []).append(weight)
    size = lambda some: sum(weight.size for weight in some)
    return tuple((dataclasses.replace(some[0], shape=(size(some),)), len(some)) for some in alike.values())


@dataclasses.dataclass(frozen=True)
class Inventory:
    """All weights of a model."""

    groups: tuple[Group, ...]
    outside: tuple[Weight, ...]  # of no layer

    def held(self, mesh: MeshConfig) -> Iterator[tuple[Weight, float]]:
        """Each weight, those of a layer that are alike as one, with the numbers of it, in all layers, that one device keeps."""
        for weight in self.outside:
            yield weight, weight.shard(mesh)
        for group in self.groups:
            for weight, _ in group.kept_alike:
                yield weight, group.held(mesh) * weight.shard(mesh)


@functools.lru_cache(maxsize=256)
def inventory(c: ModelConfig) -> Inventory:
    """The weights of a model."""
    groups = [*_groups(c)]
    outside = [*_outside(c)]
    if c.encoder:
        groups += [dataclasses.replace(group, where='encoder') for group in _groups(c.of_encoder)]
        outside += _outside(c.of_encoder)
    if c.mtp.layers:
        D, last = c.model_dim, c.layer_specs[-1]
        more = (
            *_norm(c, 'embedding_norm'),
            *_norm(c, 'hidden_norm'),
            *_norm(c, 'norm'),
            Weight('join_DE', 'mtp', (D, 2 * D), FSDP, FSDP),
        )
        groups.append(Group('ahead', last.experts, c.mtp.layers, 0, c.mtp.layers, c, (*_layer(c, last.experts), *more)))
    return Inventory(tuple(groups), tuple(outside))


def _groups(c: ModelConfig) -> list[Group]:
    """The layers of one stack."""
    count, ends, written = (Counter[tuple[Where, bool]]() for _ in range(3))
    for number, run in enumerate(c.layer_groups):
        where: Where = 'pipeline' if number == c.pipelined_group else 'stack'
        for kind in run.specs:
            count[where, kind.experts] += run.repeats
            written[where, kind.experts] += 1
        ends[where, run.specs[-1].experts] += run.repeats
    return [
        Group(key[0], key[1], layers, ends[key], written[key], c, _layer(c, key[1])) for key, layers in count.items()
    ]


def _outside(c: ModelConfig) -> tuple[Weight, ...]:
    """Of one stack, what is in none of its layers."""
    D, V = c.model_dim, 0 if c.vocabulary is None else c.padded_vocabulary
    found: list[Weight] = []
    if V:
        found.append(Weight('embed_VD', 'embedding', (V, D), EVERY, FSDP))
        if c.positions.kind == 'learned':
            found.append(Weight('position_PD', 'embedding', (c.max_positions or 0, D), EVERY, FSDP))
        if c.embedding.token_types:
            found.append(Weight('kind_YD', 'embedding', (c.embedding.token_types, D), EVERY, FSDP))
        if c.embedding.norm:
            found += _norm(c, 'embedding_norm')
    if c.positions.kind == 'relative':
        found.append(Weight('relative_RN', 'attention', (c.positions.buckets, c.attention.heads), ('tensor',)))
    if c.norm.order != 'post':
        found += _norm(c, 'norm')
    if V and c.head_mlp:
        found += [
            Weight('up_DD', 'head', (D, D), EVERY, EVERY),
            Weight('up_bias_D', 'head', (D,)),
            *_norm(c, 'norm', 'head'),
        ]
    if V and c.head and not c.embedding.tied:
        found.append(Weight('head_DV', 'head', (D, V), EVERY, FSDP))
    if V and c.head_bias:
        found.append(Weight('head_bias_V', 'head', (V,), ('tensor',)))
    if V and c.pooler:
        found += [Weight('up_DD', 'pooler', (D, D), EVERY), Weight('up_bias_D', 'pooler', (D,))]
        if c.next_sentence:
            found += [Weight('next_CD', 'pooler', (2, D)), Weight('next_bias_C', 'pooler', (2,))]
    return tuple(found)


def _layer(c: ModelConfig, experts: bool) -> tuple[Weight, ...]:
    """Of one layer."""
    names = ['attention', 'cross', 'mlp'] if c.encoder else ['attention', 'mlp']
    norms = [f'{name}_norm' for name in names]
    if c.norm.order == 'sandwich':
        norms += [f'{name}_out_norm' for name in names]
    found = [weight for name in norms for weight in _norm(c, name)]
    found += _latent(c) if c.attention.kind == 'mla' else _attention(c, 'attention')
    if c.encoder:
        found += _attention(c, 'cross_attention')
    return (*found, *(_experts(c) if experts else _mlp(c, c.mlp.dim, 'mlp')))


def _norm(c: ModelConfig, name: str, part: str = 'norms') -> list[Weight]:
    found = [Weight(f'{name}.scale_D', part, (c.model_dim,))]
    if c.norm.bias:
        found.append(Weight(f'{name}.bias_D', part, (c.model_dim,)))
    return found


def _attention(c: ModelConfig, part: str) -> list[Weight]:
    D, N, M, H = (
        c.model_dim,
        c.attention.heads * c.attention.head_dim,
        c.attention.kv_heads * c.attention.head_dim,
        c.attention.head_dim,
    )
    matrices = {'q_DN': N, 'k_DM': M, 'v_DM': M, 'o_DN': N}
    found = [Weight(name, part, (D, columns), EVERY, FSDP) for name, columns in matrices.items()]
    if c.attention.qkv_bias:
        found += [
            Weight(name, part, (columns,), ('tensor',))
            for name, columns in (('q_bias_N', N), ('k_bias_M', M), ('v_bias_M', M))
        ]
    if c.attention.o_bias:
        found.append(Weight('o_bias_D', part, (D,)))
    if c.attention.qk_norm == 'full':
        found += [Weight('q_scale_N', part, (N,), ('tensor',)), Weight('k_scale_M', part, (M,), ('tensor',))]
    elif c.attention.qk_norm:
        found += [Weight('q_scale_H', part, (H,)), Weight('k_scale_H', part, (H,))]
    if c.attention.sinks:
        found.append(Weight('sink_N', part, (c.attention.heads,), ('tensor',)))
    return found


def _latent(c: ModelConfig) -> list[Weight]:
    a = c.attention
    assert a.kind == 'mla'
    D, N = c.model_dim, c.attention.heads * c.attention.query_dim
    assert a is not None
    matrix = lambda name, rows, columns: Weight(name, 'attention', (rows, columns), EVERY, FSDP)
    down = lambda name, columns: Weight(name, 'attention', (D, columns), FSDP, FSDP)
    vector = lambda name, size: Weight(name, 'attention', (size,))
    found = [down('kv_down_DR', a.kv_lora_rank + a.qk_rope_head_dim), vector('kv_scale_R', a.kv_lora_rank)]
    found.append(matrix('kv_up_RN', a.kv_lora_rank, c.attention.heads * (a.qk_nope_head_dim + a.v_head_dim)))
    if a.q_lora_rank:
        found += [
            down('q_down_DQ', a.q_lora_rank),
            vector('q_scale_Q', a.q_lora_rank),
            matrix('q_up_QN', a.q_lora_rank, N),
        ]
    else:
        found.append(matrix('q_DN', D, N))
    if c.attention.qkv_bias:
        found.append(vector('kv_down_bias_R', a.kv_lora_rank + a.qk_rope_head_dim))
        found += [vector('q_down_bias_Q', a.q_lora_rank)] if a.q_lora_rank else []
    found.append(matrix('o_DU', D, c.attention.heads * a.v_head_dim))
    return [*found, vector('o_bias_D', D)] if c.attention.o_bias else found


def _mlp(c: ModelConfig, hidden: int, part: str) -> list[Weight]:
    D, inner = c.model_dim, ('gate', 'up') if c.mlp.gated else ('up',)
    found = [Weight(f'{name}_DF', part, (D, hidden), EVERY, FSDP) for name in (*inner, 'down')]
    if c.mlp.bias:
        found += [Weight(f'{name}_bias_F', part, (hidden,), ('tensor',)) for name in inner]
        found.append(Weight('down_bias_D', part, (D,)))
    return found


def _experts(c: ModelConfig) -> list[Weight]:
    D, m, inner = c.model_dim, c.moe, ('gate', 'up') if c.mlp.gated else ('up',)
    assert m is not None
    E, F = m.experts, m.mlp_dim
    found = [Weight('router_DE', 'router', (D, E), FSDP, FSDP)]
    found += [Weight(f'{name}_EDF', 'experts', (E, D, F), EXPERTS, ('data', 'context')) for name in (*inner, 'down')]
    if m.bias:
        found += [Weight(f'{name}_bias_EF', 'experts', (E, F), ('expert', 'tensor')) for name in inner]
        found.append(Weight('down_bias_ED', 'experts', (E, D), ('expert',)))
    if m.router_bias:
        found.append(Weight('router_bias_E', 'router', (E,)))
    if m.has_choice_bias:
        found.append(Weight('bias_E', 'router', (E,), wide=True))
    if m.shared_gate:
        found.append(Weight('shared_gate_D', 'shared_experts', (D,)))
    return [*found, *_mlp(c, m.shared_dim, 'shared_experts')] if m.shared_experts else found
