"""Activations of a forward pass, by the names under which layers offer them (`ForwardContext.tap`).

Letters: L layers, B rows, T sequence.
"""

from collections.abc import Callable, Collection, Set
from typing import Any, Literal

import jax
from jax import P

from weft.model.batch import Source
from weft.model.decoder import Decoder
from weft.model.forward import TOKENS, needs_no_stages, one_device, scoring_view
from weft.runtime.errors import UserError, nearest
from weft.sharding.mesh import AXES


def capture(
    model: Decoder,
    names: Collection[str],
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    kind_BT: jax.Array | None = None,
    source: Source | None = None,
) -> dict[str, jax.Array]:
    """Of each name an array [L, B, T, …] of the layers that offer it, in their order.

    Each stays where it was computed: rows are split over BATCH, and where it stands between blocks T over `context` and
    `tensor`, which must divide T. Every layer offers `attention` and `mlp`, what those add to the residual stream, and `block`,
    that stream behind the layer; of an encoder–decoder the decoder's layers do, and `cross` too. Use it under `jax.jit`, as
    `weft.model.forward.logits`, whose arguments it takes. Raises UserError for a name that no layer offers, and on a mesh
    with stages.
    """
    needs_no_stages('capturing activations')
    rows = tokens_BT, position_BT, segment_BT, kind_BT
    layouts: dict[str, P] = {}

    def run(taps: Set[str] | Literal['all'], out_specs: Any) -> Callable[..., dict[str, jax.Array]]:
        def body(model: Decoder, rows: tuple[jax.Array | None, ...], source: Source | None) -> dict[str, jax.Array]:
            _, _, records = model.hidden(*scoring_view(model, rows, source, taps=taps), for_head=False)
            layouts.update({name: P(None, *tap.layout) for name, tap in records.taps.items()})
            return {name: tap.value for name, tap in records.taps.items()}

        return one_device(body, model, (TOKENS, TOKENS), out_specs)

    # How an activation is laid out is said where it is tapped: a first look, at shapes alone, finds it.
    jax.eval_shape(run('all', P(AXES)), model, rows, source)
    for name in names:
        if name not in layouts:
            raise UserError(f'{name!r}: no layer offers such an activation{nearest(name, layouts)}')
    return run(frozenset(names), {name: layouts[name] for name in names})(model, rows, source)
