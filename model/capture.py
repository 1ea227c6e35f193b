"""Activations of a forward pass, by the names under which layers offer them (`ForwardContext.tap`).

Letters: L layers, B rows, T sequence.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.model.batch import Source
from weft.model.decoder import Decoder
from weft.model.edits import Edit, Observer
from weft.model.forward import TOKENS, needs_no_stages, one_device, scored, scoring_view
from weft.model.records import Records, Tap
from weft.runtime.errors import UserError, nearest
from weft.sharding.collectives import as_replicated, mark_varying
from weft.sharding.mesh import AXES, split_axes

Taps = dict[str, Tap]  # by name
EVERYWHERE = P(AXES)  # a layout for a first look at shapes: any dim may be split by any axis


def capture(
    model: Decoder,
    names: Collection[str],
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    kind_BT: jax.Array | None = None,
    source: Source | None = None,
    edits: Sequence[Edit] = (),
) -> dict[str, jax.Array]:
    """Of each name an array [L, B, T, …] of the layers that offer it, in their order, or [B, T, …] of what is no layer's.

    docs/interpret.md lists names and dims; a name may be a pattern, as in `residual.*`. Each array stays where it was
    computed: rows are split over BATCH, and where it stands between blocks T over `context` and `tensor`, which must divide T.
    Of an encoder–decoder the decoder's layers offer them. Use it under `jax.jit`, as `weft.model.forward.logits`, whose
    arguments it takes. Raises UserError for a name that no layer offers, for an edit that does not fit, and on a mesh with
    stages.
    """
    taps = captured(model, names, tokens_BT, position_BT, segment_BT, kind_BT, source, edits)
    return {name: tap.value for name, tap in taps.items()}


def captured(
    model: Decoder,
    names: Collection[str],
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    kind_BT: jax.Array | None = None,
    source: Source | None = None,
    edits: Sequence[Edit] = (),
) -> Taps:
    """What `capture` gives, and which layers each array is of."""
    rows = (tokens_BT, position_BT, segment_BT, kind_BT), source, tuple(edits)
    headed = model.config.head is not None and model.config.vocabulary is not None

    def run(names: Collection[str] | None, layouts: Any) -> Callable[..., Taps]:
        def body(model: Decoder, rows: Any, source: Source | None, edits: tuple[Edit, ...]) -> Taps:
            observer = Observer('all' if names is None else frozenset(names), edits)
            tokens_BT, ctx = scoring_view(model, rows, source, observer=observer)
            ctx, said = ctx.recording()
            x_BTD, _, records = model.hidden(tokens_BT, ctx, for_head=headed)
            if headed and observer.asks('logits'):
                scored(model, x_BTD, ctx)
            observer.check(model.config.layers)
            return own_taps(records, said)

        return one_device(body, model, (TOKENS, TOKENS, P()), layouts)

    offered = look(run(None, EVERYWHERE), model, *rows)
    names = chosen(names, offered)
    return collected(run(names, out_layouts(names, offered))(model, *rows))


class Offer(NamedTuple):
    """What the layers of a model offer under a name."""

    shape: tuple[int, ...]  # as captured: [L, B, T, …], or [B, T, …] where `layers` is None
    layers: tuple[int, ...] | None  # the numbers of the layers that have it


def offers(model: Decoder, tokens_BT: jax.Array, position_BT: jax.Array, segment_BT: jax.Array) -> dict[str, Offer]:
    """What `capture` can give of such rows, by name; nothing is computed. `model` may be its shapes, dtypes and layouts."""
    rows = tokens_BT, position_BT, segment_BT
    taps = jax.eval_shape(lambda model, *rows: captured(model, ['*'], *rows), model, *rows)
    return {name: Offer(tap.value.shape, tap.layers) for name, tap in taps.items()}


def look(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a program offers, its shapes one device's: where an activation is tapped it is said how it is laid out."""
    needs_no_stages('capturing activations')
    return jax.eval_shape(run, *arguments)


def chosen(patterns: Iterable[str], offered: Collection[str]) -> list[str]:
    """The names that patterns (of `fnmatch`) mean, sorted. Raises UserError for a pattern that means none."""
    assert not isinstance(patterns, str), 'several patterns'
    found = set[str]()
    for pattern in patterns:
        these = fnmatch.filter(offered, pattern)
        if not these:
            raise UserError(f'{pattern!r}: no layer offers such an activation{nearest(pattern, sorted(offered))}')
        found.update(these)
    return sorted(found)


def own_taps(*records: Records) -> Taps:
    """What one device captured, of a layout that says all: alike on the devices of the axes that it does not name."""
    taps = {name: tap for one in records for name, tap in one.taps.items()}
    for name, tap in taps.items():
        value = mark_varying(tap.value)
        for axis in AXES:
            if axis not in split_axes(tap.layout):
                value = as_replicated(value, axis)
        taps[name] = Tap(value, tap.layout, tap.copies, tap.real, tap.layers)
    return taps


def out_layouts(names: Iterable[str], offered: Mapping[str, Tap]) -> dict[str, P]:
    """The layouts of captured arrays, as the program's outputs have them."""
    return {name: P(*leading(offered[name]), *offered[name].layout) for name in names}


def leading(tap: Tap) -> tuple[None, ...]:
    """The dims before the rows: that of layers, where there is one."""
    return () if tap.layers is None else (None,)


def collected(taps: Mapping[str, Tap], order: np.ndarray | None = None) -> Taps:
    """The arrays of all devices together, without copies and padding; `order`: which column of a row stands where."""
    return {name: dataclasses.replace(tap, value=whole(tap, order)) for name, tap in taps.items()}


def whole(tap: Tap, order: np.ndarray | None) -> jax.Array:
    """One captured array; see `collected`."""
    value, at = tap.value, len(leading(tap))
    split = list(P(*jax.typeof(value).sharding.spec))
    split += [None] * (value.ndim - len(split))

    def unsplit(dim: int) -> jax.Array:
        """The value with all of a dim on every device, as an index along it needs."""
        split[dim] = None
        return jax.reshard(value, P(*split))

    if order is not None and value.shape[at + 1] == len(order) and (np.diff(order) != 1).any():
        value = unsplit(at + 1)
        value = value.at[(slice(None),) * (at + 1) + (jnp.argsort(order),)].get(out_sharding=P(*split))
    if tap.copies > 1:
        value = unsplit(at + 2)
        value = value[(slice(None),) * (at + 2) + (slice(None, None, tap.copies),)]
    if tap.real is not None and tap.real < value.shape[-1]:
        value = unsplit(value.ndim - 1)[..., : tap.real]
    return value
