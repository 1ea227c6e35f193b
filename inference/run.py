"""A trained run, opened for reading on any mesh. Nothing in its folder is touched."""

import dataclasses
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from weft.data.tokenizer import Tokenizer
from weft.hub.published_tokenizer import has_tokenizer, run_tokenizer
from weft.inference.unstacked import divided, is_written_out, kinds, unstacked
from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.cost import parameters
from weft.model.decoder import Decoder, declared_decoder
from weft.model.parameters import Parameter, map_declared
from weft.model.sizes import sizes
from weft.runtime import background
from weft.runtime.device_memory import explain_oom
from weft.runtime.errors import UserError
from weft.sharding.mesh import Divides, MeshConfig, check_divides, configure_jax, make_mesh, nearest_meshes, parse_mesh
from weft.storage.bucket_checkpoint import checkpoints_of
from weft.storage.buckets import Bucket
from weft.storage.checkpoint import Checkpoints
from weft.training.config import RunConfig
from weft.training.context import context, published_files
from weft.training.finite import check_saved
from weft.training.run_folder import run_folder
from weft.training.state import abstract_model, newest_saved, restore_newest

SAID = re.compile(
    r'(tokenizer_config|special_tokens_map|generation_config|chat_template)\.json|chat_template\.jinja'
    r'|additional_chat_templates/.*'
)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run's config, tokenizer and weights, which are read meanwhile; use it under `jax.set_mesh(run.mesh)`."""

    folder: Path | Bucket
    config: RunConfig
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer | None  # an imported model may have none
    kind: Decoder  # shapes, dtypes and layouts of the weights
    reading: Future[tuple[Decoder, int]]
    context: int  # the most tokens of a row: as it was trained, or as published

    @property
    def model(self) -> Decoder:
        """The weights, matrices in the compute dtype. Waits until all are there, and raises what went wrong with them."""
        return self.reading.result()[0]

    @property
    def step(self) -> int:
        """Of the checkpoint. Waits as `model` does: where the run deletes one that is being read, the newest is taken."""
        return self.reading.result()[1]


def open_run(
    folder: str | Path | Bucket,
    mesh: str | None = None,
    needs_text: bool = True,
    stacked: bool = False,
    step: int | None = None,
) -> TrainedRun:
    """The newest checkpoint of a run, or that of a step, on the mesh that trained it or on another (`'expert=2,tensor=2'`).

    Rows are split over replica, data and expert, caches over context and tensor too; each replica has all weights. There is no
    pipeline: stages of the run's own mesh become more of `data`, as far as that divides the model. A machine with only a CPU
    simulates as many devices as the mesh has, unless JAX has started before. The run may be trained meanwhile.

    Args:
        needs_text: whether a run without a tokenizer, as an imported model may be, is an error.
        stacked: one array for the like layers' weights, with which programs of a loop compile sooner; else, where decoding
            keeps no loop over them, each layer is a module of its own in a list.

    Raises UserError where the folder is not a run, has no whole checkpoint, or the mesh cannot hold the model; what is wrong
    with the weights comes with the first use of `model`.
    """
    folder = run_folder(folder)
    checkpoints = checkpoints_of(folder)
    check_step(checkpoints, step)
    first, config, files = newest_saved(checkpoints, step)
    wanted = own_mesh(config) if mesh is None else parse_mesh(mesh)
    check_divides(wanted, [*sizes(config.model), NO_PIPELINE])
    configure_jax(wanted.size, config.compute.dtype)
    devices = make_mesh(wanted)
    rows = context(folder, config)
    if needs_text and not has_tokenizer(files):
        raise UserError(f'{folder} was imported without a tokenizer: it takes token ids alone (scripts/score.py)')
    with jax.set_mesh(devices):
        stored = abstract_model(config)
        in_use = dtypes_in_use(config.model, config.compute)
        computed = jax.tree.map(lambda w, dtype: w.update(dtype=dtype), stored, in_use)
        apart = not stacked and is_written_out(computed)
        kind = unstacked(computed, kinds) if apart else computed

    def read() -> tuple[Decoder, int]:
        count = sum(parameters(config.model).values())
        tell = f'out of memory on a device: {count:,} parameters; split them over more with --mesh'
        with jax.set_mesh(devices), explain_oom(lambda: tell):
            model, found = restore_newest(checkpoints, first, config, files, stored, step)
            check_saved(checkpoints, found, {'model': model}, 'with which nothing can be computed')
            if jax.tree.leaves(computed) != jax.tree.leaves(stored):
                model = jax.jit(in_compute_dtype, donate_argnums=0)(model)
            return unstacked(model, divided) if apart else model, found

    thread = ThreadPoolExecutor(1, 'weights')
    reading = background.submit(thread, read)
    thread.shutdown(wait=False)  # takes no more work, and ends when this is done
    return TrainedRun(folder, config, devices, run_tokenizer(files, str(folder)), kind, reading, rows)


def check_step(checkpoints: Checkpoints, step: int | None) -> None:
    """Raises UserError where a run has no checkpoint of a step that is asked for."""
    if step is None or step in (steps := checkpoints.steps() or [checkpoints.newest()]):
        return
    run, near = checkpoints.run, min(steps, key=lambda there: (abs(there - step), there))
    raise UserError(f'--step {step}: {run} has no checkpoint of this step; the nearest that it has is {near}')


def said_beside(folder: Path | Bucket) -> dict[str, bytes]:
    """Of an imported run, the published files that say how it is to be asked: chat templates, special tokens, sampling."""
    return published_files(folder, SAID.fullmatch)


# A token would wait for each stage in turn.
NO_PIPELINE = Divides(('stage',), 'the number of stages that decoding can use', 1)


def own_mesh(config: RunConfig) -> MeshConfig:
    """The mesh that a run decodes on unless told otherwise: its own, or the most alike of as many devices without stages."""
    mesh = config.mesh
    if mesh.stage == 1:
        return mesh
    wanted = dataclasses.replace(mesh, stage=1, data=mesh.data * mesh.stage)
    found = next(nearest_meshes(wanted, [*sizes(config.model), NO_PIPELINE]))
    print(f'decoding has no pipeline: on mesh ({found}) instead of the run’s own ({mesh})', file=sys.stderr)
    return found


def in_compute_dtype(model: Decoder) -> Decoder:
    """Weights as the forward pass uses them, bit for bit; routers, norms and biases stay in at least float32."""
    return jax.tree.map(lambda w, dtype: w.astype(dtype), model, dtypes_in_use(model.config, model.compute))


def dtypes_in_use(c: ModelConfig, compute: ComputeConfig) -> Decoder:
    """The dtype of each weight while a model is used."""

    def dtype(name: str, weight: Parameter) -> jnp.dtype:
        return weight.in_use(compute.dtype, compute.parameter_dtype)

    return map_declared(dtype, declared_decoder(c, compute))
