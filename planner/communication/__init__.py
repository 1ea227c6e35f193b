"""What one device sends in a step by the shapes alone: the count by hand of what `planner.traffic` finds.

The weights that a layer gathers over FSDP and whose gradients it scatters back, the activations that are joined and split
over `tensor` around its blocks, the keys and values that go round `context`, tokens on their way to experts, microbatches
on theirs through a pipeline, the embedding, the loss over a split vocabulary, and the sums of gradients over the axes that
replicate a weight. Left out: scalars (the loss's sums, the gradient's norm).

A count takes as long for a deep model as for a shallow one: a search tries thousands of meshes. What says no costs is traced.
"""

import dataclasses

from weft.model.block import has_costs
from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.costs import What
from weft.planner.communication import ends
from weft.planner.communication.counter import TrafficCounter
from weft.planner.communication.layers import copies, layers
from weft.planner.tracing import traced_traffic
from weft.planner.traffic.tables import Traffic
from weft.planner.weights import inventory
from weft.sharding.mesh import BATCH, MeshConfig
from weft.sharding.pipeline import ticks


def training(
    c: ModelConfig,
    compute: ComputeConfig,
    mesh: MeshConfig,
    batch: int,
    sequence_length: int,
    accumulation: int = 1,
    microbatches: int = 1,
) -> Traffic:
    """Arrays and bytes that one device sends in a training step, by kind and axes.

    Args:
        c: the model.
        compute: how it is computed.
        mesh: what it is laid out on; it must divide the sizes (`RunConfig.check_sizes`).
        batch: rows a step, all devices together.
        sequence_length: tokens a row; of an encoder–decoder also of the row's source.
        accumulation: parts in which the step is done.
        microbatches: into which a pipeline cuts the rows of a part (`RunConfig.microbatches`).

    Raises:
        ValueError: a model that is not trained.
    """
    if not c.causal:
        raise ValueError('model.causal is false: such a model is not trained, and its traffic not counted')
    rows = batch / (mesh.span(BATCH) * accumulation)
    if not has_costs(c):
        step = (batch, sequence_length, sequence_length if c.encoder else 0, accumulation, microbatches)
        return traced_traffic(c, compute, mesh, 'train', *step)
    held = inventory(c)
    dealt = TrafficCounter(compute=compute, mesh=mesh, rows=rows / mesh.stage, columns=sequence_length)
    microbatch = dataclasses.replace(dealt, rows=rows / microbatches)
    ends.embedding(c, dealt.outside(1 + bool(c.encoder) + c.mtp.layers))
    for group in held.groups:
        if group.where == 'pipeline' and mesh.stage > 1:
            layers(microbatch, group, ticks(microbatches, mesh.stage))
        else:
            layers(dealt, group)
    if c.encoder:  # its output, whole for every layer of the decoder
        dealt.outside().all_gather(('tensor',), dealt.tokens * c.model_dim * dealt.number)
    if mesh.stage > 1:
        ends.pipeline(c, microbatch, ticks(microbatches, mesh.stage))
    ends.head(c, dealt.outside())
    ends.cross_entropy(c, dealt.outside(1 + c.mtp.layers))
    once = dataclasses.replace(dealt, found=Traffic())
    once.found.include(dealt.found, accumulation)
    for group in held.groups:
        copies(once, group)
    ends.copies(c, once, held)
    return once.found


def prefill(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, rows: int, tokens: int) -> Traffic:
    """What one device sends to read prompts of `tokens` tokens in each of `rows` rows, all devices together.

    What an encoder sends for its sources is not among it. Raises ValueError for a mesh with stages and a model that cannot
    decode.
    """
    count = _forward(c, compute, mesh, 'prefill', rows, -(-tokens // mesh.context) * mesh.context)
    if has_costs(c):
        if count.split:
            count.all_gather(('tensor',), count.tokens * c.model_dim * count.number)
        count.send('psum', ('context',), count.rows * c.model_dim * count.number)
        ends.logits(c, count)
    return count.found


def decoding(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, rows: int) -> Traffic:
    """What one device sends to decode one more token in each of `rows` rows, all devices together, however long they are.

    Raises ValueError as `prefill`.
    """
    count = _forward(c, compute, mesh, 'decode', rows, 1)
    if has_costs(c):
        ends.logits(c, count)
    return count.found


def _forward(
    c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, what: What, rows: int, columns: int
) -> TrafficCounter:
    """What embedding, layers and head send; of a model that is traced, all of it."""
    if not c.causal:
        raise ValueError('model.causal is false: such a model does not decode')
    if mesh.stage > 1:
        raise ValueError(f'mesh.stage is {mesh.stage}: decoding has no pipeline; use mesh.data={mesh.stage} more')
    count = TrafficCounter(compute=compute, mesh=mesh, what=what, rows=rows / mesh.span(BATCH), columns=columns)
    if not has_costs(c):
        # However long the cache is: its slots are not sent.
        length = max(columns, mesh.context)
        return dataclasses.replace(
            count, found=traced_traffic(c, compute, mesh, what, rows, length, length if c.encoder else 0)
        )
    ends.embedding(c, count)
    for group in inventory(c).groups:
        if group.where in ('pipeline', 'stack'):
            layers(count, group)
    ends.head(c, count)
    return count
