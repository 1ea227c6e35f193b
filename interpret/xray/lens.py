"""The logit lens: what the model would say if it stopped after each layer.

What stands in the residual stream after layer l goes through the final norm and the LM head, as if layer l were the last
(nostalgebraist 2020, interpreting GPT: the logit lens). Row 0 is the embedding, row L what the model says. In the layers
between the head reads vectors that it was never trained on: what it finds there is a lower bound of what they hold.

Letters: L layers, T tokens, D model, k tokens that are told of each place.
"""

from typing import NamedTuple

import numpy as np

from weft.interpret.xray import programs
from weft.model.decoder import Decoder


class Lens(NamedTuple):
    """Rows 0 to L of one text; the answer is the token that the model finds likeliest in the end."""

    top_LTk: np.ndarray  # int32 [L + 1, T, k]: ids, the likeliest first
    probability_LTk: np.ndarray
    entropy_LT: np.ndarray  # nats
    answer_LT: np.ndarray  # probability of the answer
    decided_T: np.ndarray  # int32: the first row from which the answer stays on top


def residuals(taps: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [L + 1, T, D] of one text: the embedding, and the residual stream after each layer."""
    return np.concatenate([taps['embedding'][None], taps['residual.after_mlp']])


def lens(model: Decoder, x_LTD: np.ndarray, answer_T: np.ndarray) -> Lens:
    """Reads each row of a residual stream [L + 1, T, D] by the final norm and the head."""
    rows, T, _ = x_LTD.shape
    found = programs.read(model, x_LTD.reshape(rows * T, -1), np.tile(answer_T, rows))
    probability = np.exp(found.logit_Nk - found.log_sum_N[:, None]).reshape(rows, T, -1)
    top_LTk = found.top_Nk.reshape(rows, T, -1)
    answer_LT = np.exp(found.asked_N - found.log_sum_N).reshape(rows, T)
    return Lens(top_LTk, probability, found.entropy_N.reshape(rows, T), answer_LT, decided(top_LTk[..., 0], answer_T))


def decided(first_LT: np.ndarray, answer_T: np.ndarray) -> np.ndarray:
    """int32 [T]: the first of the rows [L + 1, T] from which the likeliest token is the answer in all that follow."""
    same_LT = first_LT == answer_T[None]
    stays_LT = np.logical_and.accumulate(same_LT[::-1])[::-1]
    return np.where(stays_LT.any(0), stays_LT.argmax(0), len(first_LT) - 1).astype(np.int32)
