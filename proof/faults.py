"""Faults that the proof must catch: mistakes planted in the code while a case of it runs."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from weft.proof.equivalence import TOLERANCE, gradient_error, one_gradient
from weft.sharding.collectives import tensor_slice
from weft.sharding.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake planted in the code while a case runs."""

    what: str
    kind: str
    mesh: MeshConfig
    plant: Callable[[], contextlib.AbstractContextManager]


def patched(target: str, change: Callable[[Any], Any]) -> contextlib.AbstractContextManager:
    """The attribute `target` (a dotted name) replaced by `change` of it."""
    module, _, name = target.rpartition('.')
    found = __import__(module, fromlist=[name])
    return mock.patch.object(found, name, change(getattr(found, name)))


def first_replica_only(real: Callable) -> Callable:
    return lambda gradient, specs: real(
        jax.tree.map(lambda g: jnp.where(lax.axis_index('replica') == 0, g, 0), gradient), specs
    )


def keys_without_places(real: Callable) -> Callable:
    """Of (k, v, places) only k and v are sent."""
    return lambda tree, axis: (*real(tree[:2], axis), *tree[2:]) if len(tree) == 3 else real(tree, axis)


def own_counts(real: Callable) -> Callable:
    return lambda sums, counts, model: real(sums, jax.tree.map(lambda n: n / 2, counts), model)


def late_borders(real: Callable) -> Callable:
    """A document's first token is taken for the last one of the document before."""

    def sums(model, batch, *rest):
        segment_BT = batch.segment_BT
        late_BT = jnp.where(segment_BT > 0, jnp.roll(segment_BT, 1, axis=1).at[:, 0].set(segment_BT[:, 0]), 0)
        return real(model, batch._replace(segment_BT=late_BT), *rest)

    return sums


def fault(what: str, kind: str, mesh: MeshConfig, target: str, change: Callable[[Any], Any]) -> Fault:
    return Fault(what, kind, mesh, lambda: patched(target, change))


FAULTS = (
    fault(
        'gradients are not summed over replicas',
        'dense',
        MeshConfig(replica=2, data=4),
        'weft.training.loss.reduce_gradients',
        lambda real: lambda gradient, specs: gradient,
    ),
    fault(
        'only one replica’s gradient counts',
        'dense',
        MeshConfig(replica=2, data=4),
        'weft.training.loss.reduce_gradients',
        first_replica_only,
    ),
    fault(
        'a sum over tensor is left out',
        'dense',
        MeshConfig(data=2, tensor=4),
        'weft.model.context.reduce_scatter_sequence',
        lambda real: tensor_slice,
    ),
    fault(
        'the ring moves two devices at a time',
        'dense',
        MeshConfig(data=2, context=4),
        'weft.model.ops.attention.ring.ring_shift',
        lambda real: lambda tree, axis: real(tree, axis, 2),
    ),
    fault(
        'keys go round without their positions',
        'dense',
        MeshConfig(data=2, context=4),
        'weft.model.ops.attention.ring.ring_shift',
        keys_without_places,
    ),
    fault(
        'each part of a step is averaged by itself',
        'dense',
        MeshConfig(data=8),
        'weft.training.loss.objective',
        own_counts,
    ),
    fault(
        'the last microbatch is dropped',
        'dense',
        MeshConfig(stage=4, data=2),
        'weft.sharding.pipeline.ticks',
        lambda real: lambda microbatches, stages: real(microbatches, stages) - 1,
    ),
    fault(
        'a stage takes the documents of another microbatch',
        'dense',
        MeshConfig(stage=4, data=2),
        'weft.model.context.microbatch',
        lambda real: lambda tree, number, M: real(tree, (number + 1) % M, M),
    ),
    fault(
        'tokens reach the next device’s experts',
        'all_gather',
        MeshConfig(data=2, expert=4),
        'weft.model.ops.expert_dispatch.by_expert',
        lambda real: lambda expert_NK, E: real(jnp.where(expert_NK < E, (expert_NK + 1) % E, E), E),
    ),
    fault(
        'a document begins a token late',
        'dense',
        MeshConfig(data=2, context=2, tensor=2),
        'weft.training.loss.local_loss_sums',
        late_borders,
    ),
)


def fault_error(fault: Fault) -> dict[str, Any]:
    """What the case says while the fault is planted: the type check's refusal, or how wrong the numbers are."""
    one_gradient(fault.kind)  # before anything is planted
    jax.clear_caches()  # else what was traced without the fault is used again
    with fault.plant(), contextlib.ExitStack() as after:
        after.callback(jax.clear_caches)
        try:
            return gradient_error(fault.kind, fault.mesh)
        except ValueError as error:
            line = next(line.strip() for line in str(error).splitlines() if 'out_specs' in line or 'varying' in line)
            return {'refused': line[:160]}


def caught(found: dict[str, Any]) -> bool:
    """Whether a planted fault shows."""
    return 'refused' in found or not found['error'] <= TOLERANCE['gradient']
