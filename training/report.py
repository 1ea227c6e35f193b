"""What a run tells its user about memory: the layout of every weight, and what filled a device that ran out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Group
from rich.table import Table

from weft.hub.tensor_table import unpadded
from weft.model.decoder import weights_of
from weft.model.parameters import name_of
from weft.runtime.device_memory import gib, shard_bytes
from weft.sharding.mesh import AXES, BATCH, SEQUENCE
from weft.sharding.pipeline import bubble, ticks
from weft.training.config import RunConfig
from weft.training.tables import Fitted


def rate_line(before: RunConfig, now: RunConfig, step: int) -> str | None:
    """What another number of steps does to the learning rate of a run that goes on after `step`; None where it is the same."""
    was, will = before.training.steps, now.training.steps
    if was == will or step >= will:
        return None
    rate = float(before.optimizer.schedule(was)(step - 1))
    next_rate = float(now.optimizer.schedule(will)(step))
    return (
        f'training.steps was {was} and is {will}: the schedule is of all steps, and the learning rate goes from {rate:.3g} at '
        f'step {step} to {next_rate:.3g} at step {step + 1}'
    )


SPLITS = {
    'replica': 'rows; gradients are averaged over it once a step',
    'stage': 'layers',
    'data': 'rows, weights and optimizer state',
    'context': 'the sequence, weights and optimizer state',
    'expert': 'rows, experts, weights and optimizer state',
    'tensor': 'heads, hidden units, vocabulary; between blocks the sequence',
}


def layout(config: RunConfig, model: Any) -> Group:
    """What the mesh splits, and each weight's layout."""
    return Group(Fitted(mesh_table(config)), '', Fitted(weights_table(model)))


def mesh_table(config: RunConfig) -> Table:
    """All axes of the mesh: devices along each, and what they split."""
    table = Table(title='Mesh', title_justify='left', pad_edge=False, box=None)
    table.add_column('axis', no_wrap=True)
    table.add_column('devices', justify='right', no_wrap=True)
    table.add_column('splits')
    for axis in AXES:
        what = SPLITS[axis] + (f': {pipeline_line(config)}' if axis == 'stage' and config.mesh.stage > 1 else '')
        table.add_row(axis, str(getattr(config.mesh, axis)), what)
    parts = config.training.accumulation
    table.add_row('all', str(config.mesh.size), f'{parts} parts of a batch, one after another' if parts > 1 else '')
    return table


def pipeline_line(config: RunConfig) -> str:
    """The pipeline's schedule: its microbatches and its bubble, and the layers' inputs that it keeps for the backward pass."""
    M, kept = config.microbatches, gib(kept_inputs(config))
    return (
        f'{M} microbatches, a bubble of {bubble(M, config.mesh.stage):.1%} of the work; its layers’ inputs take {kept}'
    )


def kept_inputs(config: RunConfig) -> int:
    """Bytes on one device of the layers' inputs that wait for the backward pass: all that compute.remat=block keeps.

    A pipeline keeps those of each tick, the bubble's too: (M + S - 1) · L / S inputs of a microbatch.
    """
    t, m, mesh = config.training, config.model, config.mesh
    width = jnp.dtype(config.compute.dtype).itemsize
    row = t.sequence_length * m.model_dim * width // mesh.span(SEQUENCE)
    rows = t.batch // (t.accumulation * mesh.span(BATCH))
    if mesh.stage == 1:
        return m.layers * rows * row
    longest = m.layer_groups[m.pipelined_group].layers
    M = config.microbatches
    in_pipeline = ticks(M, mesh.stage) * (longest // mesh.stage) * (rows // M) * row
    return in_pipeline + (m.layers - longest) * (rows // mesh.stage) * row


def weights_table(model: Any) -> Table:
    """Each weight's shape, layout and bytes per device."""
    table = Table(title='Weights', title_justify='left', pad_edge=False, box=None)
    for column in ('weight', 'shape', 'layout'):
        table.add_column(column, no_wrap=column != 'layout')
    table.add_column('bytes/device', justify='right', no_wrap=True)
    count = bytes_ = padding = 0
    known = weights_of(model.config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = name_of(path)
        layout = ', '.join('·'.join(axes if isinstance(axes, tuple) else [axes or '–']) for axes in leaf.sharding.spec)
        table.add_row(name, ' × '.join(map(str, leaf.shape)), layout, f'{shard_bytes(leaf):,}')
        count, bytes_ = count + leaf.size, bytes_ + shard_bytes(leaf)
        padding += leaf.size - math.prod(unpadded(known[name], model.config))
    table.add_section()
    table.add_row('all', f'{count - padding:,}', 'parameters', f'{bytes_:,}')
    if padding:
        table.add_row('', f'{padding:,}', 'more, which fill up the vocabulary', '')
    return table


def memory_line(config: RunConfig, state: Any) -> str:
    """What a training step keeps on each device, and what to change. `state` may be abstract (shapes with shardings)."""
    t, how, mesh = config.training, config.compute, config.mesh
    weights, moments, inputs = shard_bytes(state.model), shard_bytes(state.optimizer), kept_inputs(config)
    remat = (
        f'set compute.remat=block (now {how.remat}) to keep only the layers’ inputs, ' if how.remat != 'block' else ''
    )
    return (
        f'out of memory on a device: weights {gib(weights)}, gradients {gib(weights)}, optimizer state {gib(moments)}, '
        f'layers’ inputs {gib(inputs)}, the rest activations; {remat}raise '
        f'training.accumulation (now {t.accumulation}), lower training.batch (now {t.batch}) or training.sequence_length (now '
        f'{t.sequence_length}), or split all of it further (now {mesh}): by mesh.data, mesh.tensor, mesh.context or mesh.stage'
    )
