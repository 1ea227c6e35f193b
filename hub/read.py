"""Folders of published models, as the Hugging Face hub has them: config.json, safetensors, and files beside them.

`read` checks a folder by its headers alone, so that every mistake is told before a number is read; `Published.arrays` then
streams its tensors onto a mesh. Nothing in a folder is ever run or unpickled. hub/write.py writes such folders. A GGUF file
is read as the folder that it stands for (hub/gguf).
"""

import dataclasses
import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from weft.hub import gguf
from weft.hub.dequantize import unpacked
from weft.hub.families import OPTIONAL, Family, Fields, Tensor, family_of
from weft.hub.families.fields import passed_over
from weft.hub.gguf.blocks import Blocks
from weft.hub.published_folder import CONFIG, all_stored, config_of
from weft.hub.streaming import arrays
from weft.hub.tensor_files import Derived, Stored
from weft.hub.tensor_table import array_shapes, is_correction, tensors
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import ModelConfig
from weft.runtime.errors import CLOSE, SEARCHED, UserError, nearest, shown
from weft.sharding.mesh import AXES
from weft.storage.foreign import shown_path

BUFFERS = (r'.*rotary_emb\.inv_freq',)  # of every family in old files: they follow from the config
TensorSource = Stored | Blocks | Derived  # where a published tensor's numbers are
Kept = Literal['float32', 'bfloat16', 'float16']  # what weights can be kept in


@dataclasses.dataclass(frozen=True)
class Published:
    """A folder, or a GGUF file, that was read: all that its config and headers say has been checked."""

    folder: Path
    fields: Fields
    family: Family
    model: ModelConfig
    compute: ComputeConfig  # the dtypes that its weights are kept in and computed in
    table: list[Tensor]  # without copies
    sources: dict[str, TensorSource]  # by the table's names
    files: dict[str, str]  # what tensors are called in the files, where the table calls them otherwise
    copies: dict[str, str]  # tensors in the files that repeat another of the table, which it is
    fixed: dict[str, str]  # tensors in the files that follow from the model, and their dtype
    absent: tuple[str, ...] = ()  # of OPTIONAL, what config.json has and the files have not
    ignored: tuple[str, ...] = ()  # fields of config.json that a user passes over
    of_gguf: gguf.Model | None = None  # where it is no folder

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return shapes_of(self.model, self.compute)

    @property
    def bytes(self) -> int:
        """Of all tensors, in the dtypes that they are read in."""
        return sum(source.dtype.itemsize * math.prod(source.shape) for source in self.sources.values())

    def arrays(self, mesh: jax.sharding.Mesh) -> Iterator[tuple[str, jax.Array]]:
        """Our arrays by name, one after another, in their layout on the mesh."""
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            # Their layouts name the axes that this mesh splits something along.
            shapes = array_shapes(self.model, self.compute)
        return arrays(self.table, shapes, lambda name, take: self.sources[name].read(take), mesh)


def shapes_of(c: ModelConfig, compute: ComputeConfig = DEFAULT) -> dict[str, jax.ShapeDtypeStruct]:
    """`array_shapes`, also where no mesh is set and no device may be touched yet: the layouts are then those on one device."""
    if not jax.sharding.get_abstract_mesh().empty:
        return array_shapes(c, compute)
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        return array_shapes(c, compute)


def read(
    folder: Path, dtype: str | None = None, without_remote_code: bool = False, ignore: Sequence[str] = ()
) -> Published:
    """A published folder or GGUF file, its weights to be kept in `dtype` or in the source's own.

    Where the source has several, the narrowest that holds all of them exactly. Compute is in bfloat16 where weights are.
    Fields of config.json that `ignore` names are passed over. A part of `OPTIONAL` that config.json has and the files have
    not is no part of the model. Raises UserError for whatever else is missing, damaged or not supported.
    """
    from_gguf = gguf.read(folder) if gguf.is_file(folder) else None
    where, config = (folder, from_gguf.config) if from_gguf else (folder / CONFIG, config_of(folder))
    config = passed_over(config, ignore, shown_path(where))
    fields = Fields(config, shown_path(where))
    names = fields('architectures', None) or ['?']
    if 'auto_map' in config and not without_remote_code:
        raise fields.error(
            f'auto_map names code that comes with the model, which is never run; where Weft’s own code for '
            f'{shown(names[0], 60)} is what you want, say --without-remote-code'
        )
    family = family_of(fields)
    with fields.told():
        c = family.model(fields)
    fields.finish()
    found: Mapping[str, TensorSource] = from_gguf.stored if from_gguf else unpacked(all_stored(folder), fields)
    with fields.told():
        _check_counts(family, c, len(found))
    stored, files = _as_named(found, family)
    c, table, absent = _present(family, family.model_of(c, stored), stored)
    if from_gguf:
        from_gguf.check(table)
    sources, copies, fixed = _match(folder, family, table, stored, files, c)
    table = [one for one in table if not one.copy_of]
    compute = _dtypes(folder, c, table, sources, dtype)
    files = {name: file for name, file in files.items() if name in (*sources, *copies, *fixed)}
    return Published(
        folder, fields, family, c, compute, table, sources, files, copies, fixed, absent, tuple(ignore), from_gguf
    )


def _check_counts(family: Family, c: ModelConfig, tensors: int) -> None:
    """Raises UserError where the config names more layers or experts than the files have tensors, before any is listed."""
    rule = f'and the files have {tensors} tensors: each layer has one at least'
    stacks = [('model.layers', c.layers), *([('model.encoder.layers', c.encoder.layers)] if c.encoder else [])]
    for field, count in [*stacks, ('model.mtp.layers', c.mtp.layers)]:
        if count > tensors:
            raise UserError(f'{field} is {count} {rule}')
    if c.moe and any('{e}' in name for name in family.names):
        layers = sum(kind.experts for kind in c.layer_specs)
        if c.moe.experts * layers > tensors:
            raise UserError(
                f'model.moe.experts is {c.moe.experts} in each of {layers} layers, and the files have {tensors} tensors'
            )


def _present(
    family: Family, c: ModelConfig, stored: Mapping[str, TensorSource]
) -> tuple[ModelConfig, list[Tensor], tuple[str, ...]]:
    """A model without the parts of which the files hold no tensor; its tensors; the names of those parts."""
    table, absent = tensors(family, c, shapes_of(c)), list[str]()
    for part in OPTIONAL:
        if all(one.name in stored for one in table if not one.copy_of):
            break
        less = family.without(c, part)
        if less == c:
            continue
        left = tensors(family, less, shapes_of(less))
        of_part = {one.name for one in table} - {one.name for one in left}
        if of_part and not any(name in stored for name in of_part):
            c, table = less, left
            absent.append(part)
    return c, table, tuple(absent)


def _as_named(stored: Mapping[str, TensorSource], family: Family) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """Tensors by the names of the family's table, and what differs from these in the files."""
    short = bool(family.prefix) and not any(name.startswith(family.prefix) for name in stored)
    outside = {name for name in (*family.names, *family.tied) if not name.startswith(family.prefix)}  # such as a head's
    found: dict[str, TensorSource] = {}
    files: dict[str, str] = {}
    for name, source in stored.items():
        now = family.known_as(name)
        now = family.prefix + now if short and now not in outside else now
        if now in found:
            raise source.file.error(
                f'tensors {name} and {files.get(now, now)} are the same one of a {family.name} model'
            )
        found[now] = source
        if now != name:
            files[now] = name
    return found, files


def _match(
    folder: Path,
    family: Family,
    table: list[Tensor],
    stored: Mapping[str, TensorSource],
    files: dict[str, str],
    c: ModelConfig,
) -> tuple[dict[str, TensorSource], dict[str, str], dict[str, str]]:
    """The source of each tensor of the table; the copies; what is fixed. All in the files is one of these, or a buffer.

    A tensor that is there only under the name of a copy of it is taken from there, and `files` says so.
    """
    sources: dict[str, TensorSource] = {}
    left = dict(stored)
    missing, own = [], {one.name for one in table if not one.copy_of}
    repeats = {name: of for name, of in _copies(family, table, c).items() if name not in own}
    for one in table:
        if one.copy_of:
            continue
        if one.name not in left:
            again = next((name for name, of in repeats.items() if of == one.name and name in left), None)
            if again is None:
                missing.append(one.name)
                continue
            left[one.name], files[one.name] = left.pop(again), files.pop(again, again)
        sources[one.name] = source = left.pop(one.name)
        if tuple(source.shape) != one.shape:
            raise source.file.error(
                f'tensor {one.name} is {list(source.shape)} and by {CONFIG} must be {list(one.shape)}'
            )
    copies = {name: of for name, of in repeats.items() if name in left and of in sources}
    for name, of in copies.items():
        _check_copy(left.pop(name), name, sources[of], of)
    fixed = {name: left[name].dtype.name for name in family.fixed if name in left}
    for name in fixed:
        _check_fixed(left.pop(name), name, c, family.fixed[name])
    left = {
        name: one for name, one in left.items() if not any(re.fullmatch(p, name) for p in (*BUFFERS, *family.buffers))
    }
    tail = lambda names: f' (and {len(names) - 1} more)' if len(names) > 1 else ''
    if missing:
        others = sorted(left)
        close = difflib.get_close_matches(missing[0], others[:SEARCHED], n=1, cutoff=CLOSE)
        near = nearest(missing[0], close or others[:3]) if left else ''
        of_layer = [re.match(r'model\.layers\.(\d+)\.', name) for name in missing]
        if c.mtp.layers and all(at and int(at[1]) >= c.layers for at in of_layer):
            near = '; it predicts further ahead, and the files have a part of what does'
        heads = [one.name for one in table if any(part.leaf == 'head_DV' for part in one.parts)]
        if family.headless and missing == heads:
            near = f'; a model without an LM head is a {family.headless}: if this is one, say so under architectures'
        raise UserError(
            f'{shown_path(folder)}: tensor {missing[0]} is missing{tail(missing)}: by {CONFIG} a '
            f'{family.architectures[0]} has it{near}'
        )
    if left:
        name, extra = next(iter(left.items()))
        raise extra.file.error(
            f'tensor {name} {list(extra.shape)}{tail(left)} is none that a '
            f'{family.architectures[0]} of this {CONFIG} has; its numbers would be lost'
        )
    return sources, copies, fixed


def _copies(family: Family, table: list[Tensor], c: ModelConfig) -> dict[str, str]:
    """Tensors that a publisher may repeat, and which they repeat; among them the head that is the embedding."""
    found = dict(family.tied)
    embedding = [one.name for one in table if any(part.leaf == 'embed_VD' for part in one.parts) and not one.copy_of]
    if c.embedding.tied and embedding:
        found |= {name: embedding[0] for name, entry in family.names.items() if entry == 'head_DV'}
    return found | {one.name: one.copy_of for one in table if one.copy_of}


def _check_fixed(one: TensorSource, name: str, c: ModelConfig, make: Callable[[ModelConfig], np.ndarray]) -> None:
    """That a tensor has the numbers that it must have, as far as its dtype can say them."""
    fits = one.shape == (c.max_positions, c.model_dim) and jnp.issubdtype(one.dtype, np.floating)
    if not fits or not np.allclose(
        one.read().astype(np.float32), make(c), rtol=0, atol=4 * float(jnp.finfo(one.dtype).eps)
    ):
        raise one.file.error(
            f'tensor {name} {list(one.shape)} has not the numbers that follow from {CONFIG}: a model '
            'with others is not supported'
        )


def _check_copy(one: TensorSource, name: str, source: TensorSource, of: str) -> None:
    """That a tensor has the numbers of another, some rows at a time."""
    same = one.shape == source.shape and one.dtype == source.dtype
    step = max(2**24 // max(math.prod(one.shape[1:]), 1), 1)
    for begin in range(0, one.shape[0] if same else 0, step):
        rows = (slice(begin, begin + step),)
        same = same and one.read(rows).tobytes() == source.read(rows).tobytes()
    if not same:
        raise one.file.error(
            f'tensor {name} differs from {of}, of which it must be a copy by {CONFIG} '
            '(tie_word_embeddings for an lm_head); where they are two, say so there'
        )


def _dtypes(
    folder: Path, c: ModelConfig, table: list[Tensor], sources: Mapping[str, TensorSource], dtype: str | None
) -> ComputeConfig:
    """The dtypes of storage and compute: see `read`."""
    found: Counter[np.dtype] = Counter()
    for one in table:
        source = sources[one.name]
        if not jnp.issubdtype(source.dtype, np.floating) or source.dtype.itemsize < 2:
            raise UserError(
                f'{shown_path(folder)}: tensor {one.name} has dtype {source.dtype}, which needs a quantization_config that '
                'says what its numbers stand for; supported: DeepSeek’s block-scaled FP8, MXFP4'
            )
        # The bias of a router's choices is kept in at least float32 anyhow, without widening all others.
        if not is_correction(one, c) or source.dtype.itemsize > 4:
            found[source.dtype] += math.prod(one.shape)
    kept = dtype or np.dtype(functools.reduce(jnp.promote_types, found)).name
    if kept not in get_args(Kept):
        raise UserError(
            f'{shown_path(folder)}: its tensors are {kept}: weights are kept in {", ".join(get_args(Kept))}; say which '
            'with --dtype'
        )
    most = dtype or found.most_common(1)[0][0].name
    return ComputeConfig(weight_dtype=cast(Kept, kept), dtype='bfloat16' if most == 'bfloat16' else 'float32')
