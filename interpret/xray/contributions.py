"""What each part, head and cell adds to the residual stream, in size and direction, and to the logit of the answer.

Direct logit attribution: with the norms' scales frozen (frozen.py) the logit of a token, before a softcap, is

    logit = embedding · d + Σ over layers (attention · d + feed-forward · d) + biases

with d the token's vector in the head, taken back through the norms that follow. A layer's attention is the sum of what its
heads write, W_O's rows of a head times what the head has gathered, and its bias (Elhage et al. 2021, A mathematical framework
for transformer circuits).

Letters: L layers, T tokens, N heads, H head width, D model.
"""

from typing import NamedTuple

import numpy as np

from weft.interpret.xray import programs
from weft.interpret.xray.frozen import Directions, FrozenPass, directions, layer_norm
from weft.model.decoder import Decoder


class Contributions(NamedTuple):
    """Of one text: the shares of the logit of one token for each place."""

    attention_LT: np.ndarray
    mlp_LT: np.ndarray
    embedding_T: np.ndarray
    constant_T: np.ndarray  # of biases: norms' and the head's
    directions: Directions

    @property
    def total_T(self) -> np.ndarray:
        """The logit, before a softcap."""
        return self.attention_LT.sum(0) + self.mlp_LT.sum(0) + self.embedding_T + self.constant_T


def contributions(
    model: Decoder, taps: dict[str, np.ndarray], frozen: FrozenPass, token_T: np.ndarray
) -> Contributions:
    """Shares of the logits of `token_T` [T]; `taps` are a text's activations [L, T, D] by name, its `embedding` [T, D]."""
    d = directions(frozen, programs.head_vectors(model, token_T))
    constant_T = d.constant_T
    if model.config.head_bias:
        constant_T = constant_T + np.asarray(model.head_bias_V[...], np.float32)[token_T]
    return Contributions(
        along(taps['attention.output'], d.attention_LTD),
        along(taps['mlp.output'], d.mlp_LTD),
        along(taps['embedding'], d.embedding_TD),
        constant_T,
        d,
    )


class HeadShares(NamedTuple):
    """Of the heads of one layer and one text."""

    write_TND: (
        np.ndarray
    )  # what each head writes: W_O's part of it times what it has gathered, before a norm of the output
    answer_NT: np.ndarray  # its share of the logit
    rest_T: np.ndarray  # of attention's share what no head wrote: the biases of the output and of its norm
    read_TND: np.ndarray  # what the LM head gets of it


def of_heads(model: Decoder, frozen: FrozenPass, d: Directions, layer: int, heads_TNH: np.ndarray) -> HeadShares:
    """What the heads of a layer write, of what each has gathered [T, N, H]."""
    T, N, H = heads_TNH.shape
    apart_TNNH = heads_TNH[:, :, None] * np.eye(N, dtype=np.float32)[None, :, :, None]
    write_TND = programs.written(model, 'attention', layer, apart_TNNH.reshape(T * N, N * H)).reshape(T, N, -1)
    bias_D = programs.layer_weight(model, layer, 'attention', 'o', 'b_O')
    d_TD, rest_T, added_TND = d.attention_LTD[layer], np.zeros(T, np.float32), write_TND
    name = {'sandwich': 'attention_out_norm', 'output': 'attention_norm'}.get(model.config.norm.order)
    if name:
        sum_TD = write_TND.sum(1) + (0 if bias_D is None else bias_D)
        own = layer_norm(model, layer, name, sum_TD)
        rest_T, d_TD, added_TND = own.constant(d_TD), own.back(d_TD), own.forward(write_TND)
    if bias_D is not None:
        rest_T = rest_T + d_TD @ bias_D
    answer_NT = np.einsum('TND,TD->NT', write_TND, d_TD)
    return HeadShares(write_TND, answer_NT, rest_T, frozen.to_head(added_TND, layer))


def along(x: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Products of vectors in the last dim."""
    return np.einsum('...D,...D->...', x, direction)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of vectors in the last dim; 0 where one of them is 0."""
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.einsum('...D,...D->...', a, b) / np.where(size == 0, 1, size)
