"""Each way in which a case may fail is reported as a fault of that case, and the next case runs."""

import pytest

from tests.fuzz import workers
from tests.fuzz.fakes import part as fake

PART = 'tests.fuzz.fakes.part'
WRONG = {
    'said': 'SCRATCH/file is not as it should be',
    'raises': 'ValueError: two lines (tests/fuzz/fakes/part.py:',
    'swallows': 'took more than 1.5 s',
    'panics': 'Panic: index out of bounds',
    'leaves': 'SystemExit: 0',
    'loops': 'took more than 0.5 s of the processor',
    'memory': 'MemoryError: ',
    'dies': 'the worker died of SIGSEGV: ',
    'exits': 'the worker died of exit code 3: terminate called',
    'hangs': 'hangs: nothing came within 2 s',
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(workers, 'GRACE', 0.5)


def test_every_way_to_fail_is_a_fault_of_its_case_and_the_others_are_checked(tmp_path, impatient):
    told = []
    names = workers.named(fake, 3, len(fake.WAYS))
    found = workers.run(PART, 3, names, tmp_path, tell=told.append)
    assert [(one.number, one.name) for one in found] == list(enumerate(fake.WAYS)), 'each once'
    assert {one.number for one in told} == set(names)
    for one in found:
        assert (one.wrong or '').startswith(WRONG.get(one.name, '')), one
        assert (one.wrong is None) == (one.name not in WRONG), one
    assert {one.name: one.outcome for one in found}['noted'] == 'refused'
    assert {one.outcome for one in found if one.wrong} == {'wrong'}
    assert not list(tmp_path.glob('*/case-*')), 'nothing of a case is left'
    assert list(tmp_path.glob('*/shared')), 'what cases share is left'


def test_workers_that_cannot_begin_are_no_faults_of_cases(tmp_path):
    with pytest.raises(RuntimeError, match=r'workers of tests\.fuzz\.fakes\.broken do not begin: .*no module of use'):
        workers.run('tests.fuzz.fakes.broken', 0, {0: 'one'}, tmp_path)
