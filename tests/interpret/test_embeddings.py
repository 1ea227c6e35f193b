"""Neighbours and analogies against NumPy word by word, planted answers, and files of words.

Letters: V words, D model.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from weft.interpret.embeddings import CHUNK, METHODS, neighbours, solve_analogies, unit
from weft.interpret.word_files import Section, read_questions, read_words
from weft.runtime.errors import UserError


def random_words(count: int, dim: int = 8) -> tuple[np.ndarray, list[str]]:
    return np.random.default_rng(0).standard_normal((count, dim)), [f'w{i}' for i in range(count)]


def test_neighbours_are_those_of_all_cosines():
    x_VD, words = random_words(50)
    x_VD[7] = 0  # has no direction: its cosine is 0
    y_D = x_VD[3]
    cosine_V = np.array([x @ y_D / max(np.linalg.norm(x) * np.linalg.norm(y_D), 1e-12) for x in x_VD])
    order = [i for i in np.argsort(-cosine_V, kind='stable') if i != 3]
    found = neighbours(x_VD, words, y_D, 12, {'w3'})
    assert [one.word for one in found] == [words[i] for i in order[:12]]
    np.testing.assert_allclose([one.cosine for one in found], cosine_V[order[:12]], atol=1e-6)
    assert len(neighbours(x_VD, words, y_D, 99, {'w3'})) == 49
    assert next(one.cosine for one in neighbours(x_VD, words, y_D, 50) if one.word == 'w7') == 0


def test_answers_are_those_of_every_word_tried():
    """Of more questions than are answered at once, the three words of each left out."""
    x_VD, words = random_words(40)
    r = np.random.default_rng(1)
    questions = [tuple(words[i] for i in r.choice(40, 4, replace=False)) for _ in range(2 * CHUNK + 3)]
    unit_VD = x_VD / np.linalg.norm(x_VD, axis=1, keepdims=True)
    expected, differ = [], 0
    for a, b, c, _ in questions:
        best: dict[str, tuple[float, str]] = {}
        for word, x_D in zip(words, unit_VD, strict=True):
            if word in (a, b, c):
                continue
            near_a, near_b, near_c = (float(x_D @ unit_VD[words.index(one)]) for one in (a, b, c))
            product = (near_b + 1) / 2 * ((near_c + 1) / 2) / ((near_a + 1) / 2 + 0.001)
            for method, score in zip(METHODS, (near_b - near_a + near_c, product), strict=True):
                best[method] = max(best.get(method, (-np.inf, '')), (score, word))
        expected.append({method: word for method, (_, word) in best.items()})
        differ += len(set(expected[-1].values())) > 1
    assert 5 < differ < len(questions) - 5, 'the methods agree on some and differ on others'
    right = {method: sum(one[method] == q[3] for one, q in zip(expected, questions, strict=True)) for method in METHODS}
    found = solve_analogies(x_VD, words, [Section('all', questions)])
    assert [one.answers for one in found.answers] == expected
    assert [one.question for one in found.answers] == questions
    assert found.sections[0] == ('all', len(questions), 0, right)


# With a, b, c at right angles: one word has nearly all of b and little of c, the other half of each.
AXES = np.eye(5)
PLANTED = {
    'a': AXES[0],
    'b': AXES[1],
    'c': AXES[2],
    'one-sided': 0.95 * AXES[1] + 0.1 * AXES[2] + (1 - 0.95**2 - 0.1**2) ** 0.5 * AXES[3],
    'balanced': 0.5 * AXES[1] + 0.5 * AXES[2] + 0.5**0.5 * AXES[4],
}


def test_the_two_methods_differ_where_one_term_outweighs_the_other():
    """3CosAdd: 0.95 + 0.1 > 0.5 + 0.5. 3CosMul: 0.975 · 0.55 < 0.75 · 0.75."""
    section = Section('planted', [('a', 'b', 'c', 'balanced'), ('a', 'b', 'c', 'one-sided')])
    found = solve_analogies(np.stack(list(PLANTED.values())), list(PLANTED), [section])
    assert [one.answers for one in found.answers] == [{'3CosAdd': 'one-sided', '3CosMul': 'balanced'}] * 2
    assert found.total.right == {'3CosAdd': 1, '3CosMul': 1}
    assert found.total.accuracy('3CosAdd') == 0.5


ROYAL = {  # royal, male, female, other
    'man': [0, 1, 0, 3],
    'woman': [0, 0, 1, 3],
    'King': [2, 0.5, 0, 0],
    'king': [2, 0.4, 0, 0],
    'apple': [0, 0.1, 0.1, -5],
    'Queen': [2, 0, 0.3, 1],
}


def test_question_words_are_left_out_and_case_is_ignored_as_in_word2vec():
    x_VD, words = np.array(list(ROYAL.values())), list(ROYAL)
    sections = [
        Section('royal', [('man', 'woman', 'king', 'queen'), ('man', 'woman', 'king', 'tsarina')]),
        Section('none', [('man', 'woman', 'duke', 'duchess')]),
    ]
    sum_D = unit(x_VD)[words.index('woman')] - unit(x_VD)[words.index('man')] + unit(x_VD)[words.index('king')]
    assert neighbours(x_VD, words, sum_D, 1)[0].word == 'king', 'the question itself is the nearest'
    found = solve_analogies(x_VD, words, sections)
    assert found.answers[0].answers == dict.fromkeys(METHODS, 'Queen'), '"King" is left out with "king"'
    assert [(one.name, one.asked, one.skipped, one.accuracy('3CosMul')) for one in found.sections] == [
        ('royal', 1, 1, 1.0),
        ('none', 0, 1, None),
    ]
    assert (found.total.asked, found.total.skipped, found.total.right) == (1, 2, {'3CosAdd': 1, '3CosMul': 1})
    assert found.missing == ['tsarina', 'duke', 'duchess']
    exactly = [Section('royal', [('man', 'woman', 'king', 'Queen')])]
    strict = solve_analogies(x_VD, words, exactly, match_case=True)
    assert strict.answers[0].answers['3CosAdd'] == 'King', '"King" is a word of its own'
    with pytest.raises(UserError, match='none of the 2 questions can be asked: the vocabulary lacks queen, tsarina'):
        solve_analogies(x_VD, words, sections[:1], match_case=True)


def written(folder: Path, text: str) -> str:
    (folder / 'words.txt').write_text(text, encoding='utf-8')
    return str(folder / 'words.txt')


QUESTIONS = """: capitals
Athens Greece Oslo Norway

:plural forms
car cars  dog dogs
: capitals
Rome Italy Oslo Norway
"""


def test_files_of_questions_and_of_words_are_read_by_section(tmp_path):
    path = written(tmp_path, QUESTIONS)
    capitals = [('Athens', 'Greece', 'Oslo', 'Norway'), ('Rome', 'Italy', 'Oslo', 'Norway')]
    plural = Section('plural forms', [('car', 'cars', 'dog', 'dogs')])
    assert read_questions('--analogies', path) == [Section('capitals', capitals), plural]
    assert read_questions('--analogies', path, ['plural forms']) == [plural]
    assert read_words('--words', path, ['plural forms']) == [
        Section('plural forms', [(one,) for one in plural.items[0]])
    ]
    path = written(tmp_path, 'one two\n: three\nfour')
    assert read_words('--words', path) == [Section('', [('one',), ('two',)]), Section('three', [('four',)])]


@pytest.mark.parametrize(
    ('text', 'wanted', 'told'),
    [
        ('a b c d\n', [], r'words.txt:1: a question before the first section; begin it with a line ": NAME"'),
        (': x\na b c d\n\na b c\n', [], r'words.txt:4: 3 words; a question has four'),
        (': x\na\n', [], r'words.txt:2: 1 word; a question has four'),
        (':\na b c d\n', [], r'words.txt:1: a section without a name'),
        (': empty\n', [], r'words.txt: has no questions'),
        ('', [], r'words.txt: has no questions'),
        (': plural\na b c d\n', ['plurals'], r"--section plurals: .* has no such section .*; did you mean 'plural'\?"),
        ('\x89PNG\r\n\x1a\n', [], r'words.txt: .*not'),
    ],
)
def test_mistakes_in_a_file_of_questions(tmp_path, text, wanted, told):
    path = written(tmp_path, text)
    if text.startswith('\x89'):
        Path(path).write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=told):
        read_questions('--analogies', path, wanted)


def test_there_is_no_such_file():
    with pytest.raises(UserError, match=re.escape('--words nowhere.txt: ')):
        read_words('--words', 'nowhere.txt')
