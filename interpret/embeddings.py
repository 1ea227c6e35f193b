"""Word vectors as an instrument: nearest neighbours, and analogies by the field's standard protocol.

Everything here takes a table of vectors and the words of its rows, wherever they come from: a model's own table, the
activations of a layer (word_vectors.py), word2vec.

Letters: V words, D model, Q questions, U different words of some questions, W the four words of a question.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from weft.interpret.word_files import Section
from weft.runtime.errors import UserError, shown

METHODS = ('3CosAdd', '3CosMul')
EPSILON = 0.001  # of 3CosMul, as in the paper: keeps the quotient finite
CHUNK = 64  # questions answered at once: their cosines with 100,000 words take 80 MB


class Neighbour(NamedTuple):
    """A word, and the cosine of its vector with the one that was asked for."""

    word: str
    cosine: float


class SectionScore(NamedTuple):
    """How a section of questions was answered."""

    name: str
    asked: int
    skipped: int  # questions with a word that the vocabulary lacks
    right: dict[str, int]  # of those asked, by method

    def accuracy(self, method: str) -> float | None:
        """The share of right answers; None where nothing was asked."""
        return self.right[method] / self.asked if self.asked else None


class Answer(NamedTuple):
    """What each method answers to a question that was asked."""

    section: str
    question: tuple[str, ...]  # its four words, as in the file
    answers: dict[str, str]  # by method


class Analogies(NamedTuple):
    """Scores section by section, every answer, and the words that the vocabulary lacks, in the order of the questions."""

    sections: list[SectionScore]
    answers: list[Answer]
    missing: list[str]

    @property
    def total(self) -> SectionScore:
        """All questions, each counting once: not the mean over sections."""
        right = {method: sum(one.right[method] for one in self.sections) for method in METHODS}
        asked, skipped = sum(one.asked for one in self.sections), sum(one.skipped for one in self.sections)
        return SectionScore('total', asked, skipped, right)


def unit(x_VD: np.ndarray) -> np.ndarray:
    """The vectors at length 1, float32 [V, D], so that their products are cosines; a vector of zeros stays one."""
    x_VD = np.asarray(x_VD, np.float32)
    return x_VD / np.maximum(np.linalg.norm(x_VD, axis=-1, keepdims=True), 1e-12)


def neighbours(
    x_VD: np.ndarray, words: Sequence[str], y_D: np.ndarray, count: int = 10, left_out: Collection[str] = ()
) -> list[Neighbour]:
    """The words whose vectors have the largest cosines with y, the largest first; of equal ones the earlier word first."""
    assert len(words) == len(x_VD), 'a word for each vector'
    cosine_V = unit(x_VD) @ unit(y_D[None])[0]
    found = list[Neighbour]()
    for i in np.argsort(-cosine_V, kind='stable'):
        if len(found) == count:
            break
        if words[i] not in left_out:
            found.append(Neighbour(words[i], float(cosine_V[i])))
    return found


def solve_analogies(
    x_VD: np.ndarray, words: Sequence[str], sections: Sequence[Section], match_case: bool = False
) -> Analogies:
    """Answers questions "a is to b as c is to …" with the best of all words but a, b and c.

    With unit vectors, 3CosAdd (Mikolov et al. 2013, arXiv:1301.3781) takes the word d with the largest
    cos(d, b) - cos(d, a) + cos(d, c); 3CosMul (Levy and Goldberg 2014, "Linguistic Regularities in Sparse and Explicit Word
    Representations") that with the largest cos(d, b) cos(d, c) / (cos(d, a) + 0.001), its cosines shifted to
    between 0 and 1: (cos + 1) / 2. A question is skipped where the vocabulary lacks one of its four words.

    Args:
        x_VD: a vector for each word.
        words: all different, the most frequent first: of equal scores the first wins.
        sections: each item four words (word_files.read_questions).
        match_case: words are told apart by upper and lower case, too. Otherwise, as in word2vec's own evaluation, a word of a
            question that the vocabulary lacks as written is looked up in any case, the most frequent first; the words that
            differ from a, b or c in case alone are left out with them; and an answer in another case is right.

    Raises UserError where no question can be asked.
    """
    assert len(words) == len(x_VD) == len(set(words)), 'a word for each vector, each once'
    row_of = {word: row for row, word in enumerate(words)}
    folded: dict[str, int] = {}
    for row, word in enumerate(words):
        folded.setdefault(word if match_case else word.casefold(), row)
    # Words with the same number are one word to the protocol.
    kind_V = np.array([folded[word if match_case else word.casefold()] for word in words])
    cosine = unit(x_VD)
    missing: dict[str, None] = {}
    scores, answers = list[SectionScore](), list[Answer]()
    for section in sections:
        asked, rows = list[tuple[str, ...]](), list[list[int]]()
        for question in section.items:
            found = [row_of.get(word, folded.get(word if match_case else word.casefold())) for word in question]
            missing |= {word: None for word, row in zip(question, found, strict=True) if row is None}
            known = [row for row in found if row is not None]
            if len(known) == len(question):
                asked.append(question)
                rows.append(known)
        right = dict.fromkeys(METHODS, 0)
        for begin in range(0, len(asked), CHUNK):
            row_QW = np.array(rows[begin : begin + CHUNK])
            chosen = answer_chunk(cosine, kind_V, row_QW[:, :3])
            for method, chosen_Q in chosen.items():
                right[method] += int((kind_V[chosen_Q] == kind_V[row_QW[:, 3]]).sum())
            for number, question in enumerate(asked[begin : begin + CHUNK]):
                said = {method: words[chosen_Q[number]] for method, chosen_Q in chosen.items()}
                answers.append(Answer(section.name, question, said))
        scores.append(SectionScore(section.name, len(asked), len(section.items) - len(asked), right))
    if not answers:
        count, some = sum(len(section.items) for section in sections), ', '.join(map(shown, list(missing)[:5]))
        raise UserError(f'none of the {count} questions can be asked: the vocabulary lacks {some or "all words"}')
    return Analogies(scores, answers, list(missing))


def answer_chunk(x_VD: np.ndarray, kind_V: np.ndarray, row_QW: np.ndarray) -> dict[str, np.ndarray]:
    """By method the row [Q] of the best word for each question's rows a, b, c; x is of unit vectors."""
    used_U, place_QW = np.unique(row_QW, return_inverse=True)
    cosine_UV = x_VD[used_U] @ x_VD.T
    a_Q, b_Q, c_Q = place_QW.reshape(row_QW.shape).T
    out_QV = (kind_V[None, None] == kind_V[row_QW][..., None]).any(1)
    add_QV = cosine_UV[b_Q] - cosine_UV[a_Q] + cosine_UV[c_Q]
    shifted_UV = (cosine_UV + 1) / 2
    multiply_QV = shifted_UV[b_Q] * shifted_UV[c_Q] / (shifted_UV[a_Q] + EPSILON)
    scores = zip(METHODS, (add_QV, multiply_QV), strict=True)
    return {method: np.where(out_QV, -np.inf, score_QV).argmax(1) for method, score_QV in scores}
