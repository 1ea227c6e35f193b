"""A run of another run: its model in another form, with its tokenizer, its data and what was published beside its weights."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from weft.compress.weights import Arrays, stacked_arrays
from weft.inference.run import TrainedRun
from weft.model.config import ModelConfig
from weft.model.decoder import weights_of
from weft.model.parameters import active
from weft.runtime.errors import UserError, shown
from weft.sharding.mesh import MeshConfig
from weft.storage import files as disk
from weft.storage.checkpoint import Checkpoints
from weft.storage.manifest import leaves_by_path
from weft.storage.staged import staged
from weft.training import config as configs
from weft.training.config import RECORD, RunConfig
from weft.training.context import SOURCE
from weft.training.state import abstract_model

REPORT = 'compression.json'  # in the run: the method, and what became of each map


def placed(c: ModelConfig, arrays: Arrays, mesh: jax.sharding.Mesh, weights: Any) -> Iterator[tuple[str, jax.Array]]:
    """A model's arrays on a mesh, one after another, by the model's names, in the dtypes that the config stores them in."""
    declared, shape = weights_of(c), MeshConfig(**mesh.shape)
    for name, array in stacked_arrays(c, arrays):
        weight = declared[name]
        layout = NamedSharding(mesh, active(weight.global_layout, shape))
        yield name, jax.device_put(np.asarray(array, weight.stored(weights)), layout)


def write_run(source: TrainedRun, target: Path, c: ModelConfig, arrays: Arrays, report: Mapping[str, Any]) -> RunConfig:
    """Writes the run, whole or not at all; training goes on with it as with an imported model, from step 0.

    Raises UserError where the target exists, or the source is not a local folder.
    """
    folder = source.folder
    if not isinstance(folder, Path):
        raise UserError(
            f'{shown(folder)}: compressed runs are made of local folders; copy it with your store’s own tool'
        )
    config = dataclasses.replace(source.config, name=target.name, model=c)
    kept = {'config.yaml': configs.dump(config).encode()}
    kept |= source.tokenizer.files() if source.tokenizer else {}
    with staged(target) as place, jax.set_mesh(source.mesh):
        names = dict(zip(weights_of(c), leaves_by_path(abstract_model(config)), strict=True))
        stored = config.compute.parameter_dtype
        facts = {'step': 0, 'tokens': 0, 'corpus': None, 'seed': config.seed, 'next_sample': 0}
        on_mesh = ((names[name], x) for name, x in placed(c, arrays, source.mesh, stored))
        Checkpoints(place).save_weights(0, 'model', on_mesh, facts, kept)
        for name, content in kept.items():
            disk.put(place / name, content)
        for name in ('data', SOURCE, RECORD):
            if (folder / name).is_dir():
                shutil.copytree(folder / name, place / name, copy_function=link_or_copy)
            elif (folder / name).is_file():
                disk.put(place / name, (folder / name).read_bytes())
        disk.put(place / REPORT, (json.dumps(report, indent=1) + '\n').encode())
    return config


def link_or_copy(source: str, target: str) -> None:
    """Prepared data is never written to again: where the file system can, both runs have one copy of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
