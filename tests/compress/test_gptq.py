"""GPTQ against a reference that updates every weight after each input and eliminates that input from the inverse Hessian.

Letters: I inputs, O outputs, N tokens.
"""

import numpy as np
import pytest

from weft.compress.numerics.gptq import gptq
from weft.compress.numerics.rounding import decode, int4, int8
from weft.compress.numerics.svd import errors
from weft.runtime.errors import UserError

RNG = np.random.default_rng(0)
W_IO = RNG.standard_normal((150, 6))
# Inputs of a model: few directions have most of the energy.
X_NI = RNG.standard_normal((400, 150)) * 0.95 ** np.arange(150) @ RNG.standard_normal((150, 150))
GRAM_II = X_NI.T @ X_NI


def reference(w_IO: np.ndarray, gram_II: np.ndarray, kind: str, group: int, damping: float) -> np.ndarray:
    """Equations 2 and 3 of arXiv:2210.17323 for inputs in their order, with no shortcut."""
    w_IO = w_IO.copy()
    hessian_II = gram_II + damping * np.diag(gram_II).mean() * np.eye(len(gram_II))
    inverse = np.linalg.inv(hessian_II)  # of the inputs from i on
    found_IO = np.zeros_like(w_IO)
    scale = (np.abs(w_IO).max(0) / 127).astype(np.float32).astype(np.float64)
    for i in range(len(w_IO)):
        if kind == 'int4' and i % group == 0:
            scale = (np.abs(w_IO[i : i + group]).max(0) / 7).astype(np.float16).astype(np.float64)
        least, most = (-127, 127) if kind == 'int8' else (-8, 7)
        found_IO[i] = np.clip(np.round(w_IO[i] / scale), least, most) * scale
        error = (w_IO[i] - found_IO[i]) / inverse[0, 0]
        w_IO[i:] -= np.outer(inverse[:, 0], error)
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return found_IO


@pytest.mark.parametrize(
    ('kind', 'group'), [('int8', 32), ('int4', 32), ('int4', 50), ('int4', 7), ('int4', 150), ('int4', 1000)]
)
def test_it_is_the_reference(kind, group):
    found = gptq(W_IO, GRAM_II, kind, group, 0.01)
    np.testing.assert_allclose(decode(found), reference(W_IO, GRAM_II, kind, group, 0.01), atol=1e-9)
    assert (found.axis, found.group) == (0, None if kind == 'int8' else group)
    plain = int8(W_IO, 0) if kind == 'int8' else int4(W_IO, 0, group)
    assert (found.codes.dtype, found.scale.dtype, found.scale.shape) == (np.int8, plain.scale.dtype, plain.scale.shape)


@pytest.mark.parametrize(('kind', 'most'), [('int8', 0.7), ('int4', 0.7)])
def test_outputs_of_correlated_inputs_are_nearer_than_of_round_to_nearest(kind, most):
    plain = int8(W_IO, 0) if kind == 'int8' else int4(W_IO, 0)
    of_nearest = errors(W_IO, decode(plain), GRAM_II)
    found = errors(W_IO, decode(gptq(W_IO, GRAM_II, kind)), GRAM_II)
    assert found.weighted < most * of_nearest.weighted
    assert found.frobenius > of_nearest.frobenius  # it pays with weights for outputs
    if kind == 'int4':
        searched = errors(W_IO, decode(gptq(W_IO, GRAM_II, kind, search=True)), GRAM_II)
        assert searched.weighted < found.weighted


def test_of_white_inputs_it_is_round_to_nearest():
    for gram_II in (np.eye(150), np.diag(RNG.random(150)), np.zeros((150, 150))):
        np.testing.assert_array_equal(decode(gptq(W_IO, gram_II, 'int4')), decode(int4(W_IO, 0)))
        np.testing.assert_array_equal(decode(gptq(W_IO, gram_II, 'int8')), decode(int8(W_IO, 0)))


def test_inputs_that_no_token_has_are_rounded_to_nearest():
    x_NI = X_NI.copy()
    x_NI[:, 96:128] = 0
    found = decode(gptq(W_IO, x_NI.T @ x_NI, 'int4'))
    np.testing.assert_array_equal(found[96:128], decode(int4(W_IO, 0))[96:128])
    assert np.isfinite(found).all()


def test_fewer_tokens_than_inputs_need_damping():
    few_II = X_NI[:20].T @ X_NI[:20]
    plain = errors(W_IO, decode(int4(W_IO, 0)), few_II).weighted
    assert errors(W_IO, decode(gptq(W_IO, few_II, 'int4')), few_II).weighted < 0.5 * plain
    singular_II = np.ones((150, 150))
    with pytest.raises(UserError, match=r'damping is 0: the Gram matrix is singular and needs more; 0\.01 is usual'):
        gptq(W_IO, singular_II, 'int4', damping=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match='damping is -1: it must be at least 0'):
        gptq(W_IO, GRAM_II, 'int8', damping=-1)
    with pytest.raises(UserError, match='group is 0: it must be at least 1'):
        gptq(W_IO, GRAM_II, 'int4', group=0)
    with pytest.raises(UserError, match='the Gram matrices have 1 numbers'):
        gptq(np.ones((1, 1)), np.full((1, 1), np.nan), 'int8')
