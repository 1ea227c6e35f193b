"""scripts/embeddings.py on a run whose tables are planted, and what it says to mistakes."""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.interpret.planted_tables import QUESTIONS, WORDS, planted_run
from tests.scripts.runs import refused, run
from weft.scripts import embeddings as script
from weft.sharding.mesh import MeshConfig

FILES = {
    'questions.txt': QUESTIONS + ': far\nman woman zebra giraffe\n',
    'words.txt': ': people\nman woman king\n: things\nriver bank zebra house\n',
    'empty.txt': '',
    'three.txt': ': x\none two three\n',
}


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('embeddings')
    planted_run(folder / 'runs' / 'planted', MeshConfig(tensor=2))
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding='utf-8')
    return folder


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Calls the script in this process: what it prints as JSON, and what it says on stderr."""
    monkeypatch.chdir(place)

    def call(*arguments: str) -> tuple[dict, str]:
        with mock.patch.object(sys, 'argv', ['embeddings.py', 'runs/planted', *arguments, '--json']):
            script.main()
        out, err = capsys.readouterr()
        return json.loads(out), err

    return call


def test_neighbours_in_both_tables_of_words_and_of_tokens(call):
    found, _ = call('--nearest', 'king', '--count', '1')
    assert [one['word'] for one in found['neighbours']] == ['queen']
    assert found['neighbours'][0]['cosine'] == pytest.approx(1 / 1.25**0.5, abs=1e-5)
    assert (found['vectors'], found['step'], found['word'], found['tokens']) == ('input table', 0, 'king', [' king'])
    found, err = call('--nearest', WORDS[4], '--table', 'output', '--count', '2')
    assert [one['word'] for one in found['neighbours']] == [WORDS[3], WORDS[5]], 'as the spiral has them'
    assert not err
    found, _ = call('--nearest', ' king', '--tokens', '--count', '1')
    assert found['neighbours'][0]['word'] == ' queen'
    found, _ = call('--nearest', 'bank', '--words', 'words.txt', '--section', 'things')
    assert {one['word'] for one in found['neighbours']} == {'river', 'house'}, 'zebra is not one token'
    found, _ = call('--nearest', 'zebra', '--words', 'words.txt', '--pieces', 'mean', '--centre')
    assert found['candidates'] == 6
    assert len(found['tokens']) > 1


def test_neighbours_behind_a_layer(call):
    found, err = call('--nearest', 'king', '--layer', '2', '--candidates', '20', '--text', 'a king the river')
    assert (found['vectors'], found['candidates'], err) == ('layer 2', 19, '')
    assert found['neighbours'][0]['cosine'] < 1
    alone, _ = call('--nearest', 'king', '--layer', '2', '--words', 'words.txt')
    assert {one['word'] for one in alone['neighbours']} == {'man', 'woman', 'river', 'bank', 'house', 'zebra'}


def test_analogies_by_section_with_what_was_skipped(call):
    found, err = call('--analogies', 'questions.txt')
    gender, far = found['sections']
    assert gender == {'name': 'gender', 'asked': 12, 'skipped': 0, '3CosAdd': 1.0, '3CosMul': 1.0}
    assert far == {'name': 'far', 'asked': 0, 'skipped': 1, '3CosAdd': None, '3CosMul': None}
    assert found['total'] == gender | {'name': 'total', 'skipped': 1}
    assert found['missing'] == ['zebra', 'giraffe']
    assert err == '1 questions skipped for 2 words that are not one token: zebra, giraffe\n'
    first = {'section': 'gender', 'words': ['man', 'woman', 'king', 'queen'], '3CosAdd': 'queen', '3CosMul': 'queen'}
    assert found['questions'][0] == first
    of_pieces, err = call('--analogies', 'questions.txt', '--pieces', 'mean', '--candidates', '3')
    assert (of_pieces['total']['skipped'], err) == (0, '')
    words = {word for line in FILES['questions.txt'].splitlines() if line[0] != ':' for word in line.split()}
    assert len(words) <= of_pieces['candidates'] <= len(words) + 3
    layer, _ = call('--analogies', 'questions.txt', '--section', 'gender', '--layer', '1', '--text', 'a {} the')
    assert layer['total']['asked'] == 12


def test_a_picture_in_the_colours_of_the_files_sections(call, place):
    found, err = call('--words', 'words.txt', '--out', 'words.png')
    assert (place / 'words.png').read_bytes()[:4] == b'\x89PNG'
    assert [(one['word'], one['group']) for one in found['words']] == [
        *((word, 'people') for word in ('man', 'woman', 'king')),
        *((word, 'things') for word in ('river', 'bank', 'house')),
    ]
    assert err == '1 words left out that are not one token: zebra\n'
    assert 0 < found['share'][1] <= found['share'][0] < 1
    found, _ = call('--out', 'words.png', '--candidates', '12')
    assert len(found['words']) == 12
    assert all(len(one['word']) >= 3 and one['group'] is None for one in found['words'])


def test_a_user_sees_results_on_stdout_and_one_line_for_a_mistake(place):
    done = run(place, 'embeddings', 'runs/planted', '--analogies', 'questions.txt')
    assert re.fullmatch(
        r'input table, step 0, \d+ candidates\n +asked  skipped  3CosAdd  3CosMul\ngender +12 +0 +100.0% +100.0%\n'
        r'far +0 +1 +– +–\ntotal +12 +1 +100.0% +100.0%\n',
        done.stdout,
    )
    assert done.stderr == '1 questions skipped for 2 words that are not one token: zebra, giraffe\n'
    done = run(place, 'embeddings', 'runs/planted', '--nearest', 'zebra', code=2)
    assert done.stdout == ''
    assert done.stderr.startswith('error: --nearest zebra: is ')
    assert done.stderr.count('\n') == 1


MISTAKES = [
    ([], 'one of the arguments --nearest --analogies --out is required'),
    (['--nearest', 'a', '--out', 'x.png'], 'not allowed with argument --nearest'),
    (['--nearest', ''], "--nearest : has no tokens of its own in this form (spaced)"),
    (['--nearest', 'kingg', '--tokens'], "--nearest 'kingg': no token is called so; did you mean"),
    (['--nearest', 'king', '--layer', '3'], '--layer 3: this model has no such layer; layers are 1 to 2'),
    (['--nearest', 'king', '--layer', '0'], '--layer: 0: it must be at least 1'),
    (['--nearest', 'king', '--table', 'inptu'], '--table inptu: it must be input or output'),
    (['--nearest', 'king', '--form', 'x'], '--form x: it must be spaced or bare'),
    (['--nearest', 'king', '--pieces', 'x'], '--pieces x: it must be single or mean'),
    (['--out', 'x.png', '--projection', 'tsne'], '--projection tsne: it must be pca or umap'),
    (['--nearest', 'king', '--text', 'a king'], "--text 'a king': a table knows no context; add --layer N"),
    (['--nearest', 'king', '--layer', '1', '--text', 'a queen'], "--text 'a queen': has 'king' or {} 0 times"),
    (['--out', 'x.png', '--layer', '1', '--text', 'none'], "--text 'none': has {} 0 times"),
    (['--nearest', 'king', '--layer', '1', '--text', 'a king' + ' the' * 90], '--text: a text has 93 tokens'),
    (['--nearest', 'king', '--layer', '1', '--table', 'input'], '--layer and --table do not go together'),
    (['--nearest', 'king', '--tokens', '--words', 'words.txt'], '--tokens and --words do not go together'),
    (['--out', 'x.png', '--tokens'], '--tokens: it goes with --nearest TOKEN alone'),
    (['--nearest', 'king', '--section', 'x'], '--section x: it is of --analogies FILE or --words FILE'),
    (['--analogies', 'nowhere.txt'], '--analogies nowhere.txt: '),
    (['--analogies', 'three.txt'], 'three.txt:2: 3 words; a question has four'),
    (['--analogies', 'empty.txt'], 'empty.txt: has no questions'),
    (['--analogies', 'questions.txt', '--section', 'gendr'], "has no such section with questions; did you mean 'gender'?"),
    (['--analogies', 'questions.txt', '--section', 'far'], 'none of the 1 questions can be asked: the vocabulary lacks zebra'),
    (['--words', 'three.txt', '--out', 'x.png'], '0 words: a picture needs at least 3'),
    (['--out', 'x.pdf'], '--out x.pdf: a picture is written as PNG; name it x.png'),
    (['--out', 'no/x.png'], '--out no/x.png: there is no folder no'),
    (['--words', 'words.txt', '--candidates', '5', '--out', 'x.png'], '--words and --candidates do not go together'),
    (['--nearest', 'king', '--mesh', 'tensor=3'], 'mesh.tensor is 3'),
    (['--nearest', 'king', '--step', '7'], '--step 7: runs/planted has no checkpoint of this step'),
]  # fmt: skip


@pytest.mark.parametrize(('arguments', 'told'), MISTAKES, ids=[' '.join(words)[:60] for words, _ in MISTAKES])
def test_mistakes(place, arguments, told):
    before = sorted(place.iterdir())
    assert told in refused(place, 'embeddings', 'runs/planted', *arguments)
    assert sorted(place.iterdir()) == before


def test_there_is_no_such_run(place):
    assert "did you mean 'runs/planted'" in refused(place, 'embeddings', 'runs/plantd', '--nearest', 'king')


def test_a_run_without_a_tokenizer_has_no_words(place):
    planted_run(place / 'runs' / 'mute', MeshConfig(), has_tokenizer=False)
    line = refused(place, 'embeddings', 'runs/mute', '--nearest', 'king')
    assert line == 'runs/mute was imported without a tokenizer: it takes token ids alone (scripts/score.py)'
