"""A run's vectors of words: rows of its input or output table, or activations behind a layer, for any word and any context.

How a word becomes tokens: as the run's tokenizer cuts it in a text, where it follows another word (`spaced`, ' Paris'), or
begins the text (`bare`, 'Paris'), or stands in a context that is given. BERT's pieces do not tell the first two apart.

Letters: B rows, T tokens of a row, D model, V vocabulary, N words.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from jax import P

from weft.data.tokenizer import Tokenizer
from weft.inference.run import TrainedRun
from weft.inference.score import TOKENS, TOKENS_ELSEWHERE
from weft.model.capture import capture
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder
from weft.model.forward import place, row_ways
from weft.runtime.errors import UserError, shown
from weft.sharding.collectives import upcast
from weft.sharding.mesh import SEQUENCE, platform

Table = Literal['input', 'output']  # the embedding; the LM head
Form = Literal['spaced', 'bare']
BEFORE = {'spaced': 'a ', 'bare': ''}  # what stands before a word in a text where its tokens are looked up
STREAM = 'residual.after_mlp'  # the tap behind a layer; of a post-norm layer it is normed
WIDTH = 128  # tokens of a row at least, which many short texts share
PAUSE = 5.0  # seconds between lines that tell how far it is


class Placed(NamedTuple):
    """A word in a text: the text's tokens, and which of them are the word's, [begin, end)."""

    ids: tuple[int, ...]
    begin: int
    end: int

    @property
    def own(self) -> tuple[int, ...]:
        """The word's tokens alone."""
        return self.ids[self.begin : self.end]


class Context(NamedTuple):
    """What stands before and after a word."""

    before: str
    after: str


def context_of(text: str, word: str | None = None) -> Context:
    """The context that a text gives to a word: `{}` marks where it stands, or else the word itself, which stands there once.

    Raises UserError where the place is not told, or there are several.
    """
    marks = [(found.start(), found.end()) for found in re.finditer(r'\{\}', text)]
    if not marks and word:
        marks = [(one.start(), one.end()) for one in re.finditer(rf'(?<!\w){re.escape(word)}(?!\w)', text)]
    if len(marks) != 1:
        what = f'{shown(word, 60, quoted=True)} or {{}}' if word else '{}'
        rule = 'it must stand there exactly once; {} marks the place where words stand'
        raise UserError(f'--text {shown(text, 80, quoted=True)}: has {what} {len(marks)} times: {rule}')
    ((begin, end),) = marks
    return Context(text[:begin], text[end:])


def place_words(tokenizer: Tokenizer, words: Sequence[str], context: Context) -> list[Placed | None]:
    """Each word in its context, as the tokenizer cuts the whole text.

    None for a word that has no tokens of its own there, because one of them holds something of the context, or because the
    tokenizer does not know a character of it.
    """
    # A space before a word belongs to its first token, where the tokenizer has such.
    before = context.before.rstrip(' ')
    (ids_before,) = tokenizer.encode_batch([before])
    upto = tokenizer.encode_batch([context.before + word for word in words])
    whole = (
        tokenizer.encode_batch([f'{context.before}{word}{context.after}' for word in words]) if context.after else upto
    )
    unknown, found = unknown_token(tokenizer), list[Placed | None]()
    for word, ids, ids_upto in zip(words, whole, upto, strict=True):
        begin, end = len(ids_before), len(ids_upto)
        apart = ids_upto[:begin] == ids_before and ids[:end] == ids_upto and begin < end
        known = apart and unknown not in ids_upto[begin:] and word.strip()
        found.append(Placed(tuple(ids), begin, end) if known else None)
    return found


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The id that stands for whatever a tokenizer does not know; None where it has bytes for that.

    It is what two signs of a dead script have in common, of which no vocabulary has both as one token.
    """
    one, other = tokenizer.encode_batch(['\U00012000', '\U00012001'])
    return one[-1] if one and one == other else None


def alone(tokenizer: Tokenizer, words: Sequence[str], form: Form) -> list[Placed | None]:
    """The tokens of each word in this form, without a context; None as in `place_words`."""
    placed = place_words(tokenizer, words, Context(BEFORE[form], ''))
    return [one and Placed(one.own, 0, len(one.own)) for one in placed]


def single_token_words(
    tokenizer: Tokenizer, embedded: int, form: Form, most: int | None = None, letters: int = 1
) -> dict[str, int]:
    """The words that are one token in this form, with their ids, in the order of ids; at most `most` of them.

    A word has letters alone, at least `letters` of them. Ids of byte pair encoding are in the order in which pieces were
    learnt, and BERT's in that of their frequency: small ones are frequent words. Ids from `embedded` on have no row in the
    model.
    """
    words = dict[str, None]()
    for piece in tokenizer.pieces[:embedded]:
        text = piece.decode('utf-8', 'replace').strip()
        # After another word its first token has the space between them, which stands behind it in some tokenizers.
        may_be = form == 'bare' or piece != piece.strip()
        if may_be and text.isalpha() and len(text) >= letters:
            words[text] = None
    placed = zip(words, alone(tokenizer, list(words), form), strict=True)
    ids = {word: one.ids[0] for word, one in placed if one and len(one.ids) == 1 and one.ids[0] < embedded}
    by_id = sorted(ids, key=ids.__getitem__)
    first = {ids[word]: word for word in reversed(by_id)}  # an uncased tokenizer may give two words one id
    return {word: ids[word] for word in [word for word in by_id if first[ids[word]] == word][:most]}


def token_names(tokenizer: Tokenizer, embedded: int) -> list[str]:
    """What each token is called, each otherwise: its text, or else the tokenizer's name for it, or its id."""
    named = dict[str, int]()
    for i, piece in enumerate(tokenizer.pieces[:embedded]):
        text = piece.decode('utf-8', 'replace')
        names = (text if '\ufffd' not in text else '', tokenizer.name_of(i), f'token {i}')
        named.setdefault(next(name for name in names if name and name not in named), i)
    return list(named)


def check_table(c: ModelConfig, table: str) -> None:
    """Raises UserError for a table that is none, and for the LM head of a model without one."""
    if table not in get_args(Table):
        raise UserError(f'--table {shown(table)}: no such table; there are {", ".join(get_args(Table))}')
    if table == 'output' and not c.head:
        raise UserError('--table output: model.head is null: this model has no LM head; --table input is its embedding')


def rows_of_table(run: TrainedRun, table: Table) -> np.ndarray:
    """The static vectors of all tokens, float32 [V, D]; use it under `jax.set_mesh(run.mesh)`.

    `input` is the embedding, `output` the LM head, column by column; where they are tied they are one. Raises UserError as
    `check_table`.
    """
    c = run.config.model
    check_table(c, table)
    tied = table == 'input' or c.embedding.tied
    w = (run.model.embed_VD if tied else run.model.head_DV)[...]
    x = np.asarray(jax.jit(everywhere)(w), np.float32)
    return (x if tied else x.T)[: c.vocabulary]


def everywhere(w: jax.Array) -> jax.Array:
    """An array in at least float32, all of it on every device."""
    return jax.reshard(upcast(w), P())


def mean_rows(x_VD: np.ndarray, placed: Sequence[Placed]) -> np.ndarray:
    """The mean of each word's tokens' rows of a table, [N, D]."""
    return np.stack([x_VD[list(one.own)].mean(0) for one in placed])


def check_layer(c: ModelConfig, layer: int) -> None:
    """Raises UserError for a layer that the model lacks, and for a model that reads a source."""
    if not 1 <= layer <= c.layers:
        rule = f'layers are 1 to {c.layers}; without --layer the vectors are those of the table'
        raise UserError(f'--layer {layer}: this model has no such layer; {rule}')
    if c.encoder:
        raise UserError(f'--layer {layer}: model.encoder is given: activations of words are of models without one')


def layer_vectors(
    run: TrainedRun, placed: Sequence[Placed], layer: int, say: Callable[[str], object] = str
) -> np.ndarray:
    """The mean of each word's tokens' activations behind a layer (from 1), float32 [N, D]; under `jax.set_mesh(run.mesh)`.

    Each text is a document of its own, after what the tokenizer sets before every text or, where it sets nothing, after the
    token that opens a document: a decoder's first token stands for little but being the first. Activations are the residual
    stream behind the layer, before any final norm. `say` is told how far it is, every few seconds.

    Raises UserError for a layer that the model lacks, a text longer than the context, and a model with an encoder.
    """
    check_layer(run.config.model, layer)
    assert run.tokenizer is not None, 'open_run sees to it'
    prefix = run.tokenizer.prefix or ((run.tokenizer.bos,) if run.config.model.causal else ())
    documents = [[*prefix, *one.ids, *run.tokenizer.suffix] for one in placed]
    longest = max(map(len, documents))
    if longest > run.context:
        tokens = f'a text has {longest} tokens with its word, those around it included'
        raise UserError(f'--text: {tokens}, and the context is {run.context}: cut it')
    ways = math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)
    width = -(-max(longest, WIDTH) // ways) * ways
    each = max(1, TOKENS.get(platform(), TOKENS_ELSEWHERE) // width)
    starts = row_and_column(documents, width)
    count = row_ways() * min(each, -(-(starts[-1][0] + 1) // row_ways()))
    step = jax.jit(layer_activations, static_argnames='layer')
    found_ND, done, told = np.zeros((len(documents), run.config.model.model_dim), np.float32), 0, time.monotonic()
    while done < len(documents):
        first = starts[done][0]
        last = next((n for n in range(done, len(documents)) if starts[n][0] == first + count), len(documents))
        tokens_BT, position_BT, segment_BT = np.zeros((3, count, width), np.int32)
        for number in range(done, last):
            row, begin = starts[number][0] - first, starts[number][1]
            here = slice(begin, begin + len(documents[number]))
            tokens_BT[row, here], position_BT[row, here] = documents[number], np.arange(len(documents[number]))
            segment_BT[row, here] = segment_BT[row].max() + 1
        x_BTD = np.asarray(step(run.model, *place((tokens_BT, position_BT, segment_BT)), layer=layer), np.float32)
        for number in range(done, last):
            row, begin = starts[number][0] - first, starts[number][1] + len(prefix)
            found_ND[number] = x_BTD[row, begin + placed[number].begin : begin + placed[number].end].mean(0)
        done = last
        if time.monotonic() - told > PAUSE:
            say(f'layer {layer}: {done:,} of {len(documents):,} words')
            told = time.monotonic()
    return found_ND


def row_and_column(documents: Sequence[Sequence[int]], width: int) -> list[tuple[int, int]]:
    """The row and the column where each document begins, one after another in rows of `width` tokens."""
    found, row, column = list[tuple[int, int]](), 0, 0
    for ids in documents:
        if column + len(ids) > width:
            row, column = row + 1, 0
        found.append((row, column))
        column += len(ids)
    return found


def layer_activations(
    model: Decoder, tokens_BT: jax.Array, position_BT: jax.Array, segment_BT: jax.Array, layer: int
) -> jax.Array:
    """What stands behind a layer (from 1), [B, T, D] in at least float32, the same on all devices."""
    x_BTD = capture(model, [STREAM], tokens_BT, position_BT, segment_BT)[STREAM][layer - 1]
    return everywhere(x_BTD)


def with_tokens(words: Iterable[str], placed: Iterable[Placed | None], single: bool) -> dict[str, Placed]:
    """The words that have tokens of their own; with `single` those of one token. Each once, in their order."""
    found = dict[str, Placed]()
    for word, one in zip(words, placed, strict=True):
        if one is not None and (len(one.own) == 1 or not single):
            found.setdefault(word, one)
    return found
