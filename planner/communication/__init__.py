"""What one device sends in a step by the shapes alone: the count by hand of what `planner.traffic` finds.

The weights that a layer gathers over FSDP and whose gradients it scatters back, the activations that are joined and split
over `tensor` around its blocks, the keys and values that go round `context`, tokens on their way to experts, microbatches
on theirs through a pipeline, the embedding, the loss over a split vocabulary, and the sums of gradients over the axes that
replicate a weight. Left out: scalars (the loss's sums, the gradient's norm).

A count takes as long for a deep model as for a shallow one, so that a search may try thousands of meshes.
"""

from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.planner.communication import ends
from weft.planner.communication.layers import copies, layers
from weft.planner.communication.view import View
from weft.planner.traffic import Traffic
from weft.planner.weights import inventory
from weft.sharding.mesh import BATCH, MeshConfig
from weft.sharding.pipeline import ticks

__all__ = ['decoding', 'prefill', 'training']


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
    held, part = inventory(c), Traffic()
    rows = batch / (mesh.span(BATCH) * accumulation)
    dealt = View(c, compute, mesh, part, rows / mesh.stage, sequence_length)
    microbatch = View(c, compute, mesh, part, rows / microbatches, sequence_length)
    ends.embedding(dealt, 1 + bool(c.encoder) + c.mtp.layers)
    for group in held.groups:
        if group.where == 'pipeline' and mesh.stage > 1:
            layers(microbatch, group, ticks(microbatches, mesh.stage))
        else:
            layers(_of(dealt, group.config), group)
    if c.encoder:  # its output, whole for every layer of the decoder
        dealt.gather(('tensor',), dealt.tokens * c.model_dim * dealt.number)
    if mesh.stage > 1:
        ends.pipeline(microbatch, ticks(microbatches, mesh.stage))
    ends.head(dealt)
    ends.cross_entropy(dealt, 1 + c.mtp.layers)
    found = Traffic()
    found.include(part, accumulation)
    once = View(c, compute, mesh, found, rows, sequence_length)
    for group in held.groups:
        copies(once, group)
    ends.copies(once, held)
    return found


def prefill(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, rows: int, tokens: int) -> Traffic:
    """What one device sends to read prompts of `tokens` tokens in each of `rows` rows, all devices together.

    What an encoder sends for its sources is not among it. Raises ValueError for a mesh with stages and a model that cannot
    decode.
    """
    _can_decode(c, mesh)
    columns = -(-tokens // mesh.context) * mesh.context
    split = columns // mesh.context % mesh.tensor == 0
    view = View(c, compute, mesh, Traffic(), rows / mesh.span(BATCH), columns, training=False, split=split)
    _forward(view)
    if split:
        view.gather(('tensor',), view.tokens * c.model_dim * view.number)
    view.send('psum', ('context',), view.rows * c.model_dim * view.number)
    ends.logits(view)
    return view.found


def decoding(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, rows: int) -> Traffic:
    """What one device sends to decode one more token in each of `rows` rows, all devices together, however long they are.

    Raises ValueError as `prefill`.
    """
    _can_decode(c, mesh)
    view = View(
        c, compute, mesh, Traffic(), rows / mesh.span(BATCH), columns=1, training=False, split=False, decoding=True
    )
    _forward(view)
    ends.logits(view)
    return view.found


def _forward(view: View) -> None:
    ends.embedding(view)
    for group in inventory(view.config).groups:
        if group.where in ('pipeline', 'stack'):
            layers(view, group)
    ends.head(view)


def _of(view: View, c: ModelConfig) -> View:
    return view if view.config is c else View(c, view.compute, view.mesh, view.found, view.rows, view.columns)


def _can_decode(c: ModelConfig, mesh: MeshConfig) -> None:
    if not c.causal:
        raise ValueError('model.causal is false: such a model does not decode')
    if mesh.stage > 1:
        raise ValueError(f'mesh.stage is {mesh.stage}: decoding has no pipeline; use mesh.data={mesh.stage} more')
