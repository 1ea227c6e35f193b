"""Every attention backend against the reference, the reference against plain NumPy, causality by gradients."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

from weft.model.ops.attention import BACKENDS, attention, default_backend, needs_unchecked
from weft.model.ops.attention.blockwise import blockwise_attention
from weft.model.ops.attention.flash import FlashTiling, flash_attention
from weft.model.ops.attention.mask import QKV, MaskRule, sees, span, tiles_see
from weft.runtime.errors import UserError

FAST = tuple(backend for backend in BACKENDS if backend != 'reference')
TILES = (FlashTiling(16, 32, 4, 2), FlashTiling(32, 16, 4, 2), FlashTiling(16, 16, 4, 2))  # forward, dq, dkv
SMALL_TILES = {  # many tiles at the lengths of these tests; splash's are 128
    'blockwise': partial(blockwise_attention, tile=16),
    'flash': partial(flash_attention, tiling=TILES),
}
HEADS = {'multi-head': (3, 1), 'grouped': (2, 3), 'multi-query': (1, 4)}  # K, G
ELSEWHERE = {'flash': 'tpu', 'splash': 'gpu'}  # the kernels exist on their own platform, and interpreted on a CPU


def here(backends) -> list:
    """The backends as parameters of a test, marked as skipped where this platform has none."""
    absent = {backend for backend in backends if ELSEWHERE.get(backend) == jax.default_backend()}
    skip = pytest.mark.skipif(True, reason='no kernel for this platform')
    return [pytest.param(backend, marks=skip) if backend in absent else backend for backend in backends]


def packed(rng: np.random.Generator, B: int, T: int) -> tuple[jax.Array, jax.Array]:
    """(position, segment) of rows packed with three documents of random lengths, and padding (segment 0) at the end."""
    position_BT, segment_BT = np.zeros((2, B, T), np.int32)
    for b in range(B):
        ends = np.sort(rng.choice(np.arange(1, T), size=3, replace=False))
        for segment, (start, end) in enumerate(itertools.pairwise([0, *ends]), 1):
            position_BT[b, start:end], segment_BT[b, start:end] = np.arange(end - start), segment
    return jnp.asarray(position_BT), jnp.asarray(segment_BT)


def sample(B: int, T: int, K: int, G: int, H: int, dtype=jnp.float32, seed: int = 0) -> tuple:
    """q, k, v, at, and a cotangent of the output that is 0 at padding."""
    rng = np.random.default_rng(seed)
    at = packed(rng, B, T)
    shapes = (B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q, k, v, at, dout * (at[1] > 0)[:, :, None, None, None].astype(dtype)


@partial(jax.jit, static_argnums=0)
def value_and_grads(run, q, k, v, at, dout) -> tuple[jax.Array, ...]:
    """The output, 0 at padding, and dq, dk, dv."""
    out, back = jax.vjp(lambda q, k, v: run(q, k, v, at, at), q, k, v)
    return jnp.where((at[1] > 0)[:, :, None, None, None], out, 0), *back(dout)


def check(run, window: int | None, inputs: tuple, tolerance: float) -> None:
    """Output and gradients of `run` against the reference's: the largest difference over the largest magnitude."""
    expected = value_and_grads(partial(attention, window=window, backend='reference'), *inputs)
    for name, one, other in zip(('out', 'dq', 'dk', 'dv'), value_and_grads(run, *inputs), expected, strict=True):
        assert one.dtype == other.dtype == inputs[0].dtype
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        # With a window of 1 the softmax has one term: dq and dk are 0 but for rounding, whatever dout is.
        scale = np.abs(other).max() if np.abs(other).max() > 1e-5 else 1
        assert np.abs(one - other).max() <= tolerance * scale, name


def small(backend: str, window: int | None):
    """The backend in small tiles, called as `attention` calls it."""
    return lambda *inputs: SMALL_TILES[backend](QKV(*inputs), MaskRule(window, inputs[0].shape[-1] ** -0.5))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('window', [None, 1, 5, 1000])
def test_the_reference_is_what_the_docstring_says(window):
    q, k, v, (position_BT, segment_BT), _ = sample(2, 19, 2, 3, 4, jnp.float64)
    found = attention(q, k, v, *[(position_BT, segment_BT)] * 2, window=window, scale=0.3, backend='reference')
    q, k, v, position_BT, segment_BT = map(np.asarray, (q, k, v, position_BT, segment_BT))
    expected = np.zeros(q.shape)
    for b, t, n, g in np.ndindex(q.shape[:4]):
        weights, values = [], []
        for s in range(k.shape[1]):
            ago = int(position_BT[b, t] - position_BT[b, s])
            if segment_BT[b, t] == segment_BT[b, s] and 0 <= ago < (window or 10**6):
                weights.append(np.exp(0.3 * np.dot(q[b, t, n, g], k[b, s, n])))
                values.append(v[b, s, n])
        expected[b, t, n, g] = np.einsum('s,sh->h', weights, values) / np.sum(weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize('window', [None, 1, 5, 1000])
@pytest.mark.parametrize('heads', HEADS)
def test_blockwise_equals_the_reference(heads, window):
    check(small('blockwise', window), window, sample(2, 70, *HEADS[heads], 8), 1e-5)


@pytest.mark.parametrize(('T', 'window'), [(64, None), (37, 5)])
@pytest.mark.parametrize('heads', HEADS)
def test_blockwise_in_one_tile_equals_the_reference(heads, T, window):
    check(partial(attention, window=window, backend='blockwise'), window, sample(2, T, *HEADS[heads], 8), 1e-5)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('run', ['tiles', 'one tile'])
@pytest.mark.parametrize('window', [None, 5])
def test_blockwise_equals_the_reference_in_float64(window, run):
    one_tile = partial(attention, window=window, backend='blockwise')
    check(
        small('blockwise', window) if run == 'tiles' else one_tile, window, sample(2, 53, 2, 2, 8, jnp.float64), 1e-12
    )


@pytest.mark.parametrize('backend', here(['flash']))
@pytest.mark.parametrize(
    ('heads', 'T', 'H', 'window'),
    [('multi-head', 70, 16, None), ('grouped', 64, 24, None), ('multi-query', 70, 16, 5), ('grouped', 50, 16, 1)],
)
def test_flash_equals_the_reference(backend, heads, T, H, window):
    check(small(backend, window), window, sample(2, T, *HEADS[heads], H), 1e-5)


@pytest.mark.parametrize('backend', here(['splash']))
@pytest.mark.parametrize(
    ('heads', 'T', 'H', 'window'), [('grouped', 300, 24, None), ('multi-query', 140, 16, 5), ('multi-head', 40, 8, 1)]
)
def test_splash_equals_the_reference(backend, heads, T, H, window):
    check(partial(attention, window=window, backend=backend), window, sample(1, T, *HEADS[heads], H), 1e-5)


@pytest.mark.parametrize('window', [None, 3])
def test_what_is_known_of_tiles_holds_for_their_tokens(window):
    """Also of tokens in any order: a tile that is skipped has nothing to see, one without a mask nothing to hide."""
    rng = np.random.default_rng(0)
    B, c, d, tile = 40, 5, 6, 4

    def places(tiles: int, low: int) -> tuple[jax.Array, jax.Array]:
        position = low + rng.integers(0, 4, (B, tiles, 1)) + rng.integers(0, 2, (B, tiles, tile))
        segment = rng.integers(1, 3, (B, tiles, 1)) + (rng.random((B, tiles, tile)) < 0.1)  # mostly one a tile
        return jnp.asarray(position, jnp.int32), jnp.asarray(segment, jnp.int32)

    at_c, at_d = places(c, low=1), places(d, low=0)
    whole = (tuple(x.reshape(B, -1) for x in at) for at in (at_c, at_d))
    see_Bctds = np.asarray(sees(*whole, window)).reshape(B, c, tile, d, tile)
    some_Bcd, every_Bcd = map(np.asarray, tiles_see(at_c, at_d, window))
    assert (some_Bcd >= see_Bctds.any((2, 4))).all()
    assert (every_Bcd <= see_Bctds.all((2, 4))).all()
    first_Bc, end_Bc = (np.asarray(x)[..., None] for x in span(jnp.asarray(some_Bcd)))
    assert (some_Bcd <= (np.arange(d) >= first_Bc) & (np.arange(d) < end_Bc)).all()
    for known in (some_Bcd, every_Bcd, see_Bctds.any((2, 4))):
        assert 0 < known.mean() < 1


@pytest.mark.parametrize('backend', here(['blockwise', 'flash']))
def test_tokens_may_stand_in_any_order(backend):
    q, k, v, at, dout = sample(2, 70, 2, 1, 16)
    order = jnp.asarray(np.random.default_rng(1).permutation(70))
    q, k, v, dout, *at = (x[:, order] for x in (q, k, v, dout, *at))
    check(small(backend, 9), 9, (q, k, v, tuple(at), dout), 1e-5)


@pytest.mark.parametrize('backend', here(FAST))
def test_bfloat16_is_as_near_as_its_eight_bits(backend):
    inputs = sample(1, 50, 2, 2, 16, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    expected = value_and_grads(partial(attention, backend='reference'), *wide)
    for one, other in zip(value_and_grads(partial(attention, backend=backend), *inputs), expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.abs(np.asarray(one, np.float32) - other).max() <= 0.02 * np.abs(other).max()


@pytest.mark.parametrize('backend', here(BACKENDS))
def test_gradients_reach_exactly_what_a_query_sees(backend):
    T, window = 14, 4
    q, k, v, at, _ = sample(1, T, 1, 1, 8)
    run = partial(attention, q_at=at, k_at=at, window=window, backend=backend)
    _, back = jax.vjp(lambda q, k, v: run(q, k, v), q, k, v)
    rng = np.random.default_rng(1)
    douts = jnp.eye(T)[:, None, :, None, None, None] * jnp.asarray(rng.normal(size=(1, *q.shape)), jnp.float32)
    dq, dk, dv = jax.jit(jax.vmap(back))(douts)  # [query, B, token, ...]
    reach_q, reach_k, reach_v = (np.abs(np.asarray(d)).reshape(T, T, -1).max(-1) > 0 for d in (dq, dk, dv))

    position_T, segment_T = (np.asarray(x)[0] for x in at)
    ago_TS = position_T[:, None] - position_T[None, :]
    see_TS = (segment_T[:, None] == segment_T[None, :]) & (ago_TS >= 0) & (ago_TS < window)
    real_T = segment_T > 0
    np.testing.assert_array_equal(reach_v[real_T], see_TS[real_T])
    choice_T = real_T & (position_T > 0)  # the first token sees itself alone: its weight is 1 whatever the key is
    np.testing.assert_array_equal(reach_k[choice_T], see_TS[choice_T])
    np.testing.assert_array_equal(reach_q[choice_T], np.eye(T, dtype=bool)[choice_T])
    # Padding, whatever it sees, reaches no real token, and nothing is NaN.
    assert not (reach_k | reach_v)[~real_T][:, real_T].any()
    assert all(np.isfinite(d).all() for d in (dq, dk, dv))


@pytest.mark.parametrize('backend', here(['reference', 'blockwise', 'flash']))
def test_a_query_that_sees_no_key_gives_zero(backend):
    q, k, v, at, dout = sample(2, 20, 2, 2, 8)
    nobodys = at[0][:, :12], at[1][:, :12].at[0].set(9)  # row 0: of a document that is not among the queries

    def run(q, k, v):
        return attention(q, k, v, at, nobodys, backend=backend)

    @jax.jit
    def value_and_grads(q, k, v, dout):
        out, back = jax.vjp(run, q, k, v)
        return out, back(dout)

    out, grads = value_and_grads(q, k[:, :12], v[:, :12], dout)
    assert (out[0] == 0).all()
    assert not (out[1, :5] == 0).all()
    for d in grads:
        assert (d[0] == 0).all()
        assert np.isfinite(d).all()


@pytest.mark.parametrize('backend', here(['reference', 'blockwise', 'flash']))
def test_one_query_against_a_cache(backend):
    """The last of T queries among S > T slots, of which those behind it are not yet written."""
    q, k, v, _, _ = sample(2, 30, 2, 2, 8)
    position_BS = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32), (2, 30))
    at, slots = (position_BS[:, 10:11], jnp.ones((2, 1), jnp.int32)), (position_BS, jnp.ones((2, 30), jnp.int32))
    found = attention(q[:, 10:11], k, v, at, slots, backend=backend)
    until = tuple(x[:, :11] for x in slots)
    expected = attention(q[:, :11], k[:, :11], v[:, :11], until, until, backend='reference')[:, 10:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def largest_array(jaxpr) -> int:
    """Elements of the largest intermediate of a traced program, those of its loops, branches and kernels included."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, 'size')]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                sizes.append(largest_array(inner))
    return max(sizes, default=0)


@pytest.mark.parametrize('backend', BACKENDS)
def test_no_fast_backend_holds_all_scores(backend):
    T = 2048
    x = jax.ShapeDtypeStruct((1, T, 1, 1, 16), jnp.float32)
    kv, at = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32), (jax.ShapeDtypeStruct((1, T), jnp.int32),) * 2
    traced = jax.make_jaxpr(partial(value_and_grads, partial(attention, backend=backend)))(x, kv, kv, at, x)
    assert (largest_array(traced.jaxpr) >= T * T) == (backend == 'reference')


@pytest.mark.parametrize('backend', here(BACKENDS))
@pytest.mark.parametrize('split', ['kv heads', 'query heads'])
def test_inside_a_manual_shard_map(backend, split):
    """Rows over data and expert, heads over tensor; if only query heads are split, `tensor` shares one kv head."""
    mesh = jax.make_mesh((2, 2, 2), ('data', 'expert', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    rows = P(('data', 'expert'))
    q_spec, kv_spec = {
        'kv heads': (P(*rows, None, 'tensor'), P(*rows, None, 'tensor')),
        'query heads': (P(*rows, None, None, 'tensor'), rows),
    }[split]
    K, G = (2, 2) if split == 'kv heads' else (1, 4)
    inputs = sample(4, 24, K, G, 8)

    def sharded(q, k, v, q_at, k_at):
        body = partial(attention, window=9, backend=backend)
        specs = (q_spec, kv_spec, kv_spec, (rows, rows), (rows, rows))
        checked = not needs_unchecked(backend)
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=checked)(q, k, v, q_at, k_at)

    check(sharded, 9, inputs, 1e-5)


def test_mistakes_are_named():
    q, k, v, at, _ = sample(1, 8, 1, 1, 4)
    with pytest.raises(UserError, match="'blockwize' does not exist; did you mean 'blockwise'"):
        attention(q, k, v, at, at, backend='blockwize')
    with pytest.raises(UserError, match='window 0 sees no token'):
        attention(q, k, v, at, at, window=0, backend='reference')
    with pytest.raises(UserError, match='as many keys as queries'):
        attention(q[:, :4], k, v, tuple(x[:, :4] for x in at), at, backend='splash')
    with pytest.raises(UserError, match="platform 'abacus'"):
        default_backend('abacus')
    assert [default_backend(name) for name in ('cpu', 'gpu', 'cuda', 'tpu')] == [
        'blockwise',
        'flash',
        'flash',
        'splash',
    ]


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('backend', ['flash', 'splash'])
def test_the_kernels_refuse_float64(backend):
    q, k, v, at, _ = sample(1, 8, 1, 1, 4, jnp.float64)
    with pytest.raises(UserError, match=f'{backend} has no float64'):
        attention(q, k, v, at, at, backend=backend)
