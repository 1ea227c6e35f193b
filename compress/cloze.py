"""A cloze test made of held-out text: which of four words stands here?

An item is a place in a row of text where the next token is a whole word. Beside the right word stand three others of the same
text, of one token each and about as frequent in it, so that who knows how often words occur, and does not read what stands
before the place, is right one time in four. All are scored by the log-probability of the word: as they have one token each,
the forward pass that measures perplexity gives those of all four, and the test costs nothing beside it.

Letters: R rows, T their columns, N items, C candidates of an item.
"""

import hashlib
import re
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from weft.data.tokenizer import Tokenizer
from weft.model.batch import Batch

CANDIDATES = 4
CHANCE = 1 / CANDIDATES  # the accuracy of who knows nothing, or only how often words occur
CONTEXT = 32  # tokens of the document that stand before an item in its row, at least
EACH = 6  # items at most whose right word is the same
NEAR = 12  # words, the nearest in frequency, of which the others are drawn
WORD = re.compile(rb' ?[A-Za-z]{3,}')  # with or without the space that many tokenizers make part of a word
GOES_ON = re.compile(rb'[A-Za-z0-9_\x80-\xff]')  # what begins or ends with it is part of a longer word


class Cloze(NamedTuple):
    """The items of a text, in the order of its rows: right at row r, column t is what follows column t's token."""

    row_N: np.ndarray  # int32
    column_N: np.ndarray  # int32
    candidate_NC: np.ndarray  # int32: tokens, no two alike
    right_N: np.ndarray  # int32: the place of the right one among them, each place as often as any other

    def is_right(self, log_p_NC: np.ndarray) -> np.ndarray:
        """bool [N]: whether the right word is the likeliest. Of equal ones the first counts, so that ties are worth chance."""
        return log_p_NC.argmax(1) == self.right_N


def cloze_items(rows: Batch, tokenizer: Tokenizer) -> Cloze:
    """All items of a text, a function of its tokens alone; of a text without enough different words there are none."""
    row_N, column_N = word_places(rows, tokenizer)
    target_N = rows.target_BT[row_N, column_N]
    others_of = near_words(Counter(target_N.tolist()), tokenizer)
    used: Counter[int] = Counter()
    items = []
    # Which places of a frequent word are taken does not depend on where in the text they stand.
    for n in sorted(range(len(row_N)), key=lambda n: drawn_order(0, int(row_N[n]), int(column_N[n]))):
        token = int(target_N[n])
        if token in others_of and used[token] < EACH:
            used[token] += 1
            items.append((int(row_N[n]), int(column_N[n]), token))
    found = []
    for number, (row, column, token) in enumerate(sorted(items)):
        others = sorted(others_of[token], key=lambda other: drawn_order(1 + other, row, column))[: CANDIDATES - 1]
        right = number % CANDIDATES
        found.append((row, column, right, *others[:right], token, *others[right:]))
    found_N = np.array(found, np.int32).reshape(-1, 3 + CANDIDATES)
    return Cloze(found_N[:, 0], found_N[:, 1], found_N[:, 3:], found_N[:, 2])


def word_places(rows: Batch, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, int [N] each, whose target is a whole word with enough of its document before it."""
    pieces = [*tokenizer.pieces, *[b''] * max(0, int(np.max(rows.target_BT)) + 1 - len(tokenizer.pieces))]
    is_word_V = np.array([WORD.fullmatch(piece) is not None for piece in pieces])
    opens_V = np.array([piece.startswith(b' ') for piece in pieces])
    ends_inside_V = np.array([GOES_ON.fullmatch(piece[-1:]) is not None for piece in pieces])
    begins_inside_V = np.array([GOES_ON.match(piece) is not None for piece in pieces])
    goes_on_BT = np.zeros(rows.target_BT.shape, bool)
    same_BT = rows.segment_BT[:, 1:] == rows.segment_BT[:, :-1]
    goes_on_BT[:, :-1] = ~same_BT | begins_inside_V[rows.target_BT[:, 1:]]
    goes_on_BT[:, -1] = True  # where a row ends nobody knows whether the word does
    starts_BT = opens_V[rows.target_BT] | ~ends_inside_V[rows.tokens_BT]
    # A token of a column is at its place of the document's part in this row, so that many tokens were read before it.
    enough_BT = (rows.segment_BT > 0) & (rows.position_BT + 1 >= CONTEXT)
    row_N, column_N = np.nonzero(is_word_V[rows.target_BT] & starts_BT & ~goes_on_BT & enough_BT)
    return row_N, column_N


def near_words(count_of: Counter[int], tokenizer: Tokenizer) -> dict[int, list[int]]:
    """For each word the `NEAR` others that occur about as often, as many oftener as rarer, as far as there are such.

    Words with a space before them are beside others with one. A word that has fewer than three others has no entry.
    """
    groups: defaultdict[bool, list[int]] = defaultdict(list)
    for token in sorted(count_of, key=lambda token: (-count_of[token], token)):
        groups[tokenizer.pieces[token].startswith(b' ')].append(token)
    found = {}
    for words in groups.values():
        size = min(NEAR + 1, len(words))
        if size < CANDIDATES:
            continue
        for at, token in enumerate(words):
            begin = min(max(at - size // 2, 0), len(words) - size)
            found[token] = [word for word in words[begin : begin + size] if word != token]
    return found


def drawn_order(*numbers: int) -> bytes:
    """Of numbers always the same, and in no order: what is chosen by it stays the same with any version of any library."""
    return hashlib.blake2b(repr(numbers).encode(), digest_size=8, key=b'weft cloze').digest()
