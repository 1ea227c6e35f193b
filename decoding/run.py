"""A trained run, opened for reading on any mesh. Nothing in its folder is touched."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from data.tokenizer import Tokenizer
from model.config import sizes
from model.decoder import Decoder
from model.layers import is_matrix
from sharding.errors import UserError, nearest
from sharding.memory import explaining, gib, shard_bytes
from sharding.mesh import MeshConfig, check_divides, make_mesh, parse_mesh, simulate_cpu_devices
from training import config as configs
from training.config import RunConfig
from training.loop import on_mesh, restore_model
from training.step import init


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run's config, tokenizer and weights. Use the model under `jax.set_mesh(run.mesh)`."""

    folder: Path
    config: RunConfig
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    model: Decoder
    step: int


def open_run(folder: str | Path, mesh: str | None = None) -> TrainedRun:
    """The newest checkpoint of a run, on the mesh that trained it or on another (`'expert=2,tensor=2'`).

    Call it before anything asks JAX for devices: a machine with only a CPU simulates as many as the mesh has.
    Raises UserError where the folder is not a run, has no whole checkpoint, or the mesh cannot hold the model.
    """
    folder = Path(folder)
    if not (folder / 'config.yaml').is_file():
        runs = [str(path.parent) for path in folder.parent.glob('*/config.yaml')] if folder.parent.is_dir() else []
        raise UserError(f'{folder}: not a run, for it has no config.yaml{nearest(str(folder), runs) if runs else ""}')
    config = configs.load(folder / 'config.yaml')
    wanted: MeshConfig = config.mesh if mesh is None else parse_mesh(mesh)
    check_divides(wanted, sizes(config.model))
    simulate_cpu_devices(wanted.size)
    devices = make_mesh(wanted)
    tokenizer = Tokenizer.load(folder / 'tokenizer.model')
    with jax.set_mesh(devices):
        abstract = on_mesh(jax.eval_shape(lambda: init(config).model))
        with explaining(
            lambda: f'out of memory on a device: weights {gib(shard_bytes(abstract))}; split them over more with --mesh'
        ):
            model, step = restore_model(folder, abstract)
            model = jax.jit(in_compute_dtype, donate_argnums=0)(model)
    return TrainedRun(folder, config, devices, tokenizer, model, step)


def in_compute_dtype(model: Decoder) -> Decoder:
    """Matrices as the forward pass uses them, so that decoding reads no wider numbers; the same results, bit for bit.

    Routers, norms and biases compute in at least float32 and stay as they are.
    """

    def cast(path, w):
        narrow = is_matrix(path) and not any(getattr(part, 'name', '') == 'router_DE' for part in path)
        return w.astype(jnp.dtype(model.config.dtype)) if narrow else w

    return jax.tree_util.tree_map_with_path(cast, model)
