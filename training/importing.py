"""Published models to runs and back: a run is made of a published folder, and a published folder of a run.

    runs/NAME/
      config.yaml, tokenizer.*   as of every run (of Marian source.spm, target.spm, vocab.json)
      checkpoints/0/             the weights alone
      source/                    the published files beside the weights, as they were
      source.json                what an export needs to give back the same tensors

One array after another goes from the files over the mesh into the checkpoint: no more than one is ever in memory.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from weft.data.config import DataConfig
from weft.data.tokenizer import Tokenizer
from weft.hub import published_folder
from weft.hub import read as hub
from weft.hub.families import OPTIONAL
from weft.hub.gguf.tokenizer import tokenizer_files
from weft.hub.published_tokenizer import published_tokenizer
from weft.hub.tokenizers.side_files import json_file
from weft.model.sizes import sizes
from weft.runtime.device_memory import human_bytes
from weft.runtime.errors import UserError, shown
from weft.sharding.mesh import BATCH, SEQUENCE, MeshConfig, check_divides, configure_jax, make_mesh
from weft.storage import files as disk
from weft.storage.checkpoint import Checkpoints
from weft.storage.foreign import shown_path
from weft.storage.lock import Lock
from weft.storage.manifest import leaves_by_path
from weft.storage.staged import refuse_existing, staged
from weft.training import config as configs
from weft.training.config import RECORD, RunConfig, TrainingConfig
from weft.training.context import SOURCE, context_of
from weft.training.finite import RULE, not_finite
from weft.training.optimizers import AdamW
from weft.training.state import abstract_state

CONTEXT = 2048  # tokens, where a config says nothing of it
MOST_TO_TRAIN = 4096  # tokens of a row, however long a context is: what fits in memory
NO_DATA = DataConfig(source=None, vocabulary=None)  # what a model learnt from does not come with it


def import_run(
    source: Path,
    run: Path,
    mesh: MeshConfig,
    dtype: str | None = None,
    without_remote_code: bool = False,
    ignore: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Makes the run of a published folder or GGUF file; arguments as of `hub.read`. Raises UserError before it writes."""
    check_local(run)
    with Lock(run):
        refuse_existing(run)
        found, files, config, tokenizer, unread = examine(source, run.name, mesh, dtype, without_remote_code, ignore)
        configure_jax(mesh.size, config.compute.dtype)
        devices = make_mesh(mesh)
        kept = {'config.yaml': configs.dump(config).encode()} | (tokenizer.files() if tokenizer else {})
        with staged(run) as place:
            with jax.set_mesh(devices):
                names = dict(zip(found.shapes, leaves_by_path(abstract_state(config).model), strict=True))
            arrays = finite_arrays(found.arrays(devices), names, str(source), found.bytes, say)
            facts = {'step': 0, 'tokens': 0, 'corpus': None, 'seed': config.seed, 'next_sample': 0}
            Checkpoints(place).save_weights(0, 'model', arrays, facts, kept)
            written = kept | {'config.yaml': configs.dump(trained_on(config)).encode()}
            written |= {f'{SOURCE}/{name}': content for name, content in files.items()}
            written[RECORD] = (json.dumps(import_record(found, dtype), indent=1) + '\n').encode()
            for name, content in written.items():
                disk.make_folder((place / name).parent)
                disk.put(place / name, content)
    count = sum(math.prod(one.shape) for one in found.table)
    say(f'{run}: {found.family.name}, {count:,} parameters, weights in {found.compute.weight_dtype}')
    for line in (*left_out_lines(found), *unread):
        say(line)
    if found.of_gguf and (packed := found.of_gguf.packed):
        say(f'read from blocks of {", ".join(packed)}, whose numbers are float32; --dtype bfloat16 halves them')
    if tokenizer and tokenizer.embedded < tokenizer.vocabulary:
        say(
            f'its tokenizer has {tokenizer.vocabulary} tokens and its embedding {tokenizer.embedded} rows: texts with a token '
            f'beyond, such as {shown(tokenizer.name_of(tokenizer.embedded), 60, quoted=True)}, are refused'
        )
    if not tokenizer:
        say(f'{source} has no tokenizer: the run can be scored with token ids, but neither decode nor evaluate text')


def check_local(run: Path) -> None:
    """Raises UserError for a URL: what is made is made under another name and renamed, which only a local folder can be."""
    scheme, slashes, rest = str(run).partition(':/')  # a Path has lost one of its two slashes
    if slashes and scheme.isalnum() and len(scheme) > 1:
        name = rest.rstrip('/').rpartition('/')[2] or 'NAME'
        raise UserError(
            f'{shown(run)}: models are imported and exported into local folders; give one, such as runs/{shown(name)}: it '
            'may be copied with your store’s own tool'
        )


class Examined(NamedTuple):
    """What an import knows before it writes anything."""

    found: hub.Published
    files: dict[str, bytes]  # beside the weights, by their paths
    config: RunConfig
    tokenizer: Tokenizer | None
    unread: list[str]  # a line for each file beside the weights that is not kept because it could not be read


def examine(
    source: Path,
    name: str,
    mesh: MeshConfig,
    dtype: str | None = None,
    without_remote_code: bool = False,
    ignore: Sequence[str] = (),
) -> Examined:
    """All of a published folder or GGUF file but its numbers. Raises UserError if it cannot be a run of this name."""
    found = hub.read(source, dtype, without_remote_code, ignore)
    with found.fields.told():
        check_divides(mesh, sizes(found.model))
    unread = list[str]()
    files = files_beside(source, found, unread)
    config = run_config(name, found, mesh)
    tokenizer = published_tokenizer(files, shown_path(source), found.model.vocabulary)
    return Examined(found, files, config, tokenizer, unread)


def left_out_lines(found: hub.Published) -> Iterator[str]:
    """What of a published folder a run does without, a line each."""
    for field in found.ignored:
        yield f'{found.fields.source}: {shown(field, 100)} is passed over, as asked'
    for part in found.absent:
        instead = 'the embedding is it' if part == 'head' and found.model.head else 'imported without'
        yield f'{shown_path(found.folder)}: has no {OPTIONAL[part]}: {instead}'
    if not found.model.head:
        yield 'without an LM head it can be scored and embeds texts (scripts/score.py), but can neither decode nor be trained'


def files_beside(source: Path, found: hub.Published, unread: list[str]) -> dict[str, bytes]:
    """The files beside the weights, of GGUF what its header says; `unread` gets a line for each that cannot be read."""
    if found.of_gguf is None:
        return published_folder.side_files(source, unread)
    files = tokenizer_files(found.of_gguf.contents.values, found.of_gguf.contents.path)
    return {published_folder.CONFIG: json_file(found.of_gguf.config)} | files


def finite_arrays(
    arrays: Iterable[tuple[str, jax.Array]],
    names: Mapping[str, str],
    source: str,
    total: int,
    say: Callable[[str], None],
) -> Iterator[tuple[str, jax.Array]]:
    """Hands on arrays by their `names` in a checkpoint, and says every few seconds how many of `total` bytes are done.

    Raises UserError, naming `source`, for one that is not finite: nothing could be computed with it.
    """
    done, last = 0, time.monotonic()
    for leaf, x in arrays:
        if not_finite({names[leaf]: x}):
            raise UserError(f'{shown(source)}: what becomes {names[leaf]} holds {RULE}: such a model computes nothing')
        done += x.nbytes
        yield names[leaf], x
        del x  # before the next is made
        if time.monotonic() - last > 5:
            last = time.monotonic()
            say(f'{human_bytes(done)} of about {human_bytes(total)}')


def run_config(name: str, found: hub.Published, mesh: MeshConfig) -> RunConfig:
    """The config of an imported run: the context that was published, and gentle values for training on."""
    positions = min(context_of(found.fields.values) or CONTEXT, MOST_TO_TRAIN)
    ways = mesh.span(SEQUENCE) * (2 if mesh.context > 1 else 1)
    length = max(positions // ways, 1) * ways
    return RunConfig(
        name=name,
        mesh=mesh,
        model=found.model,
        compute=found.compute,
        data=NO_DATA,
        training=TrainingConfig(steps=1000, batch=mesh.span((*BATCH, 'stage')), sequence_length=length),
        optimizer=AdamW(learning_rate=1e-5),
    )


def trained_on(config: RunConfig) -> RunConfig:
    """The config that training goes on with: narrow weights become float32, for a small step is lost in them."""
    kept = config.compute.parameter_dtype
    if jnp.promote_types(kept, jnp.float32) == kept:
        return config
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, weight_dtype=None))


def import_record(found: hub.Published, dtype: str | None) -> dict[str, Any]:
    """What an export needs beside the weights: the family, and what each tensor was, whatever it becomes here."""
    kept, shapes = found.compute.weight_dtype, found.shapes
    # Those of a source that is imported in another dtype become what our arrays are.
    dtypes = {
        one.name: shapes[one.parts[0].leaf].dtype if dtype else found.sources[one.name].dtype for one in found.table
    }
    return {
        'family': found.family.name,
        'files': found.files,
        'dtype': kept,
        'dtypes': {name: own.name for name, own in dtypes.items() if own.name != kept},
        'copies': found.copies,
        'fixed': {name: dtype or own for name, own in found.fixed.items()},
        'absent': list(found.absent),
        'ignored': list(found.ignored),
    }
