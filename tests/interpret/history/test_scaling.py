"""The fitted law of size: planted numbers come back."""

import numpy as np
import pytest

from weft.interpret.history.scaling import fit, without_one
from weft.runtime.errors import UserError

SIZES = np.geomspace(1e4, 3e6, 8)


@pytest.mark.parametrize(('offset', 'factor', 'exponent'), [(2.0, 30.0, 0.4), (0.7, 400.0, 0.6), (1.2, 8.0, 0.15)])
def test_a_planted_law_comes_back(offset, factor, exponent):
    law = fit(SIZES.tolist(), (offset + factor * SIZES**-exponent).tolist())
    assert law[:3] == pytest.approx((offset, factor, exponent), rel=1e-3)
    assert law.error < 1e-6
    np.testing.assert_allclose(law(SIZES), offset + factor * SIZES**-exponent, rtol=1e-6)


def test_noise_is_told_by_the_error_and_by_leaving_out_a_run():
    noise = np.random.default_rng(0).normal(size=8)
    bits = (2 + 30 * SIZES**-0.4) * np.exp(0.01 * noise)
    law, (low, high) = fit(SIZES.tolist(), bits.tolist()), without_one(SIZES.tolist(), bits.tolist())
    assert 0.003 < law.error < 0.02
    assert law.exponent == pytest.approx(0.4, abs=0.15)
    assert low < law.exponent < high
    # The least squares: no near law has a smaller error.
    error = lambda e, a, alpha: np.sqrt((np.log((e + a * SIZES**-alpha) / bits) ** 2).mean())
    for factors in np.random.default_rng(1).normal(1, 0.02, (50, 3)):
        assert error(*(np.array(law[:3]) * factors)) >= law.error


def test_mistakes():
    with pytest.raises(UserError, match=r'^a law of three numbers is fitted to 3 sizes: at least 4 are needed$'):
        fit([1, 2, 3], [3, 2, 1])
    with pytest.raises(UserError, match=r'^sizes and losses of a law must be finite and above 0$'):
        fit([1, 2, 3, 4], [3, 2, 1, 0])
