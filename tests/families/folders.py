"""Published folders of tiny models with generated weights, as a publisher would have them, without torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.families import cases, weights
from tests.families.loading import read, stored_name
from weft.hub import published_folder, tensor_files
from weft.hub import read as hub
from weft.hub.tensor_table import tensors


def named(name: str, make: Callable[[str, tuple[int, ...]], np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The tensors of a case by their published names: as in the goldens, float32, or as `make` makes them."""
    family, c = read(cases.CASES[name])
    offset = cases.family(name) in cases.OFFSET_NORMS
    make = make or (lambda tensor, shape: weights.tensor(cases.SEED, tensor, shape, offset))
    of = lambda tensor: stored_name(family, c, tensor)
    table = tensors(family, c, hub.shapes_of(c))
    return {of(one.name): make(of(one.copy_of or one.name), one.shape) for one in table}


def bits(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Any bit patterns at all: infinities, numbers too small to be normal, NaNs of every kind."""
    dtype = np.dtype(dtype)
    raw = weights.integers(weights.key_of(1, name), int(np.prod(shape)))
    return raw.astype(f'u{dtype.itemsize}').view(dtype).reshape(shape)


def write(folder: Path, config: dict[str, Any], found: dict[str, np.ndarray], files: int = 1) -> Path:
    """A folder of a config and tensors, in that many files."""
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    kinds = {name: (array.dtype, array.shape) for name, array in found.items()}
    if files == 1:
        tensor_files.write(folder / published_folder.SINGLE, kinds, lambda name: found[name])
        return folder
    where = {name: f'model-{i % files + 1:05}-of-{files:05}.safetensors' for i, name in enumerate(found)}
    for file in set(where.values()):
        mine = {name: kind for name, kind in kinds.items() if where[name] == file}
        tensor_files.write(folder / file, mine, lambda name: found[name])
    (folder / published_folder.INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    return folder


def in_bfloat16(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(jnp.bfloat16) for name, array in found.items()}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder."""
    return {name: np.array(one.read()) for name, one in hub.all_stored(folder).items()}
