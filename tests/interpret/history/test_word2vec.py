"""word2vec: planted relations are found, pairs are those of the window, and mistakes."""

import numpy as np
import pytest

from weft.interpret.history.word2vec import SkipGram, analogies, nearest, neighbours, planted, train, unit
from weft.runtime.errors import UserError


@pytest.fixture(scope='module')
def learnt() -> tuple[np.ndarray, np.ndarray]:
    texts, question_N4, vocabulary = planted(rows=8, columns=3, sentences=3000)
    config = SkipGram(vocabulary=vocabulary, dim=24, window=4, subsample=0, epochs=3, pairs=256, learning_rate=2e-2)
    return train(config, texts), question_N4


def test_analogies_with_planted_relations_are_answered(learnt):
    x_VD, question_N4 = learnt
    share = (analogies(x_VD, question_N4) == question_N4[:, 3]).mean()
    assert share >= 0.9, share
    shuffled_VD = np.random.default_rng(0).permutation(x_VD)
    assert (analogies(shuffled_VD, question_N4) == question_N4[:, 3]).mean() < 0.3


def test_the_answer_is_none_of_the_question_s_words(learnt):
    x_VD, question_N4 = learnt
    answer_N = analogies(x_VD, question_N4)
    assert not (answer_N[:, None] == question_N4[:, :3]).any()


def test_analogies_are_those_of_vectors_that_add_up():
    x_VD = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1], [5, 5, -5]], float)
    x_VD = unit(x_VD)
    assert analogies(x_VD, np.array([[0, 1, 2, 3]])).tolist() == [3]
    assert [word for word, _ in nearest(x_VD, 0, 2, np.arange(5))] == [1, 2]
    assert nearest(x_VD, 0, 1, np.array([0, 3])) == [(3, pytest.approx(0.5))]


def test_neighbours_stand_in_the_window_and_the_text():
    texts = [np.arange(0, 5), np.arange(5, 12)]
    config = SkipGram(vocabulary=12, window=2, subsample=0)
    pair_P2 = np.concatenate([neighbours(config, texts, np.ones(12), np.random.default_rng(s)) for s in range(40)])
    found = {tuple(pair) for pair in pair_P2.tolist()}
    text_of = lambda word: word >= 5
    wanted = {(a, b) for a in range(12) for b in range(12) if 0 < abs(a - b) <= 2 and text_of(a) == text_of(b)}
    assert found == wanted
    beside = np.abs(pair_P2[:, 0] - pair_P2[:, 1])
    assert (beside == 2).sum() < 0.7 * (beside == 1).sum()  # a reach of 1 is as likely as one of 2


def test_frequent_words_are_left_out():
    count_V = np.array([990, 10])
    texts = [np.repeat([0, 1], [990, 10])]
    config = SkipGram(vocabulary=2, window=1, subsample=0.01)
    pair_P2 = neighbours(config, texts, count_V, np.random.default_rng(0))
    # √(0.01 / 0.99) = 0.1005 of the first word stay, and all of the second.
    assert (pair_P2[:, 0] == 1).sum() in range(18, 21)
    assert 150 < (pair_P2[:, 0] == 0).sum() < 250


def test_mistakes():
    with pytest.raises(UserError, match=r'^word2vec: window is 0: it must be at least 1$'):
        SkipGram(vocabulary=3, window=0)
    with pytest.raises(UserError, match=r'^word2vec: 0 pairs of neighbours, and a step takes 1024; give more text$'):
        train(SkipGram(vocabulary=3), [np.array([1])])
    with pytest.raises(UserError, match=r'^word2vec: word 3 is outside of 0 to 2$'):
        train(SkipGram(vocabulary=3), [np.array([1, 3])])
