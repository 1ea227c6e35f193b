"""Texts as vectors: a model's last hidden states, pooled over the tokens of each text and made unit length.

Cosines of such vectors are their products. Models that are made for this come without an LM head (BERT's, as
sentence-transformers has them; Qwen3's), but any model without an encoder has hidden states.

Letters: B rows, T tokens of a row, D model, N texts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.data.tokenizer import Tokenizer
from weft.inference.prompts import BUCKET
from weft.inference.run import TrainedRun
from weft.model.forward import hidden_states, place, row_ways
from weft.runtime.errors import UserError, shown
from weft.sharding.collectives import upcast
from weft.sharding.mesh import BATCH, SEQUENCE
from weft.storage.buckets import Bucket
from weft.storage.foreign import read_json
from weft.training.importing import SOURCE

Pooling = Literal['mean', 'cls', 'last']  # over a text's tokens; its first; its last
ROWS = 16  # texts at once on each part of the rows
MODULES, POOLING = 'modules.json', '1_Pooling/config.json'  # of sentence-transformers
MODE = 'pooling_mode_'  # how its fields for each begin
MODES: dict[str, Pooling] = {  # what it calls them
    'mean_tokens': 'mean',
    'mean': 'mean',
    'cls_token': 'cls',
    'cls': 'cls',
    'lasttoken': 'last',
}


def embed(run: TrainedRun, texts: Sequence[str], pooling: Pooling | None = None) -> np.ndarray:
    """float32 [N, D], a vector of length 1 for each text; use it under `jax.set_mesh(run.mesh)`.

    A text is read with the tokens that its tokenizer sets before and after it. `pooling` is what the published folder says,
    where the run was imported from one that says it; else `mean` of models that see all of a row, and `last` of others.
    Raises UserError for an unknown pooling, a text longer than the context, and a model with an encoder.
    """
    pooling = pooling or published_pooling(run) or ('last' if run.config.model.causal else 'mean')
    if pooling not in get_args(Pooling):
        raise UserError(f'--pooling {pooling}: no such pooling; there are {", ".join(get_args(Pooling))}')
    assert run.tokenizer is not None, 'open_run sees to it'
    rows = token_rows(run.tokenizer, texts)
    for number, ids in enumerate(rows):
        if len(ids) > run.context:
            raise UserError(
                f'text {number + 1} has {len(ids)} tokens, those around it included, and the context is {run.context}: cut it'
            )
    step = jax.jit(pooled, static_argnums=4)
    count = ROWS * row_ways()
    ways = BUCKET * int(np.prod([jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE]))
    found = np.zeros((len(rows), run.config.model.model_dim), np.float32)
    by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for begin in range(0, len(rows), count):
        numbers = by_length[begin : begin + count]
        longest = max(len(rows[number]) for number in numbers)
        tokens_BT = np.zeros((count, -(-longest // ways) * ways), np.int32)
        length_B = np.ones(count, np.int32)
        for row, number in enumerate(numbers):
            tokens_BT[row, : len(rows[number])], length_B[row] = rows[number], len(rows[number])
        # A table of positions may have fewer rows than the padding, which nothing attends to.
        position_BT = np.minimum(np.arange(tokens_BT.shape[1], dtype=np.int32), run.context - 1)
        arrays = place((tokens_BT, np.broadcast_to(position_BT, tokens_BT.shape), length_B))
        found[numbers] = np.asarray(step(run.model, *arrays, pooling), np.float32)[: len(numbers)]
    return found


def pooled(model, tokens_BT, position_BT, length_B, pooling: Pooling):
    """Vectors of length 1 [B, D] in at least float32, of rows of which the first `length_B` tokens are a text."""
    live_BT = jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]
    x_BTD = hidden_states(model, tokens_BT, position_BT, live_BT.astype(jnp.int32))
    x_BTD = jax.reshard(upcast(x_BTD), P(BATCH))
    if pooling == 'mean':
        weight_BT = live_BT / length_B[:, None]
    else:
        at_B = length_B - 1 if pooling == 'last' else jnp.zeros_like(length_B)
        weight_BT = jnp.arange(tokens_BT.shape[1])[None] == at_B[:, None]
    y_BD = (x_BTD * weight_BT[..., None]).sum(1)
    return y_BD / jnp.maximum(jnp.linalg.norm(y_BD, axis=-1, keepdims=True), 1e-12)


def token_rows(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, with what the tokenizer sets before and after it; of nothing at all the start of a document."""
    return [[*tokenizer.prefix, *ids, *tokenizer.suffix] or [tokenizer.bos] for ids in tokenizer.encode_batch(texts)]


def published_pooling(run: TrainedRun) -> Pooling | None:
    """What the folder that a run was imported from says of pooling; None where it says nothing.

    Raises UserError where it says what there is not here: another pooling, or a layer after it.
    """
    source = run.folder / SOURCE
    modules, pooling = _json(source / MODULES), _json(source / POOLING)
    for one in modules if isinstance(modules, list) else []:
        kind = str(one.get('type') if isinstance(one, dict) else one).rpartition('.')[2]
        if kind not in ('Transformer', 'Pooling', 'Normalize'):
            raise UserError(
                f'{source / MODULES}: names {shown(kind, 60)}, which is not supported; --pooling mean, cls or last '
                'embeds without it'
            )
    if not isinstance(pooling, dict):
        return None
    modes = [name.removeprefix(MODE) for name, on in pooling.items() if name.startswith(MODE) and on is True]
    modes += [str(pooling['pooling_mode'])] if 'pooling_mode' in pooling else []
    if len(modes) != 1 or modes[0] not in MODES:
        raise UserError(
            f'{source / POOLING}: {shown(" and ".join(modes) or "no pooling at all", 60)} is not supported; '
            'say one with --pooling mean, '
            'cls or last'
        )
    return MODES[modes[0]]


def _json(path: Path | Bucket) -> Any:
    """What a file holds; None where there is none."""
    if not path.is_file():
        return None
    return read_json(path.read_bytes(), str(path))
