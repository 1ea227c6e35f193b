"""Faults that the proof must catch: mistakes planted in the code while a case of it runs."""

import contextlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from weft.model.batch import Batch
from weft.model.decoder import Decoder
from weft.proof.equivalence import TOLERANCE, gradient_error, one_gradient
from weft.sharding.collectives import tensor_slice
from weft.sharding.mesh import MeshConfig


class Fault(NamedTuple):
    """A mistake in the code: `target`, a dotted name, is replaced by `change` of it while a case runs."""

    what: str
    mesh: MeshConfig
    target: str
    change: Callable[[Any], Any]
    kind: str = 'dense'


def first_replica_only(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda gradient, specs: real(
        jax.tree.map(lambda g: jnp.where(lax.axis_index('replica') == 0, g, 0), gradient), specs
    )


def keys_without_places(real: Callable[..., Any]) -> Callable[..., Any]:
    """Of (k, v, places) only k and v are sent."""
    return lambda tree, axis: (*real(tree[:2], axis), *tree[2:]) if len(tree) == 3 else real(tree, axis)


def own_counts(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda sums, counts, model: real(sums, jax.tree.map(lambda n: n / 2, counts), model)


def late_borders(real: Callable[..., Any]) -> Callable[..., Any]:
    """A document's first token is taken for the last one of the document before."""

    def sums(model: Decoder, batch: Batch, *rest: Any) -> Any:
        segment_BT = batch.segment_BT
        late_BT = jnp.where(segment_BT > 0, jnp.roll(segment_BT, 1, axis=1).at[:, 0].set(segment_BT[:, 0]), 0)
        return real(model, batch._replace(segment_BT=late_BT), *rest)

    return sums


FAULTS = (
    Fault(
        'gradients are not summed over replicas',
        MeshConfig(replica=2, data=4),
        'weft.training.loss.reduce_gradients',
        lambda real: lambda gradient, specs: gradient,
    ),
    Fault(
        'only one replica’s gradient counts',
        MeshConfig(replica=2, data=4),
        'weft.training.loss.reduce_gradients',
        first_replica_only,
    ),
    Fault(
        'a sum over tensor is left out',
        MeshConfig(data=2, tensor=4),
        'weft.model.context.reduce_scatter_sequence',
        lambda real: tensor_slice,
    ),
    Fault(
        'the ring moves two devices at a time',
        MeshConfig(data=2, context=4),
        'weft.model.ops.attention.ring.ring_shift',
        lambda real: lambda tree, axis: real(tree, axis, 2),
    ),
    Fault(
        'keys go round without their positions',
        MeshConfig(data=2, context=4),
        'weft.model.ops.attention.ring.ring_shift',
        keys_without_places,
    ),
    Fault(
        'each part of a step is averaged by itself',
        MeshConfig(data=8),
        'weft.training.loss.objective',
        own_counts,
    ),
    Fault(
        'the last microbatch is dropped',
        MeshConfig(stage=4, data=2),
        'weft.sharding.pipeline.ticks',
        lambda real: lambda microbatches, stages: real(microbatches, stages) - 1,
    ),
    Fault(
        'a stage takes the documents of another microbatch',
        MeshConfig(stage=4, data=2),
        'weft.model.context.microbatch',
        lambda real: lambda tree, number, M: real(tree, (number + 1) % M, M),
    ),
    Fault(
        'tokens reach the next device’s experts',
        MeshConfig(data=2, expert=4),
        'weft.model.ops.expert_dispatch.by_expert',
        lambda real: lambda expert_NK, E: real(jnp.where(expert_NK < E, (expert_NK + 1) % E, E), E),
        kind='all_gather',
    ),
    Fault(
        'a document begins a token late',
        MeshConfig(data=2, context=2, tensor=2),
        'weft.training.loss.local_loss_sums',
        late_borders,
    ),
)


def fault_error(fault: Fault) -> dict[str, Any]:
    """What the case says while the fault is planted: the type check's refusal, or how wrong the numbers are."""
    one_gradient(fault.kind)  # before anything is planted
    jax.clear_caches()  # else what was traced without the fault is used again
    planted = mock.patch(fault.target, fault.change(pkgutil.resolve_name(fault.target)))
    with planted, contextlib.ExitStack() as after:
        after.callback(jax.clear_caches)
        try:
            return gradient_error(fault.kind, fault.mesh)
        except ValueError as error:
            line = next(line.strip() for line in str(error).splitlines() if 'out_specs' in line or 'varying' in line)
            return {'refused': line[:160]}


def caught(found: dict[str, Any]) -> bool:
    """Whether a planted fault shows."""
    return 'refused' in found or not found['error'] <= TOLERANCE['gradient']
