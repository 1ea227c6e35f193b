"""One forward pass of all texts of a report, and what of its activations belongs to each.

Letters: L layers, T tokens of a text, D model, N heads, S keys, H head width, F cells.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from weft.data.tokenizer import Tokenizer
from weft.inference.prompts import rows_of
from weft.inference.run import TrainedRun
from weft.interpret.xray import attention, experts, programs
from weft.interpret.xray.patching import CELLS, HEADS
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder
from weft.model.forward import needs_causal
from weft.runtime.errors import UserError, shown

PATTERN = 'attention.pattern'
ALWAYS = (
    'embedding',
    'residual.before_attention',
    'residual.after_attention',
    'residual.after_mlp',
    'attention.output',
    'mlp.output',
)
MOST = 256  # tokens of a text: a report has a number for each pair of them, and each head
LEAST_COLUMNS = 64  # so that short texts run one program
RANDOM = 4  # texts of random tokens, read twice


@dataclasses.dataclass
class Observed:
    """One text and its activations by name: [L, T, …] of the layers that have them, `embedding` [T, D]."""

    ids: list[int]
    taps: dict[str, np.ndarray]

    @property
    def pattern_LNTS(self) -> np.ndarray | None:
        """Of every head how much of its attention each query gives each key; None: the mixer has no patterns."""
        return self.taps.get(PATTERN)


def check_model(model: Decoder) -> None:
    """Raises UserError for a model that does not predict a text's next tokens, from its final norm and head alone."""
    c = model.config
    if c.encoder is not None:
        raise UserError('model.encoder is given: an X-ray is of a decoder alone, whose text is all that it reads')
    needs_causal(model, 'an X-ray')
    if c.head_mlp:
        raise UserError('model.head.mlp is true: an X-ray reads layers by the head, and a layer stands before it here')


def text_ids(run: TrainedRun, option: str, text: str) -> list[int]:
    """A text's tokens after the start token. Raises UserError for none, and for more than a report or the context holds."""
    assert run.tokenizer is not None, 'open_run sees to it'
    if not text:
        raise UserError(f'{option} is empty: give some words')
    (ids,) = rows_of(run.tokenizer, [text])
    most = min(run.context, MOST)
    if len(ids) > most:
        why = (
            f'the context is {run.context}'
            if run.context <= MOST
            else 'a report shows each pair of tokens of each head'
        )
        cut = f'{option} {shown(text, 40, quoted=True)} has {len(ids)} tokens, its start token included'
        raise UserError(f'{cut}: at most {most} work, for {why}')
    if len(ids) < 2:
        raise UserError(f'{option} {shown(text, 40, quoted=True)} is one token: at least 2 work')
    return ids


def observe(run: TrainedRun, texts: Sequence[list[int]], seed: int = 0) -> tuple[list[Observed], list[Observed]]:
    """The texts, and random tokens that are read twice, by one program; use it under `jax.set_mesh(run.mesh)`."""
    model, tokenizer = run.model, run.tokenizer
    assert tokenizer is not None
    assert model.config.vocabulary is not None
    length = min(run.context, max(LEAST_COLUMNS, *map(len, texts)))
    leave_out = without_text(tokenizer, model.config)
    twice = attention.random_twice(RANDOM, length, model.config.vocabulary, tokenizer.prefix, seed, leave_out)
    rows = [*texts, *(ids for ids in twice if len(ids) >= len(tokenizer.prefix) + 4)]
    filled = programs.padded(
        model.config, rows, programs.columns_for(max(map(len, rows)), min(LEAST_COLUMNS, run.context))
    )
    there = programs.offered(model, filled)
    names = [*ALWAYS, *(name for name in (PATTERN, HEADS, CELLS, *experts.TAPS) if name in there)]
    taps = programs.captured(model, names, filled)
    found = [Observed(ids, of_row(taps, row, len(ids))) for row, ids in enumerate(rows)]
    return found[: len(texts)], found[len(texts) :]


def without_text(tokenizer: Tokenizer, c: ModelConfig) -> frozenset[int]:
    """The ids of a model that stand for no text: control tokens, and rows of the embedding that no token has."""
    assert c.vocabulary is not None
    pieces = tokenizer.pieces
    return frozenset(token for token in range(c.vocabulary) if token >= len(pieces) or not pieces[token])


def of_row(taps: dict[str, np.ndarray], row: int, T: int) -> dict[str, np.ndarray]:
    """Activations of one row's first T tokens, of [L, B, T, …] or [B, T, …]; patterns become [L, N, T, S]."""
    found = {name: a[row, :T] if name == 'embedding' else a[:, row, :T] for name, a in taps.items()}
    if PATTERN in found:
        found[PATTERN] = found[PATTERN][..., :T].swapaxes(1, 2)
    return found
