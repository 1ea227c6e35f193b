"""Many prompts through one program, with changes to their activations, and what the model says after each.

Letters: L layers, B prompts, T columns, N heads, H head width, F cells, D model, V vocabulary, A prompts of one call.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from weft.inference.step import empty_cache, prefill
from weft.interpret.xray import programs
from weft.model.decoder import Decoder
from weft.model.edits import Edit
from weft.model.forward import place

HEADS, CELLS = 'attention.head_outputs', 'mlp.hidden_units'


@dataclasses.dataclass(frozen=True)
class Change:
    """Where `mask` holds, `value` takes the place of what stands at `name`.

    Both have the dims of the activation after one of layers, [L, B, T, …], each whole or 1, which is meant for all. As data of
    a program they may be other ones at each call; only their shapes are compiled in.
    """

    name: str
    mask: np.ndarray
    value: np.ndarray

    def edit(self, begin: int, end: int, count: int) -> Edit:
        """For the prompts from `begin` on, filled up to `count`."""

        def rows(array: np.ndarray) -> jax.Array:
            if array.shape[1] > 1:
                part = array[:, begin:end]
                array = np.pad(part, [(0, count - n if dim == 1 else 0) for dim, n in enumerate(part.shape)])
            return jnp.asarray(array)

        factor = jnp.zeros((1,) * self.mask.ndim, jnp.float32)
        return Edit(name=self.name, where=(rows(self.mask),), factor=factor, shift=rows(self.value))


class Prompts:
    """Prompts of a model, whose last tokens are what the next one is read after."""

    def __init__(self, model: Decoder, rows: Sequence[Sequence[int]], at_once: int = 32, columns: int = 0) -> None:
        self.model, self.rows = model, [list(row) for row in rows]
        self.columns = programs.columns_for(max(map(len, self.rows)), columns)
        unit = programs.row_ways()
        self.at_once = -(-min(at_once, len(rows)) // unit) * unit
        self.last_B = np.array([len(row) - 1 for row in self.rows])

    def logits(
        self, changes: Sequence[Change] = (), progress: Callable[[int], object] = lambda done: None
    ) -> np.ndarray:
        """float32 [B, V]: after the last token of each prompt. `progress` is told how many prompts are done."""
        found = []
        for begin in range(0, len(self.rows), self.at_once):
            some = self.rows[begin : begin + self.at_once]
            arrays = place(self._arrays(some))
            edits = tuple(change.edit(begin, begin + len(some), self.at_once) for change in changes)
            found.append(programs.host(_last_logits(self.model, *arrays, edits))[: len(some)])
            progress(begin + len(some))
        return np.concatenate(found)

    def taps(self, names: Sequence[str], last: bool = True) -> dict[str, np.ndarray]:
        """float32 [L, B, …] by name, or [B, …] of what is no layer's: at the last token; else [L, B, T, …], at all."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for begin in range(0, len(self.rows), self.at_once):
            some = self.rows[begin : begin + self.at_once]
            filled = [*some, *[some[0]] * (self.at_once - len(some))]
            arrays = programs.captured(self.model, names, programs.padded(self.model.config, filled, self.columns))
            last_A = self.last_B[begin : begin + len(some)]
            for name, array in arrays.items():
                dim = 0 if array.shape[0] == self.at_once and name == 'embedding' else 1
                array = array.take(range(len(some)), dim)
                if last:
                    shape = [1] * array.ndim
                    shape[dim] = len(some)
                    at = last_A.reshape(shape)
                    array = np.take_along_axis(array, at, dim + 1).squeeze(dim + 1)
                found[name].append(array)
        return {name: np.concatenate(parts, 0 if name == 'embedding' else 1) for name, parts in found.items()}

    def stream(self) -> np.ndarray:
        """float32 [L + 1, B, D]: the residual stream at the last tokens, the embedding first and then after each layer."""
        found = self.taps(['embedding', 'residual.after_mlp'])
        return np.concatenate([found['embedding'][None], found['residual.after_mlp']])

    def gradients(
        self, answer_B: np.ndarray, other_B: np.ndarray, names: Sequence[str]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By name the activations and the gradients there, [L, B, T, …] each, of logit[answer] − logit[other].

        (change − activation) · gradient is what a change does to the difference, to first order (attribution patching: Syed et
        al. 2023, arXiv:2310.10348), for all heads and cells by one backward pass.
        """
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in names}
        for begin in range(0, len(self.rows), self.at_once):
            some = self.rows[begin : begin + self.at_once]
            filled = [*some, *[some[0]] * (self.at_once - len(some))]
            rows = programs.padded(self.model.config, filled, self.columns)
            values = programs.captured(self.model, names, rows)
            shifts = {name: np.zeros_like(value) for name, value in values.items()}
            tokens = self._arrays(some)
            asked = np.zeros((2, self.at_once), np.int32)
            asked[:, : len(some)] = answer_B[begin : begin + len(some)], other_B[begin : begin + len(some)]
            found = _gradient(self.model, *place(tokens), *place(tuple(asked)), shifts)
            for name in names:
                pair = values[name][:, : len(some)], programs.host(found[name])[:, : len(some)]
                parts[name].append(pair)
        return {
            name: (np.concatenate([v for v, _ in pairs], 1), np.concatenate([g for _, g in pairs], 1))
            for name, pairs in parts.items()
        }

    def _arrays(self, some: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens_AT, length_A = np.zeros((self.at_once, self.columns), np.int32), np.ones(self.at_once, np.int32)
        for row, ids in enumerate(some):
            tokens_AT[row, : len(ids)], length_A[row] = ids, len(ids)
        return tokens_AT, length_A


@jax.jit
def _last_logits(model: Decoder, tokens_AT: jax.Array, length_A: jax.Array, edits: tuple[Edit, ...]) -> jax.Array:
    cache = empty_cache(model, tokens_AT.shape[0], tokens_AT.shape[1])
    return prefill(model, cache, tokens_AT, length_A, edits=edits)[0]


@jax.jit
def _gradient(
    model: Decoder,
    tokens_AT: jax.Array,
    length_A: jax.Array,
    answer_A: jax.Array,
    other_A: jax.Array,
    shifts: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    def difference(shifts: Mapping[str, jax.Array]) -> jax.Array:
        edits = []
        for name, shift in shifts.items():
            one = jnp.ones((1,) * shift.ndim, jnp.float32)
            edits.append(Edit(name=name, where=(one > 0,), factor=one, shift=shift))
        cache = empty_cache(model, tokens_AT.shape[0], tokens_AT.shape[1])
        logit_AV = prefill(model, cache, tokens_AT, length_A, edits=tuple(edits))[0]
        column_1V = jnp.arange(logit_AV.shape[-1])[None]
        return jnp.where(column_1V == answer_A[:, None], logit_AV, 0).sum() - (
            jnp.where(column_1V == other_A[:, None], logit_AV, 0).sum()
        )

    return dict(jax.grad(difference)(shifts))


def softmax(logit_BV: np.ndarray) -> np.ndarray:
    """Probabilities."""
    e_BV = np.exp(logit_BV - logit_BV.max(-1, keepdims=True))
    return e_BV / e_BV.sum(-1, keepdims=True)
