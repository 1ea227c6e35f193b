"""Ablation and activation patching: forward passes of one text in which something was changed, many of them as rows at once.

A row is the text once more with one change: a head, a layer's attention or feed-forward part, a cell or an expert set to
something else, at all tokens or at one. Changes are arrays of edits (model/edits.py), so that all rows run one program, which
gives the logits after the last token.

Ablated by the mean (Wang et al. 2022, arXiv:2211.00593) a part says at each token what it says on average over the tokens of
the text: what it says of *this* token is gone, and later layers are given nothing that they never meet. The first token keeps
its own and counts in no mean: it sees itself alone, many models make of it a resting place for attention with activations a
thousand times as large as others (Sun et al. 2024, arXiv:2402.17762), and a mean with those in it would destroy whatever it
stood for. An expert is ablated by zero: it is passed over. Patched (Meng et al. 2022, arXiv:2202.05262) a part has the values
of another text's run.

Letters: L layers, B rows, T tokens, N heads, H head width, F cells, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from weft.inference.step import empty_cache, prefill
from weft.interpret.xray import programs
from weft.model.decoder import Decoder
from weft.model.edits import Edit
from weft.model.forward import place
from weft.runtime.errors import UserError, nearest

HEADS, CELLS, EXPERTS = 'attention.head_outputs', 'mlp.hidden_units', 'experts.outputs'
ATTENTION, MLP, RESIDUAL = 'attention.output', 'mlp.output', 'residual.after_mlp'
# Dims after the columns of the mask of a change, by name: 'whole' ones can be told apart, others are changed together.
UNITS = {
    HEADS: (True, False),
    CELLS: (True,),
    EXPERTS: (True, False),
    ATTENTION: (False,),
    MLP: (False,),
    RESIDUAL: (False,),
}


@dataclasses.dataclass(frozen=True)
class Change:
    """One row's: where `mask` holds, the activation `name` of a layer is what `Patches.values` has there.

    `mask` is bool [T, units] or, with either dim 1, meant for all of it; units are heads, cells or experts.
    """

    name: str
    layer: int
    mask: np.ndarray


def everywhere() -> np.ndarray:
    """The mask of all of a layer's activation."""
    return np.ones((1, 1), bool)


def unit(number: int, units: int) -> np.ndarray:
    """The mask of one head, cell or expert at all tokens. Raises UserError for one that is not there."""
    check_number('head, cell or expert', number, units)
    return np.arange(units)[None] == number


def column(number: int, columns: int) -> np.ndarray:
    """The mask of all units at one token. Raises UserError for one that is not there."""
    check_number('token', number, columns)
    return np.arange(columns)[:, None] == number


def check_number(what: str, number: int, count: int) -> None:
    """Raises UserError for a number that none of so many has."""
    if not 0 <= number < count:
        raise UserError(f'{what} {number}: there is no such one; they are 0 to {count - 1}')


@jax.jit
def _last_logits(model: Decoder, tokens_BT: jax.Array, length_B: jax.Array, edits: tuple[Edit, ...]) -> jax.Array:
    cache = empty_cache(model, tokens_BT.shape[0], tokens_BT.shape[1])
    return prefill(model, cache, tokens_BT, length_B, edits=edits)[0]


class Patches:
    """A text, and what its activations may be set to."""

    def __init__(self, model: Decoder, ids: Sequence[int], values: Mapping[str, np.ndarray], begin: int = 0) -> None:
        """`values`: by name [L, T, …] or, at each token the same, [L, 1, …]; all of the model's layers.

        No token before the place `begin` is changed.
        """
        self.model, self.ids, self.values, self.begin = model, ids, dict(values), begin
        self.columns = programs.columns_for(len(ids))
        self.rows = programs.rows_for(self.columns)
        self.shift = {name: jnp.asarray(self._shift(array)) for name, array in self.values.items()}

    def _shift(self, array: np.ndarray) -> np.ndarray:
        """What takes an activation's place, [L, 1, T, …]."""
        if array.shape[1] > 1:
            array = np.pad(array, [(0, self.columns - n if dim == 1 else 0) for dim, n in enumerate(array.shape)])
        return array[:, None]

    def log_probabilities(
        self, changes: Sequence[Change | None], progress: Callable[[int], object] = lambda done: None
    ) -> np.ndarray:
        """float32 [changes, V]: after the last token, with each change, or with none. All in one program, so that they compare.

        `progress` is called with the number of changes that are done.
        """
        found = []
        for logit_BV in self._logits(changes):
            top_B1 = logit_BV.max(-1, keepdims=True)
            found.append(logit_BV - top_B1 - np.log(np.exp(logit_BV - top_B1).sum(-1, keepdims=True)))
            progress(sum(map(len, found)))
        return np.concatenate(found)

    def _logits(self, changes: Sequence[Change | None]) -> Iterator[np.ndarray]:
        tokens_BT = np.zeros((self.rows, self.columns), np.int32)
        tokens_BT[:, : len(self.ids)] = self.ids
        length_B = np.full(self.rows, len(self.ids), np.int32)
        arrays = place((tokens_BT, length_B))
        for begin in range(0, len(changes), self.rows):
            some = changes[begin : begin + self.rows]
            logit_BV = _last_logits(self.model, *arrays, self._edits(some))
            yield programs.host(logit_BV)[: len(some)]

    def _edits(self, changes: Sequence[Change | None]) -> tuple[Edit, ...]:
        masks = {}
        for name, array in self.values.items():
            apart = tuple(n if whole else 1 for n, whole in zip(array.shape[2:], UNITS[name], strict=True))
            # Cells are many and the same at all tokens; others may differ by token.
            columns = 1 if name == CELLS else self.columns
            masks[name] = np.zeros((len(array), self.rows, columns, *apart), bool)
        for row, change in enumerate(changes):
            if change is not None:
                if change.name not in masks:
                    raise UserError(f'{change.name!r}: no values are given for it{nearest(change.name, masks)}')
                check_number('layer', change.layer, self.model.config.layers)
                mask = masks[change.name][change.layer, row]
                units = change.mask.reshape(*change.mask.shape, *[1] * (mask.ndim - change.mask.ndim))
                mask[: len(self.ids) if mask.shape[0] > 1 else 1] = units
        found = []
        for name, mask in masks.items():
            later = (np.arange(self.columns) >= self.begin).reshape(1, 1, -1, *[1] * (mask.ndim - 3))
            where = jnp.asarray(mask), jnp.asarray(later)
            zero = jnp.zeros((1,) * mask.ndim, jnp.float32)
            found.append(Edit(name=name, where=where, factor=zero, shift=self.shift[name]))
        return tuple(found)


def of_all_layers(array: np.ndarray, layers: Sequence[int], count: int) -> np.ndarray:
    """Activations of some layers as those of all, with zeros for the others."""
    found = np.zeros((count, *array.shape[1:]), array.dtype)
    found[list(layers)] = array
    return found


def means(array: np.ndarray) -> np.ndarray:
    """[L, 1, …] of activations [L, T, …]: their means over all tokens but the first."""
    return array[:, 1:].mean(1, keepdims=True)
