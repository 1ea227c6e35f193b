"""Benchmarks: what cannot be measured is said before the work."""

import pytest

from weft.model.config import AttentionConfig, MLPConfig, ModelConfig
from weft.proof import speed as measure
from weft.runtime.errors import UserError
from weft.training.config import RunConfig, TrainingConfig

RUN = RunConfig(
    name='x',
    model=ModelConfig(vocabulary=64, layers=1, model_dim=32, attention=AttentionConfig(heads=2), mlp=MLPConfig(dim=32)),
    training=TrainingConfig(steps=1, batch=1, sequence_length=16),
)


WAYS = {
    'train': lambda: measure.measure_training(RUN, 2, profile=3),
    'decode': lambda: measure.measure_decoding(RUN, 1, 8, 8, profile=3),
}


@pytest.mark.parametrize('what', WAYS)
def test_a_profile_that_a_cpu_has_not_is_refused_before_a_model_is_made(monkeypatch, what):
    monkeypatch.setattr(measure, 'init', None)  # it would be called
    monkeypatch.setattr(measure.jax, 'default_backend', lambda: 'cpu')
    with pytest.raises(UserError, match='--profile: a CPU has no kernels to list; use an accelerator'):
        WAYS[what]()


def test_a_step_that_captures_takes_turns_with_one_that_does_not(monkeypatch):
    asked = []
    true = measure.train_step
    monkeypatch.setattr(measure, 'train_step', lambda *rest, taps: asked.append(taps) or true(*rest, taps=taps))
    monkeypatch.setattr(measure, 'peak_flops', lambda config: (None, ''))
    found = measure.measure_training(RUN, 1, taps=['residual.*'])
    assert asked == [(), ['residual.*']]
    low, high = found['taps_ratio_range']
    assert 0 < low == found['taps_ratio'] == high
    with pytest.raises(UserError, match="'residuals': no layer offers such an activation; known: attention"):
        measure.measure_training(RUN, 1, taps=['residuals'])


def test_tokens_a_second_are_those_of_all_rows_and_those_of_each():
    found = measure.measure_decoding(RUN, 4, 8, 8)
    assert found['tokens_per_second'] == pytest.approx(4 / found['step_seconds'])
    assert found['tokens_per_second_per_row'] == pytest.approx(1 / found['step_seconds'])
