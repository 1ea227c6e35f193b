"""The first cases of each part that is read in process, and what `make fuzz` says of them all."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.fuzz import PARTS, __main__, page, workers
from tests.fuzz.fakes import part as fake
from tests.fuzz.workers import Result

IN_PROCESS = [name for name in PARTS if workers.load(name).IN_PROCESS]


@pytest.mark.parametrize('name', IN_PROCESS)
def test_odd_inputs_of_seed_0_are_read_or_refused_as_docs_say(name, tmp_path):
    part = workers.load(name)
    found = list(workers.in_process(part, 0, range(part.QUICK), part.COUNT, tmp_path))
    assert len(found) == part.QUICK >= 20
    assert not [f'{one.number} ({one.name}): {one.wrong}' for one in found if one.wrong]


def test_every_part_of_this_folder_is_run():
    modules = [path for path in Path(__file__).parent.glob('*.py') if not path.name.startswith(('_', 'test_'))]
    assert {path.stem for path in modules if re.search(r'^def check\(case', path.read_text(), re.MULTILINE)} == set(
        PARTS
    )


@pytest.mark.parametrize('name', PARTS)
def test_a_case_is_a_function_of_its_seed_and_number(name):
    part = workers.load(name)
    assert name == part.NAME
    assert importlib.util.find_spec(f'tests.fuzz.{name}').origin == part.__file__
    cases = list(part.cases(5, part.COUNT))
    assert [case.number for case in cases] == list(range(part.COUNT))
    few = [(one.number, one.name) for one in part.cases(5, 10)]
    assert few == [(one.number, one.name) for one in cases[:10]]
    if part.IN_PROCESS:
        assert few != [(one.number, one.name) for one in part.cases(6, 10)]


def test_the_page_lists_every_failure_in_full_and_nothing_in_it_is_markup(tmp_path):
    long = 'x' * 1500
    results = [
        Result(0, 'one', 'refused', None, 0.1),
        Result(1, 'two', 'refused', None, 0.1),
        Result(2, 'a|b', 'wrong', f'<b>Traceback</b>\n{long}', 0.1),
        Result(3, 'three', 'imported', None, 0.1),
    ]
    parts = {'fake': page.Found(fake, results, 90.0)}
    target = tmp_path / 'fuzz.md'
    page.write(target, page.Figures(7, 120.0, parts))
    text = target.read_text()
    assert '`make fuzz SEED=7`' in text
    assert '4 cases in 2 minutes, 1 of them wrong' in text
    assert (
        '| fake | A part whose cases fail in every way that a case may | 4 | 1 | refused 2, imported 1 | 1.5 |' in text
    )
    assert f'| 2 | a\\|b | \\<b\\>Traceback\\</b\\>\\\\u000a{long} |' in text
    assert list(tmp_path.iterdir()) == [target]


def test_a_part_that_has_a_failure_is_a_failure_of_make_fuzz_and_each_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__, 'FOLDER', tmp_path / 'fuzz')
    monkeypatch.setattr(__main__, 'PARTS', ('tests.fuzz.fakes.part',))
    ask = lambda *words: monkeypatch.setattr('sys.argv', ['fuzz', 'tests.fuzz.fakes.part', '--seed', '3', *words])
    ask('--only', 'right', '--only', '11')
    assert __main__.main() == 0
    assert '2 cases, 0 of them wrong' in capsys.readouterr().out
    ask('--only', 'raises', '--only', 'right', '--page', str(tmp_path / 'page.md'))
    assert __main__.main() == 1
    told = capsys.readouterr().out
    assert 'seed 3' in told
    assert 'tests.fuzz.fakes.part 2 (raises): ValueError: two lines (tests/fuzz/fakes/part.py' in told
    assert '2 cases, 1 of them wrong' in told
    assert not (tmp_path / 'page.md').exists(), 'it is of all cases or not there'
