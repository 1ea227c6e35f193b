"""What a run tells its user about memory: the layout of every weight, and what filled a device that ran out."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from rich.table import Table

from training.config import RunConfig


def shard_bytes(x: Any) -> int:
    """Bytes of x on one device; x may be an array or only its shape, dtype and sharding."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


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


def out_of_memory(config: RunConfig, state: Any) -> str:
    """One line: what a step keeps on each device, and what to change. `state` may be abstract (shapes with shardings)."""
    gib = lambda n: f'{n / 2**30:.2f} GiB'
    t, m, mesh = config.training, config.model, config.mesh
    weights = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(state.model))
    moments = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(state.optimizer))
    rows = -(-t.batch // mesh.span(('data', 'expert')))
    residual = m.layers * rows * t.sequence_length * m.model_dim * jax.numpy.dtype(m.dtype).itemsize // mesh.tensor
    changes = [
        f'training.batch (now {t.batch})',
        f'training.sequence_length (now {t.sequence_length})',
        *([f'model.remat=block (now {m.remat}) to keep only the layers’ inputs'] if m.remat != 'block' else []),
        f'a larger mesh.data or mesh.tensor (now {mesh.data} and {mesh.tensor}) to split weights and activations further',
    ]
    return (
        f'out of memory on a device: weights {gib(weights)}, gradients {gib(weights)}, optimizer state {gib(moments)}, '
        f'the layers’ inputs {gib(residual)}, the rest activations within layers; lower {", ".join(changes[:2])}, or set {"; or ".join(changes[2:])}'
    )
