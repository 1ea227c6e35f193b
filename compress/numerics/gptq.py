"""GPTQ: weights rounded input by input, what each rounding does wrong made good by the inputs that are still to come.

Letters: I inputs, O outputs, S inputs of a group.
"""

from typing import Literal

import numpy as np

from weft.compress.numerics.checks import finite
from weft.compress.numerics.rounding import (
    GROUP,
    INT4_LEAST,
    INT4_MOST,
    INT8_MOST,
    Rounded,
    check_group,
    int4_scale,
    int8_scale,
    nearest_codes,
)
from weft.runtime.errors import UserError

BLOCK = 128  # inputs after which those beyond are updated in one matrix product


def gptq(
    w_IO: np.ndarray,
    gram_II: np.ndarray,
    kind: Literal['int8', 'int4'],
    group: int | None = None,
    damping: float = 0.01,
    search: bool = False,
) -> Rounded:
    """Rounds a weight so that ‖X(W − Q)‖_F is small, for inputs X whose XᵀX is known (Frantar et al. 2022, arXiv:2210.17323).

    Inputs are rounded in their order. With U Cholesky's upper factor of the inverse Hessian, the error of input i, divided by
    U_ii, is taken from each later input j times U_ij (algorithm 1). int8 has one scale an output, that of `rounding.int8` for
    the weight as it is. int4 chooses the scales of a group from the weights as they are when the group begins, with all updates
    from inputs before it. Blocks end where groups do, so that they change nothing but speed.

    Args:
        w_IO: weights, [I, O].
        gram_II: XᵀX of the inputs, [I, I], summed or averaged over tokens; it may be singular. All zeros: the identity.
        kind: `int8` or `int4`, as rounding.py defines them.
        group: inputs that share a scale of int4, 32 where it is None; of no use to int8.
        damping: is added to the diagonal of the Gram matrix, as a share of the diagonal's mean. UserError where it is below 0,
            or 0 and the matrix is singular.
        search: for the scales of int4, as in `rounding.int4`.

    Returns:
        codes [I, O] and scales with axis 0, as `rounding.int8` and `rounding.int4` give them.
    """
    w_IO = finite(w_IO).copy()
    inputs = len(w_IO)
    factor_II = _inverse_factor(finite(gram_II, 'the Gram matrices'), damping)
    if kind == 'int8':
        group, block = None, BLOCK
        least, most, scales = -INT8_MOST, INT8_MOST, [int8_scale(w_IO, 0)]
    else:
        group = GROUP if group is None else group
        check_group(group)
        block = group * max(BLOCK // group, 1)
        least, most, scales = INT4_LEAST, INT4_MOST, []
    codes_IO = np.zeros(w_IO.shape, np.int8)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        error_SO = np.zeros((end - start, w_IO.shape[1]))
        for i in range(start, end):
            if group is not None and i % group == 0:
                scales.append(int4_scale(w_IO[i : i + group].T, search).T)
            codes_IO[i] = nearest_codes(w_IO[i], scales[-1][0], least, most)
            error_SO[i - start] = (w_IO[i] - codes_IO[i] * scales[-1][0].astype(np.float64)) / factor_II[i, i]
            w_IO[i + 1 : end] -= factor_II[i, i + 1 : end, None] * error_SO[i - start]
        w_IO[end:] -= factor_II[start:end, end:].T @ error_SO
    return Rounded(codes_IO, np.concatenate(scales), 0, group)


def _inverse_factor(gram_II: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U with UᵀU = H⁻¹ of the damped Gram matrix H.

    With the order of inputs reversed, H = LLᵀ of Cholesky gives U = L⁻¹ reversed back, and H⁻¹ itself is never formed.
    """
    if damping < 0:
        raise UserError(f'damping is {damping}: it must be at least 0; 0.01 is usual')
    mean = float(np.diag(gram_II).mean())
    if mean <= 0:
        return np.eye(len(gram_II))
    damped_II = (gram_II + gram_II.T) / 2 + damping * mean * np.eye(len(gram_II))
    try:
        lower_II = np.linalg.cholesky(damped_II[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise UserError(f'damping is {damping}: the Gram matrix is singular and needs more; 0.01 is usual') from None
    return np.linalg.inv(lower_II)[::-1, ::-1]
