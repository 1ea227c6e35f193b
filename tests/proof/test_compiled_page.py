"""Plans by shapes alone are those of the compiled programs that benchmarks/compiled/ keeps."""

import statistics

import pytest

from weft.planner.chips import CHIPS
from weft.planner.traffic.tables import Sent, Traffic
from weft.proof import compiled_page as aot_page
from weft.proof import compiled_pairs as aot_pairs
from weft.proof.compiled_searched import record_of, searched
from weft.proof.search_cases import CASES

ROWS = {row.pair.name: row for row in aot_page.compiled_rows()}


@pytest.mark.parametrize('name', ROWS)
def test_a_plan_is_what_was_compiled(name):
    ratios = ROWS[name].ratios
    assert ratios['arguments'] == pytest.approx(1, abs=0.01)
    assert ratios['sent'] == pytest.approx(1, abs=0.02)
    assert ratios['memory'] == pytest.approx(1, abs=0.1)


def test_memory_is_planned_within_a_few_percent_in_the_median():
    assert statistics.median(abs(row.ratios['memory'] - 1) for row in ROWS.values()) < 0.03


@pytest.mark.parametrize('name', ROWS)
def test_a_plan_says_what_fits(name):
    row = ROWS[name]
    assert (row.planned.memory.total <= CHIPS[row.pair.chip].memory_bytes) == row.compiled.fits


RECORDED = [name for name in CASES if record_of(name).exists()]


def test_what_the_search_chooses_has_been_compiled():
    """Of all cases whose chips have a compiler; after another choice, `python -m weft.proof.compiled_searched`."""
    assert sum(bool(one.compiled) for one in searched()) >= 10
    text = aot_page.compiled_page([], searched())
    for one in searched():
        assert (f'| {one.name} | {one.case.chips} {one.case.chip}' in text) == bool(one.compiled)


@pytest.mark.parametrize('name', RECORDED)
def test_what_the_search_chooses_fits_as_planned(name):
    _, _, choice, compiled = next(one for one in searched() if one.name == name)
    assert compiled, 'another choice than was compiled: python -m weft.proof.compiled_searched'
    assert compiled.fits
    assert choice.total == pytest.approx(compiled.memory['total'], rel=0.15)
    assert aot_page.total_bytes(aot_page.run_traffic(choice.run)) == pytest.approx(
        aot_page.total_bytes(compiled.sent), rel=0.025
    )


def test_what_a_compiler_refused_was_not_planned_to_fit():
    records = {pair: aot_pairs.compiled_before(pair) for pair in aot_pairs.PAIRS}
    refused = [pair for pair, found in records.items() if found and found.status == 'does not fit']
    assert refused
    for pair in refused:
        assert aot_page.plan_pair(pair).memory.total > CHIPS[pair.chip].memory_bytes


def test_an_axis_that_is_cut_into_groups_is_still_that_axis():
    sent = Traffic(
        {('all_gather', 'data (groups of 4)'): Sent(1, 10), ('all_gather', 'data (groups of 2)'): Sent(1, 5)}
    )
    assert aot_page.by_axes(sent) == {'data': {'all_gather': 15}}


def test_the_page_has_a_line_for_each_record_and_more_for_those_that_are_shown():
    text = aot_page.compiled_page(list(ROWS.values()), [])
    for row in ROWS.values():
        mesh = row.pair.config.mesh
        assert f'| {row.pair.model} | {row.pair.what} | {mesh.size:,} {row.pair.chip} | {mesh} |' in text
        assert (f'### {row.pair.model}, {row.pair.what}, {mesh.size:,} {row.pair.chip}' in text) == row.pair.shown


def test_a_pair_without_a_record_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(aot_pairs, 'RECORDS', tmp_path)
    assert aot_page.compiled_rows() == []
