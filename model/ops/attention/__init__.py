"""Attention behind one call: a reference that is always right, and a fast backend for each platform.

Letters: B batch rows, T queries, S keys, K key/value heads, G query heads per key/value head, H width of a query and
a key, U of a value.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from jax import lax

from weft.model.ops.attention.blockwise import blockwise_attention
from weft.model.ops.attention.mask import QKV, MaskRule, TokenIndex
from weft.model.ops.attention.reference import Relative, reference_attention
from weft.runtime.errors import UserError, nearest
from weft.sharding.collectives import match_varying
from weft.sharding.mesh import platform

BACKENDS = ('reference', 'blockwise', 'flash', 'splash')


def _function(backend: str, ring: bool) -> Callable[..., jax.Array]:
    """What computes it. What needs Pallas is imported where it is used: that takes a while, and most runs on a CPU do not."""
    if ring:
        from weft.model.ops.attention.ring import ring_attention

        return partial(ring_attention, backend=backend)
    if backend == 'flash':
        from weft.model.ops.attention.flash import flash_attention

        return flash_attention
    if backend == 'splash':
        from weft.model.ops.attention.splash import splash_attention

        return splash_attention
    return blockwise_attention if backend == 'blockwise' else reference_attention


def attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    q_at: TokenIndex,
    k_at: TokenIndex,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    sink_KG: jax.Array | None = None,
    relative: Relative | None = None,
    backend: str,
    ring: bool = False,
) -> jax.Array:
    """Softmax attention within segments (Vaswani et al. 2017, arXiv:1706.03762), from one device's view.

    Args:
        q_BTKGH: queries, G heads for each of the K key/value heads (K = 1: multi-query; G = 1: multi-head).
        k_BSKH, v_BSKU: keys and values.
        q_at: (position, segment), int32 [B, T] each: a token's place in its document, and its document in the row.
        k_at: the same for the keys, [B, S] each.
        window: a query sees itself and the `window` - 1 positions before it (as in Hugging Face's configs); None: all.
        scale: of the scores; default H ** -0.5.
        softcap: c: a score s becomes c tanh(s / c) (Gemma 2, arXiv:2408.00118, section 2).
        causal: False: keys after the query are seen too (with a window, as far after as before).
        sink_KG: one more score of each query head, that has no value (gpt-oss: "attention sinks", arXiv:2309.17453).
        relative: what is added to scores by distance.
        backend: one of `BACKENDS`; `default_backend` names the fast one of a platform.
        ring: inside a shard_map whose mesh has an axis `context`: the keys are those of all its devices, which hold a part of
            each row (in any order, `ring.zigzag`'s for equal work), as many columns each; Liu et al. 2023, arXiv:2310.01889.

    A query sees a key iff their segments are equal and, if causal, 0 <= query position - key position (< window). A query
    that sees no key gives 0. Segment 0 is padding: its outputs are finite and otherwise unspecified. Softmax and sums are
    float32 (float64 for float64).

    Returns:
        [B, T, K, G, U] in q's dtype.

    Raises:
        UserError: an unknown backend, or one without what is asked of it (a ring, a soft cap …), a window below 1, or inputs
            that the backend says it does not take.
    """
    if backend not in BACKENDS:
        raise UserError(f'attention backend {backend!r} does not exist{nearest(backend, BACKENDS)}')
    if window is not None and window < 1:
        raise UserError(f'attention window {window} sees no token, not even itself; the least is 1')
    B, T, K, _, H = q_BTKGH.shape
    shapes = q_BTKGH.shape, k_BSKH.shape, v_BSKU.shape
    assert k_BSKH.shape == (*v_BSKU.shape[:3], H) == (B, k_BSKH.shape[1], K, H), shapes
    assert q_at[0].shape == q_at[1].shape == (B, T), (q_BTKGH.shape, q_at[0].shape)
    assert k_at[0].shape == k_at[1].shape == k_BSKH.shape[:2], (k_BSKH.shape, k_at[0].shape)
    inputs = QKV(q_BTKGH, k_BSKH, v_BSKU, q_at, k_at)
    inputs, sink_KG, table_KGN = match_varying((inputs, sink_KG, relative and relative.table_KGN))
    asked = AttentionFeatures(
        softcap=softcap is not None,
        sinks=sink_KG is not None,
        two_ways=not causal,
        value_width=v_BSKU.shape[-1] != H,
        relative=relative is not None,
        float64=q_BTKGH.dtype == 'float64',
    )
    lacks = [name for name in asked.names() if name not in _ABLE[backend]]
    if lacks:
        works = ', '.join(name for name in BACKENDS if not set(asked.names()) - _ABLE[name])
        raise UserError(f'attention backend {backend} has no {lacks[0]}, which this model needs; use {works}')
    if relative is not None and table_KGN is not None:
        relative = relative._replace(table_KGN=table_KGN)
    options = {'sink_KG': sink_KG, 'relative': relative}
    run = _function(backend, ring and lax.axis_size('context') > 1)
    rule = MaskRule(window, H**-0.5 if scale is None else scale, softcap, causal)
    return run(inputs, rule, **{name: given for name, given in options.items() if given is not None})


@dataclasses.dataclass(frozen=True)
class AttentionFeatures:
    """What a model asks of attention that not every backend has."""

    softcap: bool = False
    sinks: bool = False
    two_ways: bool = False  # not causal
    value_width: bool = False  # values of another width than keys
    relative: bool = False  # positions
    float64: bool = False

    def names(self) -> list[str]:
        """Of what is asked."""
        return [name for name, asked in dataclasses.asdict(self).items() if asked]


# Beside plain causal attention.
_ABLE: dict[str, set[str]] = {
    'reference': {'softcap', 'sinks', 'two_ways', 'value_width', 'relative', 'float64'},
    'blockwise': {'softcap', 'sinks', 'two_ways', 'value_width', 'float64'},
    'flash': set(),
    'splash': {'softcap', 'two_ways', 'value_width'},
}


def default_backend(name: str, context: int = 1, asked: AttentionFeatures = AttentionFeatures()) -> str:
    """The fast backend of a JAX platform ('cpu', 'gpu' or 'cuda', 'tpu') that has what is asked, for a sequence over
    `context` devices."""
    fast = {'cpu': 'blockwise', 'gpu': 'flash', 'cuda': 'flash', 'tpu': 'splash'}
    if name not in fast:
        raise UserError(f'platform {name!r} has no fast attention backend; known: {", ".join(fast)}')
    first = 'blockwise' if fast[name] == 'splash' and context > 1 else fast[name]
    return next(one for one in (first, 'blockwise', 'reference') if not set(asked.names()) - _ABLE[one])


def needs_unchecked(backend: str) -> bool:
    """Whether a shard_map that holds this backend must be made with check_vma=False, on the current mesh's platform.

    Splash's outputs do not say over which axes they vary; on a CPU, neither does Pallas while it interprets flash.
    """
    return backend == 'splash' or (backend == 'flash' and platform() == 'cpu')
