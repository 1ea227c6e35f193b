"""A case as our model: its config read by its family, its weights generated and put where the family's table says."""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from tests.families import cases, weights
from weft.hub.families import Family, Fields, family_of
from weft.hub.tensor_table import array_shapes, tensors
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder, init_decoder

GOLDENS = Path(os.environ.get('GOLDENS') or Path(__file__).parent / 'goldens')  # others: `make parity`


def stored_name(family: Family, c: ModelConfig, name: str) -> str:
    """What a tensor of a family's table is called in files of this model: without the prefix where there is no head."""
    return name if c.head else name.removeprefix(family.prefix)


class Golden(NamedTuple):
    """What an outside implementation made of a case."""

    name: str
    config: dict[str, Any]  # as published
    saved: dict[str, Any]  # the same as transformers saves it
    seed: int
    ids: np.ndarray  # int32 [rows, length]
    at: np.ndarray  # int32 [kept, 2]: rows and positions
    logits: np.ndarray  # float32 [kept, vocabulary]
    greedy: np.ndarray  # int32: what follows the first row's first tokens; of an encoder, what stands at the masks
    margins: np.ndarray  # of each choice, over the largest |logit|
    kinds: np.ndarray | None = None  # int32 [rows, length]: of what text each token is
    source: np.ndarray | None = None  # int32 [rows, length]: what the encoder reads
    beams: np.ndarray | None = None  # int32 [rows, new]: what beam search gives, its end among them; -1 after it
    beam_scores: np.ndarray | None = None  # float32 [rows]
    eos: np.ndarray | None = None  # int32: the end of a continuation
    ahead: np.ndarray | None = None  # float32 [layers, kept, vocabulary] of layers that predict further ahead


def golden(path: Path) -> Golden:
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(bytes(file['about']))
        arrays = {name: file[name] for name in file.files if name != 'about'}
    arrays = {name: a.astype(np.int32) if a.dtype == np.int16 else a for name, a in arrays.items()}
    return Golden(path.stem, about['config'], about['saved'], about['seed'], **arrays)


def read(config: dict[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the model of a published config."""
    fields = Fields(config)
    family = family_of(fields)
    c = family.model(fields)
    fields.finish()
    return family, c


def generated(name: str, family: Family, c: ModelConfig, seed: int) -> Decoder:
    """The model with generated weights, on the current mesh."""
    shapes = array_shapes(c)
    filled = {leaf: np.zeros(shape.shape, shape.dtype) for leaf, shape in shapes.items()}
    for one in tensors(family, c, shapes):
        tensor = stored_name(family, c, one.copy_of or one.name)
        array = weights.tensor(seed, tensor, one.shape, cases.family(name) in cases.OFFSET_NORMS)
        for part in one.parts:
            piece = part(array)
            filled[part.leaf][part.at][tuple(slice(n) for n in piece.shape)] = piece
    return from_leaves(c, filled)


def from_leaves(c: ModelConfig, filled: dict[str, np.ndarray], compute: ComputeConfig = DEFAULT) -> Decoder:
    """The model of host arrays by name, in its layout on the current mesh."""
    layouts, structure = _structure(c, compute, jax.sharding.get_mesh())
    return jax.tree.unflatten(structure, [jax.device_put(filled[name], layout) for name, layout in layouts.items()])


@functools.cache  # tracing takes a tenth of a second
def _structure(c: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> tuple[dict[str, NamedSharding], Any]:
    """A model's arrays on a mesh: by name their layouts, and the tree that they are the leaves of."""
    model = jax.eval_shape(lambda key: init_decoder(c, compute, key), jax.random.key(0))
    paths, structure = jax.tree_util.tree_flatten_with_path(model)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')
    return {name(path): NamedSharding(mesh, leaf.sharding.spec) for path, leaf in paths}, structure
