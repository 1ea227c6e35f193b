"""What a layer costs, said by the layer: a static method `costs` tells a `CostCounter` what one device does in a forward pass.

Each counter notes what it counts: FLOPs (planner/flops.py; of one token: model/cost.py), what is sent (planner/communication),
what the backward pass needs (planner/activations.py). The weights need not be told: they are declared. A model with a kind of
layer that has no `costs` is counted by tracing its programs (planner/tracing.py), which is slower.
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp

from weft.model.compute import ComputeConfig
from weft.model.config import LayerSpec, ModelConfig
from weft.sharding.mesh import MeshConfig

What = Literal['train', 'loss', 'score', 'prefill', 'decode', 'encode']
INT32, FLOAT32, BOOL = 4, 4, 1  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostCounter:
    """The rows of one device in one program, and the operations on them that a layer tells. This counter notes none."""

    compute: ComputeConfig
    mesh: MeshConfig = MeshConfig()
    what: What = 'train'  # see `planner.flops.executed`
    rows: float = 1.0  # of this device, in one part of a step or one microbatch
    columns: int = 1  # tokens of each that are worked on, all devices of `context` together; 1 in decoding
    source: int = 0  # tokens of a row that an encoder reads
    platform: str = 'tpu'
    times: float = 1  # how often the layer is computed
    ends: float = 0  # of those how often it is the last of what is computed once more for the backward pass in one go
    written: float = 1  # how often it is written down in the program: a loop's layers once

    @property
    def training(self) -> bool:
        """Whether there is a backward pass."""
        return self.what == 'train'

    @property
    def decoding(self) -> bool:
        """Whether one token in each row is worked on, by all devices of `context` alike."""
        return self.what == 'decode'

    @functools.cached_property
    def split(self) -> bool:
        """Whether each device of `tensor` holds a slice of the sequence between blocks, not all of it."""
        return not self.decoding and self.columns // self.mesh.context % self.mesh.tensor == 0

    @functools.cached_property
    def tokens(self) -> float:
        """Tokens inside a block, where a device has all of its sequence over `tensor`."""
        return self.rows * self.columns / (1 if self.decoding else self.mesh.context)

    @functools.cached_property
    def own_tokens(self) -> float:
        """Tokens between blocks."""
        return self.tokens / self.mesh.tensor if self.split else self.tokens

    @functools.cached_property
    def number(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.compute.dtype).itemsize

    @functools.cached_property
    def wide(self) -> int:
        """Bytes of a number in which sums are made: at least float32."""
        return max(self.number, FLOAT32)

    @property
    def again(self) -> int:
        """How often a layer's forward pass is computed once more for its backward pass."""
        return int(self.training and self.compute.remat != 'none')

    @property
    def passes(self) -> int:
        """How often a layer does what it does in its forward pass, and in another direction in its backward pass."""
        return 1 + self.again + self.training

    @property
    def looped(self) -> bool:
        """Whether a loop over layers keeps all that JAX's rules ask for, which a compiler cannot see through."""
        return False

    def kv_heads(self, heads: int) -> float:
        """Heads of keys on this device: one at least."""
        return max(heads / self.mesh.tensor, 1)

    def keys_seen(self, c: ModelConfig, spec: LayerSpec) -> float:
        """Keys that this device meets of those that a token attends to, on average."""
        return 0.0

    @property
    def source_keys(self) -> float:
        """Those of an encoder's output."""
        return self.source / (self.mesh.context if self.decoding else 1)

    def matmul(self, part: str, tokens: float, inputs: float, outputs: float, last: bool = False) -> None:
        """A product with a weight; `last`: it ends the layer, and nothing in the backward pass needs its result."""

    def grouped_matmul(self, part: str, rows: float, inputs: float, outputs: float) -> None:
        """A product with experts' weights, rows by expert."""

    def attend(self, part: str, heads: float, query_width: float, value_width: float, keys: float) -> None:
        """Scores of each token with keys, and the values that they weigh."""

    def gather_sequence(self, width: float) -> None:
        """`ForwardContext.gather_sequence` of activations so wide."""

    def reduce_scatter_sequence(self, width: float, last: bool = False) -> None:
        """`ForwardContext.reduce_scatter_sequence`; `last`: nothing in the backward pass needs its result."""

    def send(self, kind: str, axes: tuple[str, ...], size: float, calls: float = 1) -> None:
        """A collective on an array of `size` bytes (`planner.traffic` says which), in all its passes `calls` times."""

    def send_alike(self, kind: str, axes: tuple[str, ...], size: float, calls: float = 1) -> None:
        """`calls` collectives in a forward pass, on what is the same in all of a loop's layers."""

    def all_gather(self, axes: tuple[str, ...], size: float, grad: bool = True) -> None:
        """An all_gather whose result has `size` bytes, in each forward pass; backward a reduce_scatter."""

    def reduce_scatter(self, axes: tuple[str, ...], size: float, last: bool = False) -> None:
        """A reduce_scatter of `size` bytes a forward pass; `last`: none needs its result again. Backward an all_gather."""

    def keep(self, size: float) -> None:
        """Bytes of activations that the backward pass needs."""

    def work(self, size: float) -> None:
        """Bytes that the backward pass of a part of the layer needs beside what is kept; of several parts the most counts."""
