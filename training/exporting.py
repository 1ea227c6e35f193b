"""A run as a published folder: its newest checkpoint, each tensor by the name, shape and dtype that its family publishes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from weft.data.pairs import first_token
from weft.hub import published_folder
from weft.hub import read as hub
from weft.hub import write as publish
from weft.hub.exported_tokenizer import exported_tokenizer
from weft.hub.families import Tensor, families
from weft.hub.published_tokenizer import run_tokenizer
from weft.hub.streaming import narrowed, published
from weft.hub.tensor_table import is_correction, tensors
from weft.model.config import ModelConfig
from weft.model.sizes import sizes
from weft.runtime.device_memory import human_bytes
from weft.runtime.errors import UserError, shown
from weft.sharding.mesh import MeshConfig, check_divides, configure_jax, make_mesh
from weft.storage.bucket_checkpoint import checkpoints_of
from weft.storage.buckets import Bucket
from weft.storage.staged import refuse_existing
from weft.training.config import RECORD
from weft.training.context import object_of, published_config, published_files
from weft.training.finite import check_saved
from weft.training.importing import check_local
from weft.training.run_folder import run_folder
from weft.training.state import abstract_model, newest_saved, restore_newest


def export_run(
    run: Path | Bucket,
    target: Path,
    dtype: str | None = None,
    family: str | None = None,
    mesh: MeshConfig | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Makes a published folder of a run's newest checkpoint, each tensor in the dtype that it was imported in, or in `dtype`.

    `family` is for a run that was not imported; the first that can say this model otherwise. Raises UserError where none can.
    """
    check_local(target)
    refuse_existing(target)
    run = run_folder(run)
    checkpoints = checkpoints_of(run)
    first, config, files = newest_saved(checkpoints)
    c, stored = as_published(run, config.model), config.compute.parameter_dtype
    known = read_import(run)
    if known and family not in (None, known.family):
        raise UserError(f'--family {family}: {run} was imported as {known.family}, and is exported as that')
    context = config.training.sequence_length
    if known:
        chosen, fields = publish.published_config(c, context, known.family, known.config, known.absent, known.ignored)
        beside = known.beside
    else:
        tokenizer = run_tokenizer(files, str(run))
        if tokenizer is None:
            raise UserError(
                f'{run}: its checkpoint {first} holds no tokenizer, and {RECORD} does not say that it was imported'
            )
        if c.encoder:  # a published config names the token that a decoder reads first
            start_token = first_token(tokenizer, c.encoder.start_token)
            c = dataclasses.replace(c, encoder=dataclasses.replace(c.encoder, start_token=start_token))
        chosen, fields = publish.published_config(c, context, family)
        fields |= {'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos}
        beside = exported_tokenizer(tokenizer, fields.get('max_position_embeddings', context))
    kept = dtype or (known.dtype if known else stored.name)
    fields['torch_dtype' if 'torch_dtype' in fields else 'dtype'] = kept
    wanted = mesh or config.mesh
    check_divides(wanted, sizes(c))
    configure_jax(wanted.size, config.compute.dtype)
    shapes = hub.shapes_of(c, config.compute)
    with jax.set_mesh(make_mesh(wanted)):
        model, step = restore_newest(checkpoints, first, config, files, abstract_model(config))
        check_saved(checkpoints, step, {'model': model}, 'which are not to be published')
    arrays = dict(zip(shapes, jax.tree.leaves(model), strict=True))
    table = {one.name: one for one in tensors(chosen, c, shapes)}
    if known and (odd := {*known.copies.values()} - {*table} or {*known.fixed} - {*chosen.fixed}):
        raise UserError(
            f'{run / RECORD}: is damaged ({shown(min(odd))} is no tensor of {chosen.name}); import the model again'
        )

    def of_table(one: Tensor) -> ExportedTensor:
        if known and not dtype:
            own = known.dtypes.get(one.name, known.dtype)
        elif is_correction(one, c):
            own = shapes[one.parts[0].leaf].dtype.name
        else:
            own = dtype or stored.name
        return ExportedTensor(np.dtype(own), one.shape, functools.partial(published, one, arrays))

    exports = {name: of_table(one) for name, one in table.items() if not (known and one.copy_of)}
    if known:
        exports |= {name: of_table(table[source]) for name, source in known.copies.items()}
        for name, own in known.fixed.items():
            numbers = chosen.fixed[name](c)
            exports[name] = ExportedTensor(
                np.dtype(dtype or own), numbers.shape, functools.partial(np.asarray, numbers)
            )
        exports = {known.files.get(name, name): one for name, one in exports.items()}

    def content(name: str) -> np.ndarray:
        one = exports[name]
        return narrowed(one.make(), one.dtype, name).astype(one.dtype)

    kinds = {name: (one.dtype, one.shape) for name, one in exports.items()}
    publish.write(target, fields, beside, kinds, content)
    size = sum(math.prod(one.shape) * one.dtype.itemsize for one in exports.values())
    say(f'{target}: {fields["architectures"][0]}, {len(kinds)} tensors in {kept}, {human_bytes(size)} (step {step})')
    if not dtype and jnp.promote_types(kept, stored) != kept:
        say(f'rounded from {stored} to {kept}, as it was imported; --dtype {stored} keeps all digits')


def as_published(run: Path | Bucket, c: ModelConfig) -> ModelConfig:
    """The model as families know it: pruned weights are numbers like others. Raises UserError for other forms and adapters."""
    unlike = sorted({form.kind for form in c.weights or () if form.kind != 'pruned'})
    if unlike:
        raise UserError(
            f'{run}: model.weights has {", ".join(unlike)}, and published folders keep each weight whole: export the run that '
            'it was made of; pruned weights, and models with fewer layers, heads, experts or hidden units, can be exported'
        )
    if c.adapter:
        raise UserError(f'{run}: model.adapter is {c.adapter.kind}, and published folders keep each weight whole')
    return dataclasses.replace(c, weights=None)


class ExportedTensor(NamedTuple):
    """A tensor of a published folder that is to be written."""

    dtype: np.dtype
    shape: Sequence[int]
    make: Callable[[], np.ndarray]  # its numbers, in any dtype


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a run keeps of the folder that it was imported from."""

    family: str
    files: dict[str, str]  # tensors' names in the folder's files, where the family's table has others
    dtype: str  # of its tensors
    dtypes: dict[str, str]  # of tensors that have another
    copies: dict[str, str]  # tensors that repeat others
    fixed: dict[str, str]  # tensors that follow from the model, and their dtypes
    config: dict[str, Any]
    beside: dict[str, bytes]  # files beside config.json and the weights, by their paths
    absent: list[str]  # parts that config.json has and the files had not
    ignored: list[str]  # fields of config.json that were passed over


# What `training.importing.import_record` writes: a text, texts by names, or a list of texts.
RECORDED = {
    field.name: get_origin(field.type) or field.type
    for field in dataclasses.fields(Imported)
    if field.name not in ('config', 'beside')
}


def read_import(run: Path | Bucket) -> Imported | None:
    """Of a run; None where it was not imported."""
    if not (run / RECORD).is_file():
        return None
    record: dict[str, Any] = {'absent': [], 'ignored': []} | object_of(run / RECORD)
    for field, kind in RECORDED.items():
        value = record.get(field)
        texts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        right = type(value) is kind and all(isinstance(text, str) for text in texts)
        if not right or (field in ('dtype', 'dtypes', 'fixed') and not all(map(_is_dtype, texts))):
            damaged = f'{field} is {"missing" if value is None else shown(repr(value))}'
            raise UserError(
                f'{run / RECORD}: is damaged ({damaged}); restore it from a copy, or import the model again'
            )
    if record['family'] not in (family.name for family in families()):
        family = shown(record['family'], 60, quoted=True)
        raise UserError(f'{run / RECORD}: is damaged (family is {family}, which is none)')
    beside = published_files(run, lambda path: path != published_folder.CONFIG)
    return Imported(config=published_config(run), beside=beside, **{field: record[field] for field in RECORDED})


def _is_dtype(name: str) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(name), jnp.number))
    except TypeError:
        return False
