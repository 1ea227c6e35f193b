"""Matmul FLOPs that our programs execute, by formula: equal to those of every dot in the traced program (`model.dots`).

`model.cost` counts what the model needs (the causal triangle, the real vocabulary, each matmul once). Here stands what is
computed: masked scores where the backend computes them, what rematerialisation computes again, the padded vocabulary, heads
of keys that several devices of `tensor` share, a pipeline's bubble, and what every device of `context` or `tensor` does alike
while decoding.

A backward pass computes two products for each one forward, the gradients of both sides; attention kernels, which keep no
scores, compute those once or twice more (`BACKWARD`). Figures are of all devices together: divide by the mesh's size.
"""

import dataclasses

from weft.model.block import Block, has_costs
from weft.model.compute import AttentionBackend, ComputeConfig
from weft.model.config import LayerSpec, ModelConfig
from weft.model.cost import keys_seen_in
from weft.model.costs import CostCounter, What
from weft.model.kv_cache import slot_count
from weft.model.layers.cross import CrossAttention
from weft.model.ops.cross_entropy import CHUNK
from weft.planner.tracing import traced_flops
from weft.sharding.mesh import BATCH, MeshConfig
from weft.sharding.pipeline import ticks

ONE = MeshConfig()  # device

# Products in the backward pass for the two forward (scores, and values weighted by them). Autodiff keeps the weights and needs
# four. Tiles compute the scores anew: once in one walk over them, twice where keys' and queries' gradients have a walk each.
BACKWARD = {'reference': 4, 'blockwise': 5, 'flash': 7, 'splash': 7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCounter(CostCounter):
    """Adds up FLOPs by part, of all devices that work on a layer together."""

    found: dict[str, float] = dataclasses.field(default_factory=dict)
    slots: int = 0  # of a cache: the tokens of a row that it is for
    cut: int = 1  # parts of the rows of one device of BATCH that are worked on each alone: microbatches, or one a stage

    def add(self, part: str, flops: float, last: bool = False, batched: bool = False, back: float = 2.0) -> None:
        """A product of one device; `batched`: it has batch dims or ragged rows, so that `remat: dots` computes it again."""
        again = self.again and (self.compute.remat == 'block' or batched)
        passes = self.times * (1 + back * self.training) + again * (self.times - self.ends * last)
        devices = self.mesh.size / self.mesh.stage * self.cut
        self.found[part] = self.found.get(part, 0.0) + flops * passes * devices

    def matmul(self, part: str, tokens: float, inputs: float, outputs: float, last: bool = False) -> None:
        self.add(part, 2.0 * tokens * inputs * outputs, last)

    def grouped_matmul(self, part: str, rows: float, inputs: float, outputs: float) -> None:
        # Also what comes last is needed once more, for the gradient of the gates that it is multiplied by.
        self.add(part, 2.0 * rows * inputs * outputs, batched=True)

    def attend(self, part: str, heads: float, query_width: float, value_width: float, keys: float) -> None:
        for width in (query_width, value_width):
            flops = 2.0 * self.tokens * heads * width * keys
            self.add(part, flops, batched=True, back=BACKWARD[self.compute.attention] / 2)

    def keys_seen(self, c: ModelConfig, spec: LayerSpec) -> float:
        """Each key that the backend does not leave out."""
        if self.decoding:
            context = self.mesh.context
            return slot_count(self.slots, context, c.attention.window if spec.windowed else None) / context
        return float(self.columns) if self.compute.attention == 'reference' else keys_seen_in(c, spec, self.columns)


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
    attention: AttentionBackend = 'reference',
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
    same. With `dispatch: all_to_all` they count their buffers, full or not. Of a model with a layer that does not say what it
    costs the one part is `model`, as traced: of the backend `reference`.
    """
    assert (c.encoder is None) == (source == 0), 'an encoder reads a source'
    length = -(-length // mesh.context) * mesh.context
    if not has_costs(c):
        return {'model': traced_flops(c, compute, mesh, what, rows, length, source, microbatches)}
    count = FlopCounter(
        compute=dataclasses.replace(compute, attention=attention),
        mesh=mesh,
        what=what,
        rows=rows / accumulation / mesh.span(BATCH),
        columns=1 if what == 'decode' else length,
        source=source,
        slots=length,
    )
    if c.encoder and what in ('train', 'loss', 'score', 'encode'):
        of_encoder = dataclasses.replace(
            count, what='score' if what == 'encode' else what, columns=source, source=0, found={}
        )
        _stack(c.of_encoder, of_encoder, 1)
        count.found['encoder'] = sum(of_encoder.found.values())
    if what == 'encode':
        CrossAttention.key_costs(c, dataclasses.replace(count, times=c.layers))
    else:
        _stack(c, count, microbatches)
        _ends(c, count)
    return {part: flops * accumulation for part, flops in count.found.items()}


def _cut(count: FlopCounter, parts: int) -> FlopCounter:
    """The counter of rows in so many parts."""
    return dataclasses.replace(count, cut=parts, rows=count.rows / parts)


def _stack(c: ModelConfig, count: FlopCounter, microbatches: int) -> None:
    stages = count.mesh.stage
    for number, run in enumerate(c.layer_groups):
        pipelined = stages > 1 and number == c.pipelined_group
        here = _cut(count, microbatches if pipelined else stages)
        times = run.repeats * (ticks(microbatches, stages) / microbatches if pipelined else 1.0)
        for place, kind in enumerate(run.specs):
            ends = times * (place == len(run.specs) - 1)
            Block.costs(c, kind, dataclasses.replace(here, times=times, ends=ends))


def _ends(c: ModelConfig, count: FlopCounter) -> None:
    """What stands between the last layer and the logits, and the layers that predict further ahead, each with a head."""
    if not c.head:
        return
    D, V = c.model_dim, c.padded_vocabulary
    once = dataclasses.replace(
        count, compute=dataclasses.replace(count.compute, remat='none')
    )  # nothing is computed again
    if c.head_mlp:
        once.add('head', 2.0 * count.own_tokens * D**2)
    if count.what not in ('train', 'loss'):
        tokens = count.tokens if count.what in ('decode', 'score') else count.rows
        once.add('head', 2.0 * tokens * D * V / count.mesh.tensor)
        return
    # The head on chunks of tokens.
    here = int(count.own_tokens) // count.mesh.stage
    chunks = -(-here * count.mesh.tensor // CHUNK)
    loss = 2.0 * chunks * -(-here // chunks) * count.mesh.stage * D * V
    once.add('head', loss)
    if c.mtp.layers:  # a norm comes after these layers, which needs all of their products
        ahead = dataclasses.replace(_cut(count, count.mesh.stage), times=c.mtp.layers, found={})
        ahead.matmul('join', ahead.own_tokens, 2 * D, D)
        Block.costs(c, c.layer_specs[-1], ahead)
        dataclasses.replace(once, times=c.mtp.layers, found=ahead.found).add('head', loss)
        count.found['mtp'] = sum(ahead.found.values())
