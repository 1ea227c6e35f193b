"""Whether arrays hold numbers: a NaN or an infinity in a weight makes all that is computed with it none.

A state is looked at before it is saved, weights as they are read, imported or exported: what is not finite never gets out. The
look is apart from the step, whose program stays as it is.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from weft.runtime.errors import Diverged, UserError, shown
from weft.storage.checkpoint import Checkpoints
from weft.storage.manifest import leaves_by_path
from weft.training.config import RECORD, RunConfig

PART = 1 << 24  # numbers that a thread takes
AT_ONCE = 1 << 18  # of them, that it looks at together: they stay in its cache
# The bits of infinity, of dtypes that NumPy itself asks three times slower: those of a NaN, as a whole number, are more.
INFINITY = {'bfloat16': 0x7F80, 'float16': 0x7C00}
RULE = 'numbers that are not finite (NaN or infinite)'


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
    """bool [leaves]."""
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def not_finite(tree: Any) -> list[str]:
    """The paths of arrays with a NaN or an infinity, in the tree's order. Of several processes all call it alike."""
    leaves = {name: x for name, x in leaves_by_path(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    if not leaves:
        return []
    finite = on_host(leaves.values()) if is_host() else jax.device_get(_finite(list(leaves.values()))).tolist()
    return [name for name, right in zip(leaves, finite, strict=True) if not right]


def is_host() -> bool:
    """Whether all arrays lie in this process' own memory: it reads them where they are, and compiles nothing."""
    return jax.default_backend() == 'cpu' and jax.process_count() == 1


def on_host(leaves: Iterable[jax.Array]) -> list[bool]:
    """Whether each array is finite, by this process alone, on all of its cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1, 'finite') as threads:
        found = [
            [
                threads.submit(_is_finite, flat[begin : begin + PART])
                for shard in x.addressable_shards
                if not shard.replica_id
                for flat in [np.asarray(shard.data).reshape(-1)]
                for begin in range(0, flat.size, PART)
            ]
            for x in leaves
        ]
        return [all(part.result() for part in parts) for parts in found]


def _is_finite(part: np.ndarray) -> bool:
    """Whether all numbers of one dimension are finite. NumPy lets other threads run meanwhile."""
    infinity = INFINITY.get(part.dtype.name)
    for begin in range(0, part.size, AT_ONCE):
        some = part[begin : begin + AT_ONCE]
        if infinity is None:
            if not np.isfinite(some).all():
                return False
        # As whole numbers with a sign those without one are the largest, else those with it.
        elif some.view(np.int16).max() >= infinity or some.view(np.uint16).max() >= infinity | 0x8000:  # the sign
            return False
    return True


def listed(names: Sequence[str]) -> str:
    """Paths of arrays for a message."""
    return shown(names[0]) + (f' and {len(names) - 1} more' if len(names) > 1 else '')


def check_saved(checkpoints: Checkpoints, step: int, tree: Any, why: str) -> None:
    """Raises UserError where arrays read off a checkpoint are not finite; `why` says what they are not good for."""
    if names := not_finite(tree):
        others = [other for other in checkpoints.steps() if other != step]
        folder = checkpoints.run / 'checkpoints' / str(step)
        way = f'remove {folder} to use that of step {others[-1]}' if others else 'the run has no other: make it anew'
        raise UserError(f'{folder}: {listed(names)} holds {RULE}, {why}; {way}')


def diverged(what: str, checkpoints: Checkpoints, config: RunConfig) -> Diverged:
    """The error of a run whose numbers are not finite any more: what stands, and what to do that a continuation allows."""
    steps = checkpoints.steps()
    rate = config.optimizer.learning_rate
    lower = f'optimizer.learning_rate={float(f"{rate / 3:.1e}"):g}'
    stands = f'checkpoint {steps[-1]}, from before, is finite' if steps else 'nothing was saved before'
    if not (checkpoints.run / RECORD).is_file():
        way = f'begin anew with --fresh {lower}'
    elif steps == [0]:
        way = f'begin again from the imported weights with {lower}'
    else:
        way = f'import the model again under another name and train it with {lower}'
    return Diverged(
        f'{what}; {stands}; a continuation takes the same steps to the same end: {way} (it is {rate:g}) or a larger '
        f'optimizer.warmup_steps (it is {config.optimizer.warmup_steps})'
    )
