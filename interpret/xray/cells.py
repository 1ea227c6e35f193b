"""The feed-forward layer as a memory of keys and values (Geva et al. 2020, arXiv:2012.14913).

    FFN(x) = Σ over cells f of  h_f(x) · v_f  + bias,    h = act(W_up x), or act(W_gate x) ⊙ (W_up x)

Cell f fires by h_f where x matches its key, a row of W_up (and of W_gate); then it adds its value v_f, a column of W_down, to
the residual stream. What a value promotes are the tokens whose vectors in the head have the largest products with it, the
final norm's scale (and that of a norm of the part's output) taken in.

Letters: L layers, T tokens, F cells of a layer, D model, k cells that are told of each place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weft.interpret.xray import programs
from weft.interpret.xray.programs import TOLD
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder
from weft.runtime.errors import UserError

CHUNK = 512  # cells whose values are made at once
SUPPRESSED = 5  # tokens that are told


class TopCells(NamedTuple):
    """Of each layer and token the cells that add most, largest first; rows of zeros for layers of experts."""

    cell_LTk: np.ndarray  # uint32
    activation_LTk: np.ndarray  # h
    share_LTk: np.ndarray  # |h_f| ‖v_f‖ / Σ over all cells of it


class Promoted(NamedTuple):
    """What a cell's value says, by the head."""

    norm: float  # of the value
    promotes: list[
        tuple[int, float]
    ]  # ids and what an activation of 1 adds to their logits before the scale, largest first
    suppresses: list[tuple[int, float]]  # the same of the smallest, smallest first


def dense_layers(model: Decoder) -> list[int]:
    """The layers whose feed-forward part is one MLP."""
    return [layer for layer, spec in enumerate(model.config.layer_specs) if not spec.experts]


def check_cell(c: ModelConfig, option: str, layer: int, cell: int) -> None:
    """Raises UserError for a cell that a model does not have."""
    if not 0 <= layer < c.layers:
        raise UserError(f'{option}: there is no layer {layer}; layers are 0 to {c.layers - 1}')
    if c.layer_specs[layer].experts:
        dense = [number for number, spec in enumerate(c.layer_specs) if not spec.experts]
        others = f'; those of layers {", ".join(map(str, dense))} can be named' if dense else ''
        raise UserError(f'{option}: layer {layer} is a mixture of experts, and has no cells of its own{others}')
    if not 0 <= cell < c.mlp.dim:
        raise UserError(f'{option}: there is no cell {cell}; cells of a layer are 0 to {c.mlp.dim - 1}')


def values(model: Decoder, layer: int, cells: Sequence[int], units: int) -> np.ndarray:
    """float32 [cells, D]: the values of some cells of a layer that has so many."""
    found = []
    for begin in range(0, len(cells), CHUNK):
        some = np.asarray(cells[begin : begin + CHUNK])
        one_CF = np.zeros((len(some), units), np.float32)
        one_CF[np.arange(len(some)), some] = 1
        found.append(programs.written(model, 'mlp', layer, one_CF))
    return np.concatenate(found)


def top_cells(model: Decoder, hidden_LTF: np.ndarray, k: int) -> TopCells:
    """The cells of a text; `hidden_LTF` has the dense layers alone, in their order."""
    layers, (_, T, F) = dense_layers(model), hidden_LTF.shape
    k = min(k, F)
    found = TopCells(*(np.zeros((model.config.layers, T, k), kind) for kind in (np.uint32, np.float32, np.float32)))
    for at, layer in enumerate(layers):
        norm_F = np.linalg.norm(values(model, layer, range(F), F), axis=-1)
        size_TF = np.abs(hidden_LTF[at]) * norm_F[None]
        cell_Tk = np.argsort(-size_TF, -1, kind='stable')[:, :k]
        take = lambda a_TF, cell_Tk=cell_Tk: np.take_along_axis(a_TF, cell_Tk, -1)
        sum_T1 = size_TF.sum(-1, keepdims=True)
        found.cell_LTk[layer] = cell_Tk
        found.activation_LTk[layer] = take(hidden_LTF[at])
        found.share_LTk[layer] = take(size_TF) / np.where(sum_T1 == 0, 1, sum_T1)
    return found


def promoted(model: Decoder, cells: Sequence[tuple[int, int]], units: int) -> list[Promoted]:
    """Of cells, (layer, number) each, what their values promote (TOLD tokens) and suppress (SUPPRESSED tokens)."""
    if not cells:
        return []
    c = model.config
    value_CD = np.zeros((len(cells), c.model_dim), np.float32)
    for layer in sorted({layer for layer, _ in cells}):
        at = [number for number, (of, _) in enumerate(cells) if of == layer]
        value_CD[at] = values(model, layer, [cells[number][1] for number in at], units)
    read_CD = through_norms(model, cells, value_CD)
    nothing = np.zeros(2 * len(cells), np.int32)
    both = programs.read(model, np.concatenate([read_CD, -read_CD]), nothing, direct=True)
    up, down = (slice(0, len(cells)), slice(len(cells), None))
    pairs = lambda row, part, sign, count: [
        (int(token), sign * float(logit))
        for token, logit in zip(both.top_Nk[part][row][:count], both.logit_Nk[part][row][:count], strict=True)
    ]
    norm_C = np.linalg.norm(value_CD, axis=-1)
    return [
        Promoted(float(norm), pairs(row, up, 1, TOLD), pairs(row, down, -1, SUPPRESSED))
        for row, norm in enumerate(norm_C)
    ]


def through_norms(model: Decoder, cells: Sequence[tuple[int, int]], value_CD: np.ndarray) -> np.ndarray:
    """float32 [cells, D]: values after what is the same for every text of the norms between them and the head."""
    c = model.config
    if name := {'sandwich': 'mlp_out_norm', 'output': 'mlp_norm'}.get(c.norm.order):
        scales = [programs.layer_weight(model, layer, name, 'scale_D') for layer, _ in cells]
        value_CD = scaled(c, value_CD, np.stack([scale_D for scale_D in scales if scale_D is not None]))
    if c.norm.order == 'post':  # the norms of its own layer and of those after it: the last one stands before the head
        scale_D = programs.layer_weight(model, c.layers - 1, 'mlp_norm', 'scale_D')
        assert scale_D is not None
        return scaled(c, value_CD, scale_D[None])
    return scaled(c, value_CD, np.asarray(model.norm.scale_D[...], np.float32)[None])


def scaled(c: ModelConfig, value_CD: np.ndarray, scale_CD: np.ndarray) -> np.ndarray:
    """Vectors times a norm's scale, as it is kept; a LayerNorm takes their mean off first."""
    if c.norm.kind != 'rmsnorm':
        value_CD = value_CD - value_CD.mean(-1, keepdims=True)
    return value_CD * (scale_CD + c.norm.offset)
