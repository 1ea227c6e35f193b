"""The study: its cells, its rows, what it goes on with after a kill, and the page made of rows."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from weft.compress.numerics import bits
from weft.compress.numerics.tensor_train import modes
from weft.compress.study import run, verdict
from weft.compress.study.cells import BUDGETS, PAPER_RANK, TRAINED_HERE, Cell, design, of_settings, published, short
from weft.compress.study.page import write_page
from weft.compress.study.rows import append, key_of, make_row, read_rows
from weft.compress.study.subjects import Reading
from weft.compress.study.verdict import BREAKS, Duel, Point, advised, best, breaks, curve, duels, score
from weft.compress.transform import NAMES
from weft.interpret.intervals import Estimate
from weft.runtime.errors import UserError
from weft.scripts.compression_study import study

Figures = dict[str, Any]
READING = vars(Reading())


# ---- cells


def test_cells_are_many_and_no_two_have_a_name() -> None:
    names = [cell.name for cell in [*design(), *published()]]
    assert len(names) == len(set(names)) >= 140
    assert {cell.name for cell in short()} <= set(names)
    assert all(re.fullmatch(r'[\w/.:-]+', name) for name in names), 'they are patterns for a shell'


def test_a_row_keeps_all_of_a_cell() -> None:
    for cell in [*design(), *published()]:
        assert of_settings(json.loads(json.dumps(cell.settings))) == cell


def test_the_design_asks_for_methods_that_there_are_and_has_every_question() -> None:
    cells = design()
    assert {cell.method for cell in cells} <= {*NAMES, 'original', 'deleted', 'trained-smaller'}
    assert {cell.model for cell in cells} == set(TRAINED_HERE)
    assert {cell.budget for cell in cells} >= set(BUDGETS)
    assert {cell.spread for cell in cells} == {'uniform', 'sensitivity', 'middle'}
    assert {cell.measured for cell in cells} == {'quality', 'recovered', 'speed', 'diagnosis'}
    assert sum(cell.measured == 'recovered' for cell in cells) >= 10


def test_the_papers_rank_keeps_as_little_of_a_matrix() -> None:
    """Order 12 and rank 64 of a matrix of 4,096 × 4,096, and the rank for the dense model's matrices that is nearest to it."""

    def share(shapes: list[tuple[int, int]], rank: int) -> float:
        kept = sum(bits.tensor_train(modes(D, 12), modes(F, 12)[::-1], rank) for D, F in shapes)
        return kept / sum(bits.dense(shape) for shape in shapes)

    papers = share([(4096, 4096)], 64)
    assert papers == pytest.approx(0.0064, abs=1e-4)
    ours = [(320, 320), (320, 160), (320, 160), (320, 320), (320, 960), (320, 960), (320, 960)]
    off = [abs(share(ours, rank) - papers) for rank in range(1, 20)]
    assert int(np.argmin(off)) + 1 == PAPER_RANK


# ---- rows


class FakeSubjects:
    """Models of which only the weights' hash is known."""

    def __init__(self, sha256: str = 'a' * 64) -> None:
        self.reading, self.sha256 = Reading(), sha256

    def open(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, sha256=self.sha256)


def measured(cell: Cell, *others: object) -> Figures:
    return figures(0.5, 0.1)


def go(cells: list[Cell], path: Path, subjects: FakeSubjects | None = None) -> tuple[int, list[str]]:
    said: list[str] = []
    count = run.run_cells(cells, subjects or FakeSubjects(), path, path.parent, said.append, measured)  # type: ignore[arg-type]
    return count, said


def test_a_study_goes_on_at_its_next_cell(tmp_path: Path) -> None:
    path, cells = tmp_path / 'rows.jsonl', design()[:5]
    assert go(cells[:3], path)[0] == 3
    before = path.read_bytes()
    assert go(cells, path)[0] == 2
    assert path.read_bytes().startswith(before)
    assert go(cells, path) == (0, [])
    assert [row['cell'] for row in read_rows(path, print)] == [cell.name for cell in cells]


def test_a_kill_in_the_middle_of_a_line_loses_that_cell_alone(tmp_path: Path) -> None:
    path, cells = tmp_path / 'rows.jsonl', design()[:3]
    go(cells, path)
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        count, said = go(cells, path)
        assert count == 1, cut
        assert 'cut off' in said[0]
        assert [row['cell'] for row in read_rows(path, said.append)] == [cell.name for cell in cells]
        assert path.read_bytes().count(b'\n') == 3


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'rows.jsonl'
    go(design()[:1], path)
    with path.open('ab') as file:
        file.write(b'{"cell": "dense/svd"}\n')
    with pytest.raises(UserError, match='line 2 is no row'):
        read_rows(path, print)


@pytest.mark.parametrize('what', ['model', 'code', 'settings'])
def test_a_stale_row_is_told_and_measured_again(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cells = tmp_path / 'rows.jsonl', [Cell('dense', 'int8')]
    go(cells, path)
    subjects = FakeSubjects('b' * 64 if what == 'model' else 'a' * 64)
    if what == 'code':
        monkeypatch.setattr('weft.compress.study.rows.measuring_code', lambda cell: 'other')
        monkeypatch.setattr('weft.compress.study.run.measuring_code', lambda cell: 'other')
    if what == 'settings':
        subjects.reading = Reading(tokens=4096)
    count, said = go(cells, path, subjects)
    words = {'model': 'the model’s weights', 'code': 'the code', 'settings': 'the settings'}[what]
    assert count == 1
    assert said[0] == f'dense/int8: stale, for {words} changed: measured again'
    assert len(read_rows(path, print)) == 1, 'the newest row of a cell counts'


def test_the_page_says_what_is_stale_and_what_is_missing(tmp_path: Path) -> None:
    rows = fixture_rows()[:-2]
    rows[0]['code'] = 'old'
    stale = run.stale_rows(rows, design(), lambda name: None)
    assert stale == {rows[0]['cell']: 'the code changed'}
    missing = write_page(rows, stale, [cell.name for cell in design()], tmp_path / 'page.md')
    text = (tmp_path / 'page.md').read_text()
    assert f'2 of {len(design())} cells are missing and 1 rows' in ' '.join(text.split())
    assert missing == '; 2 cells are missing'


def test_what_a_method_refuses_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / 'rows.jsonl'

    def refuse(*arguments: object) -> Figures:
        raise UserError('--budget 0.9: too much')

    run.run_cells([Cell('dense', 'svd', 0.9)], FakeSubjects(), path, tmp_path, print, refuse)  # type: ignore[arg-type]
    (row,) = read_rows(path, print)
    assert row['figures'] == {'refused': '--budget 0.9: too much'}


# ---- verdict


def figures(share: float, cost: float, width: float = 0.01, **more: object) -> Figures:
    def estimate(value: float) -> Figures:
        return {'value': value, 'low': value - width, 'high': value + width, 'of': 32}

    text = {
        'source': 's', 'sha256': 'x', 'tokens': 8192, 'nats': estimate(3.7), 'perplexity': estimate(40 * (1 + cost)),
        'cloze': estimate(0.6), 'kl': estimate(max(cost, 0)), 'excess': estimate(cost), 'cloze_change': estimate(-cost / 2),
        'perplexity_cost': estimate(cost),
    }  # fmt: skip
    errors = {'error_of_weights': cost**0.5 if cost > 0 else 0.01, 'error_of_outputs': cost if cost > 0 else 0.01}
    return {
        'share': share, 'bits': int(320e6 * share), 'bits_before': int(320e6),
        **errors, 'quality': {'held-out': text, 'documentation': text}, **more,
    }  # fmt: skip


def point(cell: Cell, share: float, cost: float, width: float = 0.01) -> Point:
    return Point(cell, share, Estimate(cost, cost - width, cost + width, 32), figures(share, cost, width))


def test_the_best_of_a_budget_costs_the_least_of_those_that_save_enough() -> None:
    int8, int4 = point(Cell('dense', 'int8'), 0.2532, 0.001), point(Cell('dense', 'int4'), 0.148, 0.02)
    svd, tucker = point(Cell('dense', 'svd', 0.5), 0.496, 0.06), point(Cell('dense', 'tucker', 0.5), 0.497, 0.09)
    every = [svd, tucker, int4, int8]
    assert best(every, 0.5) == int8
    assert best(every, 0.75) == int8, 'in whole percent 0.2532 saves 75 %'
    assert best(every, 0.85) == int4
    assert best(every, 0.9) is None
    assert best(every, 0.5, 'pairs') == svd
    assert best(every, 0.5, 'tensors') == tucker
    assert best(every, 0.75, 'tensors') is None


def test_the_advice_is_the_simplest_that_is_not_surely_worse() -> None:
    int8, int4 = point(Cell('dense', 'int8'), 0.25, 0.012), point(Cell('dense', 'int4'), 0.148, 0.04)
    svd = point(Cell('dense', 'svd', 0.5), 0.5, 0.0)
    assert advised([svd, int4, int8], 0.5) == int8, 'its interval overlaps with that of SVD, that of int4 does not'
    assert advised([svd, int4], 0.5) == svd
    assert advised([svd, int4, int8], 0.85) == int4
    assert advised([svd], 0.85) is None


def test_a_curve_breaks_where_it_passes_the_line() -> None:
    cells = [Cell('dense', 'svd', budget) for budget in BUDGETS]
    of = [
        point(cell, cell.budget or 1, cost) for cell, cost in zip(cells, (0.01, 0.02, 0.05, 0.2, 0.5, 2.0), strict=True)
    ]
    shuffled = [of[3], of[0], of[5], point(Cell('dense', 'svd', 0.5, spread='middle'), 0.5, 9.0), of[1], of[4], of[2]]
    assert curve(shuffled, cells[0]) == of, 'its own cells, most bits first'
    where = breaks(of)
    assert where is not None
    assert where.within == ''
    assert 0.35 < where.share < 0.5
    middle = np.interp(np.log(np.log1p(BREAKS)), np.log(np.log1p([0.05, 0.2])), [0.5, 0.35])
    assert where.share == pytest.approx(middle)
    assert breaks(of[:3]) == (0.5, '<')
    assert breaks(of[4:]) == (0.25, '>')
    assert breaks([]) is None


def test_duels_are_of_cells_that_differ_in_one_thing_and_count_what_is_sure() -> None:
    plain = [point(Cell('dense', 'svd', b, objective='frobenius'), b, cost) for b, cost in ((0.5, 0.2), (0.25, 0.9))]
    white = [point(Cell('dense', 'svd', b), b, cost) for b, cost in ((0.5, 0.1), (0.25, 0.895), (0.75, 0.01))]
    found = duels([*plain, *white], 'objective', 'frobenius', 'whitened')
    assert [(duel.one.share, duel.other.share) for duel in found] == [(0.5, 0.5), (0.25, 0.25)]
    assert score(found) == (1, 0, 1), 'the second is open: its intervals overlap'
    assert found[0].gain == pytest.approx(1 - np.log(1.1) / np.log(1.2))
    assert score([Duel(found[0].other, found[0].one)]) == (0, 1, 0)


def test_tensor_forms_are_held_to_pairs_of_the_same_maps_and_budget() -> None:
    found = [
        point(Cell('dense', 'svd', 0.5), 0.5, 0.06),
        point(Cell('dense', 'tucker', 0.5), 0.5, 0.2),
        point(Cell('dense', 'tensor-train', 0.5, order=4), 0.5, 0.6),
        point(Cell('dense', 'cp', 0.9, maps='attention'), 0.9, 0.2),
    ]
    duel = verdict.tensors_against_pairs(found)
    assert [one.other.cell.method for one in duel] == ['tucker', 'tensor-train']
    assert score(duel) == (0, 2, 0)


# ---- page


def fixture_rows() -> list[Figures]:
    """Rows of every cell, of costs that grow as bits shrink; tensor forms cost three times what pairs do."""
    rows = []
    for cell in design():
        share = cell.budget or {'original': 1.0, 'int8': 0.2532, 'fp8': 0.2532, 'gptq-int8': 0.2532}.get(
            cell.method, 0.148
        )
        cost = 0.02 / share**2
        cost *= {'tensors': 3.0, 'rounding': 0.01}.get(verdict.FAMILY.get(cell.method, ''), 1.0)
        of = figures(share, cost)
        if cell.measured == 'diagnosis':
            of = diagnosis()
        elif cell.method == 'original' and cell.measured == 'quality':
            of = figures(1.0, 0.0)
            for text in of['quality'].values():
                text |= dict.fromkeys(('kl', 'excess', 'cloze_change', 'perplexity_cost'))
        elif cell.measured == 'recovered':
            of |= {'before': figures(share, 2 * cost)['quality']}
            of |= {'recovery': {'steps': 60, 'learning_rate': 1e-3, 'warmup_steps': 10}}
        elif cell.measured == 'speed':
            e = {'value': 1.5, 'low': 1.4, 'high': 1.6, 'of': 7}
            of = {'share': share, 'tokens_per_second_before': e, 'tokens_per_second': e, 'ratio': e}
            of |= {'bytes_read_before': 100, 'bytes_read': 25}
        key = key_of(cell, 'a' * 64, READING)
        rows.append(json.loads(json.dumps(make_row(cell, key, READING, of, 1.0))))
    return rows


def diagnosis() -> Figures:
    e = {'value': 0.5, 'low': 0.4, 'high': 0.6, 'of': 8}
    fields = ('energy', 'chance', 'most', 'above_chance', 'cosine', 'cosine_of_chance')
    stacks = [
        {'kind': kind, 'map': 'attention.q', 'side': 'in', 'stacks': 8, **dict.fromkeys(fields, e)}
        for kind in ('heads', 'layers')
    ]
    gains = [
        {
            'kind': 'heads', 'map': 'attention.q', 'layer': layer, 'budget': budget,
            'predicted': {'shared_in': 0.1, 'shared_out': 0.0, 'tucker': -0.1 * layer},
            'real': {'shared_in': 0.1, 'shared_out': 0.0, 'tucker': -0.1 * layer},
        }
        for layer in range(8) for budget in (0.5, 0.25)
    ]  # fmt: skip
    return {
        'stacks': stacks,
        'gains': gains,
        'stable_ranks': [{'map': 'attention.q', 'singular_values': 320, **e}],
        'outliers': {'count': 16, 'before': 3.4, 'without': 3.401, 'largest': 3.4, 'random': e, 'weights': 9830400},
    }


@pytest.fixture(scope='module')
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp('page') / 'compression.md'
    missing = write_page(fixture_rows(), {}, [cell.name for cell in design()], path)
    assert missing == ''
    return path.read_text(encoding='utf-8'), path.parent


def test_the_page_is_made_of_its_rows(page: tuple[str, Path]) -> None:
    text, folder = page
    assert '**Not whole.**' not in text
    assert 'No tensor form is what to use at any of these budgets.' in ' '.join(text.split())
    # At half of the bits int8 costs 0.01 · 0.02 / 0.2532², the least of all that save as much.
    assert '| 50 % | int8 (25.3 % left) | +0.31 % [−0.69, +1.31] |' in text
    for name in re.findall(r'\]\((compression/\w+\.png)\)', text):
        assert (folder / name).read_bytes().startswith(b'\x89PNG')
    assert text.count('](compression/') == 4
    assert 'nan' not in re.findall(r'\bnan\b', text)
    assert all(len(line) <= 128 for line in text.splitlines() if not line.startswith('|'))


def test_the_page_judges_claims_by_the_rows(page: tuple[str, Path]) -> None:
    text = page[0]
    (line,) = [line for line in text.splitlines() if 'do not outperform matrix formats' in line]
    assert '| confirmed |' in line
    (line,) = [line for line in text.splitlines() if 'training afterwards' in line]
    assert '| confirmed |' in line, 'the original has cost 0.02 · 1, tensor forms thrice that at half of the bits'


def test_a_page_of_no_rows_says_so(tmp_path: Path) -> None:
    write_page([], {}, ['dense/int8'], tmp_path / 'page.md')
    assert 'No cell of the dense model has been measured yet.' in (tmp_path / 'page.md').read_text()


# ---- command


def test_the_command_lists_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ['--results', str(tmp_path / 'rows.jsonl'), '--out', str(tmp_path / 'page.md')]
    study(['dense', '--list', '--part', '2/3', *where])
    listed = capsys.readouterr().out.split()
    dense = [cell.name for cell in design() if cell.model == 'dense']
    assert listed == dense[1::3]
    with pytest.raises(UserError, match="did you mean 'dense'"):
        study(['dens', *where])
    with pytest.raises(UserError, match='no cell has such a name'):
        study(['--only', 'dense/nothing', *where])
    with pytest.raises(UserError, match='it must be N/M'):
        study(['--part', '4/3', *where])


def test_a_page_alone_measures_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / 'rows.jsonl'
    for row in fixture_rows()[:3]:
        append(path, row)
    study(['--page-only', '--results', str(path), '--out', str(tmp_path / 'page.md'), '--runs', str(tmp_path)])
    assert len(read_rows(path, print)) == 3
    assert 'of 3 rows' in capsys.readouterr().out
