"""The plan before a run refuses what cannot fit, and says what does."""

import dataclasses
import re
import types

import jax
import pytest

from weft.model.config import AttentionConfig, MLPConfig, ModelConfig
from weft.planner.fits import available_memory, changed, memory_of, nearest_that_fits, plan_first
from weft.planner.memory import training_memory
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.config import RunConfig, TrainingConfig, parse

RUN = RunConfig(
    name='x',
    mesh=MeshConfig(data=2, tensor=2),
    model=ModelConfig(
        vocabulary=512,
        layers=8,
        model_dim=256,
        attention=AttentionConfig(heads=4),
        mlp=MLPConfig(dim=1024),
    ),
    training=TrainingConfig(steps=1, batch=16, sequence_length=512),
)


def device(limit: float, platform: str = 'gpu', kind: str = 'NVIDIA H100 80GB HBM3'):
    return types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: {'bytes_limit': limit})


def test_a_run_that_fits_goes_on_with_one_line():
    line = plan_first(RUN, device(80e9))
    assert re.fullmatch(
        r'plan: 0\.\d+ GiB a device of 74\.51 GiB, [\d.e-]+ s a step at least, [\d.e-]+ s predicted', line
    )


@pytest.mark.parametrize('share', [0.9, 0.6, 0.4, 0.2])
def test_a_run_that_does_not_is_refused_with_what_fits(share):
    needed = training_memory(RUN, 'gpu').total
    with pytest.raises(UserError, match=r'a step of this run needs .* on each device, .* nearest that fits: ') as error:
        plan_first(RUN, device(needed * share))
    told = re.search(r'nearest that fits: (.*?);', str(error.value))[1]
    changes = dict(part.split('=') for part in told.split())
    tried = changed(RUN, {key: value if key == 'compute.remat' else int(value) for key, value in changes.items()})
    assert training_memory(tried, 'gpu').total <= needed * share
    line = plan_first(RUN, device(needed * share), force=True)
    assert re.fullmatch(r'plan: .* GiB a device of .* GiB: does not fit, and is tried as --force says', line)


def test_the_least_change_comes_first():
    needed = training_memory(RUN, 'gpu').total
    assert nearest_that_fits(RUN, 'gpu', needed * 0.95).startswith('nearest that fits: training.accumulation=2')
    assert nearest_that_fits(RUN, 'gpu', needed * 0.12).startswith('nearest that fits: mesh.')
    assert nearest_that_fits(RUN, 'gpu', 1.0).startswith('no other mesh')


def test_simulated_devices_share_what_the_machine_has_left():
    (cpu,) = jax.devices()[:1]
    one, eight = (memory_of(cpu, MeshConfig(data=n), 1) for n in (1, 8))
    assert one.bytes / 8 == pytest.approx(eight.bytes, rel=0.2)
    assert one.bytes > 2**28


def test_a_group_of_processes_may_have_less_than_the_machine(tmp_path):
    (tmp_path / 'meminfo').write_text('MemTotal: 900 kB\nMemAvailable: 800 kB\n')
    assert available_memory(tmp_path / 'meminfo', tmp_path) == 800 * 1024
    (tmp_path / 'memory.max').write_text('600000\n')
    (tmp_path / 'memory.current').write_text('100000\n')
    assert available_memory(tmp_path / 'meminfo', tmp_path) == 500_000
    (tmp_path / 'memory.max').write_text('max\n')
    assert available_memory(tmp_path / 'meminfo', tmp_path) == 800 * 1024
    assert available_memory(tmp_path / 'none', tmp_path / 'none') is None


def test_a_device_that_tells_nothing_and_is_not_described_is_not_judged():
    strange = types.SimpleNamespace(platform='gpu', device_kind='NVIDIA T4', memory_stats=lambda: None)
    assert plan_first(RUN, strange).endswith('GiB a device')


def test_a_tokenizer_that_is_still_to_be_made_counts_as_asked_for():
    run = parse(
        '{name: x, model: {layers: 1, model_dim: 64, attention: {heads: 1}, mlp: {dim: 64}}, data: {vocabulary: 384}, '
        'training: {steps: 1, batch: 1, sequence_length: 64}}',
        'x',
    )
    known = dataclasses.replace(run, model=dataclasses.replace(run.model, vocabulary=384))
    assert plan_first(run, device(1e9)) == plan_first(known, device(1e9))
