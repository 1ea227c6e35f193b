"""Models that are trained on something known (interpret/planted): the instruments find it.

One seed each; `python -m weft.interpret.planted` has three, and the heads that copy, which take longest. What names those is
held to heads that are written by hand in test_xray_planted.py.
"""

import numpy as np
import pytest

from tests.models import on
from weft.interpret.planted import facts, senses
from weft.interpret.planted.__main__ import main
from weft.interpret.planted.training import train
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig


@pytest.fixture(autouse=True)
def one_device():
    with on(MeshConfig()):
        yield


def test_the_senses_of_a_word_part_where_a_probe_and_patching_say():
    found = senses.measure(0)
    assert found.found, found
    assert found.row, 'in the embedding there is one word'
    assert found.probe[0].value < 0.65
    assert found.swapped[0].value == 0, 'the embedding is the same word'
    assert 0.4 < found.control.value < 0.6
    assert found.swapped[-1].value == 1


def test_the_cells_of_a_fact_hold_it_and_no_other():
    found = facts.measure(0, draws=2)
    assert found.found, found
    assert found.least_own >= 0.5
    assert found.most_others <= 0.1
    assert found.most_random <= 0.05
    assert found.cells.value < 16


def test_the_table_of_facts_tells_nothing_by_one_name():
    fact_P3 = facts.table(np.random.default_rng(3))
    for name in (0, 1):
        for one in np.unique(fact_P3[:, name]):
            assert len(set(fact_P3[fact_P3[:, name] == one, 2])) == facts.NAMES
    assert len({tuple(row) for row in fact_P3[:, :2].tolist()}) == facts.FACTS


def test_what_is_not_learnt_is_said():
    config = facts.config(0, steps=25)
    rows = np.zeros((2, 4), np.int32)
    with pytest.raises(UserError, match='facts: not learnt after 25 steps'):
        train(config, lambda rng, count: np.resize(rows, (count, 4)), lambda model: False)


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (['fact'], "'fact': there is no such experiment; did you mean 'facts'?"),
        (['--seeds', '0'], '--seeds is 0: it must be from 1 to 1000'),
    ],
)
def test_mistakes(arguments, line):
    with pytest.raises(UserError) as error:
        main(arguments)
    assert str(error.value).startswith(line.split('; ')[0])
