"""What to leave out: masks of single weights, and scores of heads, hidden units, layers and experts.

A score says what leaving something out would cost: the lowest go first. Masks are bool, True where a weight is kept.

Letters: I inputs, O outputs, H heads, D dims of a head, F hidden units of a feed-forward, L layers, N tokens, M model dims,
K experts that a token goes to, E experts.
"""

from typing import NamedTuple

import numpy as np

from weft.compress.numerics.checks import check_share, finite
from weft.runtime.errors import UserError


def magnitude(w: np.ndarray, share: float) -> np.ndarray:
    """The mask that keeps the largest weights of a whole matrix by absolute value (Han et al. 2015, arXiv:1506.02626).

    Args:
        w: weights of any shape.
        share: of the weights that are kept, above 0 and at most 1, or UserError: as many as are nearest to it. Of equal ones
            the first are kept.
    """
    check_share(share)
    w = finite(w)
    return _highest(np.abs(w).reshape(1, -1), share).reshape(w.shape)


def wanda(w_IO: np.ndarray, norm_I: np.ndarray, share: float) -> np.ndarray:
    """The mask that keeps, of each output's weights, those with the highest `wanda_score` (Sun et al. 2023, arXiv:2306.11695).

    Args:
        w_IO: weights, [I, O], or [..., I, O].
        norm_I: of each input over tokens, [I] or [..., I]: the root of the Gram matrix's diagonal.
        share: of each output's weights that are kept, above 0 and at most 1, or UserError: as many as are nearest to it. Of
            equal ones the first are kept.
    """
    check_share(share)
    score = wanda_score(w_IO, norm_I)
    return np.swapaxes(_highest(np.swapaxes(score, -1, -2), share), -1, -2)


def wanda_score(w_IO: np.ndarray, norm_I: np.ndarray) -> np.ndarray:
    """|W_io| · ‖X_i‖ of each weight (Sun et al. 2023, eq. 1), [..., I, O]; `n_of_m` of it is Wanda's structured variant."""
    return np.abs(finite(w_IO)) * finite(norm_I, 'the norms of inputs')[..., None]


def n_of_m(score_IO: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    """The mask that keeps n weights of every m consecutive inputs of an output: the highest scores, of equal ones the first.

    2 of 4 is what NVIDIA's sparse tensor cores multiply (Mishra et al. 2021, arXiv:2104.08378).

    Args:
        score_IO: of each weight, [..., I, O]: its absolute value, or `wanda_score`.
        n, m: integers, 1 ≤ n ≤ m, where m divides I; else UserError.
    """
    inputs = score_IO.shape[-2]
    if not 1 <= n <= m:
        raise UserError(f'{n} of {m} weights: it must be from 1 to {m}; nearest: {min(max(n, 1), m)} of {m}')
    if inputs % m:
        divisors = [size for size in range(n, inputs + 1) if inputs % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - m))
        raise UserError(f'{n} of {m} weights: {m} must divide the {inputs} inputs; nearest: {n} of {nearest}')
    groups = np.swapaxes(score_IO, -1, -2).reshape(-1, m)
    kept = _highest(groups, n / m).reshape(*score_IO.shape[:-2], score_IO.shape[-1], inputs)
    return np.swapaxes(kept, -1, -2)


def head_scores(w_HDO: np.ndarray, gram_FF: np.ndarray) -> np.ndarray:
    """What attention's output would lose without each head: the root mean square norm of what the head adds to it, [H].

    ‖X_h W_h‖_F, of the head's own block of the Gram matrix: √tr(W_hᵀ G_hh W_h). It is the error of leaving out that head alone.

    Args:
        w_HDO: the output projection by heads, [H, D, O].
        gram_FF: XᵀX of its inputs, [H·D, H·D]; averaged over tokens the score is per token.
    """
    w_HDO = finite(w_HDO)
    H, D, _ = w_HDO.shape
    gram_HDHD = finite(gram_FF, 'the Gram matrix').reshape(H, D, H, D)
    own_HDD = gram_HDHD[np.arange(H), :, np.arange(H)]
    return np.sqrt(np.maximum((w_HDO * (own_HDD @ w_HDO)).sum((1, 2)), 0))


def hidden_unit_scores(w_FO: np.ndarray, moment_F: np.ndarray) -> np.ndarray:
    """What a feed-forward's output would lose without each hidden unit: the root mean square norm of what it adds, [..., F].

    Args:
        w_FO: the output projection, [F, O], or [..., F, O] such as of experts.
        moment_F: mean over tokens of the square of each unit's activation, [..., F]: the diagonal of the averaged Gram matrix.
    """
    return np.sqrt(finite(moment_F, 'the second moments')) * np.linalg.norm(finite(w_FO), axis=-1)


def layer_scores(inputs_LNM: np.ndarray, outputs_LNM: np.ndarray) -> np.ndarray:
    """Block influence of each layer: 1 − the mean over tokens of the cosine between its input and its output, [L].

    Men et al. 2024 (ShortGPT, arXiv:2403.03853, eq. 1). 0 is a layer that turns nothing, 2 the most. A vector of zeros has the
    cosine 0.

    Args:
        inputs_LNM: the residual stream before each layer, [L, N, M].
        outputs_LNM: the residual stream after it, [L, N, M].
    """
    before, after = finite(inputs_LNM, 'the inputs'), finite(outputs_LNM, 'the outputs')
    size = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosine_LN = (before * after).sum(-1) / np.where(size > 0, size, 1)
    return 1 - cosine_LN.mean(-1)


class RoutedSums(NamedTuple):
    """Sums over tokens for each expert, which add up over batches.

    Attributes:
        weighted_E: of gate × norm of the expert's output, over the tokens that went to it.
        tokens_E: how many went to it.
    """

    weighted_E: np.ndarray
    tokens_E: np.ndarray


def reap_sums(expert_NK: np.ndarray, gate_NK: np.ndarray, norm_NK: np.ndarray, experts: int) -> RoutedSums:
    """What `reap_scores` needs of some tokens.

    Args:
        expert_NK: which experts each token goes to, [N, K]; −1 where it goes to none.
        gate_NK: what each of them is weighted by, as the layer uses it.
        norm_NK: ‖f_e(x)‖₂ of each of their outputs, before the gate.
        experts: how many there are, E.
    """
    routed = expert_NK >= 0
    expert = expert_NK[routed]
    weighted = np.asarray(gate_NK, np.float64)[routed] * np.asarray(norm_NK, np.float64)[routed]
    return RoutedSums(np.bincount(expert, weighted, experts), np.bincount(expert, minlength=experts))


def reap_scores(weighted_E: np.ndarray, tokens_E: np.ndarray) -> np.ndarray:
    """Router-weighted expert activation, [E]: the mean of gate × ‖output‖₂ over the tokens that went to an expert, 0 of none.

    Lasby et al. 2025 (REAP, arXiv:2510.13999).

    Args:
        weighted_E, tokens_E: of `RoutedSums`, summed over all batches.
    """
    tokens_E = np.asarray(tokens_E, np.float64)
    return np.asarray(weighted_E, np.float64) / np.maximum(tokens_E, 1)


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the highest `count` scores, ascending; of equal ones the first. UserError unless 1 ≤ count ≤ all."""
    if not 1 <= count <= len(scores):
        nearest = min(max(count, 1), len(scores))
        raise UserError(
            f'{count} of {len(scores)} cannot be kept: it must be from 1 to {len(scores)}; nearest: {nearest}'
        )
    return np.sort(np.argsort(-np.asarray(scores), kind='stable')[:count])


def _highest(rows: np.ndarray, share: float) -> np.ndarray:
    """The mask of the highest of each row (the last dim): round(share × length) of them, the first of equal ones."""
    count = round(share * rows.shape[-1])
    order = np.argsort(-rows, axis=-1, kind='stable')[..., :count]
    mask = np.zeros(rows.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask
