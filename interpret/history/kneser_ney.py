"""N-gram models with modified Kneser–Ney smoothing (Chen and Goodman 1999, Computer Speech & Language 13, section 4.1).

An n-gram is a context h and a word w. With a(hw) its adjusted count and h' the context without its first word

    p(w | h) = max(a(hw) − D(a(hw)), 0) / Σ_v a(hv)  +  γ(h) p(w | h')
    γ(h)     = (D₁ N₁(h) + D₂ N₂(h) + D₃ N₃(h)) / Σ_v a(hv)

where N_i(h) is how many words follow h with an adjusted count of i (N₃: of 3 or more). Of the longest n-grams a is how often
they were seen; of shorter ones how many different words stand before them, or, where a text begins with them and nothing does,
how often they were seen. The unigrams are mixed with 1 / V, and an unseen context leaves all to the shorter one, so what
follows any context has a sum of 1. The discounts of an order come from n_i, its numbers of n-grams with a count of i:

    Y = n₁ / (n₁ + 2 n₂),   D₁ = 1 − 2Y n₂/n₁,   D₂ = 2 − 3Y n₃/n₂,   D₃ = 3 − 4Y n₄/n₃

Letters: S tokens of all texts, one after another; G different n-grams of an order, sorted; C contexts: n-grams of the order
below; V vocabulary; 4 a count's class: 0, 1, 2, 3 or more.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.runtime.errors import UserError

LONGEST = 8  # tokens of an n-gram
# Where an order has too few n-grams for the formula: those of KenLM's --discount_fallback.
FALLBACK = (0.5, 1.0, 1.5)


class Texts(NamedTuple):
    """Texts one after another. What is not predicted, such as a mark at the beginning, is only ever a context."""

    token_S: np.ndarray  # integers
    place_S: np.ndarray  # of each token in its text, from 0
    predicted_S: np.ndarray  # bool

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], given: int = 1) -> 'Texts':
        """Texts whose first `given` tokens are not predicted."""
        lengths = [len(text) for text in texts]
        place_S = np.concatenate([np.arange(length) for length in lengths])
        return cls(np.concatenate([np.asarray(text, np.int64) for text in texts]), place_S, place_S >= given)


@dataclasses.dataclass(frozen=True)
class Order:
    """The n-grams of one length."""

    key_G: np.ndarray  # the number of its context times V + its last token, ascending
    count_G: np.ndarray  # adjusted; 0: nothing but a context
    discount_4: np.ndarray  # by class of a count
    fallback: bool  # whether the discounts are FALLBACK
    total_C: np.ndarray  # Σ of the counts after each context
    gamma_C: np.ndarray  # the weight of the shorter context's probabilities


class KneserNey:
    """A model of n-grams up to `order` tokens over `vocabulary` tokens; `discounts` by length where they are not to be learnt.

    Tokens from `vocabulary` to `marks` − 1 may stand in contexts and are never predicted. Raises UserError for an order that
    is not in 1 to 8, for tokens outside of the vocabulary, and for texts in which nothing is predicted.
    """

    def __init__(
        self,
        texts: Texts,
        order: int,
        vocabulary: int,
        marks: int = 0,
        discounts: Sequence[Sequence[float]] | None = None,
    ) -> None:
        if not 1 <= order <= LONGEST:
            raise UserError(
                f'order is {order}: n-grams have 1 to {LONGEST} tokens; nearest: {min(max(order, 1), LONGEST)}'
            )
        self.order, self.vocabulary, self.symbols = order, vocabulary, max(vocabulary, marks)
        check_tokens(texts, vocabulary, self.symbols)
        self.orders: list[Order] = []
        number_S, found = np.zeros(len(texts.token_S), np.int64), []
        for length in range(1, order + 1):
            key_S, inside_S = self.keys(texts, number_S, length)
            key_G, first_G, inverse = np.unique(key_S[inside_S], return_index=True, return_inverse=True)
            ends = np.flatnonzero(inside_S)
            shorter_G = number_S[ends[first_G]]  # the n-gram without its first token
            number_S = np.full_like(number_S, -1)
            number_S[ends] = inverse
            seen_G = np.bincount(inverse, texts.predicted_S[ends], len(key_G)).astype(np.int64)
            found.append((key_G, seen_G, shorter_G))
        for length, (key_G, seen_G, _) in enumerate(found, start=1):
            count_G = seen_G if length == order else self.continuations(found[length], seen_G, len(key_G))
            contexts = 1 if length == 1 else len(found[length - 2][0])
            given = None if discounts is None else discounts[length - 1]
            self.orders.append(self.smoothed(key_G, count_G, contexts, given))

    def keys(self, texts: Texts, number_S: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the n-gram of so many tokens that ends at each token its key, and whether it is inside the text.

        `number_S` are the numbers of the n-grams that are one token shorter; −1: one that the model has not.
        """
        before_S = np.zeros_like(number_S) if length == 1 else np.concatenate([[-1], number_S[:-1]])
        inside_S = (texts.place_S >= length - 1) & (before_S >= 0)
        return before_S * self.symbols + texts.token_S, inside_S

    def continuations(self, longer: tuple[np.ndarray, ...], seen_G: np.ndarray, count: int) -> np.ndarray:
        """How many different tokens stand before each n-gram; of one that only begins texts, how often it was seen."""
        _, seen, shorter = longer
        before_G = np.bincount(shorter[seen > 0], minlength=count)
        return np.where(before_G > 0, before_G, seen_G)

    def smoothed(self, key_G: np.ndarray, count_G: np.ndarray, contexts: int, given: Sequence[float] | None) -> Order:
        """An order with its discounts, and what they leave of each context."""
        learnt = discounts_of(count_G) if given is None else tuple(given)
        discount_4 = np.array([0.0, *(learnt or FALLBACK)])
        class_G, context_G = np.minimum(count_G, 3), key_G // self.symbols
        total_C = np.bincount(context_G, count_G, contexts)
        left_C = np.bincount(context_G, discount_4[class_G], contexts)
        gamma_C = np.divide(left_C, total_C, out=np.ones(contexts), where=total_C > 0)
        return Order(key_G, count_G, discount_4, learnt is None, total_C, gamma_C)

    def probabilities(self, texts: Texts) -> np.ndarray:
        """p of each predicted token of texts given what stands before it in its text, float64."""
        check_tokens(texts, self.vocabulary, self.symbols)
        p_S = np.full(len(texts.token_S), 1 / self.vocabulary)
        number_S = np.zeros(len(p_S), np.int64)
        for length, order in enumerate(self.orders, start=1):
            key_S, inside_S = self.keys(texts, number_S, length)
            context_S = np.where(inside_S, key_S // self.symbols, 0)
            at_S = np.minimum(np.searchsorted(order.key_G, key_S), len(order.key_G) - 1)
            known_S = inside_S & (order.key_G[at_S] == key_S)
            count_S = np.where(known_S, order.count_G[at_S], 0)
            total_S = order.total_C[context_S]
            told_S = inside_S & (total_S > 0)
            kept_S = np.maximum(count_S - order.discount_4[np.minimum(count_S, 3)], 0)
            share_S = np.divide(kept_S, total_S, out=np.zeros_like(p_S), where=told_S)
            p_S = np.where(told_S, share_S + order.gamma_C[context_S] * p_S, p_S)
            number_S = np.where(known_S, at_S, -1)
        return p_S[texts.predicted_S]

    def next_token(self, context: Sequence[int]) -> np.ndarray:
        """p of each token after a context, float64 [V]: their sum is 1."""
        p_V = np.full(self.vocabulary, 1 / self.vocabulary)
        numbers = [0]  # of the n-grams that end the context: of no token, of one, …
        for length, order in enumerate(self.orders, start=1):
            if len(numbers) < length:
                break
            context_number = numbers[-1]
            begin, end = np.searchsorted(
                order.key_G, [context_number * self.symbols, (context_number + 1) * self.symbols]
            )
            if total := order.total_C[context_number]:
                p_V = p_V * order.gamma_C[context_number]
                count = order.count_G[begin:end]
                share = np.maximum(count - order.discount_4[np.minimum(count, 3)], 0) / total
                token = order.key_G[begin:end] - context_number * self.symbols
                p_V[token[count > 0]] += share[count > 0]
            if length <= len(context) and (number := self.number(context[len(context) - length :])) is not None:
                numbers.append(number)
        return p_V

    def number(self, gram: Sequence[int]) -> int | None:
        """The number of an n-gram among those of its length; None where it was never seen."""
        number = 0
        for token, order in zip(gram, self.orders, strict=False):
            key = number * self.symbols + token
            at = int(np.searchsorted(order.key_G, key))
            if at == len(order.key_G) or order.key_G[at] != key:
                return None
            number = at
        return number

    @property
    def grams(self) -> int:
        """How many n-grams the model keeps, of all orders: its parameters."""
        return sum(int((order.count_G > 0).sum()) for order in self.orders)


def discounts_of(count_G: np.ndarray) -> tuple[float, float, float] | None:
    """D₁, D₂ and D₃ of an order's adjusted counts (Chen and Goodman 1999, eq. 26).

    None where the formula has no answer (no n-gram with a count of 1, 2 or 3) or one that is no discount (below 0, or above the
    count): so it is of few n-grams, or of counts that are no text's.
    """
    n = [int((count_G == count).sum()) for count in range(5)]
    if not (n[1] and n[2] and n[3]):
        return None
    y = n[1] / (n[1] + 2 * n[2])
    found = [count - (count + 1) * y * n[count + 1] / n[count] for count in (1, 2, 3)]
    return (found[0], found[1], found[2]) if all(0 <= d <= count for count, d in enumerate(found, start=1)) else None


def check_tokens(texts: Texts, vocabulary: int, symbols: int) -> None:
    """Raises UserError where a token is outside of the vocabulary, or where none is predicted."""
    if not texts.predicted_S.any():
        raise UserError('texts: no token of them is predicted; give more text')
    for token_S, most, what in (
        (texts.token_S, symbols, 'token'),
        (texts.token_S[texts.predicted_S], vocabulary, 'predicted token'),
    ):
        if token_S.min() < 0 or token_S.max() >= most:
            wrong = int(token_S.min() if token_S.min() < 0 else token_S.max())
            raise UserError(f'texts: {what} {wrong} is outside of 0 to {most - 1}')
