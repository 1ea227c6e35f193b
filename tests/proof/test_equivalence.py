"""A part of scripts/prove.py: some of its meshes, and each planted fault, which must be caught; and that it resumes."""

import json

import pytest

from weft.proof import cases as proof_cases
from weft.proof import equivalence as proof
from weft.proof import faults as proof_faults
from weft.proof import page as proof_page
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, factorizations

# Every axis is on in two of them or more, and every two of neighbouring axes in one.
CHOSEN = [
    ('dense', MeshConfig(replica=2, stage=2, data=2)),
    ('dense', MeshConfig(stage=2, context=2, tensor=2)),
    ('all_gather', MeshConfig(replica=2, context=2, expert=2)),
    ('all_gather', MeshConfig(stage=4, expert=2)),
    ('all_to_all', MeshConfig(data=2, context=2, expert=2)),
    ('ragged', MeshConfig(stage=2, expert=2, tensor=2)),
    ('ragged', MeshConfig(replica=2, expert=4)),
]


@pytest.mark.parametrize(('kind', 'mesh'), CHOSEN, ids=lambda value: str(value))
def test_loss_and_gradient_are_one_devices(kind, mesh):
    found = proof.gradient_error(kind, mesh)
    assert proof_cases.holds(f'gradient/{kind}/{mesh}', found), found


@pytest.mark.parametrize('mesh', [MeshConfig(stage=2, context=2, tensor=2), MeshConfig(replica=2, data=2, expert=2)])
def test_initial_parameters_are_one_devices_bit_for_bit(mesh):
    assert proof.initial_error('all_gather', mesh)['error'] == 0


@pytest.mark.parametrize('fault', proof_faults.FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(fault):
    found = proof_faults.fault_error(fault)
    assert proof_faults.caught(found), found


def test_all_56_meshes_are_in_it_for_each_model():
    cases = proof_cases.cases()
    for kind in proof.MODELS:
        meshes = {case.split('/')[2] for case in cases if case.startswith(f'gradient/{kind}/')}
        assert len(meshes) == len(list(factorizations(8, 6))) == 56
    assert all(sum(getattr(mesh, axis) > 1 for mesh in proof.LONG) >= 4 for axis in proof.AXES)


def test_a_result_is_kept_for_the_code_that_it_came_from(tmp_path):
    path, calls = tmp_path / 'proof.jsonl', []

    def compute():
        calls.append(1)
        return {'error': 1e-15, 'loss': 0.0}

    case = f'gradient/dense/{proof.MESHES[0]}'
    assert proof_cases.Results(path).run(case, compute)[1] is False
    results = proof_cases.Results(path)
    assert results.run(case, compute)[1] is True
    assert len(calls) == 1
    page = proof_page.proof_page(results, proof_cases.cases())
    assert '1.0e-15' in page
    assert f'Not run yet: {len(proof_cases.cases()) - 1} of {len(proof_cases.cases())}' in page
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {'code': 'other'}) + '\n')
    assert proof_cases.Results(path).run(case, compute)[1] is False


def test_a_result_that_a_kill_cut_short_is_computed_again(tmp_path):
    path = tmp_path / 'proof.jsonl'
    first, second = proof_cases.Results(path), {'error': 1e-15, 'loss': 0.0}
    first.run('a', lambda: second)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:-9])
    again = proof_cases.Results(path)
    assert [*again.found] == ['a']
    again.run('b', lambda: second)
    assert [*proof_cases.Results(path).found] == ['a', 'b']
    path.write_bytes(whole + b'[]\n')
    with pytest.raises(UserError, match=r'--results .*proof\.jsonl:2: no figures of a case; take the file away'):
        proof_cases.Results(path)


@pytest.mark.parametrize(
    ('found', 'right'),
    [
        ({'loss': 0.0, 'error': 9e-11}, True),
        ({'loss': 0.0, 'error': 2e-10}, False),
        ({'loss': 1e-9, 'error': 0.0}, False),
        ({'loss': 0.0, 'error': float('nan')}, False),
    ],
)
def test_what_holds(found, right):
    assert proof_cases.holds('gradient/dense/data=8', found) is right


def test_what_holds_of_whole_runs():
    near, far = {'error': 9e-6, 'error of 50': 9e-5}, {'error': 9e-6, 'error of 50': 2e-4}
    assert proof_cases.holds('losses/dense/data=8', near)
    assert not proof_cases.holds('losses/dense/data=8', far)
    assert not proof_cases.holds('losses/all_gather/data=8', near)  # in float64
