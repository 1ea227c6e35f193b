"""A few spoiled folders of each seed's: `python -m tests.fuzz.folders` tries thousands."""

import os
from pathlib import Path

import pytest

from tests.fuzz import folders

SEED = int(os.environ.get('WEFT_FUZZ_SEED', '1'))
COUNT = 120


@pytest.fixture(scope='module')
def bases(tmp_path_factory) -> Path:
    return folders.write_bases(tmp_path_factory.mktemp('bases'))


@pytest.mark.parametrize('base', folders.BASES)
def test_a_folder_that_nobody_spoiled_becomes_a_run(base, bases, tmp_path):
    assert folders.outcome(bases / base, tmp_path / 'run') == 'accepted'


def test_a_spoiled_folder_becomes_what_it_says_or_one_line_says_why_not(bases, tmp_path):
    outcomes = []
    for case in folders.cases(SEED, COUNT):
        place = tmp_path / str(case.number)
        place.mkdir()
        outcomes.append(folders.check(case, bases, place))
    assert set(outcomes) == {'accepted', 'refused'}
