"""What one device sends in a training step by the shapes alone: the count by hand of what `analysis.traffic` finds.

The weights that a layer gathers over FSDP and whose gradients it scatters back, the activations that are joined and split
over `tensor` around its blocks, the keys and values that go round `context`, the embedding, the loss over a split
vocabulary, and the sums of gradients over the axes that replicate a weight. Left out: scalars (the loss's sums, the
gradient's norm).

Letters: B rows and T sequence of one device's blocks, D model, N query heads times H, M kv heads times H, F hidden units of
an MLP, V padded vocabulary, L layers.
"""

import dataclasses
import math

import jax.numpy as jnp

from analysis.traffic import Traffic, cost, label, span
from model.config import ModelConfig
from sharding.mesh import AXES, BATCH, FSDP, MeshConfig
from training.loss import CHUNK

INT32, BOOL = 4, 1  # bytes


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step of a model on a mesh, and the sizes that its terms share."""

    config: ModelConfig
    mesh: MeshConfig
    batch: int  # rows, all devices together
    sequence_length: int

    @property
    def rows(self) -> int:
        """B of one device."""
        return self.batch // self.mesh.span(BATCH)

    @property
    def tokens(self) -> int:
        """Tokens of one device inside a block, where it has all of its sequence over `tensor`."""
        return self.rows * self.sequence_length // self.mesh.context

    @property
    def number(self) -> int:
        """Bytes of a number in the compute dtype, in which weights and activations are sent."""
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number in at least float32, in which gradients are summed."""
        return jnp.dtype(self.config.parameter_dtype).itemsize

    @property
    def passes(self) -> int:
        """How often a layer's forward pass is computed: once more for the backward pass where it is rematerialised."""
        return 1 if self.config.remat == 'none' else 2

    def send(self, found: Traffic, kind: str, axes: tuple[str, ...], size: float, times: float = 1) -> None:
        """`times` operations on arrays of `size` bytes, which is the S of `analysis.traffic`."""
        mesh = {axis: getattr(self.mesh, axis) for axis in AXES}
        p = span(axes, mesh)
        found.add(kind, label(axes, mesh), cost(kind, size, p) * times, times)


def training(config: ModelConfig, mesh: MeshConfig, batch: int, sequence_length: int) -> Traffic:
    """Arrays and bytes that one device sends in a training step, by kind and axes.

    Args:
        config: a dense model; how the experts' tokens travel is not counted here.
        mesh: `stage` must be 1: what a pipeline sends is not counted here.
        batch: rows a step, all devices together.
        sequence_length: tokens a row.

    Raises:
        ValueError: a model or a mesh whose traffic this does not count.
    """
    if config.moe:
        raise ValueError('the traffic of experts is not counted by hand: a dense model is needed (model.moe is set)')
    if mesh.stage > 1:
        raise ValueError('the traffic of a pipeline is not counted by hand: mesh.stage must be 1')
    plain = ModelConfig(layers=1, model_dim=2, heads=1, mlp_dim=1)
    fields = ('latent', 'norm_order', 'positions', 'attention_sinks', 'o_bias', 'mlp_bias', 'causal', 'encoder')
    for field in (*fields, 'segment_kinds', 'embedding_norm', 'head_mlp', 'head_bias', 'pooler'):
        if getattr(config, field) != getattr(plain, field):
            raise ValueError(f'the traffic of model.{field} {getattr(config, field)} is not counted by hand')
    if config.qk_norm == 'full':
        raise ValueError('the traffic of model.qk_norm full is not counted by hand')
    step, found = Step(config, mesh, batch, sequence_length), Traffic()
    for term in TERMS:
        term(step, found)
    return found


def layer_weights(step: Step, found: Traffic) -> None:
    """Each matrix is gathered in each forward pass of its layer; its gradient is scattered back once."""
    c, n = step.config, step.mesh.tensor
    for columns in matrices(c):
        size = c.model_dim * columns / n * step.number
        step.send(found, 'all_gather', FSDP, size, step.passes * c.layers)
        step.send(found, 'reduce_scatter', FSDP, size, c.layers)
    if n > c.kv_heads:  # each device uses one head of keys and one of values, which it takes from all of them
        size = c.model_dim * c.kv_heads * c.head_dim * step.number
        step.send(found, 'all_gather', ('tensor',), size, 2 * step.passes * c.layers)
        step.send(found, 'reduce_scatter', ('tensor',), size, 2 * c.layers)


def matrices(c: ModelConfig) -> list[int]:
    """The columns of each matrix of a layer, all of which have D rows: q, k, v, o; gate, up, down."""
    N, M = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return [N, M, M, N, *[c.mlp_dim] * (3 if c.gated else 2)]


def layer_activations(step: Step, found: Traffic) -> None:
    """Two joins and two splits of x_BTD a layer, backward the opposite. The second split is not computed again."""
    c = step.config
    size = step.tokens * c.model_dim * step.number
    joins, splits = 2 * step.passes, 2 + (step.passes - 1)
    step.send(found, 'all_gather', ('tensor',), size, (joins + 2) * c.layers)
    step.send(found, 'reduce_scatter', ('tensor',), size, (splits + 2) * c.layers)


def ring(step: Step, found: Traffic) -> None:
    """Keys, values and their places go round n devices of `context`: in n − 1 sends a pass, and n − 1 backward.

    Backward their gradients go along, in at least float32, and one send further: home.
    """
    c, n = step.config, step.mesh.context
    if n == 1:
        return
    heads = max(c.kv_heads, step.mesh.tensor) // step.mesh.tensor
    numbers, times = step.tokens * heads * c.head_dim, c.layers * (step.passes + 1) * (n - 1)
    step.send(found, 'ppermute', ('context',), numbers * step.number, 2 * times)
    step.send(found, 'ppermute', ('context',), step.tokens * INT32, 2 * times)
    step.send(found, 'ppermute', ('context',), numbers * step.wide, 2 * c.layers * n)


def embedding(step: Step, found: Traffic) -> None:
    """The embedding whole over FSDP; of the tokens' vectors D goes from split to whole, T from whole to split."""
    c, n = step.config, step.mesh.tensor
    weight = c.padded_vocabulary * c.model_dim / n * step.number
    step.send(found, 'all_gather', FSDP, weight)
    step.send(found, 'reduce_scatter', FSDP, weight)
    step.send(found, 'all_to_all', ('tensor',), step.tokens * c.model_dim / n * step.number, 2)


def head(step: Step, found: Traffic) -> None:
    """The LM head; a tied one is gathered like the embedding and turned from D split over `tensor` to V split."""
    c, n = step.config, step.mesh.tensor
    weight = c.padded_vocabulary * c.model_dim / n * step.number
    step.send(found, 'all_gather', FSDP, weight)
    step.send(found, 'reduce_scatter', FSDP, weight)
    if c.tied_embedding:
        step.send(found, 'all_to_all', ('tensor',), weight, 2)


def cross_entropy(step: Step, found: Traffic) -> None:
    """Chunks of tokens, joined with their targets; maxima and sums over the vocabulary; all of it twice."""
    c, n = step.config, step.mesh.tensor
    local = step.tokens // n
    chunks = -(-local * n // CHUNK)
    tokens = -(-local // chunks) * n
    x = tokens * c.model_dim * step.number
    for size in (x, tokens * INT32, tokens * BOOL):
        step.send(found, 'all_gather', ('tensor',), size, 2 * chunks)
    step.send(found, 'reduce_scatter', ('tensor',), x, chunks)
    step.send(found, 'pmax', ('tensor',), tokens * step.wide, 2 * chunks)
    # The sum and the target's logit; the sum once more; and a token's gradient from every device of `tensor`.
    step.send(found, 'psum', ('tensor',), tokens * step.wide, 4 * chunks)


def replicated(step: Step, found: Traffic) -> None:
    """Gradients are summed over the axes along which a weight is whole: of vectors over most, of matrices over `replica`."""
    c, n = step.config, step.mesh.tensor
    D, N, M = c.model_dim, c.heads * c.head_dim, c.kv_heads * c.head_dim
    norms = 2 if c.norm == 'layernorm' and c.bias else 1
    whole = [D] * (2 * norms) + [D, D] * c.bias + [c.head_dim] * 2 * bool(c.qk_norm)
    split = [N, M, M] * c.qkv_bias + [c.mlp_dim] * (len(matrices(c)) - 5) * c.bias
    for size in whole:
        step.send(found, 'psum', AXES, c.layers * size * step.wide)
    step.send(found, 'psum', AXES, D * step.wide, norms)
    for size in split:
        step.send(found, 'psum', tuple(axis for axis in AXES if axis != 'tensor'), c.layers * size / n * step.wide)
    shards = n * step.mesh.span(FSDP)
    stacked = [c.layers * columns for columns in matrices(c)] + [c.padded_vocabulary] * (2 - c.tied_embedding)
    for columns in stacked:
        step.send(found, 'psum', ('replica',), math.prod((D, columns, step.wide)) / shards)


# One function for each thing that is sent; another axis or another kind of layer is one more.
TERMS = (layer_weights, layer_activations, ring, embedding, head, cross_entropy, replicated)
