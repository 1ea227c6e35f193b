"""Bytes that one device needs to train or to serve a model, by the shapes alone.

What a compiled program holds is its arguments (weights, optimizer state, batch or cache) and, at its fullest moment, what it
has made of them. Training has three such moments, of which the largest counts:

    in the loss    what layers keep for the backward pass, the LM head whole, its gradient, a chunk's logits and theirs
    in a layer     what the layers keep, the gradients of all layers' weights, the head's, and a unit of layers at work: what
                   its own backward pass needs, whole weights among it, and the gradients that pass through it
    at the end     the gradients of all weights, that of the embedding as it is added up, the head's before it is scattered

Beside the first two, copies of the layers' weights in the compute dtype (`casts`).

Nothing is fitted: each term is an array of the program, and its comment says which.

Letters: t tokens of one device inside a block, where it has all of its sequence over `tensor`; n devices of `tensor`.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from weft.model.block import has_costs
from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.costs import FLOAT32, INT32
from weft.model.decoder import weights_of
from weft.model.kv_cache import CacheSize
from weft.model.parameters import Parameter
from weft.model.stack import declared_cache
from weft.planner.activations import ActivationCounter, at_work, gathered_by, in_loss, kept_by, residuals
from weft.planner.tracing import traced_activations
from weft.planner.weights import Inventory, inventory
from weft.sharding.mesh import BATCH, MeshConfig
from weft.training.config import RunConfig
from weft.training.optimizers import OptimizerConfig, Shard, state_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device at the fullest moment of a step."""

    parameters: float = 0
    optimizer: float = 0
    batch: float = 0  # tokens, and what belongs to them
    cache: float = 0
    gradients: float = 0
    activations: float = 0  # what layers keep for the backward pass, and what one layer makes while it is worked on
    logits: float = 0
    compute_weights: float = 0  # the layers' weights in the compute dtype, which compilers copy before the loop
    communication: float = 0  # weights gathered to be used, their gradients before they are scattered

    @property
    def arguments(self) -> float:
        return self.parameters + self.optimizer + self.batch + self.cache

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def parts(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def training_memory(run: RunConfig, platform: str = 'tpu') -> Memory:
    """Of a step of training on a 'cpu', 'gpu' or 'tpu'; the vocabulary must be known."""
    c, compute, mesh, t = run.model, run.compute, run.mesh, run.training
    held, parameters = inventory(c), stored(c, compute, mesh)
    rows = t.batch / mesh.span(BATCH)
    names = 4 + 3 * bool(c.encoder)
    fixed = Memory(
        parameters=parameters,
        optimizer=optimizer_bytes(run) + 3 * INT32,  # with the number of the step, and the key
        batch=names * rows * t.sequence_length * INT32,
    )
    part = rows / t.accumulation
    outside = ActivationCounter(
        compute=compute, mesh=mesh, rows=part / mesh.stage, columns=t.sequence_length, platform=platform
    )
    inside = dataclasses.replace(outside, rows=part / run.microbatches)
    gradients = gradient_bytes(c, compute, mesh)
    sums = gradients if t.accumulation > 1 else 0  # of the parts before this one
    ticks = run.microbatches + mesh.stage - 1 if mesh.stage > 1 else 1
    if has_costs(c):
        of = [(group, *((inside, ticks) if group.where == 'pipeline' else (outside, 1))) for group in held.groups]
        kept = sum(times * kept_by(group, count) for group, count, times in of)
        kept += 3 * outside.x(c) if mesh.stage > 1 else 0  # what waits, moves and is done
        working, gathered = max((at_work(group, count) for group, count, _ in of), key=sum)
    else:
        kept, working, gathered = _traced_layers(run, outside)
    head, logits = in_loss(c, outside)
    waits = head * outside.number  # the head's gradient, which is scattered with the others
    of_layers = sum(
        group.held(mesh) * weight.shard(mesh)
        for group in held.groups
        for weight in group.weights
        if weight.declared.role.learns
    )
    of_layers *= compute.parameter_dtype.itemsize
    cast = casts(held, outside)
    table = c.padded_vocabulary * c.model_dim / mesh.tensor
    moments = [
        dataclasses.replace(
            fixed,
            gradients=sums,
            activations=kept,
            logits=logits,
            communication=head * (outside.number + outside.wide),
            compute_weights=cast,
        ),
        dataclasses.replace(
            fixed,
            gradients=sums + of_layers,
            activations=kept + working,
            communication=gathered + waits,
            compute_weights=cast,
        ),
        # The embedding's gradient is added up in float32, whole, and sent in the compute dtype.
        dataclasses.replace(
            fixed, gradients=sums + gradients, communication=waits + table * (outside.wide + outside.number)
        ),
    ]
    return max(moments, key=lambda moment: moment.total)


def _traced_layers(run: RunConfig, outside: ActivationCounter) -> tuple[float, float, float]:
    """What the layers keep for the backward pass, and what one that is computed again makes meanwhile; its whole weights."""
    t, head = run.training, in_loss(run.model, outside)[0] * (outside.number + outside.wide)  # counted apart

    # Of one row and of two in each part, so that a search over numbers of parts need not trace again: each more row is alike.
    unit = run.mesh.span(BATCH) * run.microbatches
    more = t.batch // t.accumulation / unit - 1

    def kept(compute: ComputeConfig) -> float:
        shape = (t.sequence_length, run.microbatches, outside.platform)
        one, two = (traced_activations(run.model, compute, run.mesh, rows * unit, *shape) for rows in (1, 2))
        return max(one + more * (two - one) - head, 0.0)

    if run.compute.remat == 'none':
        return kept(run.compute), 0.0, 0.0
    all_of_them = kept(dataclasses.replace(run.compute, remat='none'))
    return kept(run.compute), all_of_them / (run.model.layers / run.mesh.stage), 0.0


def stored(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig) -> float:
    """Bytes of the weights that a device keeps while it trains."""
    size = lambda weight: weight.declared.stored(compute.parameter_dtype).itemsize
    return sum(numbers * size(weight) for weight, numbers in inventory(c).held(mesh))


def gradient_bytes(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig) -> float:
    """Bytes of the gradients on a device: as many as of the weights that learn."""
    learning = ((weight.declared, n) for weight, n in inventory(c).held(mesh) if weight.declared.role.learns)
    return sum(n * declared.stored(compute.parameter_dtype).itemsize for declared, n in learning)


def optimizer_bytes(run: RunConfig) -> float:
    """Bytes of the optimizer's state on one device."""
    return _optimizer_bytes(
        run.model, run.optimizer, run.compute.parameter_dtype, dataclasses.replace(run.mesh, replica=1)
    )


@functools.lru_cache(maxsize=2**14)
def _optimizer_bytes(c: ModelConfig, optimizer: OptimizerConfig, stored: jnp.dtype, mesh: MeshConfig) -> float:
    alike = ((p, dtype, n) for p, dtype, n in _unlike(c, stored) if p.role.learns)
    shards = ((Shard(p.local_shape(mesh), dtype, p.role), n * p.held(mesh)) for p, dtype, n in alike)
    return state_bytes(optimizer, shards)


@functools.lru_cache(maxsize=256)
def _unlike(c: ModelConfig, stored: jnp.dtype) -> list[tuple[Parameter, str, int]]:
    """One of all weights that are kept alike, its dtype, and how many they are: a search asks for each of its meshes."""
    alike: dict[Any, list[Parameter]] = {}
    for p in weights_of(c).values():
        alike.setdefault((p.shape, p.layout, p.role, p.dtype, p.layers and len(p.layers), p.split_layers), []).append(p)
    return [(some[0], str(some[0].stored(stored)), len(some)) for some in alike.values()]


def casts(held: Inventory, device: ActivationCounter) -> float:
    """Bytes of the layers' matrices in the compute dtype, where they are stored in another.

    A layer casts its own, but all of them are known before the loop over layers, and XLA casts them there, at once, where they
    are gathered next or are experts'; a plain matmul of what is not gathered casts as it reads.
    """
    if device.compute.parameter_dtype.itemsize == device.number:
        return 0
    numbers = sum(
        group.held(device.mesh) * weight.shard(device.mesh)
        for group in held.groups
        for weight in group.weights
        if (device.mesh.span(weight.declared.gathered) > 1 or 'expert' in weight.left) and weight.declared.narrow
    )
    return numbers * device.number


def serving_memory(
    c: ModelConfig,
    compute: ComputeConfig,
    mesh: MeshConfig,
    rows: int,
    length: int,
    new: int = 1,
    platform: str = 'tpu',
) -> Memory:
    """Of a step that decodes one token in each row, or, with `new` above 1, reads prompts of so many tokens.

    Args:
        c: the model; its weights are kept as `inference.run.in_compute_dtype` has them.
        compute: of it the dtypes count, and `dispatch` and `capacity_factor`.
        mesh: without stages.
        rows: sequences at once, all devices together.
        length: tokens of each at most.
        new: tokens of each row that the step works on.
        platform: 'cpu', 'gpu' or 'tpu'.
    """
    b = jnp.dtype(compute.dtype).itemsize
    size = lambda weight: weight.in_use(compute.dtype, compute.parameter_dtype).itemsize
    held = inventory(c)
    parameters = sum(numbers * size(weight.declared) for weight, numbers in held.held(mesh))
    mine = rows / mesh.span(BATCH)
    count = ActivationCounter(compute=compute, mesh=mesh, what='prefill', rows=mine, columns=new, platform=platform)
    needs = residuals if has_costs(c) else lambda group, count: (3 * count.x(c), gathered_by(group, count))
    working, gathered = max((needs(group, count) for group in held.groups), key=sum)
    head = c.padded_vocabulary * c.model_dim / mesh.tensor * b if mesh.span(('data', 'context', 'expert')) > 1 else 0
    logits = mine * c.padded_vocabulary * (1 + 1 / mesh.tensor) * FLOAT32
    return Memory(
        parameters=parameters,
        batch=mine * (new + 1) * INT32,
        cache=cache_bytes(c, compute, mesh, rows, length, platform),
        activations=working,
        logits=logits,
        communication=max(gathered, head),
    )


def cache_bytes(
    c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, rows: int, length: int, platform: str = 'tpu'
) -> float:
    """Bytes of the cache on one device for `rows` sequences of at most `length` tokens; an encoder's output is not counted."""
    groups = declared_cache(c, CacheSize(rows, length, 1, mesh.context, mesh.tensor, compute.dtype, platform))
    return sum(array.shard_bytes(mesh) for group in groups for array in group.arrays)
