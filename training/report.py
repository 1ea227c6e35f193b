"""What a run tells its user about memory: the layout of every weight, and what filled a device that ran out."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from sharding.memory import gib, shard_bytes
from sharding.mesh import BATCH
from training.config import RunConfig


def named(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a module or an optimizer state with readable names, such as groups.0.attention.q_DN."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator='.')
        yield name.removesuffix('.value'), leaf


def weights_table(model: Any) -> Table:
    """Each weight's shape, layout and bytes per device."""
    table = Table(title='Weights', title_justify='left', pad_edge=False, box=None)
    for column in ('weight', 'shape', 'layout'):
        table.add_column(column, no_wrap=True, overflow='ignore')
    table.add_column('bytes/device', justify='right', no_wrap=True)
    count = bytes_ = 0
    for name, leaf in named(model):
        layout = ', '.join('·'.join(axes if isinstance(axes, tuple) else [axes or '–']) for axes in leaf.sharding.spec)
        table.add_row(name, ' × '.join(map(str, leaf.shape)), layout, f'{shard_bytes(leaf):,}')
        count, bytes_ = count + leaf.size, bytes_ + shard_bytes(leaf)
    table.add_section()
    table.add_row(f'all {count:,} parameters', '', '', f'{bytes_:,}')
    return table


def memory_line(config: RunConfig, state: Any) -> str:
    """What a training step keeps on each device, and what to change. `state` may be abstract (shapes with shardings)."""
    t, m, mesh = config.training, config.model, config.mesh
    weights, moments = shard_bytes(state.model), shard_bytes(state.optimizer)
    rows = -(-t.batch // mesh.span(BATCH))
    inputs = m.layers * rows * t.sequence_length * m.model_dim * jnp.dtype(m.dtype).itemsize // mesh.tensor
    remat = '' if m.remat == 'block' else f'set model.remat=block (now {m.remat}) to keep only the layers’ inputs, '
    return (
        f'out of memory on a device: weights {gib(weights)}, gradients {gib(weights)}, optimizer state {gib(moments)}, '
        f'layers’ inputs {gib(inputs)}, the rest activations; {remat}lower training.batch (now {t.batch}) or '
        f'training.sequence_length (now {t.sequence_length}), or raise mesh.data or mesh.tensor (now {mesh.data} and '
        f'{mesh.tensor}) to split all of it further'
    )
