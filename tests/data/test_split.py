"""About the share that is asked for is held out, whatever the text looks like, or one line says that it cannot be."""

import json
import random
import re
from pathlib import Path

import pytest

from weft.data.config import DataConfig
from weft.data.prepare import prepare
from weft.data.split import LEAST, MOST, bytes_after, cut
from weft.runtime.errors import UserError

DRAW = random.Random(0)
WORDS = [''.join(DRAW.choice('abcdefghij') for _ in range(DRAW.randint(2, 7))) for _ in range(300)]


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return ' '.join(draw.choice(WORDS) for _ in range(count))


def lines(*texts: str) -> str:
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


CORPORA = {
    'short lines and a long one': {'a.txt': '\n'.join(words(20, i) for i in range(10)) + '\n' + words(4000)},
    'a title and one line': {'a.txt': 'Title\n' + words(3000)},
    'a long line and a short one': {'a.txt': words(3000) + '\nx\n'},
    'one line': {'a.txt': words(3000)},
    'a word without a space': {'a.txt': 'ab' * 3000},
    'titles and bodies': {'a.jsonl': lines(*(words(60, i) + '\n' + words(1500, i) for i in range(3)))},
    'carriage returns': {'a.txt': '\r\n'.join(words(20, i) for i in range(100))},
    'only carriage returns': {'a.txt': '\r'.join(words(20, i) for i in range(100))},
    'one giant document': {'a.jsonl': lines(words(9000), *(words(20, i) for i in range(50)))},
    'a giant and few small ones': {'a.jsonl': lines(words(9000), *(words(2, i) for i in range(50)))},
    'documents all alike': {'a.jsonl': lines(*[words(20)] * 500)},
    'empty documents too': {'a.jsonl': lines(*(words(200, i) if i % 2 else '' for i in range(6)))},
    'wide letters at the end': {'a.txt': words(2000) + '文' * 3000},
    'wide letters at the beginning': {'a.txt': '文' * 3000 + words(3000)},
    'many short documents': {'a.jsonl': lines(*(words(2, i) for i in range(1500)))},
}


@pytest.mark.parametrize(
    ('name', 'share'),
    [
        *((name, 0.05) for name in CORPORA),
        ('short lines and a long one', 0.01),
        ('a title and one line', 0.5),
        ('one line', 0.5),
    ],
)
def test_the_share_that_is_asked_for_is_held_out(tmp_path: Path, name: str, share: float) -> None:
    folder = tmp_path / 'text'
    folder.mkdir()
    for file, content in CORPORA[name].items():
        (folder / file).write_bytes(content.encode())
    said: list[str] = []
    config = DataConfig(source=str(folder), vocabulary=300, validation_share=share)
    dataset = prepare(config, tmp_path / 'run', 32, said.append)
    train, validation = dataset.train_bytes(), dataset.validation_bytes()
    found = len(validation) / len(train + validation)
    assert LEAST * share <= found <= MOST * share
    assert dataset.facts['split']['share'] == pytest.approx(found)
    assert any(f'{found:.1%} of the bytes held out' in line for line in said)
    assert len(train + validation) == dataset.facts['bytes']


def test_a_cut_stands_at_a_nice_place_where_one_is_near() -> None:
    even = '\n'.join(['x' * 9] * 100)
    assert cut(even, 0.05) == 940  # the last line end before 95 %
    assert cut('x' * 500 + '\n' + 'x' * 455 + '\n' + 'x' * 43, 0.05) == 957  # the one after it
    assert cut('x' * 500 + '\n' + 'x' * 440 + ' ' + 'x' * 58, 0.05) == 942  # a space
    assert cut('ab\n' + 'x' * 997, 0.05) == 950
    assert cut('ab\n' + 'x' * 945 + '\r\n' + 'x' * 50, 0.5) == 500
    assert cut('a', 0.05) == 1
    assert cut('', 0.05) == 0
    assert cut('a' * 30, 0.05) == 28


@pytest.mark.parametrize('seed', range(40))
def test_no_cut_is_out_of_bounds_where_there_are_enough_characters(seed: int) -> None:
    draw = random.Random(seed)
    letters = [
        draw.choice(['a', ' ', '\n', '\r\n', 'é', '文', '😀', 'word ', 'x' * draw.randint(1, 300)]) for _ in range(300)
    ]
    text, share = 'y' * 200 + ''.join(letters), draw.choice([0.03, 0.05, 0.1, 0.5])
    assert LEAST * share <= bytes_after(text, cut(text, share)) / len(text.encode()) <= MOST * share


REFUSED = {
    'documents of a letter': (lines(*'abc' * 500), 0.05, '0 of 1,500 bytes can be held out'),
    'hardly any share': ('\n'.join(words(20, i) for i in range(30)), 1e-9, 'data.validation_share=1e-09 asks for 0'),
    'documents of two letters': (lines(*('ab', 'cd', 'ef') * 500), 0.2, '0 of 3,000 bytes'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_split_so_is_refused(tmp_path: Path, name: str) -> None:
    content, share, message = REFUSED[name]
    (tmp_path / 'a.jsonl' if content.startswith('{') else tmp_path / 'a.txt').write_text(content)
    config = DataConfig(source=str(tmp_path / 'a.*'), vocabulary=300, validation_share=share)
    with pytest.raises(UserError, match=message) as caught:
        prepare(config, tmp_path / 'run', 32, print)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_pairs_are_held_out_by_the_share_too(tmp_path: Path) -> None:
    config = DataConfig(source=str(tmp_path / 'a.tsv'), vocabulary=300)
    (tmp_path / 'a.tsv').write_text('\n'.join(f'{words(4, i)}\t{words(4, i)}' for i in range(300)))
    said: list[str] = []
    prepare(config, tmp_path / 'run', 64, said.append, pairs=True)
    share = float(next(line for line in said if 'held out' in line).split('% of')[0].split()[-1])
    assert 2.5 <= share <= 7.5
    (tmp_path / 'a.tsv').write_text('a b c\td e f\n' * 300)
    with pytest.raises(UserError, match='0 of 3,000 bytes can be held out'):
        prepare(config, tmp_path / 'other', 64, print, pairs=True)


def test_a_share_that_is_suggested_works(tmp_path: Path) -> None:
    suggested = 0
    for seed in range(40):
        draw = random.Random(seed)
        source = tmp_path / f'{seed}.{draw.choice(["tsv", "jsonl"])}'
        if source.suffix == '.tsv':
            sizes = [draw.choice([1, 3, 200, 200]) for _ in range(draw.randint(2, 12))]
            source.write_text(''.join(f'{words(size, i + 1000 * seed)}\tx\n' for i, size in enumerate(sizes)))
        else:
            letters = [draw.choice(['ab', '文', 'a']) * draw.choice([1, 2, 9]) for _ in range(draw.randint(2, 30))]
            source.write_text(lines(*letters))

        def refused(share: float, source: Path = source) -> str:
            config = DataConfig(source=str(source), vocabulary=300, validation_share=share)
            try:
                prepare(config, tmp_path / f'run {share}', 64, lambda line: None, pairs=source.suffix == '.tsv')
            except UserError as error:
                return str(error)
            return ''

        if found := re.search(r'or data\.validation_share=(\S+), which they allow', refused(draw.choice([0.03, 0.1]))):
            suggested += 1
            assert 'can be held out' not in refused(float(found[1])), (seed, found)
    assert suggested >= 8, suggested
