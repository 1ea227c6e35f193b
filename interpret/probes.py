"""Linear probes: what can be read off activations by one linear map (Alain and Bengio 2016, arXiv:1610.01644).

A probe is ridge regression to one-hot targets, in closed form, of which the largest output is the answer. How strongly it is
held back is chosen by the error of leaving one example out, which has a closed form too (Golub, Heath and Wahba 1979). What a
probe scores counts beside what it scores on labels that say nothing (control tasks: Hewitt and Liang 2019, arXiv:1909.03368).

Letters: N examples, D numbers of an activation, C classes, K singular values.
"""

from typing import NamedTuple

import numpy as np

STRENGTHS = 10.0 ** np.arange(-3, 4)  # times the mean squared singular value


class Probe(NamedTuple):
    """Classes from activations."""

    mean_D: np.ndarray
    scale_D: np.ndarray
    w_DC: np.ndarray
    prior_C: np.ndarray  # of each class, its share of the examples

    def classes(self, x_ND: np.ndarray) -> np.ndarray:
        """int [N]: the class that each activation is said to be of."""
        return (((x_ND - self.mean_D) / self.scale_D) @ self.w_DC + self.prior_C).argmax(-1)


def fit(x_ND: np.ndarray, class_N: np.ndarray) -> Probe:
    """A probe of examples whose classes are numbered from 0."""
    mean_D = x_ND.mean(0)
    std_D = x_ND.std(0)
    scale_D = np.where(
        std_D > 1e-6 * max(float(std_D.max()), 1e-30), std_D, np.inf
    )  # what is the same everywhere says nothing
    u_NK, s_K, v_KD = np.linalg.svd((x_ND - mean_D) / scale_D, full_matrices=False)
    one_NC = np.eye(int(class_N.max()) + 1)[class_N]
    prior_C = one_NC.mean(0)
    target_NC = one_NC - prior_C
    along_KC = u_NK.T @ target_NC
    best, least = np.zeros((x_ND.shape[1], len(prior_C))), np.inf
    for strength in STRENGTHS * max(float((s_K**2).mean()), 1e-30):
        kept_K = s_K**2 / (s_K**2 + strength)
        leverage_N = (u_NK**2) @ kept_K + 1 / len(x_ND)
        rest_NC = (target_NC - u_NK @ (kept_K[:, None] * along_KC)) / (1 - np.minimum(leverage_N, 1 - 1e-9))[:, None]
        error = float((rest_NC**2).mean())
        if error < least:
            best, least = v_KD.T @ ((s_K / (s_K**2 + strength))[:, None] * along_KC), error
    return Probe(mean_D, scale_D, best, prior_C)


def right(fit_ND: np.ndarray, fit_N: np.ndarray, test_ND: np.ndarray, test_N: np.ndarray) -> np.ndarray:
    """bool [N] of the test examples: whether a probe of the others is right."""
    return fit(fit_ND, fit_N).classes(test_ND) == test_N
