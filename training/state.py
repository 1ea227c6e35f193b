"""A run's state off its checkpoints, on the current mesh, whatever mesh saved it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from weft.model.decoder import Decoder, declared_decoder
from weft.model.parameters import abstract as abstract_module
from weft.runtime.errors import UserError
from weft.storage.checkpoint import Checkpoints
from weft.storage.checkpoint_reader import read_newest
from weft.storage.manifest import META
from weft.training import config as configs
from weft.training.config import RunConfig
from weft.training.step import State, init


def abstract_state(config: RunConfig) -> State:
    """Shapes, dtypes and layouts of the state, nothing of it made. Use it under `jax.set_mesh`."""
    return abstract(functools.partial(init, config))


def abstract_model(config: RunConfig) -> Decoder:
    """Of the weights alone; as `abstract_state`."""
    return abstract_module(declared_decoder(config.model, config.compute), config.compute.parameter_dtype)


def abstract(make: Callable[..., Any], *arguments: Any) -> Any:
    """Shapes, dtypes and layouts of what `make` gives, nothing of it made. Use it under `jax.set_mesh`."""
    mesh = jax.sharding.get_mesh()

    def place(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else P()  # eval_shape says nothing of scalars
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.eval_shape(make, *arguments))


def saved_config(checkpoints: Checkpoints, step: int) -> RunConfig:
    """The config that a checkpoint was saved with: its own copy, which its manifest vouches for."""
    checkpoints.meta(step)
    source = checkpoints.folder / str(step) / 'config.yaml'
    return configs.parse(checkpoints.file(step, 'config.yaml'), str(source))


def newest_saved(checkpoints: Checkpoints, step: int | None = None) -> tuple[int, RunConfig, Mapping[str, bytes]]:
    """The newest checkpoint, or that of `step`: its step, config and files."""
    return read_newest(
        checkpoints, lambda found: (found, saved_config(checkpoints, found), checkpoints.files(found)), step
    )


def items(state: State) -> dict[str, Any]:
    """The parts of a checkpoint."""
    return {'model': state.model, 'optimizer': state.optimizer, 'random': {'step': state.step, 'key': state.key}}


def restore(checkpoints: Checkpoints, step: int, config: RunConfig) -> State:
    found = checkpoints.restore(step, items(abstract_state(config)))
    return State(found['model'], found['optimizer'], **found['random'])


def restore_model(checkpoints: Checkpoints, step: int, config: RunConfig) -> Decoder:
    """Only the weights."""
    return checkpoints.restore(step, {'model': abstract_model(config)})['model']


def restore_newest(
    checkpoints: Checkpoints,
    first: int,
    config: RunConfig,
    files: Mapping[str, bytes],
    wanted: Decoder,
    step: int | None = None,
) -> tuple[Decoder, int]:
    """The weights of checkpoint `first`, or of a newer one if that is deleted meanwhile and no `step` asked for; their step.

    `wanted` is `abstract_model`. Raises UserError where the newer checkpoint is of another model.
    """

    def read(found: int) -> tuple[Decoder, int]:
        if found != first:
            saved = saved_config(checkpoints, found)
            same = (saved.model, saved.compute) == (config.model, config.compute)
            if not same or fixed(checkpoints.files(found)) != fixed(files):
                raise UserError(f'{checkpoints.run} became another model while it was read: begin again')
        return checkpoints.restore(found, {'model': wanted})['model'], found

    def fixed(files: Mapping[str, bytes]) -> dict[str, bytes]:
        """What is the same at each step: neither what is said of one, nor Orbax' own, which has times."""
        of_step = {META, 'config.yaml', 'commit_success.txt'}
        return {name: files[name] for name in files if name not in of_step and not name.startswith('_')}

    return read_newest(checkpoints, read, step, first)


def restore_imported(checkpoints: Checkpoints, config: RunConfig) -> Decoder:
    """An imported model's weights, made as wide as `config` keeps them. Raises UserError where that would round them."""
    saved = saved_config(checkpoints, 0)
    stored, kept = saved.compute.parameter_dtype, config.compute.parameter_dtype
    if jnp.promote_types(stored, kept) != kept:
        raise UserError(
            f'compute.weight_dtype is {kept} and the imported weights are {stored}, which it would round: nearest that works: '
            f'compute.weight_dtype={jnp.promote_types(stored, kept)}; or import the model again with --dtype {kept}'
        )
    narrow = dataclasses.replace(config, compute=saved.compute)
    wanted, structure = jax.tree.flatten(abstract_state(config).model)
    found = jax.tree.leaves(restore_model(checkpoints, 0, narrow))
    for i, kind in enumerate(wanted):
        found[i] = found[i].astype(kind.dtype)  # the narrow one is gone before the next is made
    return jax.tree.unflatten(structure, found)
