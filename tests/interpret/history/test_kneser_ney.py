"""Modified Kneser–Ney: a published worked example, KenLM's own figures, fractions from the definition, sums of exactly 1."""

import itertools
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from weft.interpret.history.kneser_ney import FALLBACK, KneserNey, Texts, discounts_of
from weft.runtime.errors import UserError

# The corpus of the worked example in KenLM's issue 405 (github.com/kpu/kenlm/issues/405).
CORPUS = [
    'I went to',
    'I go to',
    'You went to',
    'You go to',
    'Joe went to',
    'Joe go to',
    'Anna went ski',
    'Anna went ski',
]
# What the issue shows, log₁₀. KenLM counts the last unigram that it meets (`ski`) by its occurrences, as the issue explains,
# and so takes other discounts off unigrams than the formula has: those are given here.
KENLM_DISCOUNTS = ((0.4, 1.6, 1.4), (0.3, 61 / 35, 3.0))
PUBLISHED = {
    '<unk>': -1.30103,
    '</s>': -1.1249387,
    'I': -1.0579919,
    'went': -0.6726411,
    'to': -1.1249387,
    'go': -0.82390875,
    'You': -1.0579919,
    'Joe': -1.0579919,
    'Anna': -1.0579919,
    'ski': -1.0579919,
    'to </s>': -0.26962152,
    'ski </s>': -0.7123581,
    '<s> I': -0.9649993,
    'I went': -0.383262,
    'You went': -0.383262,
    'Joe went': -0.383262,
    'Anna went': -0.50341624,
    'went to': -1.1478686,
    'go to': -1.1249387,
    'I go': -0.4034029,
    'You go': -0.4034029,
    'Joe go': -0.4034029,
    '<s> You': -0.9649993,
    '<s> Joe': -0.9649993,
    '<s> Anna': -0.9649993,
    'went ski': -0.87150836,
}
# What lmplz (KenLM at commit 4cb443e, -o 2) writes when `Anna went ski` comes first: the last unigram that it meets is then one
# that occurs as often as different words stand before it, and all discounts are those of the formula.
LMPLZ = {
    '<unk>': -1.3802112,
    '</s>': -1.0280287,
    'Anna': -1.1583625,
    'went': -0.61429447,
    'ski': -1.1583625,
    'I': -1.1583625,
    'to': -1.0280287,
    'go': -0.7433891,
    'ski </s>': -0.6772271,
    'to </s>': -0.26211193,
    '<s> Anna': -1.0331136,
    'Anna went': -0.4680398,
    'I went': -0.37374517,
    'went ski': -0.93069607,
    '<s> I': -1.0331136,
    'went to': -1.0509588,
    'go to': -1.0280287,
    'I go': -0.3934395,
}


def words_of(lines: list[str]) -> dict[str, int]:
    """Numbers of the words; `<s>` is the mark that begins texts, and the last."""
    found = {'<unk>': 0, '</s>': 1}
    for word in ' '.join(lines).split():
        found.setdefault(word, len(found))
    return found | {'<s>': len(found)}


def model_of(lines: list[str], order: int, discounts=None) -> tuple[KneserNey, dict[str, int]]:
    words = words_of(lines)
    texts = [[words['<s>'], *(words[word] for word in line.split()), words['</s>']] for line in lines]
    return KneserNey(Texts.of(texts), order, words['<s>'], words['<s>'] + 1, discounts), words


@pytest.mark.parametrize(('wanted', 'discounts'), [(PUBLISHED, KENLM_DISCOUNTS), (LMPLZ, None)], ids=['issue', 'lmplz'])
def test_a_published_worked_example(wanted, discounts):
    model, words = model_of(CORPUS, 2, discounts)
    for gram, log10 in wanted.items():
        *context, word = (words[word] for word in gram.split())
        assert np.log10(model.next_token(context)[word]) == pytest.approx(log10, abs=2e-7), gram


def test_discounts_are_those_of_the_formula():
    model, _ = model_of(CORPUS, 2)
    # Adjusted counts of unigrams: Anna, I, You, Joe, ski 1; to, </s> 2; go 3; went 4: n₁ = 5, n₂ = 2, n₃ = 1, n₄ = 1.
    np.testing.assert_allclose(model.orders[0].discount_4, [0, 1 - 2 * 5 / 9 * 2 / 5, 2 - 3 * 5 / 9 / 2, 3 - 4 * 5 / 9])
    np.testing.assert_allclose(model.orders[1].discount_4, [0, *KENLM_DISCOUNTS[1]])
    assert not any(order.fallback for order in model.orders)
    assert discounts_of(np.array([1, 1, 2])) is None  # no 3
    assert discounts_of(np.repeat([1, 2, 3], [5, 1, 9])) is None  # D₂ would be below 0
    assert discounts_of(np.repeat([0, 1, 2, 3, 4], [7, 8, 4, 2, 1])) == (0.5, 1.25, 2.0)


def by_definition(texts: list[list[int]], order: int, vocabulary: int, discounts: list[list[Fraction]]):
    """p(word | context) in fractions, each count and sum looked up in lists of n-grams."""
    seen = [
        Counter(tuple(text[at - n : at]) for text in texts for at in range(n, len(text) + 1) if at > 1)
        for n in range(order + 1)
    ]
    before = [defaultdict(set) for _ in range(order + 1)]
    for longer in seen[2:]:
        for gram in longer:
            before[len(gram) - 1][gram[1:]].add(gram[0])

    def count(gram: tuple[int, ...]) -> int:
        if len(gram) < order and before[len(gram)][gram]:
            return len(before[len(gram)][gram])
        return seen[len(gram)][gram]

    def p(word: int, context: tuple[int, ...]) -> Fraction:
        context = context[max(0, len(context) - order + 1) :]
        shorter = p(word, context[1:]) if context else Fraction(1, vocabulary)
        counts = [count((*context, other)) for other in range(vocabulary)]
        if not sum(counts):
            return shorter
        taken = [discounts[len(context)][min(c, 3) - 1] if c else Fraction(0) for c in counts]
        return (max(counts[word] - taken[word], Fraction(0)) + sum(taken) * shorter) / sum(counts)

    return p


def test_probabilities_are_the_definition_s_fractions():
    random = np.random.default_rng(0)
    vocabulary, order = 5, 3
    texts = [[vocabulary, *random.integers(0, vocabulary, random.integers(1, 9)).tolist()] for _ in range(12)]
    discounts = [[Fraction(k + n, 4) for k in (1, 2, 4)] for n in range(order)]
    model = KneserNey(
        Texts.of(texts), order, vocabulary, vocabulary + 1, [[float(d) for d in row] for row in discounts]
    )
    exact = by_definition(texts, order, vocabulary, discounts)
    contexts = [c for n in range(4) for c in itertools.product(range(vocabulary), repeat=n)]
    contexts += [(vocabulary,), *((vocabulary, word) for word in range(vocabulary))]
    for context in contexts:
        wanted = [exact(word, context) for word in range(vocabulary)]
        assert sum(wanted) == 1
        np.testing.assert_allclose(model.next_token(context), np.array(wanted, float), rtol=1e-13)


@pytest.fixture(scope='module')
def large() -> tuple[Texts, KneserNey]:
    token = np.random.default_rng(1).zipf(1.4, 20_000) % 60
    texts = Texts.of(token.reshape(-1, 50).tolist())
    return texts, KneserNey(texts, 5, 64)


def test_what_follows_any_context_adds_up_to_1(large):
    _, model = large
    random = np.random.default_rng(2)
    for _ in range(200):
        context = random.integers(0, 64, random.integers(0, 7)).tolist()  # 60 to 63 were never seen
        p_V = model.next_token(context)
        assert p_V.min() > 0
        assert p_V.sum() == pytest.approx(1, abs=1e-14)


def test_probabilities_of_texts_are_those_of_next_token(large):
    _, model = large
    texts = [[3, 1, 4, 1, 5, 9, 2, 6], [63, 1, 1], [7, 2]]
    found = model.probabilities(Texts.of(texts))
    one_by_one = [model.next_token(text[:at])[text[at]] for text in texts for at in range(1, len(text))]
    np.testing.assert_allclose(found, one_by_one, rtol=1e-13)


def test_text_that_repeats_is_predicted_the_better_the_longer_the_n_grams(large):
    texts, _ = large
    cycle = Texts.of([[0, 1, 2, 0, 2, 1] * 5 for _ in range(20)])
    p = [KneserNey(cycle, order, 3, discounts=[FALLBACK] * order).probabilities(cycle).mean() for order in (1, 2, 3)]
    assert p[0] < p[1] < p[2]
    assert KneserNey(texts, 2, 64).grams < KneserNey(texts, 3, 64).grams


def test_what_is_not_predicted_counts_as_context_alone():
    # A mark (3), then a token that nothing is asked of.
    texts = Texts.of([[3, 0, 1, 2]] * 4, given=2)
    model = KneserNey(texts, 2, 3, 4, [FALLBACK] * 2)
    assert len(model.probabilities(texts)) == 8
    assert model.grams == 2 + 2  # 1 and 2, 0 1 and 1 2
    np.testing.assert_allclose(model.next_token([3]), model.next_token([]))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (([[0, 1]], 0, 2), 'order is 0: n-grams have 1 to 8 tokens; nearest: 1'),
        (([[0, 1]], 9, 2), 'order is 9: n-grams have 1 to 8 tokens; nearest: 8'),
        (([[0, 2]], 2, 2), 'texts: token 2 is outside of 0 to 1'),
        (([[0, -1]], 2, 2), 'texts: token -1 is outside of 0 to 1'),
        (([[0, 2]], 2, 2, 3), 'texts: predicted token 2 is outside of 0 to 1'),
        (([[0], [1]], 2, 2), 'texts: no token of them is predicted; give more text'),
    ],
)
def test_mistakes(arguments, message):
    texts, *rest = arguments
    with pytest.raises(UserError) as caught:
        KneserNey(Texts.of(texts), *rest)
    assert str(caught.value) == message
