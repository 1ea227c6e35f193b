"""The bill of a model: its parameters by part, the bytes they take, what a token's cache takes, and rules of thumb beside
the exact FLOPs.

All by shapes alone (`model.cost`), in the order of the table by which Llama 3 405B is often explained: the embedding, then
what a layer has of each part, times the layers, then the head. Rows that fill up the vocabulary (`padded_vocabulary`) are
left out, so that totals are the publisher's.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from weft.model import cost
from weft.model.config import LayerSpec, ModelConfig
from weft.model.parts.attention import SoftmaxConfig

BYTES = {'float32': 4.0, 'bfloat16': 2.0, 'int8': 1.0, '4-bit': 0.5}  # of a number; without scales of quantised ones


@dataclasses.dataclass(frozen=True)
class BillRow:
    """One line of the bill."""

    part: str
    shapes: str  # what is multiplied, as in `2 × 16,384 × 16,384 + 2 × 16,384 × 1,024`
    each: int  # parameters of one layer, or of the one thing there is
    times: int  # layers
    each_active: int  # of those in `each`, parameters that one token meets while decoding
    layer: str = ''  # the kind of layer that it is part of; '' outside of layers

    @property
    def total(self) -> int:
        return self.each * self.times

    @property
    def active(self) -> int:
        return self.each_active * self.times


@dataclasses.dataclass(frozen=True)
class Bill:
    """What a model is made of."""

    rows: tuple[BillRow, ...]

    @property
    def total(self) -> int:
        """Parameters."""
        return sum(row.total for row in self.rows)

    @property
    def active(self) -> int:
        """Parameters that one token meets while decoding: not the experts that it does not visit."""
        return sum(row.active for row in self.rows)

    @property
    def layers(self) -> tuple[BillRow, ...]:
        """Each kind of layer, its parts together."""
        found = []
        for kind in dict.fromkeys(row.layer for row in self.rows if row.layer):
            mine = [row for row in self.rows if row.layer == kind]
            each, active = (sum(getattr(row, field) for row in mine) for field in ('each', 'each_active'))
            found.append(BillRow(kind, ' + '.join(row.part for row in mine), each, mine[0].times, active, kind))
        return tuple(found)

    @property
    def bytes(self) -> dict[str, float]:
        """Of all parameters, by precision."""
        return {name: self.total * size for name, size in BYTES.items()}

    def parts(self) -> dict[str, int]:
        """Parameters by part, the kinds of layers together."""
        found = collections.Counter[str]()
        for row in self.rows:
            found[row.part] += row.total
        return dict(found)

    def to_json(self) -> dict[str, Any]:
        line = lambda row: dataclasses.asdict(row) | {'total': row.total, 'active': row.active}
        return {
            'rows': [line(row) for row in self.rows],
            'layers': [line(row) for row in self.layers],
            'total': self.total,
            'active': self.active,
            'bytes': self.bytes,
        }


def bill(c: ModelConfig) -> Bill:
    """The bill of a model with its vocabulary."""
    return Bill(tuple(row for row in (*_before(c), *_layers(c, 'layer'), *_after(c)) if row.each * row.times))


def _before(c: ModelConfig) -> Iterator[BillRow]:
    D, V = c.model_dim, _vocabulary(c)
    yield _once('embedding', V * D, _by(V, D))
    if c.positions.kind == 'learned':
        yield _once('positions', c.positions.max * D, _by(c.positions.max, D))
    yield _once('segments', c.embedding.token_types * D, _by(c.embedding.token_types, D))
    yield _once('norms', c.embedding.norm * cost.norm_parameters(c), 'of the embedding')
    if c.encoder:
        e = c.of_encoder
        yield from _layers(e, 'encoder layer')
        yield from _relative(e)
        yield _once('norms', (e.norm.order != 'post') * cost.norm_parameters(e), 'after the encoder')


def _layers(c: ModelConfig, name: str) -> Iterator[BillRow]:
    """The rows of each kind of layer. Windows change no parameter."""
    counts = collections.Counter(kind.experts for kind in c.layer_specs)
    for experts, times in sorted(counts.items()):
        label = name if len(counts) == 1 else f'{"mixture" if experts else "dense"} {name}'
        spec = LayerSpec(experts)
        parts = cost.layer_parameters(c, spec)
        known = ('attention', 'cross_attention', 'mlp', 'router', 'experts', 'shared_experts', 'norms')
        for part in (*known, *(part for part in parts if part not in known)):
            if not (each := parts.get(part, 0)):
                continue
            active = each
            if part == 'experts':
                assert c.moe is not None, 'a mixture has them'
                active = each * c.moe.top_k // c.moe.experts
            yield BillRow(part, _shapes(c, spec, part, each), each, times, active, label)


def _after(c: ModelConfig) -> Iterator[BillRow]:
    D, V = c.model_dim, _vocabulary(c)
    yield from _relative(c)
    yield _once('norms', (c.norm.order != 'post') * cost.norm_parameters(c), 'after the layers')
    head = V * D if c.head and not c.embedding.tied else 0
    more = c.head_mlp * (D * D + D + cost.norm_parameters(c)) + V * c.head_bias
    yield _once('head', head + more, _with_vectors('the embedding' if c.embedding.tied else _by(V, D), more))
    if c.pooler:
        yield _once('pooler', D * D + D + c.next_sentence * (2 * D + 2), _with_vectors(_by(D, D), 1))
    if c.mtp.layers:
        each = cost.parameters(c)['mtp'] // c.mtp.layers
        yield BillRow('mtp', f'a layer + {_by(D, 2 * D)} + norms', each, c.mtp.layers, 0)


def _relative(c: ModelConfig) -> Iterator[BillRow]:
    if c.positions.kind == 'relative':
        yield _once('positions', c.positions.buckets * c.attention.heads, _by(c.positions.buckets, c.attention.heads))


def _once(part: str, count: int, shapes: str) -> BillRow:
    return BillRow(part, shapes, int(count), 1, int(count))


def _shapes(c: ModelConfig, spec: LayerSpec, part: str, count: int) -> str:
    """What a layer's part of `count` parameters is made of."""
    if part == 'norms':
        return _by(count // c.model_dim, c.model_dim)
    matrices = [shape for shape in cost.layer_matrices(c, spec, part) if len(shape) > 1 + (part == 'experts')]
    found = collections.Counter(sorted(matrices, key=math.prod, reverse=True))
    shared = 1
    if part == 'shared_experts':  # side by side in one matrix
        assert c.moe is not None, 'a mixture has them'
        shared = c.moe.shared_experts
    text = ' + '.join(
        _by(*experts, *([shared] if shared > 1 else []), *([n] if n > 1 else []), rows, columns // shared)
        for (*experts, rows, columns), n in found.items()
    )
    return _with_vectors(text, count - sum(n * math.prod(shape) for shape, n in found.items())) if text else 'vectors'


def _vocabulary(c: ModelConfig) -> int:
    assert c.vocabulary is not None, 'a bill is of a model with its vocabulary: see RunConfig.with_vocabulary'
    return c.vocabulary


def _by(*sizes: int) -> str:
    return ' × '.join(f'{size:,}' for size in sizes)


def _with_vectors(text: str, rest: int) -> str:
    return f'{text} + vectors' if rest else text


# The cache ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CacheBill:
    """What a cache keeps of tokens.

    Attributes:
        kind: MHA, GQA, MQA or MLA; another one by its name.
        numbers: of one token in all layers.
        without_sharing: the same if each query head had a key and a value of its own.
        layers, windowed: layers, and those of them that see no more than `window` tokens.
        state: bytes of a row however long it is, such as a recurrent state's.
    """

    kind: str
    numbers: int
    without_sharing: int
    layers: int
    windowed: int
    window: int | None
    state: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Of one more token in bfloat16, while no window is full; without what TPUs fill up."""
        return 2 * self.numbers

    def full_bytes(self, context: int) -> int:
        """Of a row of `context` tokens, if layers with a window kept all of them too."""
        return context * self.bytes_per_token + self.state

    def bytes(self, context: int) -> float:
        """Of a row of `context` tokens, as decoding keeps it: layers with a window keep no more tokens than they see."""
        seen = min(context, self.window) if self.window else context
        tokens = (self.layers - self.windowed) * context + self.windowed * seen
        return tokens * self.bytes_per_token / self.layers + self.state


def cache_bill(c: ModelConfig) -> CacheBill:
    """What decoding keeps of a decoder's tokens; of an encoder's output it keeps as much, which is not counted here."""
    a, numbers = c.attention, cost.cache_numbers_per_token(c)
    kind, alone = str(a.kind), numbers
    if isinstance(a, SoftmaxConfig):
        shared = 'MHA' if a.kv_heads == a.heads else 'MQA' if a.kv_heads == 1 else 'GQA'
        kind = 'MLA' if a.kind == 'mla' else shared
        alone = c.layers * a.heads * (a.query_dim + a.value_dim)
    return CacheBill(
        kind=kind,
        numbers=numbers,
        without_sharing=alone,
        layers=c.layers,
        windowed=sum(spec.windowed for spec in c.layer_specs),
        window=getattr(a, 'window', None),
        state=cost.state_bytes(c),
    )


# Rules of thumb -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RuleOfThumb:
    """A rule of thumb for FLOPs beside the exact count of the same thing.

    Attributes:
        name: the formula.
        about: what it is said to count.
        rule, exact: FLOPs by the formula, and of the model's matmuls.
        why: they differ.
    """

    name: str
    about: str
    rule: float
    exact: float
    why: str

    @property
    def times(self) -> float:
        """How many times too large the rule is."""
        return self.rule / self.exact

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {'times': self.times}


def rules_of_thumb(c: ModelConfig, context: int) -> tuple[RuleOfThumb, ...]:
    """2N, 6N, 2N·S and E·V + L(8E²S + 4EHS + HS²), each beside the exact FLOPs of what it is said to count.

    N is what a token meets (`Bill.active`), S = `context`, E the model's width, V the vocabulary, L layers, H heads. The last
    two are of models that decode without an encoder.
    """
    N, S, E, L, V = bill(c).active, context, c.model_dim, c.layers, _vocabulary(c)
    forward, train = cost.forward_flops(c, cost.keys_seen(c, S), S), cost.flops_per_token(c, 'train', S)
    share = (
        f', {forward["attention"] / sum(forward.values()):.1%} of the work at {S:,}' if 'attention' in forward else ''
    )
    attends = isinstance(c.attention, SoftmaxConfig)
    why = f'leaves out attention to other tokens{share}' if attends else 'counts products with weights alone'
    if not c.embedding.tied:
        why += f', and counts the embedding, a lookup ({V * E / N:.1%} of N)'
    if c.moe:
        why += f'; N is what a token meets: all parameters would be {bill(c).total / N:.1f} times as many'
    ahead = '; the layers that predict further ahead are left out too' if c.mtp.layers else ''
    rules = (
        RuleOfThumb('2N', 'a token forward', 2.0 * N, sum(forward.values()), why),
        RuleOfThumb('6N', 'a token in training', 6.0 * N, sum(train.values()), f'2N thrice, so it {why}{ahead}'),
    )
    if not c.causal or c.encoder or not attends:
        return rules
    H, decode = c.attention.heads, cost.flops_per_token(c, 'decode', S)
    one = sum(decode.values())
    share = f'; attention is {decode["attention"] / one:.1%} of its work' if 'attention' in decode else ''
    prompt = f'it is a whole prompt of {S:,} tokens, where with a cache a new token meets each weight once'
    formula = E * V + L * (8.0 * E**2 * S + 4.0 * E * H * S + H * S**2)
    hidden = f'{3 if c.mlp.gated else 2} of {_by(E, c.moe.mlp_dim if c.moe else c.mlp.dim)}'
    short = (
        f'{prompt}; and a product and a sum are one operation in it, the projections of a token 4·E·H and not about 4·E², '
        f'scores H·S² and not 2·E·S², the MLP two matrices of 4·E² and not {hidden}'
    )
    return (
        *rules,
        RuleOfThumb('2N·S', 'a token while decoding', 2.0 * N * S, one, prompt + share),
        RuleOfThumb('E·V + L(8E²S + 4EHS + HS²)', 'a token while decoding', formula, one, short),
    )
