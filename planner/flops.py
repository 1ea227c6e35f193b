"""Matmul FLOPs that our programs execute, by formula: equal to those of every dot in the traced program (`planner.dots`).

`model.cost` counts what the model needs (the causal triangle, the real vocabulary, each matmul once). Here stands what is
computed: masked scores where the backend computes them, what rematerialisation computes again, the padded vocabulary, heads
of keys that several devices of `tensor` share, a pipeline's bubble, and what every device of `context` or `tensor` does alike
while decoding.

A backward pass computes two products for each one forward, the gradients of both sides; attention kernels, which keep no
scores, compute those once or twice more (`BACKWARD`). Figures are of all devices together: divide by the mesh's size.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

from weft.model.compute import ComputeConfig
from weft.model.config import LayerSpec, ModelConfig, changed
from weft.model.cost import keys_seen
from weft.model.kv_cache import slot_count
from weft.model.ops.cross_entropy import CHUNK
from weft.model.ops.expert_dispatch import capacity
from weft.sharding.mesh import BATCH, MeshConfig
from weft.sharding.pipeline import ticks
from weft.training.config import RunConfig

ONE = MeshConfig()  # device
What = Literal['train', 'loss', 'score', 'prefill', 'decode', 'encode']

# Products in the backward pass for the two forward (scores, and values weighted by them). Autodiff keeps the weights and needs
# four. Tiles compute the scores anew: once in one walk over them, twice where keys' and queries' gradients have a walk each.
BACKWARD = {'reference': 4, 'blockwise': 5, 'flash': 7, 'splash': 7}


class Dot(NamedTuple):
    """Products of one kind in one layer, or outside of them."""

    part: str
    flops: float  # forward
    batched: bool = False  # has batch dims or ragged rows, so that `remat: dots` computes it again
    unused: bool = False  # nothing in the backward pass needs its result, so that nobody computes it again
    back: float = 2.0  # backward, by forward


@dataclasses.dataclass(frozen=True)
class Program:
    """One of our programs on a mesh, and the sizes that its terms share."""

    config: ModelConfig
    compute: ComputeConfig
    what: What
    rows: int  # all devices together; of a step in parts, those of one part
    length: int  # tokens a row; of `decode` those that the cache is for
    source: int = 0  # tokens a row that an encoder reads
    mesh: MeshConfig = ONE
    microbatches: int = 1
    attention: str = 'reference'  # backend
    cut: int = 1  # parts of the rows of one device of BATCH that are worked on each alone: microbatches, or one a stage

    @property
    def decoding(self) -> bool:
        return self.what == 'decode'

    @property
    def backward(self) -> bool:
        return self.what == 'train'

    @property
    def queries(self) -> int:
        """Tokens a row that are worked on."""
        return 1 if self.decoding else self.length

    @property
    def split(self) -> bool:
        """Whether each device of `tensor` holds a slice of the sequence between blocks."""
        return not self.decoding and self.length // self.mesh.context % self.mesh.tensor == 0

    @property
    def copies(self) -> int:
        """How many devices of `context` do the same."""
        return self.mesh.context if self.decoding else 1

    @property
    def tokens(self) -> int:
        """Tokens in a block, those that several devices of `context` work on as often."""
        return self.rows * self.queries * self.copies

    @property
    def own(self) -> int:
        """The same between blocks, where each device of `tensor` has its own slice, or all have all of it."""
        return self.tokens * (1 if self.split else self.mesh.tensor)


def executed(
    c: ModelConfig,
    compute: ComputeConfig,
    what: What,
    *,
    rows: int,
    length: int,
    source: int = 0,
    mesh: MeshConfig = ONE,
    accumulation: int = 1,
    microbatches: int = 1,
    attention: str = 'reference',
) -> dict[str, float]:
    """FLOPs by part of one call of a program, all devices together.

    Args:
        c: a model with its vocabulary.
        compute: how it is computed; of it `remat`, `dispatch` and `capacity_factor` count.
        what: `train` a step's loss and gradient; `loss` its forward pass alone; `score` all logits; `prefill` reading prompts;
            `decode` one more token in each row; `encode` what an encoder–decoder keeps of its sources.
        rows: all devices together.
        length: tokens a row; of `decode` those that the cache is for, to all slots of which a token attends.
        source: tokens a row that an encoder reads.
        accumulation, microbatches: of a training step (`microbatches` where the mesh has stages).
        attention: backend. `reference` computes all scores and masks them; the others leave out what no query of a tile sees,
            and count here as if tiles were single tokens: a bound that they come near to when rows are long.

    Experts count the rows that visit them; the backends that compute more (`reference`, all experts for each row) count the
    same. With `dispatch: all_to_all` they count their buffers, full or not.
    """
    assert (c.encoder is None) == (source == 0), 'an encoder reads a source'
    length = -(-length // mesh.context) * mesh.context
    p = Program(c, compute, what, rows // accumulation, length, source, mesh, microbatches, attention)
    parts: dict[str, float] = {}
    for part, flops in _terms(p):
        parts[part] = parts.get(part, 0.0) + flops * accumulation
    return parts


def of_run(run: RunConfig, attention: str = 'reference') -> dict[str, float]:
    """FLOPs by part of one training step of a run, all devices together."""
    t = run.training
    source = t.sequence_length if run.model.encoder else 0
    return executed(
        run.model,
        run.compute,
        'train',
        rows=t.batch,
        length=t.sequence_length,
        source=source,
        mesh=run.mesh,
        accumulation=t.accumulation,
        microbatches=run.microbatches,
        attention=attention,
    )


def _terms(p: Program) -> Iterator[tuple[str, float]]:
    c = p.config
    if c.encoder:
        if p.what in ('train', 'loss', 'score', 'encode'):
            e = dataclasses.replace(p, config=c.of_encoder, length=p.source, source=0)
            if p.what == 'encode':
                e = dataclasses.replace(e, what='score')
            for _, flops in _stack(e):
                yield 'encoder', flops
        if p.what == 'encode':
            yield 'cross_attention', c.layers * sum(dot.flops for dot in _cross_keys(p))
            return
    yield from _stack(p)
    yield from _ends(p)
    if c.mtp.layers and p.what in ('train', 'loss'):
        yield from _ahead(p)


def _stack(p: Program) -> Iterator[tuple[str, float]]:
    """The layers."""
    c, stages = p.config, p.mesh.stage
    for number, run in enumerate(c.layer_groups):
        pipelined = stages > 1 and number == c.pipelined_group
        bubble = ticks(p.microbatches, stages) / p.microbatches if pipelined else 1.0
        here = dataclasses.replace(p, cut=p.microbatches if pipelined else stages)
        for place, kind in enumerate(run.specs):
            last = place == len(run.specs) - 1
            for dot in _layer(here, kind, last and c.norm.order == 'pre'):
                yield dot.part, run.repeats * bubble * dot.flops * _passes(p, dot)


def _passes(p: Program, dot: Dot) -> float:
    """How often a layer's product is computed in all, a backward one counted by its size."""
    if not p.backward:
        return 1.0
    remat = p.compute.remat
    again = (remat == 'block' and not dot.unused) or (remat == 'dots' and dot.batched)
    return 1.0 + dot.back + again


def _layer(p: Program, kind: LayerSpec, ends_unit: bool) -> Iterator[Dot]:
    """The products of one layer; `ends_unit`: what comes last in it is only added to what the next layer reads."""
    c = p.config
    yield from _latent(p, kind) if c.attention.kind == 'mla' else _attention(p, kind)
    if c.encoder:
        yield from _cross(p)
    if kind.experts:
        yield from _experts(p, ends_unit)
    else:
        yield from _mlp('mlp', p, c.mlp.dim, ends_unit)


def _attention(p: Program, kind: LayerSpec) -> Iterator[Dot]:
    c = p.config
    yield Dot(
        'projections', 2.0 * p.tokens * c.model_dim * c.attention.heads * c.attention.head_dim * 2
    )  # of queries, and back
    yield Dot('projections', 2.0 * p.tokens * c.model_dim * _kv_heads(p) * c.attention.head_dim * 2)  # keys, values
    yield from _scores('attention', p, kind, c.attention.query_dim, c.attention.value_dim)


def _kv_heads(p: Program) -> int:
    """Heads of keys on all devices of `tensor` together: each has one at least."""
    return max(p.config.attention.kv_heads, p.mesh.tensor)


def _scores(part: str, p: Program, kind: LayerSpec, width: int, value_width: int) -> Iterator[Dot]:
    """Scores and what they weigh, of each query with each key that the backend does not leave out."""
    if p.decoding:
        keys = float(slot_count(p.length, p.mesh.context, p.config.attention.window if kind.windowed else None))
    elif p.attention == 'reference':
        keys = float(p.length)
    else:
        one = changed(
            p.config, {'layers': 1, 'moe': None, 'attention.window_pattern': (kind.windowed,), 'mtp.layers': 0}
        )
        keys = keys_seen(one, p.length)
    back = BACKWARD['reference' if p.decoding else p.attention] / 2
    for w in (width, value_width):
        yield Dot(part, 2.0 * p.rows * p.queries * p.config.attention.heads * w * keys, batched=True, back=back)


def _latent(p: Program, kind: LayerSpec) -> Iterator[Dot]:
    c, a = p.config, p.config.attention
    assert a.kind == 'mla'
    D, n = c.model_dim, c.attention.heads
    yield Dot('projections', 2.0 * p.own * D * (a.kv_lora_rank + a.qk_rope_head_dim))
    if a.q_lora_rank:
        yield Dot('projections', 2.0 * p.own * D * a.q_lora_rank)
    yield Dot('projections', 2.0 * p.tokens * (a.q_lora_rank or D) * n * c.attention.query_dim)
    # Keys and values of the latent vectors; while decoding the same weights take queries into their space and outputs back.
    yield Dot('projections', 2.0 * p.tokens * a.kv_lora_rank * n * (a.qk_nope_head_dim + a.v_head_dim))
    if p.decoding:
        yield from _scores('attention', p, kind, a.kv_lora_rank + a.qk_rope_head_dim, a.kv_lora_rank)
    else:
        yield from _scores('attention', p, kind, c.attention.query_dim, a.v_head_dim)
    yield Dot('projections', 2.0 * p.tokens * n * a.v_head_dim * D)


def _cross(p: Program) -> Iterator[Dot]:
    """A decoder's queries on an encoder's output, whose keys decoding and prefill have already."""
    c = p.config
    yield Dot('cross_attention', 2.0 * p.tokens * c.model_dim * c.attention.heads * c.attention.head_dim * 2)
    if p.what not in ('prefill', 'decode'):
        yield from _cross_keys(p)
    for width in (c.attention.query_dim, c.attention.value_dim):
        flops = 2.0 * p.rows * p.queries * c.attention.heads * width * p.source
        yield Dot('cross_attention', flops, batched=True, back=BACKWARD[p.attention] / 2)


def _cross_keys(p: Program) -> Iterator[Dot]:
    c = p.config
    yield Dot('cross_attention', 2.0 * p.rows * p.source * c.model_dim * _kv_heads(p) * c.attention.head_dim * 2)


def _mlp(part: str, p: Program, hidden: int, ends_unit: bool) -> Iterator[Dot]:
    one = 2.0 * p.tokens * p.config.model_dim * hidden
    yield Dot(part, one * (2 if p.config.mlp.gated else 1))
    yield Dot(part, one, unused=ends_unit)


def _experts(p: Program, ends_unit: bool) -> Iterator[Dot]:
    c, m = p.config, p.config.moe
    D, F, inner = c.model_dim, m.mlp_dim, 2 if c.mlp.gated else 1
    yield Dot('router', 2.0 * p.own * D * m.experts)
    rows = p.tokens * m.top_k
    if p.compute.dispatch == 'all_to_all':
        senders = p.mesh.span(BATCH) * p.cut * p.mesh.context * (p.mesh.tensor if p.split else 1)
        here = p.tokens // senders if not p.decoding else p.rows // p.mesh.span(BATCH)
        held = capacity(here, m.top_k, m.experts, p.compute.capacity_factor) if p.split else here
        rows = senders * m.experts * held
    yield Dot('experts', 2.0 * rows * D * F * inner, batched=True)
    # Needed once more, for the gradient of the gates that it is multiplied by.
    yield Dot('experts', 2.0 * rows * F * D, batched=True)
    if m.shared_experts:
        yield from _mlp('experts', p, m.shared_dim, ends_unit and not m.shared_gate)


def _ends(p: Program) -> Iterator[tuple[str, float]]:
    """What stands between the last layer and the logits."""
    c = p.config
    if not c.head:
        return
    if c.head_mlp and p.what != 'encode':
        yield 'head', 2.0 * p.own * c.model_dim**2 * (3 if p.backward else 1)
    if p.what in ('train', 'loss'):
        yield 'head', _loss(p)
    else:
        tokens = p.tokens if p.what in ('decode', 'score') else p.rows * p.mesh.context
        yield 'head', 2.0 * tokens * c.model_dim * c.padded_vocabulary


def _loss(p: Program) -> float:
    """The head on chunks of tokens."""
    c, n = p.config, p.mesh.tensor
    devices = p.mesh.span(BATCH) * p.mesh.stage * p.mesh.context
    here = p.tokens // (devices * n)
    chunks = -(-here * n // CHUNK)
    tokens = chunks * -(-here // chunks) * n * devices
    return 2.0 * tokens * c.model_dim * c.padded_vocabulary * (3 if p.backward else 1)


def _ahead(p: Program) -> Iterator[tuple[str, float]]:
    """The layers that predict further ahead, each with a head. A norm comes after them, which needs all of their products."""
    c = p.config
    join = Dot('mtp', 2.0 * p.own * 2 * c.model_dim**2)
    layer = [join, *_layer(p, c.layer_specs[-1], ends_unit=False)]
    yield 'mtp', c.mtp.layers * (sum(dot.flops * _passes(p, dot) for dot in layer) + _loss(p))
