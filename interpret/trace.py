"""A pass of a trained run over some texts: what stands at places of it by name, and what it says if some is changed there.

Letters: L layers (those that have what is captured, or that were asked for), B texts, T tokens of the longest text, t tokens
that were asked for, V vocabulary.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from weft.data.tokenizer import Tokenizer
from weft.inference.embed import token_rows
from weft.inference.prompts import BUCKET, pad_rows, rows_of
from weft.inference.run import TrainedRun, open_run
from weft.inference.session import Session
from weft.inference.step import decode, empty_cache, prefill
from weft.interpret.edits import PATTERN, Change, Shapes, Some, numbers
from weft.model.capture import Offer, capture, chosen, offers
from weft.model.decoder import Decoder
from weft.model.edits import Edit
from weft.model.forward import needs_causal, place, row_ways
from weft.model.kv_cache import KVCache
from weft.runtime.errors import UserError
from weft.sharding.mesh import SEQUENCE

Text = str | Sequence[int]  # a text, or the ids of its tokens
OFFERS: dict[Any, dict[str, Offer]] = {}  # what `offers_of` has looked up
KEPT = 32  # of them


@dataclasses.dataclass(frozen=True)
class Trace:
    """Of a pass over B texts, on the host. `trace['residual.after_mlp']` is an array [L, B, t, D].

    Places behind the end of a text that is shorter than the longest hold nothing that counts.
    """

    tokens: list[list[int]]  # of each text, those before and around it that its tokenizer sets among them
    pieces: list[list[str]]  # the text of each token
    logits_BTV: np.ndarray | None  # float32, before each next token; NaN where a pass makes none; None: no LM head
    arrays: dict[str, np.ndarray]  # by name, float32 or int32: [L, B, t, …], or [B, t, …] of what is no layer's
    layers: dict[str, tuple[int, ...] | None]  # by name: the numbers of the layers in the first dim
    column_Bt: np.ndarray  # int32: which tokens of each text the arrays are of

    def __getitem__(self, name: str) -> np.ndarray:
        """The array of a name that was asked for."""
        if name not in self.arrays:
            raise KeyError(f'{name!r} was not captured; what was: {", ".join(sorted(self.arrays)) or "nothing"}')
        return self.arrays[name]


def trace(
    run: TrainedRun | Session | str | Path,
    texts: Text | Sequence[Text],
    taps: Sequence[str] | Mapping[str, Some] = (),
    edits: Sequence[Change] = (),
    mesh: str | None = None,
    tokens: Some = None,
    new_tokens: int = 0,
) -> Trace:
    """Reads texts with a trained run, and gives what stands at the named places of the pass, under some changes.

    Args:
        run: an opened run, a chat's session (under `jax.set_mesh`), or a run's folder.
        texts: one or several; tokens as ids are read as they are.
        taps: names, or patterns of them, as in `'residual.*'`; as a mapping with the layers that are wanted of each. What is
            not asked for is not made. docs/interpret.md lists the names.
        edits: changes on the way (weft.interpret.edits), in this order where several are at one name.
        mesh: as in `open_run`, `'tensor=2'`: the run on another mesh.
        tokens: places in each text that arrays are wanted of, from its end if negative; None: all.
        new_tokens: so many tokens are decoded after each text, greedily, and traced too; texts are then read into a cache, and
            logits stand from each text's last token on.

    Raises UserError for a name, layer, head, unit, expert, text or token that does not exist, with the nearest that does.
    """
    with opened_on(run, mesh) as opened:
        model = opened.weights() if isinstance(opened, Session) else opened.model
        tokenizer, context = opened.tokenizer, opened.context
        assert tokenizer is not None, 'open_run sees to it'
        if model.config.encoder:
            raise UserError('model.encoder is given: traces are of models without one')
        if new_tokens < 0:
            raise UserError(f'new_tokens is {new_tokens}: it must be at least 0')
        if new_tokens:
            needs_causal(model, 'decoding')
        rows = token_ids(texts, tokenizer, model, context - new_tokens)
        wanted = taps if isinstance(taps, Mapping) else dict.fromkeys([taps] if isinstance(taps, str) else taps)
        batch = TextBatch(model, rows, context, new_tokens)
        found = batch.decoded(list(wanted), edits) if new_tokens else batch.scored(list(wanted), edits)
    column_Bt = chosen_columns(found.rows, tokens)
    layers = {name: layers_of(name, wanted, offer) for name, offer in batch.offers.items() if name in found.arrays}
    arrays = {}
    for name, array in found.arrays.items():
        have = batch.offers[name].layers
        if have is not None and layers[name] != have:
            array = array[[have.index(layer) for layer in layers[name] or ()]]
        arrays[name] = at_columns(array, have is not None, column_Bt)
    pieces = [[tokenizer.decode([number]) for number in row] for row in found.rows]
    return Trace(found.rows, pieces, found.logits_BTV, arrays, layers, column_Bt)


@contextlib.contextmanager
def opened_on(run: TrainedRun | Session | str | Path, mesh: str | None) -> Iterator[TrainedRun | Session]:
    """The run, opened on a mesh, which is set."""
    if isinstance(run, Session):
        if mesh is not None:
            raise UserError(f'mesh {mesh!r}: a session stands on a mesh already; leave it out, or give the run')
        yield run
        return
    if not isinstance(run, TrainedRun):
        run = open_run(run, mesh, stacked=True)
    elif mesh is not None:
        run = open_run(run.folder, mesh, stacked=True)
    with jax.set_mesh(run.mesh):
        yield run


def token_ids(texts: Text | Sequence[Text], tokenizer: Tokenizer, model: Decoder, most: int) -> list[list[int]]:
    """The tokens of each text: of a string what the run would read, ids as they are."""
    alone = isinstance(texts, str) or (len(texts) and all(isinstance(one, int | np.integer) for one in texts))
    several = [cast(Text, texts)] if alone else cast(Sequence[Text], texts)
    if not len(several):
        raise UserError('texts: none is given; give at least one')
    rows = list[list[int]]()
    for number, text in enumerate(several):
        if isinstance(text, str):
            row = rows_of(tokenizer, [text])[0] if model.config.causal else token_rows(tokenizer, [text])[0]
        else:
            row = [int(one) for one in text]
            last = (model.config.vocabulary or 0) - 1
            wrong = [one for one in row if not 0 <= one <= last]
            if wrong or not row:
                what = f'{wrong[0]} is no token' if wrong else 'it has no tokens'
                raise UserError(f'text {number}: {what}; ids are from 0 to {last}')
        if len(row) > most:
            raise UserError(f'text {number} has {len(row)} tokens, and the context leaves room for {most}: cut it')
        rows.append(row)
    return rows


class Found(NamedTuple):
    """What a pass gave of B texts, on the host: arrays by name, with all layers that have them."""

    rows: list[list[int]]
    arrays: dict[str, np.ndarray]
    logits_BTV: np.ndarray | None


class TextBatch:
    """Texts as rows of one batch on the current mesh, and what the model's layers offer of them."""

    def __init__(self, model: Decoder, rows: list[list[int]], context: int, new: int) -> None:
        self.model, self.rows, self.new, c = model, rows, new, model.config
        longest = max(map(len, rows)) + new
        ways = BUCKET * math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)
        count, width = -(-len(rows) // row_ways()) * row_ways(), -(-longest // ways) * ways
        self.tokens_BT, self.length_B = pad_rows(rows, count, width)
        column_T = np.arange(width, dtype=np.int32)
        # A table of positions may have fewer rows than the padding, which nothing attends to.
        position_BT = np.broadcast_to(np.minimum(column_T, context - 1), self.tokens_BT.shape)
        segment_BT = (column_T[None] < self.length_B[:, None]).astype(np.int32)
        self.arrays = place((self.tokens_BT, position_BT, segment_BT))
        self.offers = offers_of(model, self.arrays)
        self.shapes = Shapes(self.offers, [len(row) + new for row in rows], c.layers, c.moe.experts if c.moe else 0)
        self.headed = 'logits' in self.offers

    def edits(self, changes: Sequence[Change]) -> tuple[Edit, ...]:
        """The arrays of changes; for means a pass without any."""
        names = tuple(sorted({change.name for change in changes if change.kind == 'mean'}))
        means: dict[str, np.ndarray] = {}
        for name in names:
            self.shapes.offer(name)
        if names:
            for name, value in host(scored(self.model, names, self.arrays, ())).items():
                rows = 0 if self.offers[name].layers is None else 1
                live = np.concatenate(
                    [np.take(value, n, rows).take(range(len(row)), rows) for n, row in enumerate(self.rows)], rows
                )
                means[name] = live.mean(rows)
        return tuple(self.shapes.edit(change, means) for change in changes)

    def scored(self, patterns: Sequence[str], changes: Sequence[Change]) -> Found:
        """One pass over whole texts."""
        names = chosen(patterns, self.offers)
        every = sorted({*names, *(['logits'] if self.headed else [])})
        found = host(scored(self.model, tuple(every), self.arrays, self.edits(changes))) if every else {}
        arrays = {name: self.cut(name, value) for name, value in found.items()}
        logits_BTV = arrays['logits'] if self.headed else None
        return Found(self.rows, {name: arrays[name] for name in names}, logits_BTV)

    def decoded(self, patterns: Sequence[str], changes: Sequence[Change]) -> Found:
        """Texts read into a cache, and tokens decoded after them one by one: the likeliest, whatever ends a text."""
        edits, model = self.edits(changes), self.model
        cache = jax.jit(lambda: empty_cache(model, *self.tokens_BT.shape))()
        token_B, position_B = place((np.zeros_like(self.length_B), self.length_B))
        length_B = position_B
        offered = jax.eval_shape(
            lambda *given: step(given[0], ('*',), *given[1:]), model, cache, token_B, position_B, edits
        )
        names = tuple(chosen(patterns, offered[2]))
        logit_BV, cache, found = read(model, names, cache, self.arrays[0], length_B, edits)
        arrays = {name: value for name, value in host(found).items() if name != 'logits'}
        for name, value in arrays.items():  # copies that are written to
            arrays[name] = np.array(value)
        shape = (*self.tokens_BT.shape, logit_BV.shape[-1])
        logits_BTV, row_B = np.full(shape, np.nan, np.float32), np.arange(len(self.length_B))
        at_B, rows = np.array(self.length_B), [list(row) for row in self.rows]
        logits_BTV[row_B, at_B - 1] = np.asarray(logit_BV, np.float32)
        for _ in range(self.new):
            new_B = logits_BTV[row_B, at_B - 1].argmax(-1).astype(np.int32)
            for row, token in zip(rows, new_B.tolist(), strict=False):
                row.append(token)
            logit_BV, cache, found = step(model, names, cache, *place((new_B, at_B.astype(np.int32))), edits)
            for name, value in host(found).items():
                if name != 'logits':
                    where = (row_B, at_B) if self.offers[name].layers is None else (slice(None), row_B, at_B)
                    arrays[name][where] = np.take(value, 0, len(where) - 1)
            logits_BTV[row_B, at_B] = np.asarray(logit_BV, np.float32)
            at_B = at_B + 1
        if 'logits' in names:
            arrays['logits'] = logits_BTV
        cut = {name: self.cut(name, value) for name, value in arrays.items()}
        return Found(rows, cut, self.cut('logits', logits_BTV))

    def cut(self, name: str, value: np.ndarray) -> np.ndarray:
        """Without rows and columns that only fill up."""
        longest = max(map(len, self.rows)) + self.new
        before = () if self.offers[name].layers is None else (slice(None),)
        value = value[(*before, slice(len(self.rows)), slice(longest))]
        return value[..., :longest] if name == PATTERN else value


@functools.partial(jax.jit, static_argnums=1)
def scored(model: Decoder, names: tuple[str, ...], rows: Any, edits: tuple[Edit, ...]) -> dict[str, jax.Array]:
    """What stands at the names, of whole rows."""
    tokens_BT, position_BT, segment_BT = rows
    return capture(model, names, tokens_BT, position_BT, segment_BT, edits=edits)


@functools.partial(jax.jit, static_argnums=1)
def read(
    model: Decoder,
    names: tuple[str, ...],
    cache: KVCache,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    edits: tuple[Edit, ...],
) -> tuple[jax.Array, KVCache, dict[str, jax.Array]]:
    """`prefill`, and what stands at the names."""
    return prefill.capture(model, cache, tokens_BT, length_B, taps=names, edits=edits)


@functools.partial(jax.jit, static_argnums=1)
def step(
    model: Decoder,
    names: tuple[str, ...],
    cache: KVCache,
    token_B: jax.Array,
    position_B: jax.Array,
    edits: tuple[Edit, ...],
) -> tuple[jax.Array, KVCache, dict[str, jax.Array]]:
    """`decode`, and what stands at the names."""
    return decode.capture(model, cache, token_B, position_B, taps=names, edits=edits)


def offers_of(model: Decoder, rows: tuple[jax.Array, ...]) -> dict[str, Offer]:
    """What the model's layers offer of such rows; looked up once, for it takes as long as to trace the program."""
    key = jax.tree.structure(model), jax.sharding.get_mesh(), rows[0].shape
    if key not in OFFERS:
        OFFERS[key] = offers(model, *rows)
        while len(OFFERS) > KEPT:
            OFFERS.pop(next(iter(OFFERS)))
    return OFFERS[key]


def host(found: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Arrays on the host, whole numbers as int32 and others as float32."""
    whole = {name: jnp.issubdtype(value.dtype, jnp.integer) for name, value in found.items()}
    return {name: np.asarray(value, np.int32 if whole[name] else np.float32) for name, value in found.items()}


def layers_of(name: str, wanted: Mapping[str, Some], offer: Offer) -> tuple[int, ...] | None:
    """The layers that are wanted of a name, by all patterns that mean it."""
    if offer.layers is None:
        return None
    picked = set[int]()
    for pattern, some in wanted.items():
        if fnmatch.fnmatch(name, pattern):
            picked.update(numbers(some, max(offer.layers) + 1, f'layers of {name!r}', offer.layers))
    return tuple(sorted(picked))


def chosen_columns(rows: list[list[int]], tokens: Some) -> np.ndarray:
    """int32 [B, t]: which tokens of each text are meant; all texts have as many, for all of them the longest's."""
    if tokens is None:
        return np.broadcast_to(np.arange(max(map(len, rows)), dtype=np.int32), (len(rows), max(map(len, rows))))
    found = [numbers(tokens, len(row), f'tokens of text {text}', from_end=True) for text, row in enumerate(rows)]
    if len({len(one) for one in found}) > 1:
        raise UserError(f'tokens {tokens}: the texts have different numbers of them; give places that all texts have')
    return np.array(found, np.int32)


def at_columns(array: np.ndarray, layered: bool, column_Bt: np.ndarray) -> np.ndarray:
    """The columns of each text that are meant, of [L, B, T, …] or [B, T, …]."""
    row_B1 = np.arange(len(column_Bt))[:, None]
    return array[:, row_B1, column_Bt] if layered else array[row_B1, column_Bt]
