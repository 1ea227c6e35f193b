"""scripts/xray.py on a small run: a page, an index of its data, and what it says to mistakes."""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tests.interpret.planted_tables import WORDS, planted_run
from tests.scripts.runs import refused
from weft.data.config import DataConfig
from weft.data.prepare import prepare
from weft.inference.run import open_run
from weft.interpret.xray import observed
from weft.interpret.xray.encode import decoded
from weft.model.config import model_of
from weft.runtime.errors import UserError
from weft.scripts import xray
from weft.sharding.mesh import MeshConfig


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('xray')
    planted_run(folder / 'runs' / 'bare', MeshConfig())
    own = planted_run(folder / 'runs' / 'own', MeshConfig(tensor=2))
    (folder / 'text').mkdir()
    for number, word in enumerate(WORDS):
        text = ''.join(f'a {word} the {other} {number}\n' for other in WORDS)
        (folder / 'text' / f'{word}.txt').write_text(text, encoding='utf-8')
    data = DataConfig(source=str(folder / 'text'))
    prepare(data, own, 32, lambda line: None, tokenizer=open_run(own).tokenizer)
    return folder


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Calls the script in this process: what it prints and what it says on stderr."""
    monkeypatch.chdir(place)

    def call(*arguments: str) -> tuple[str, str]:
        with mock.patch.object(sys, 'argv', ['xray.py', *arguments]):
            xray.main()
        return capsys.readouterr()

    return call


def test_a_page_with_the_runs_own_texts(call, place):
    out, err = call('index', 'runs/own', '--tokens', '400')
    assert out.startswith('runs/own/xray: 4')
    assert 'index, in rows: 13' in err
    before = (place / 'runs' / 'own' / 'xray' / 'index.safetensors').read_bytes()
    call('index', 'runs/own', '--tokens', '400')
    assert (place / 'runs' / 'own' / 'xray' / 'index.safetensors').read_bytes() == before
    text = 'a king the </script><b>river'
    out, err = call('runs/own', '--text', text, '--against', 'a queen the river', '--out', 'x.html', '--json', 'x.json')
    assert out.count(' bytes\n') == 2
    assert 'ablation: ' in err
    found = json.loads((place / 'x.json').read_text())
    page = (place / 'x.html').read_text()
    assert '<b>river' not in page
    assert 1e4 < len(page) < 5e6
    assert found['made']['command'].startswith('python scripts/xray.py runs/own --text')
    assert [one['text'] for one in found['texts']] == [text, 'a queen the river']
    assert found['index']['tokens'] > 350
    assert found['patch'] is None
    assert 'tokens: patching' in found['patch_reason']
    cell = next(iter(found['cells'].values()))
    assert 1 <= len(cell['texts']) <= 5
    assert any(word in cell['texts'][0]['before'] + cell['texts'][0]['token'] for word in WORDS)
    sizes = [abs(one['activation']) for one in cell['texts']]
    assert sizes == sorted(sizes, reverse=True)
    # The same on another mesh.
    call('runs/own', '--text', text, '--json', 'y.json', '--mesh', 'data=1')
    other = json.loads((place / 'y.json').read_text())
    for section, name in (
        ('lens', 'probability'),
        ('heads', 'answer'),
        ('ablation', 'heads'),
        ('layers', 'residual_norm'),
    ):
        one, two = (decoded(report['texts'][0][section][name]) for report in (found, other))
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_an_index_of_named_files_and_the_test_of_induction_heads(call):
    out, _ = call('index', 'runs/bare', '--data', 'text', '--tokens', '100')
    assert 'rows of text; 2 layers of cells' in out
    with pytest.raises(UserError, match='no head scores that much as induction; the largest score is') as caught:
        call('induction', 'runs/bare', '--least', '1')
    largest = float(str(caught.value).split()[-1])
    out, _ = call('induction', 'runs/bare', '--draws', '2', '--least', str(0.9995 * largest), '--json')
    found = json.loads(out)
    assert found['draws'] == len(found['random']) == 2
    assert found['scores'][0] == pytest.approx(largest, rel=1e-3)
    assert len(found['heads']) == len(found['scores'])


TEXT = ['--text', 'a king']
MISTAKES = [
    (['runs/own'], 'give --text TEXT'),
    (['runs/own', *TEXT], 'give --out FILE.html'),
    (['runs/own', '--text', '', '--out', 'a.html'], '--text is empty'),
    (['runs/own', '--text', 'a king ' * 99, '--out', 'a.html'], 'tokens, its start token included: at most 64 work'),
    (['runs/own', *TEXT, '--against', '', '--out', 'a.html'], '--against is empty'),
    (['runs/own', *TEXT, '--out', 'no/a.html'], '--out no/a.html: there is no folder no'),
    (['runs/own', *TEXT, '--json', 'text'], '--json text: is a folder'),
    (['runs/own', *TEXT, '--out', 'a.html', '--layer', '3'], 'there is no option --layer'),
    (['runs/own', *TEXT, '--out', 'a.html', '--mesh', 'tensor=3'], 'mesh.tensor is 3'),
    (['runs/own', *TEXT, '--out', 'a.html', '--step', '9'], '--step 9: runs/own has no checkpoint of this step'),
    (['runs/own', *TEXT, '--out', 'a.html', '--cell', '3'], "argument --cell: '3': give LAYER:CELL, such as 2:17"),
    (['runs/own', *TEXT, '--out', 'a.html', '--cell', '2:1'], '--cell 2:1: there is no layer 2; layers are 0 to 1'),
    (['runs/own', *TEXT, '--out', 'a.html', '--cell', '1:32'], 'there is no cell 32; cells of a layer are 0 to 31'),
    (['runs/onw', *TEXT, '--out', 'a.html'], 'known: runs/bare, runs/own'),
    (['index', 'runs/bare'], 'runs/bare has no training data of its own, as an imported model: give text with --data PATH'),
    (['index', 'runs/own', '--tokens', '0'], '--tokens: 0: it must be at least 1'),
    (['index', 'runs/own', '--data', 'nowhere'], 'nowhere'),
    (['induction', 'runs/own', '--least', '2'], '--least 2: it must be above 0 and at most 1'),
    (['induction', 'runs/own', '--draws', '1'], '--draws: 1: it must be at least 2'),
]  # fmt: skip


@pytest.mark.parametrize(('arguments', 'told'), MISTAKES, ids=[' '.join(words)[:60] for words, _ in MISTAKES])
def test_mistakes(place, arguments, told):
    before = sorted(place.iterdir())
    assert told in refused(place, 'xray', *arguments)
    assert sorted(place.iterdir()) == before


SIZES = {'vocabulary': 32, 'layers': 1, 'model_dim': 8, 'attention.heads': 2, 'mlp.dim': 8}
UNFIT = {
    'an encoder': ({'causal': False}, 'model.causal is false'),
    'an encoder–decoder': ({'encoder.layers': 1}, 'model.encoder is given'),
    'no head': ({'head': None}, 'model.head is null'),
    'a layer before the head': ({'head.mlp': True}, 'model.head.mlp is true'),
}


@pytest.mark.parametrize('what', UNFIT)
def test_models_that_are_no_decoders(what):
    fields, told = UNFIT[what]

    class Kind:
        config = model_of({**SIZES, **fields})

    with pytest.raises(UserError, match=told):
        observed.check_model(Kind())  # type: ignore[arg-type]
