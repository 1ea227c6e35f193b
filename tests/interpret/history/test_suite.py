"""The pieces of work: kept and gone on with, one corpus for all, the page of given figures, mistakes of the script."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from weft.interpret.history import suite as suites
from weft.interpret.history.corpus import check_shared, lend, pieces
from weft.interpret.history.kept import Kept
from weft.interpret.history.markdown import code, fenced, listed, power, prose, table
from weft.interpret.history.page import MODELS, write_page
from weft.interpret.history.runs import curve_of
from weft.interpret.history.suite import CONFIGS, DEPTHS, NORMS, WIDTHS, Piece, Suite, scaling_configs
from weft.runtime.errors import UserError
from weft.scripts import history
from weft.training.config import load_config

SMALL = ('data.vocabulary=320', 'data.validation_share=0.1', 'training.steps=6', 'training.batch=2')
SMALL += ('training.sequence_length=32', 'metrics.validate_every=3', 'metrics.validation_rows=4')


@pytest.fixture(scope='module')
def overrides(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp('text')
    for number in range(12):
        lines = [f'def f{number}_{i}(x):\n    return x + {i * number}\n\n' for i in range(60)]
        (folder / f'{number}.py').write_text(''.join(lines), encoding='utf-8')
    return [f'data.source={folder}', *SMALL]


@pytest.fixture(scope='module')
def made(overrides, tmp_path_factory) -> Suite:
    return suites.suite(tmp_path_factory.mktemp('work'), overrides, lambda line: None)


def test_every_model_reads_the_same_tokens(made):
    corpus = made.corpus
    batches = corpus.batches()
    assert len(batches) == 6
    texts = corpus.texts(batches)
    # What n-grams are asked is what a decoder is, but for the first token of a piece that does not begin its document.
    bos, mark = corpus.dataset.tokenizer.bos, corpus.dataset.tokenizer.vocabulary
    wanted = []
    for text in pieces(batches):
        wanted += text[1:].tolist()
    assert texts.token_S[texts.predicted_S].tolist() == wanted
    targets = np.concatenate([batch.target_BT[batch.segment_BT > 0] for batch in batches])
    assert sorted(wanted) == sorted(targets.tolist())
    first = texts.token_S[texts.place_S == 0].tolist()
    assert mark in first, 'pieces that go on in a document'
    assert set(first) <= {bos, mark}
    validation = corpus.validation()
    assert corpus.bytes_of(validation) == corpus.dataset.facts['validation']['bytes']


def test_configs_share_corpus_and_budget():
    configs = [load_config(path) for path in sorted(CONFIGS.glob('*.yaml'))]
    assert len(configs) == 3
    for config in configs:
        check_shared(configs[0], config)
    for name, config in scaling_configs([]).items():
        check_shared(configs[1], config)
        kind, _, value = name.partition('-')
        assert int(value) == (config.model.model_dim if kind == 'width' else config.model.layers)
    other = load_config(CONFIGS / 'dense.yaml', ['training.steps=7'])
    rule = 'all models of the page have one corpus and one budget'
    with pytest.raises(UserError, match=f'^training of history-dense is not that of history-decoder-2017: {rule}$'):
        check_shared(configs[0], other)


def test_keys_of_pieces_are_those_of_every_process(made, overrides, tmp_path):
    code = 'import sys; from weft.interpret.history.suite import suite; from pathlib import Path; '
    code += 'made = suite(Path(sys.argv[1]), sys.argv[2:], lambda line: None); print(*(made.key(name) for name in made.pieces))'
    command = [sys.executable, '-c', code, str(tmp_path), *overrides]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert there == [made.key(name) for name in made.pieces]
    assert len(set(there)) == len(there) > 15


def stub(made: Suite, tmp_path: Path, calls: list[str], fails: str = '') -> Suite:
    """Two pieces of work that write down that they were done, one of which may be killed."""

    def work(name: str) -> dict:
        calls.append(name)
        if name == fails:
            raise KeyboardInterrupt
        (tmp_path / name).write_text('weights', encoding='utf-8')
        return {'bits_per_byte': 1.5}

    found = {name: Piece(lambda say, name=name: work(name), {'of': name}, (), tmp_path / name) for name in ('a', 'b')}
    return dataclasses.replace(made, pieces=found, kept=Kept(tmp_path / 'figures'))


def test_a_run_that_was_killed_goes_on_at_its_next_piece(made, tmp_path, monkeypatch, capsys):
    calls = list[str]()
    monkeypatch.setattr(suites, 'suite', lambda *given: stub(made, tmp_path, calls, fails='b'))
    monkeypatch.setattr('sys.argv', ['history.py', '--out', str(tmp_path / 'page.md')])
    with pytest.raises(KeyboardInterrupt):
        history.main()
    monkeypatch.setattr(suites, 'suite', lambda *given: stub(made, tmp_path, calls))
    monkeypatch.setattr('weft.interpret.history.page.write_page', lambda found, path: path.write_text('page'))
    assert history.main() == 0
    assert calls == ['a', 'b', 'b']
    assert re.search(r'^1/2  a  1\.5000 bits/byte  kept$', capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / 'page.md').read_text() == 'page'
    # What other pieces look into is gone: it is made again.
    (tmp_path / 'a').unlink()
    assert history.main() == 0
    assert calls[3:] == ['a']


def test_figures_are_those_of_the_config_and_the_code(tmp_path):
    kept = Kept(tmp_path)
    key = kept.key({'steps': 1}, ('interpret/history/scaling.py',))
    assert key == kept.key({'steps': 1}, ('interpret/history/scaling.py',))
    assert (
        len({key, kept.key({'steps': 2}, ('interpret/history/scaling.py',)), kept.key({'steps': 1}, ('runtime',))}) == 3
    )
    assert kept.put('x', key, {'bits': 1.0}) == {'bits': 1.0}
    assert kept.find('x', key) == {'bits': 1.0}
    assert kept.find('x', 'another') is None
    assert kept.find('y', key) is None
    with pytest.raises(ValueError, match='not JSON compliant'):
        kept.put('x', key, {'bits': float('nan')})
    assert kept.find('x', key) == {'bits': 1.0}
    (tmp_path / 'x.json').write_text('{"key"', encoding='utf-8')
    with pytest.raises(
        UserError, match=r'x\.json: no figures of a piece; take the file away, and they are computed anew$'
    ):
        kept.find('x', key)


def test_a_run_is_lent_the_corpus_and_trains_on_it(made, tmp_path):
    said = list[str]()
    lend(made.corpus, tmp_path / 'run')
    assert (tmp_path / 'run' / 'data' / 'data.json').is_file()
    figures, known = made.run('n-gram', said.append)
    assert not known
    assert made.run('n-gram', said.append) == (figures, True)
    assert [one['order'] for one in figures['orders']] == [1, 2, 3, 4, 5]
    assert figures['bits_per_byte'] == min(one['bits_per_byte'] for one in figures['orders'])
    assert max(one['sum_error'] for one in figures['orders']) < 1e-12
    assert len(said) == 5


def test_seconds_of_a_run_are_those_of_its_metrics():
    rows = [
        {'tokens': 100, 'tokens_per_second': 50.0},
        {'tokens': 200, 'tokens_per_second': 100.0, 'validation_bits_per_byte': 3.0},
        {'tokens': 500, 'tokens_per_second': 100.0, 'validation_bits_per_byte': 2.0},
    ]
    assert curve_of(rows) == [[200, 3.0, 3.0], [500, 6.0, 2.0]]


def given_figures() -> dict[str, dict]:
    """Figures of all pieces, such as they may be; models write what would spoil a page."""
    curve = [[500, 1.0, 3.0], [1000, 2.0, 2.0]]
    run = {
        'curve': curve,
        'tokens': 1000,
        'seconds': 2.0,
        'bits_per_byte': 2.0,
        'flops_per_token': 1e6,
        'parameters': 10_000,
    }
    sample = '\n```\n| a <script>\x1b[31m'
    orders = [
        {
            'order': order,
            'bits_per_byte': 2.5 - order / 10,
            'parameters': 100 * order,
            'seconds': 0.1 * order,
            'discounts': [[0.5, 1.0, 1.5]] * order,
            'fallback': [1],
            'sum_error': 1e-15,
        }
        for order in range(1, 6)
    ]
    best = {'bits_per_byte': 2.0, 'seconds': 0.5, 'parameters': 500}
    shares = {
        name: [1.0, 0.5, 0.25]
        for name in ('elman, trained', 'elman, at birth', 'lstm, trained', 'dense decoder, trained')
    }
    scaled = {f'width-{width}': run | {'parameters': 1000 * width, 'bits_per_byte': 2 + 1 / width} for width in WIDTHS}
    scaled |= {
        f'depth-{depth}': run | {'parameters': 7000 * depth, 'bits_per_byte': 2.1 + 0.1 / depth} for depth in DEPTHS
    }
    return {
        'n-gram': {'orders': orders, 'tokens': 1000, 'sample': sample, **best},
        'word2vec': {'nearest': {'`': ['|', '\n', ' ']}, 'seconds': 3.0, 'parameters': 10},
        'word2vec-planted': {'shares': [1.0, 0.95, 0.9], 'questions': 100},
        **{name: run | {'sample': sample} for name in MODELS},
        'gradients': {'shares': shares, 'rows': 4, 'radius': {'trained': 1.1, 'at birth': 1.0}},
        **scaled,
        **{f'norm-{kind}': run | {'bits_of_batch': 2.2} for kind in NORMS},
    }


def test_the_page_of_given_figures(made, tmp_path, monkeypatch):
    figures = given_figures()
    assert figures.keys() == made.pieces.keys()
    monkeypatch.setattr(Suite, 'find', lambda self, name: figures[name])
    write_page(made, tmp_path / 'history.md')
    text = (tmp_path / 'history.md').read_text(encoding='utf-8')
    named = re.findall(r'!\[[^\]]*\]\((.*?)\)', text)
    assert {path.name for path in (tmp_path / 'history').iterdir()} == {Path(name).name for name in named}
    for name in named:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b'\x89PNG')
        assert len(content) < 100_000
    assert '\x1b' not in text
    # What a model wrote is inside of fences that it cannot close.
    outside = re.sub(r'^(`{3,})\n.*?^\1$', '', text, flags=re.DOTALL | re.MULTILINE)
    assert '<script>' not in outside
    assert 'Of the trained models' in text.replace('\n', ' ')
    for name in (f'{width} wide, 4 layers' for width in WIDTHS):
        assert f'| {name} |' in text
    assert max(len(line) for line in outside.splitlines() if not line.startswith(('|', '!'))) <= 128


def test_text_of_models_is_code():
    assert fenced('a```b\x00\n') == '````\na```b\\x00\n\n````'
    assert code('a|b\n') == '`a\\|b\\n`'
    assert code('`') == '`` ` ``'
    assert code('  ') == "`'  '`"


def test_numbers_and_words_of_the_page():
    assert [power(x) for x in (0, 1.234, 0.05, 1e-7, 1.26e12)] == ['0', '1.2', '0.05', '1.0 · 10⁻⁷', '1.3 · 10¹²']
    assert listed(['a']) == 'a'
    assert listed(['a', 'b', 'c']) == 'a, b and c'
    assert table(('x', 'n'), [('a', 1), ('b', -2)]) == '| x | n |\n| --- | ---: |\n| a | 1 |\n| b | -2 |'
    assert prose('a\n   b', 'c') == 'a b\n\nc'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--only', 'lstn'], r"--only 'lstn': no piece has such a name; did you mean 'lstm'\?"),
        (['--out', 'nowhere/page.md'], r'--out nowhere/page\.md: there is no folder nowhere'),
        (['training.stepz=3'], r".*no key 'training\.stepz'; did you mean 'training\.steps'\?"),
        (['training.steps=100000'], r'training\.steps · training\.batch is 200000 rows, and the corpus has \d+: .*'),
        (['model.layerz=3'], r".*no key 'model\.layerz'; did you mean 'model\.layers'\?"),
        (['--only', 'gradients'], r'gradients looks into elman, lstm, dense: do them first, with --only elman .*'),
    ],
)
def test_mistakes(arguments, message, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['history.py', '--work', str(tmp_path), *overrides, *arguments])
    with pytest.raises(UserError) as caught:
        history.main()
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_the_names_of_the_pieces_are_listed(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['history.py', '--list', '--work', str(tmp_path), *overrides])
    assert history.main() == 0
    assert capsys.readouterr().out.split()[-3:] == ['norm-layer', 'norm-batch', 'norm-none']
    assert not list(tmp_path.glob('figures/*'))
    assert json.loads((tmp_path / 'corpus' / 'data' / 'data.json').read_text())['facts']['documents'] == 12
