"""Rotary frequencies."""

import jax.numpy as jnp
import numpy as np
import pytest

from weft.model.config import RopeScaling, model_of
from weft.model.layers.rope import frequencies
from weft.runtime.errors import UserError


@pytest.mark.parametrize('dims', [24, 96, 128])
def test_frequencies_are_the_nearest_float32(dims):
    turn_1h, gain = frequencies(1e4, dims, jnp.zeros((1, 1), jnp.int32), None, jnp.float32)
    exact_h = 1e4 ** (-np.arange(dims // 2) / (dims // 2))
    assert gain == 1
    np.testing.assert_array_equal(turn_1h[0], exact_h.astype(np.float32))


def test_longrope_has_a_factor_for_each_pair_that_turns():
    model = {'layers': 1, 'model_dim': 64, 'attention.heads': 2, 'mlp.dim': 64, 'positions.fraction': 0.75}
    scaling = RopeScaling(
        kind='longrope', factor=2, original_positions=64, short_factors=(1,) * 12, long_factors=(2,) * 12
    )
    assert model_of(model | {'positions.scaling': scaling}).rotary_dim == 24
    with pytest.raises(UserError, match=r'short_factors has 12 numbers: one is needed for each of the 16 pairs'):
        model_of(model | {'positions.fraction': 1.0} | {'positions.scaling': scaling})
