"""Texts as vectors: a model's last hidden states, pooled over the tokens of each text and made unit length.

Cosines of such vectors are their products. Models that are made for this come without an LM head (BERT's, as
sentence-transformers has them; Qwen3's), but any model without an encoder has hidden states.

Letters: B rows, T tokens of a row, D model, N texts.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.data.tokenizer import Tokenizer
from weft.inference.prompts import BUCKET, pad_rows
from weft.inference.run import TrainedRun
from weft.model.decoder import Decoder
from weft.model.forward import hidden_states, place, row_ways
from weft.runtime.errors import UserError, shown
from weft.sharding.collectives import upcast
from weft.sharding.mesh import BATCH, SEQUENCE
from weft.storage.foreign import read_json
from weft.training.context import SOURCE

Pooling = Literal['mean', 'cls', 'last']  # over a text's tokens; its first; its last
TEXTS = 16  # texts at once on each part of the rows
MODULES, POOLING = 'modules.json', '1_Pooling/config.json'  # of sentence-transformers
MODE = 'pooling_mode_'  # how its fields for each begin
MODES = ('mean', 'cls', 'mean_tokens', 'cls_token', 'lasttoken')  # what it calls them: each begins with ours


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
    for number, ids in enumerate(rows, 1):
        if len(ids) > run.context:
            tokens = f'{len(ids)} tokens, those around it included'
            raise UserError(f'text {number} has {tokens}, and the context is {run.context}: cut it')
    step = jax.jit(pooled, static_argnums=4)
    count = TEXTS * row_ways()
    ways = BUCKET * math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)
    found = np.zeros((len(rows), run.config.model.model_dim), np.float32)
    by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for begin in range(0, len(rows), count):
        numbers = by_length[begin : begin + count]
        longest = max(len(rows[number]) for number in numbers)
        tokens_BT, length_B = pad_rows([rows[number] for number in numbers], count, -(-longest // ways) * ways)
        # A table of positions may have fewer rows than the padding, which nothing attends to.
        position_BT = np.minimum(np.arange(tokens_BT.shape[1], dtype=np.int32), run.context - 1)
        arrays = place((tokens_BT, np.broadcast_to(position_BT, tokens_BT.shape), length_B))
        found[numbers] = np.asarray(step(run.model, *arrays, pooling), np.float32)[: len(numbers)]
    return found


def pooled(
    model: Decoder, tokens_BT: jax.Array, position_BT: jax.Array, length_B: jax.Array, pooling: Pooling
) -> jax.Array:
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
    """The pooling that an imported run's folder names, if it does. Raises UserError for what is not supported here."""
    source = run.folder / SOURCE
    paths = [source / MODULES, source / POOLING]
    modules, pooling = [read_json(path.read_bytes(), str(path)) if path.is_file() else None for path in paths]
    for one in modules if isinstance(modules, list) else []:
        kind = str(one.get('type') if isinstance(one, dict) else one).rpartition('.')[2]
        if kind not in ('Transformer', 'Pooling', 'Normalize'):
            names = f'{source / MODULES}: names {shown(kind, 60)}'
            raise UserError(f'{names}, which is not supported; --pooling mean, cls or last embeds without it')
    if not isinstance(pooling, dict):
        return None
    modes = [name.removeprefix(MODE) for name, on in pooling.items() if name.startswith(MODE) and on is True]
    modes += [str(pooling['pooling_mode'])] if 'pooling_mode' in pooling else []
    if len(modes) != 1 or modes[0] not in MODES:
        what = shown(' and '.join(modes) or 'no pooling at all', 60)
        raise UserError(f'{source / POOLING}: {what} is not supported; say one with --pooling mean, cls or last')
    return next(name for name in get_args(Pooling) if modes[0].startswith(name))
