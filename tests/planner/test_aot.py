"""Asking a compiler: which machine, which environment, and every way in which it may end."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig
from weft.planner import aot
from weft.planner.aot import Compiled, compile_step
from weft.planner.aot_worker import needed
from weft.planner.topology import GPUS, compile_target
from weft.planner.traffic.tables import Sent, Traffic
from weft.proof import compiled_pairs as aot_pairs
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.config import RunConfig, TrainingConfig

RUN = RunConfig(
    name='x',
    mesh=MeshConfig(data=8),
    model=ModelConfig(
        vocabulary=256,
        layers=2,
        model_dim=64,
        attention=AttentionConfig(heads=4),
        mlp=MLPConfig(dim=64),
    ),
    compute=ComputeConfig(dtype='bfloat16'),
    training=TrainingConfig(steps=1, batch=8, sequence_length=32),
)


@pytest.mark.parametrize(
    ('chip', 'count', 'name'),
    [
        ('v5p', 4, 'v5p:2x2x1'),
        ('v5p', 8, 'v5p:2x2x2'),
        ('v5p', 1024, 'v5p:8x8x16'),
        ('v5p', 2048, 'v5p:8x16x16'),
        ('v4', 64, 'v4:4x4x4'),
        ('v6e', 8, 'v6e:2x4'),
        ('v6e', 64, 'v6e:8x8'),
        ('v5e', 256, 'v5e:16x16'),
        ('v7x', 128, 'tpu7x:4x4x4'),
        ('h100', 4, '1x1x4'),
        ('h100', 256, '1x32x8'),
    ],
)
def test_a_machine_of_a_chip_and_a_count(chip, count, name):
    assert compile_target(chip, count).name == name


@pytest.mark.parametrize(
    ('chip', 'count', 'words'),
    [
        ('v6e', 512, 'nearest that works: 256'),
        ('v5p', 24, 'nearest that works: 16'),
        ('h100', 12, 'nearest that works: 16'),
        ('v7x', 7, 'nearest that works: 8'),
        ('mi300x', 8, "no compiler here for chip 'mi300x'"),
    ],
)
def test_a_machine_that_does_not_exist_is_refused_with_the_nearest(chip, count, words):
    with pytest.raises(UserError, match=words):
        compile_target(chip, count)


def test_each_gpu_is_told_to_the_compiler_with_its_own_memory():
    for chip, gpu in GPUS.items():
        assert f'device_memory_size: {gpu.memory}' in compile_target(chip, 8).description


# Ways to end ----------------------------------------------------------------------------------------------------------

TABLE = {'bytes': {'all_gather over data': [2, 100]}, 'unknown': []}
MEMORY = {'arguments': 5, 'outputs': 4, 'aliased': 4, 'temporaries': 3, 'code': 1, 'total': 8}
ANSWER = {'status': 'compiled', 'seconds': {'compile': 1.0}, 'memory': MEMORY, 'sent': TABLE, 'asked': TABLE}


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Puts a program in the worker's place, and gives what `compile_step` makes of it."""

    def run(program: str, **options) -> Compiled:
        path = tmp_path / 'python'
        path.write_text(f'#!{sys.executable}\nimport json, os, sys, time\nrequest = json.load(sys.stdin)\n{program}\n')
        path.chmod(0o755)
        monkeypatch.setattr(aot, 'interpreter', lambda platform: str(path))
        return compile_step(RUN, options.pop('chip', 'v5p'), **options)

    return run


def test_what_was_compiled_is_read(worker):
    found = worker(f'print("noise"); print(json.dumps({ANSWER}))')
    assert found.status == 'compiled'
    assert found.fits
    assert found.memory == MEMORY
    assert found.sent.sent == {('all_gather', 'data'): Sent(2, 100)}
    assert found.unplanned() == []


def test_the_request_is_the_run_that_was_asked_for(worker):
    program = f'answer = {ANSWER}; answer["message"] = json.dumps(request); print(json.dumps(answer))'
    request = json.loads(worker(program, what='decode', rows=16, length=64, chip='h100').message)
    assert (request['what'], request['rows'], request['length']) == ('decode', 16, 64)
    assert (request['platform'], request['topology']) == ('cuda', '1x1x8')
    assert 'H100' in request['description']


def test_a_compiler_that_takes_too_long_is_ended_and_that_is_not_taken_for_a_lack_of_memory(worker):
    found = worker('time.sleep(60)', timeout=0.5)
    assert (found.status, found.fits) == ('not finished', None)
    assert 'after 0.5 s' in found.message


def test_a_compiler_that_is_killed_has_not_finished(worker):
    found = worker('os.kill(os.getpid(), 9)')
    assert (found.status, found.fits) == ('not finished', None)
    assert 'signal 9' in found.message


def test_a_program_that_the_compiler_finds_too_large_does_not_fit(worker):
    answer = {'status': 'does not fit', 'seconds': {}, 'message': 'Ran out', 'needed': 200, 'available': 100}
    found = worker(f'print(json.dumps({answer}))')
    assert (found.status, found.fits, found.memory, found.available) == ('does not fit', False, {'total': 200}, 100)


def test_a_program_that_is_compiled_may_be_too_large(worker):
    answer = ANSWER | {'memory': MEMORY | {'total': 10**12}}
    assert worker(f'print(json.dumps({answer}))').fits is False


def test_any_other_end_is_a_failure_with_its_words(worker):
    found = worker('sys.exit("no such collective")')
    assert (found.status, found.fits) == ('failed', None)
    assert 'no such collective' in found.message


def test_a_mesh_that_does_not_divide_is_refused_before_a_compiler_starts(worker):
    with pytest.raises(UserError, match='the number of rows is 12'):
        worker('sys.exit(1)', what='decode', rows=12)


def test_without_a_compiler_the_target_that_makes_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, 'ROOT', tmp_path)
    monkeypatch.setattr(aot, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='make compilers'):
        aot.interpreter('tpu')


def test_what_the_compiler_says_it_lacks():
    message = 'Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm. Exceeded hbm capacity by 24.76G.'
    assert needed(message) == {'needed': int(120.5 * 2**30), 'available': int(95.74 * 2**30)}
    assert needed('out of luck') == {}


def test_traffic_that_nobody_asked_for_is_told():
    asked, sent = Traffic(), Traffic()
    asked.add('reduce_scatter', 'data', 100)
    sent.add('all_reduce', 'data', 200)
    found = Compiled('compiled', {}, {'total': 1}, 2, sent, asked)
    assert [line.split(':')[0] for line in found.unplanned()] == ['all_reduce over data']


# Records --------------------------------------------------------------------------------------------------------------


def test_a_record_gives_back_what_was_written(tmp_path):
    pair = aot_pairs.PAIRS[0]
    table = Traffic({('all_gather', 'data'): Sent(2, 100)}, ['trips of %while'])
    found = Compiled('compiled', {'compile': 1.5}, MEMORY, 10, table, Traffic())
    aot_pairs.write_record(tmp_path / 'x.json', pair.request(), found)
    request, again = aot_pairs.read_record(tmp_path / 'x.json')
    assert again == found
    assert request == pair.request()


def test_a_pair_is_compiled_once_and_anew_when_it_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(aot_pairs, 'RECORDS', tmp_path)
    pair = aot_pairs.PAIRS[0]
    assert not aot_pairs.compiled_before(pair)
    for status, known in (('not finished', False), ('compiled', True)):
        aot_pairs.write_record(
            tmp_path / f'{pair.name}.json', pair.request(), Compiled(status, {}, {'total': 1}, 1, Traffic(), Traffic())
        )
        assert bool(aot_pairs.compiled_before(pair)) == known
    changed = dataclasses.replace(pair, overrides=pair.overrides.replace('batch=8', 'batch=16'))
    assert changed.name == pair.name
    assert not aot_pairs.compiled_before(changed)


def test_pairs_have_names_of_their_own_and_meshes_that_divide_their_models():
    names = [pair.name for pair in aot_pairs.PAIRS]
    assert len(set(names)) == len(names)
    for pair in aot_pairs.PAIRS:
        compile_target(pair.chip, pair.config.mesh.size)
        if pair.what == 'train':
            pair.config.check_sizes()


def test_every_record_belongs_to_a_pair():
    names = {pair.name for pair in aot_pairs.PAIRS}
    records = list(Path(aot_pairs.RECORDS).glob('*.json'))
    assert records
    assert {path.stem for path in records} <= names
