"""Bytes of activations on one device in a training step: what is kept for the backward pass, and what is there at once."""

import dataclasses
import math

from weft.model.block import Block
from weft.model.config import LayerSpec, ModelConfig
from weft.model.costs import CostCounter
from weft.model.ops.cross_entropy import CHUNK
from weft.model.stack import is_unrolled
from weft.planner.weights import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationCounter(CostCounter):
    """Adds up the bytes that one layer's backward pass needs, of one device, each in a list to be summed."""

    in_loop: bool = False
    kept: list[float] = dataclasses.field(default_factory=list)  # activations
    made: list[float] = dataclasses.field(default_factory=list)  # results of plain matmuls, which `remat: dots` keeps
    worked: list[float] = dataclasses.field(default_factory=list)  # beside what is kept, by part of the layer

    @property
    def looped(self) -> bool:
        return self.in_loop

    def keep(self, size: float) -> None:
        self.kept.append(size)

    def work(self, size: float) -> None:
        self.worked.append(size)

    def matmul(self, part: str, tokens: float, inputs: float, outputs: float, last: bool = False) -> None:
        if not last:
            self.made.append(tokens * outputs * self.number)

    def x(self, c: ModelConfig) -> float:
        """Bytes of the activations between blocks."""
        return self.tokens / self.mesh.tensor * c.model_dim * self.number


def kept_by(group: Group, count: ActivationCounter) -> float:
    """Bytes that the layers of a group keep from their forward pass for their backward pass."""
    layers, remat = group.held(count.mesh), count.compute.remat
    if remat == 'none':
        unrolled = is_unrolled(math.ceil(layers), group.config, remat, False, count.platform)
        return layers * (sum(_counted(group, count, not unrolled).kept) + gathered_by(group, count))
    return layers * (count.x(group.config) + (sum(_counted(group, count).made) if remat == 'dots' else 0))


def at_work(group: Group, count: ActivationCounter) -> tuple[float, float]:
    """Bytes while the backward pass of a layer runs: of activations and their gradients, and of whole weights and theirs.

    Beside what it needs, the gradient of the hidden units and, where devices of `tensor` joined it, that of the layer's output.
    """
    layer, whole = _counted(group, count), gathered_by(group, count)
    hidden = max(layer.worked, default=0.0)
    if count.mesh.tensor > 1:
        hidden += count.tokens * group.config.model_dim * count.number
    return (hidden, whole) if count.compute.remat == 'none' else (sum(layer.kept) + hidden, 2 * whole)


def residuals(group: Group, count: ActivationCounter) -> tuple[float, float]:
    """Bytes that one layer's backward pass needs: activations; whole weights."""
    return sum(_counted(group, count).kept), gathered_by(group, count)


def gathered_by(group: Group, count: ActivationCounter) -> float:
    """Bytes of one layer's weights that are gathered to be used, whole."""
    return sum(weight.used(count.mesh) for weight in group.weights if weight.declared.gathered) * count.number


def _counted(group: Group, count: ActivationCounter, in_loop: bool = False) -> ActivationCounter:
    """What one layer of a group says."""
    here = dataclasses.replace(count, in_loop=in_loop, kept=[], made=[], worked=[])
    Block.costs(group.config, LayerSpec(group.experts), here)
    return here


def in_loss(c: ModelConfig, count: ActivationCounter) -> tuple[float, float]:
    """Numbers of the LM head, whose gradient is added up in float32; bytes of a chunk's logits and of their gradient."""
    columns = c.padded_vocabulary / count.mesh.tensor
    return columns * c.model_dim, min(CHUNK, count.tokens) * columns * (count.wide + count.number)
