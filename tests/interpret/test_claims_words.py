"""The sentences of claims of behaviour: balanced, and what is looked for stands where it is said to."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.models import filled, on
from weft.interpret.claims import coreference, grammar, heads, words
from weft.model.config import model_of
from weft.sharding.mesh import MeshConfig


class Words:
    """A tokenizer whose tokens are words; token 0 begins a text, and its first word is another than inside it, as in BPE."""

    prefix = (0,)
    bos = 0

    def __init__(self) -> None:
        self.known: dict[str, int] = {'': 0}

    def encode_batch(self, texts):
        """One id a word."""
        rows = []
        for text in texts:
            parts = text.replace(',', ' ,').split()
            marked = [part if at == 0 and not text.startswith(' ') else f' {part}' for at, part in enumerate(parts)]
            rows.append([self.known.setdefault(part, len(self.known)) for part in marked])
        return rows

    def starts_twice(self, text):
        """Nothing does."""
        return False

    def check(self, ids):
        """All ids are known."""


@pytest.fixture
def run():
    return SimpleNamespace(model=None, tokenizer=Words())


def test_subject_and_attractor_are_of_each_number_equally_often():
    texts, right, wrong = grammar.choices(list(words.NOUNS), np.random.default_rng(0))
    plural = {many for _, many in words.NOUNS}
    cases = [(text.split()[1] in plural, text.split()[-1] in plural) for text in texts]
    assert {case: cases.count(case) for case in set(cases)} == dict.fromkeys(set(cases), grammar.PER_CASE)
    assert len(set(cases)) == 4
    assert right == [('is', 'are')[subject] for subject, _ in cases]
    assert wrong == [('are', 'is')[subject] for subject, _ in cases]
    assert all(text.split()[1].rstrip('s') != text.split()[-1].rstrip('s') for text in texts)


def test_who_is_meant_stands_where_it_is_said_in_both_orders(run):
    names = [list(words.WOMEN[:3]), list(words.MEN[:3])]
    texts, at, beside = coreference.meetings(run, names)
    name_of = {number: word.strip() for word, number in run.tokenizer.known.items()}
    for text, place, other in zip(texts, at, beside, strict=True):
        row = [0, *run.tokenizer.encode_batch([text])[0]]
        women = text.split()[-1] == 'she'
        assert name_of[row[place]] in names[0 if women else 1], text
        assert name_of[row[other]] in names[1 if women else 0], text
    first = np.array(at) < np.array(beside)
    assert first.mean() == 0.5


def test_words_stand_once_and_kinds_are_as_many():
    kinds = [one.split() for one in words.KINDS.values()]
    assert {len(one) for one in kinds} == {20}
    assert len({word for one in kinds for word in one}) == 160
    assert len(set(words.BOTH)) == len(words.BOTH)
    assert not set(words.WOMEN) & set(words.MEN)


def test_random_heads_are_of_the_same_layers_and_others():
    best = [(0, 1), (0, 2), (3, 0)]
    for seed in range(20):
        drawn = heads.others(best, 4, np.random.default_rng(seed))
        assert [layer for layer, _ in drawn] == [0, 0, 3]
        assert not set(drawn) & set(best)


def test_ablation_of_heads_that_decide_is_told_from_that_of_others(run):
    texts, right, wrong = grammar.choices(list(words.NOUNS), np.random.default_rng(0))
    some = heads.Choices(texts[::8], right[::8], wrong[::8])
    for text in texts:
        run.tokenizer.encode_batch([text])
    run.tokenizer.encode_batch([' is', ' are'])
    config = model_of(
        {'vocabulary': len(run.tokenizer.known), 'layers': 3, 'model_dim': 16, 'attention.heads': 4, 'mlp.dim': 8}
    )
    with on(MeshConfig()):
        run.model = filled(config, gain=0.3)
        found = heads.try_heads(run, some, some, 0, lambda line: None)
    assert found['sentences'] == 8
    assert len(set(found['heads'])) == heads.BEST
    assert found['lost'].value > found['lost_to_random'].high > found['lost_to_random'].low
