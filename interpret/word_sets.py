"""Words of a run with their vectors, as a choice of table, layer, context and pieces says: what scripts/embeddings.py asks.

Letters: V words, D model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from weft.inference.run import TrainedRun
from weft.interpret.word_vectors import (
    Form,
    Placed,
    Table,
    alone,
    check_layer,
    check_table,
    context_of,
    layer_vectors,
    mean_rows,
    place_words,
    rows_of_table,
    single_token_words,
    token_names,
    with_tokens,
)
from weft.runtime.errors import MachineError, UserError, nearest, shown


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which vectors: rows of a table, or with `layer` activations behind it; and how words become tokens."""

    table: Table = 'input'
    layer: int | None = None
    text: str | None = None  # where words stand, with `layer`; None: alone
    form: Form = 'spaced'  # of words without a text
    pieces: str | None = None  # 'single', 'mean'; None: single of a table, mean of a layer

    @property
    def name(self) -> str:
        """What the vectors are, for a heading."""
        return f'{self.table} table' if self.layer is None else f'layer {self.layer}'

    @property
    def single(self) -> bool:
        """Whether only words of one token are known."""
        return self.pieces == 'single' or (self.pieces is None and self.layer is None)


class WordTable(NamedTuple):
    """Words, and a vector for each, float32 [V, D]."""

    words: list[str]
    x_VD: np.ndarray


class WordSet:
    """A run's words, by a choice of vectors. `word` is the one that is asked for, which may mark its place in the text itself.

    Raises UserError for a table or a layer that the run lacks, and a text that tells no place.
    """

    def __init__(
        self, run: TrainedRun, choice: Choice, say: Callable[[str], object] = str, word: str | None = None
    ) -> None:
        c = run.config.model
        assert run.tokenizer is not None, 'open_run sees to it'
        assert c.vocabulary is not None, 'a run embeds tokens'
        if choice.layer is None:
            check_table(c, choice.table)
        else:
            check_layer(c, choice.layer)
        self.run, self.tokenizer, self.choice, self.say = run, run.tokenizer, choice, say
        self.embedded = min(c.vocabulary, run.tokenizer.embedded)
        self.context = None if choice.text is None else context_of(choice.text, word)

    def placed(self, words: Sequence[str]) -> list[Placed | None]:
        """The tokens of each word, in the text where there is one; None for a word that has none of its own."""
        if self.context is None:
            return alone(self.tokenizer, words, self.choice.form)
        return place_words(self.tokenizer, words, self.context)

    def known(self, words: Sequence[str]) -> dict[str, Placed]:
        """The words that have vectors by this choice."""
        return with_tokens(words, self.placed(words), self.choice.single)

    def why_missing(self) -> str:
        """What words are that are not known, for a message."""
        return 'that are not one token' if self.choice.single else 'that have no tokens of their own'

    def most_frequent(self, most: int | None, letters: int = 1) -> dict[str, Placed]:
        """The most frequent words of one token with at least so many letters, or all of them."""
        words = list(single_token_words(self.tokenizer, self.embedded, self.choice.form, most, letters))
        return self.known(words)

    def asked(self, word: str) -> Placed:
        """The tokens of one word. Raises UserError where it is not known."""
        (one,) = self.placed([word])
        where = 'in this text' if self.context else f'in this form ({self.choice.form})'
        if one is None:
            rule = 'the tokenizer does not know it, or joins it with what stands beside it'
            raise UserError(f'--nearest {shown(word, 60)}: has no tokens of its own {where}: {rule}')
        if self.choice.single and len(one.own) > 1:
            pieces = ' '.join(shown(self.name_of(i), 40, quoted=True) for i in one.own)
            rule = '--pieces single takes words of one token; --pieces mean takes the mean of several'
            raise UserError(f'--nearest {shown(word, 60)}: is {len(one.own)} tokens {where}, {pieces}: {rule}')
        return one

    def tokens(self, most: int | None = None) -> dict[str, Placed]:
        """All tokens by name, or those with the smallest ids."""
        names = token_names(self.tokenizer, self.embedded)[:most]
        return {name: Placed((i,), 0, 1) for i, name in enumerate(names)}

    def token(self, name: str) -> Placed:
        """A token by its text or the tokenizer's name for it. Raises UserError where there is none."""
        names = token_names(self.tokenizer, self.embedded)
        i = names.index(name) if name in names else self.tokenizer.id_of(name)
        if i is None or i >= self.embedded:
            raise UserError(f'--nearest {shown(name, 60, quoted=True)}: no token is called so{nearest(name, names)}')
        return Placed((i,), 0, 1)

    def name_of(self, i: int) -> str:
        """A token's text, or its name."""
        return self.tokenizer.pieces[i].decode('utf-8', 'replace') or self.tokenizer.name_of(i)

    def vectors(self, placed: Mapping[str, Placed]) -> WordTable:
        """A vector for each word; use it under `jax.set_mesh`. Raises MachineError where one is not finite."""
        words, rows = list(placed), list(placed.values())
        if self.choice.layer is None:
            x_VD = mean_rows(rows_of_table(self.run, self.choice.table), rows)
        else:
            x_VD = layer_vectors(self.run, rows, self.choice.layer, self.say)
        if not (finite_V := np.isfinite(x_VD).all(1)).all():
            raise MachineError(
                f'the vector of {shown(words[int(finite_V.argmin())], 60)} is not finite: nothing is told'
            )
        return WordTable(words, x_VD)
