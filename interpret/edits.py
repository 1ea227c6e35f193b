"""Changes to a model's activations as a notebook says them: ablation, patching, steering, a router's choice.

Each function makes a `Change` at a name (docs/interpret.md lists them), at some of its layers, texts, tokens, heads, hidden
units or experts: a number, several, a slice or a range; None means all. `Shapes.edit` makes arrays of it (model/edits.py).

Letters: L layers, B rows, T tokens of a row, S keys, E experts, K experts per token.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from weft.model.capture import Offer
from weft.model.edits import Edit
from weft.runtime.errors import UserError, nearest

Some = int | slice | range | Sequence[int] | None  # which of several, from 0; None: all
Kind = Literal['zero', 'mean', 'replace', 'add', 'scale', 'force']
PATTERN, CHOICES = 'attention.pattern', 'router.choices'
# Which dims behind rows and tokens a part of a name can be chosen by.
PARTS: dict[str, dict[str, int]] = {
    'heads': {
        'attention.queries': 3,
        'attention.keys': 3,
        'attention.values': 3,
        'attention.head_outputs': 3,
        PATTERN: 3,
    },
    'experts': {'router.scores': 3, 'router.weights': 3, 'experts.outputs': 3},
    'keys': {PATTERN: 4},
}
CHOSEN = ('router.weights', 'experts.outputs')  # captured of a token's own experts, edited by number of any of them


@dataclasses.dataclass(frozen=True)
class Change:
    """One change to what stands at a name; `where` says which part of it, by `layers`, `texts`, `tokens` and so forth."""

    name: str
    kind: Kind
    value: Any
    where: dict[str, Some]


def zero(name: str, **where: Some) -> Change:
    """Zero ablation: 0 in place of what stands there.

    `where`: `layers`, `texts` (numbers of the traced texts), `tokens` (places in a text, from its end if negative), `heads` (of
    keys and values: KV heads), `units` (numbers of the last dim: hidden units, or dims of the model), `experts`, and `keys` (of
    a pattern: the tokens that are looked at).
    """
    return Change(name, 'zero', 0.0, where)


def mean(name: str, **where: Some) -> Change:
    """Mean ablation: the mean over all tokens of the traced texts, of a pass without edits, in place of what stands there."""
    return Change(name, 'mean', None, where)


def replace(name: str, value: Any, **where: Some) -> Change:
    """Activation patching (Meng et al. 2022, arXiv:2202.05262, section 2): `value` in place of what stands there.

    `value` is as `Trace` gives it, of this name and texts as long, or what NumPy broadcasts to that: a vector, say.
    """
    return Change(name, 'replace', value, where)


def add(name: str, value: Any, **where: Some) -> Change:
    """Steering (Turner et al. 2023, arXiv:2308.10248): adds a vector, or what NumPy broadcasts to what stands there."""
    return Change(name, 'add', value, where)


def scale(name: str, value: Any, **where: Some) -> Change:
    """Multiplies what stands there by a number, or by what NumPy broadcasts to it."""
    return Change(name, 'scale', value, where)


def force(experts: Sequence[int], **where: Some) -> Change:
    """Has the router choose these experts, all that a token visits, for its own ones. Weights are made of its scores."""
    return Change(CHOICES, 'force', list(experts), where)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a program offers to edits, and of which texts."""

    offers: dict[str, Offer]
    lengths: Sequence[int]  # tokens of each text
    layers: int
    experts: int  # of a mixture; 0: there is none

    def offer(self, name: str) -> Offer:
        """What stands at a name. Raises UserError for a name that no layer offers."""
        if name not in self.offers:
            raise UserError(f'{name!r}: no layer offers such an activation{nearest(name, self.offers)}')
        return self.offers[name]

    def dims(self, name: str) -> tuple[int, ...]:
        """The dims that an edit's arrays have, whole: [L, B, T, …], with all experts where a token's own are captured."""
        offer = self.offer(name)
        behind = offer.shape[2 if offer.layers is None else 3 :]
        if name in CHOSEN:
            behind = (self.experts, *behind[1:])
        first = self.layers if offer.layers is not None else 1
        rows = offer.shape[0 if offer.layers is None else 1 :]
        return first, rows[0], rows[1], *behind

    def edit(self, change: Change, means: dict[str, np.ndarray]) -> Edit:
        """The arrays of a change; `means` has those over tokens, [L, …], by name."""
        dims = self.dims(change.name)
        where = [self._mask(change, dims, part, some) for part, some in change.where.items() if some is not None]
        if not {'texts', 'tokens'} & {part for part, some in change.where.items() if some is not None}:
            where.append(self._tokens(dims, {}))  # what fills up rows stays as it is
        factor, shift = np.zeros((1,) * len(dims), np.float32), np.zeros((1,) * len(dims), np.float32)
        if change.kind == 'mean':
            shift = self._mean(change.name, means[change.name], dims)
        elif change.kind in ('replace', 'add'):
            shift = self._value(change, dims)
            factor = factor + (change.kind == 'add')
        elif change.kind == 'scale':
            factor = self._value(change, dims)
        elif change.kind == 'force':
            shift = self._forced(change.value, dims)
        if change.name == CHOICES and change.kind != 'force':
            raise UserError(f'{change.kind} at {CHOICES!r}: numbers of experts are forced; use force(experts)')
        return Edit(name=change.name, where=tuple(where), factor=factor, shift=shift)

    def _mask(self, change: Change, dims: tuple[int, ...], part: str, some: Some) -> np.ndarray:
        """bool with all dims, of which one is whole: where a part of a change is."""
        name = change.name
        if part in ('texts', 'tokens'):
            return self._tokens(dims, change.where)
        if part == 'layers':
            have = self.offer(name).layers
            if have is None:
                raise UserError(f'layers at {name!r}: it belongs to no layer; leave layers out')
            dim = 0
            picked = numbers(some, dims[0], f'layers at {name!r}', have)
        elif part == 'units':
            dim = len(dims) - 1
            if dim < 3 or name in (PATTERN, CHOICES, 'router.scores', 'router.weights'):
                raise UserError(f'units at {name!r}: it has none{self._has(name)}')
            picked = numbers(some, dims[dim], f'units at {name!r}')
        elif part in PARTS:
            if name not in PARTS[part]:
                raise UserError(
                    f'{part} at {name!r}: it has none{self._has(name)}; {part} are at {", ".join(PARTS[part])}'
                )
            dim = PARTS[part][name]
            limit = max(self.lengths) if part == 'keys' else dims[dim]
            picked = numbers(some, limit, f'{part} at {name!r}')
        else:
            raise UserError(f'{part!r}: an edit is at no such part{nearest(part, self._parts(name))}')
        mask = np.zeros(dims[dim], bool)
        mask[picked] = True
        return mask.reshape([-1 if at == dim else 1 for at in range(len(dims))])

    def _parts(self, name: str) -> list[str]:
        parts = ['layers', 'texts', 'tokens', *(part for part, names in PARTS.items() if name in names)]
        return parts if name in (PATTERN, CHOICES, 'router.scores', 'router.weights') else [*parts, 'units']

    def _has(self, name: str) -> str:
        return f'; it can be chosen by {", ".join(self._parts(name))}'

    def _tokens(self, dims: tuple[int, ...], where: dict[str, Some]) -> np.ndarray:
        """bool [1, B, T, 1 …]: tokens of texts; padding is none of them."""
        mask = np.zeros(dims[1:3], bool)
        tokens = where.get('tokens')
        for text in numbers(where.get('texts'), len(self.lengths), 'texts'):
            length = self.lengths[text]
            mask[text, numbers(tokens, length, f'tokens of text {text}', from_end=True)] = True
        return mask.reshape(1, *mask.shape, *(1,) * (len(dims) - 3))

    def _value(self, change: Change, dims: tuple[int, ...]) -> np.ndarray:
        """A user's value with all dims, each whole or 1."""
        value = np.asarray(change.value, np.float32)
        offer = self.offer(change.name)
        if value.ndim > len(dims) or (offer.layers is None and value.ndim == len(dims)):
            raise UserError(self._shape(change, value, dims))
        value = value.reshape((1,) * (len(dims) - value.ndim) + value.shape)
        have = offer.layers
        if have is not None and value.shape[0] == len(have) != dims[0]:  # as captured: of the layers that have it
            whole = np.zeros((dims[0], *value.shape[1:]), np.float32)
            whole[list(have)] = value
            value = whole
        longest = max(self.lengths)
        for dim, size in ((1, len(self.lengths)), (2, longest)):
            if value.shape[dim] == size < dims[dim]:
                value = np.pad(value, [(0, dims[dim] - size if at == dim else 0) for at in range(value.ndim)])
        if any(size not in (1, whole) for size, whole in zip(value.shape, dims, strict=True)):
            raise UserError(self._shape(change, np.asarray(change.value), dims))
        if not np.isfinite(value).all():
            raise UserError(
                f'{change.kind} at {change.name!r}: the value has numbers that are not finite; give finite ones'
            )
        return value

    def _shape(self, change: Change, value: np.ndarray, dims: tuple[int, ...]) -> str:
        rows = (len(self.lengths), max(self.lengths))
        wanted = [*([] if self.offer(change.name).layers is None else [dims[0]]), *rows, *dims[3:]]
        return (
            f'{change.kind} at {change.name!r}: a value of shape {list(value.shape)} does not broadcast to what stands there; '
            f'give {wanted}, or fewer dims from the end'
        )

    def _mean(self, name: str, mean: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
        have = self.offer(name).layers
        shift = np.zeros((dims[0], 1, 1, *dims[3:]), np.float32)
        if name in CHOSEN or name in (PATTERN, CHOICES):
            raise UserError(
                f'mean at {name!r}: what stands there differs from token to token in what it is of; use zero'
            )
        shift[list(have) if have is not None else [0], 0, 0] = mean
        return shift

    def _forced(self, experts: list[int], dims: tuple[int, ...]) -> np.ndarray:
        chosen = numbers(experts, self.experts, 'experts of force')
        if len(chosen) != dims[3] or len(set(chosen)) != len(chosen):
            raise UserError(f'force({experts}): a token visits {dims[3]} different experts; give as many')
        return np.array(chosen, np.float32).reshape(1, 1, 1, -1)


def numbers(some: Some, count: int, what: str, have: Sequence[int] | None = None, from_end: bool = False) -> list[int]:
    """The numbers that are meant, of `count` from 0 or of those in `have`. Raises UserError for one that does not exist."""
    known = list(range(count)) if have is None else list(have)
    if some is None:
        return known
    if isinstance(some, slice):
        found = list(range(count))[some]
        if not found:
            raise UserError(f'{what}: {some.start}:{some.stop} means none of {count}; the last is {count - 1}')
        return [number for number in found if have is None or number in have]
    given = list(some) if isinstance(some, Iterable) else [some]
    found = []
    for number in given:
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise UserError(f'{what}: {number!r} is not a whole number; numbers are from 0 to {count - 1}')
        place = int(number) + count if from_end and number < 0 else int(number)
        if place not in known:
            near = min(known, key=lambda one: abs(one - place))
            span = f'{known[0]} to {known[-1]}' if known == list(range(known[0], known[-1] + 1)) else str(known)
            raise UserError(f'{what}: there is no {number}; they are {span}, the nearest is {near}')
        found.append(place)
    if not found:
        raise UserError(f'{what}: none is given; leave it out for all')
    return found
