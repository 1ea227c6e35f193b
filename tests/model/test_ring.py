"""Attention over a sequence split over `context` against the reference on whole rows, in every order of the tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from tests.model.test_attention import here, sample, value_and_grads
from weft.model.ops.attention import attention, default_backend, needs_unchecked, ring
from weft.model.ops.attention.flash import FlashTiling
from weft.model.ops.attention.mask import QKV, MaskRule, tiles_see
from weft.model.ops.attention.ring import ring_blockwise, ring_flash
from weft.runtime.errors import UserError
from weft.sharding.collectives import match_varying, ring_shift
from weft.sharding.mesh import BATCH, MeshConfig, make_mesh
from weft.sharding.sequence_layout import zigzag

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason='wants 8 devices'),
]

ROWS, HEADS = P(BATCH, 'context'), P(BATCH, 'context', 'tensor')
TILES = (FlashTiling(16, 32, 4, 2), FlashTiling(32, 16, 4, 2), FlashTiling(16, 16, 4, 2))  # forward, dq, dkv
ORDERS = {
    'zigzag': lambda T, n: np.asarray(zigzag(T, n)).reshape(-1),
    'contiguous': lambda T, n: np.arange(T),
    'shuffled': lambda T, n: np.random.default_rng(7).permutation(T),
}


def in_tiles(run, *inputs, window, **kwargs):
    """A ring in small tiles, called as `attention` calls it."""
    inputs = QKV(*match_varying(inputs))
    return run(inputs, MaskRule(window, inputs.q_BTKGH.shape[-1] ** -0.5), **kwargs)


def over_devices(body, order: np.ndarray, checked: bool = True):
    """`body` as a function of whole rows, whose tokens lie over the current mesh's devices of `context` in this order."""
    specs = HEADS, HEADS, HEADS, (ROWS, ROWS), (ROWS, ROWS)

    def run(*inputs):
        inputs = jax.tree.map(lambda x, spec: jax.reshard(x[:, order], spec), inputs, specs)
        out = jax.shard_map(body, in_specs=specs, out_specs=HEADS, check_vma=checked)(*inputs)
        return jax.reshard(out, P())[:, np.argsort(order)]

    return run


def errors(run, mesh: MeshConfig, window: int | None, inputs: tuple) -> dict[str, float]:
    """The largest differences of output and gradients from the reference's, over the largest magnitudes."""
    expected = value_and_grads(partial(attention, window=window, backend='reference'), *inputs)
    with jax.set_mesh(make_mesh(mesh)):
        found = value_and_grads(run, *inputs)
    pairs = zip(('out', 'dq', 'dk', 'dv'), map(np.asarray, found), map(np.asarray, expected), strict=True)
    return {name: float(abs(one - other).max() / abs(other).max()) for name, one, other in pairs}


MESHES = {
    'context=2 data=2 tensor=2': MeshConfig(context=2, data=2, tensor=2),
    'context=4 tensor=2': MeshConfig(context=4, tensor=2),
    'context=8': MeshConfig(context=8),
}


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
    ('mesh', 'window', 'order'),
    [
        ('context=2 data=2 tensor=2', None, 'zigzag'),
        ('context=2 data=2 tensor=2', 9, 'shuffled'),
        ('context=4 tensor=2', None, 'shuffled'),
        ('context=4 tensor=2', 9, 'contiguous'),
        ('context=8', 9, 'zigzag'),
        ('context=8', None, 'contiguous'),
    ],
)
def test_blockwise_in_tiles_equals_the_reference(mesh, window, order):
    """At 64 tokens, packed with padding behind, a device has 8 to 32, in tiles of 4 or (the last one not full) 6."""
    mesh, T = MESHES[mesh], 64
    body = partial(in_tiles, ring_blockwise, window=window, tile=4 if window else 6)
    run = over_devices(body, ORDERS[order](T, mesh.context))
    assert max(errors(run, mesh, window, sample(2, T, 2, 3, 8, jnp.float64)).values()) < 1e-12


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
    ('mesh', 'window'), [('context=2 data=2 tensor=2', 9), ('context=4 tensor=2', None), ('context=8', 9)]
)
@pytest.mark.parametrize('backend', ['reference', 'blockwise'])
def test_attention_with_a_ring_equals_the_reference(backend, mesh, window):
    mesh, T = MESHES[mesh], 48
    body = partial(attention, window=window, backend=backend, ring=True)
    run = over_devices(body, ORDERS['zigzag'](T, mesh.context))
    assert max(errors(run, mesh, window, sample(2, T, 2, 1, 8, jnp.float64)).values()) < 1e-12


@pytest.mark.parametrize('backend', here(['flash']))
@pytest.mark.parametrize(
    ('mesh', 'T', 'window', 'order'),
    [('context=2', 128, None, 'zigzag'), ('context=4 tensor=2', 96, 9, 'zigzag'), ('context=2', 70, 9, 'shuffled')],
)
def test_flash_equals_the_reference(backend, mesh, T, window, order):
    mesh = {**MESHES, 'context=2': MeshConfig(context=2)}[mesh]
    body = partial(in_tiles, ring_flash, window=window, tiling=TILES)
    run = over_devices(body, ORDERS[order](T, mesh.context), checked=not needs_unchecked(backend))
    assert max(errors(run, mesh, window, sample(1, T, 2, 2, 16)).values()) < 2e-5


@pytest.mark.parametrize('backend', here(['reference', 'blockwise', 'flash']))
def test_bfloat16_is_as_near_as_its_eight_bits(backend):
    """Also after eight ticks: what is summed over them is wide."""
    inputs = sample(1, 64, 1, 2, 16, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    expected = value_and_grads(partial(attention, backend='reference'), *wide)
    body = partial(attention, backend=backend, ring=True)
    run = over_devices(body, ORDERS['zigzag'](64, 8), checked=not needs_unchecked(backend))
    with jax.set_mesh(make_mesh(MeshConfig(context=8))):
        found = value_and_grads(run, *inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.abs(np.asarray(one, np.float32) - other).max() <= 0.02 * np.abs(other).max()


@pytest.mark.parametrize('backend', here(['reference', 'blockwise', 'flash']))
def test_a_query_that_sees_no_key_gives_zero(backend):
    q, k, v, at, dout = sample(2, 64, 1, 2, 16)
    nobodys = at[0], at[1].at[0].set(9)  # row 0: of a document that is not among the queries
    body = partial(attention, backend=backend, ring=True)
    run = over_devices(body, np.arange(64), checked=not needs_unchecked(backend))

    @jax.jit
    def value_and_grads(q, k, v, dout):
        out, back = jax.vjp(lambda q, k, v: run(q, k, v, at, nobodys), q, k, v)
        return out, back(dout)

    with jax.set_mesh(make_mesh(MeshConfig(context=4))):
        out, grads = value_and_grads(q, k, v, dout)
    assert (out[0] == 0).all()
    assert not (out[1, :5] == 0).all()
    for d in grads:
        assert (d[0] == 0).all()
        assert np.isfinite(d).all()


# What is sent, kept and computed --------------------------------------------------------------------------------------


def inside(eqn) -> list:
    """The traced programs that an equation runs: the body of a loop, the branches of a condition."""
    values = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
    return [jaxpr for jaxpr in (getattr(value, 'jaxpr', value) for value in values) if hasattr(jaxpr, 'eqns')]


def sends(jaxpr, times: int = 1) -> list[tuple[str, int]]:
    """(dtype, how often) of each ppermute of a traced program, those in its loops counted as often as they run."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'ppermute':
            found += [(var.aval.dtype.name, times) for var in eqn.invars]
        for body in inside(eqn):
            found += sends(body, times * eqn.params.get('length', 1))
    return found


def loops_that_send(jaxpr) -> list:
    """The bodies of the loops over ticks."""
    bodies = [(eqn.primitive.name == 'scan', body) for eqn in jaxpr.eqns for body in inside(eqn)]
    here = [body for loop, body in bodies if loop and any(eqn.primitive.name == 'ppermute' for eqn in body.eqns)]
    return here + [found for _, body in bodies for found in loops_that_send(body)]


def equations(jaxpr) -> int:
    """Of a traced program, those of its loops and branches included."""
    return len(jaxpr.eqns) + sum(equations(body) for eqn in jaxpr.eqns for body in inside(eqn))


def long_program(n: int, T: int, gradient: bool, dtype=jnp.float32, ring: bool = True):
    """A jitted blockwise ring over n devices, and its abstract arguments."""
    mesh = make_mesh(MeshConfig(context=n))

    def array(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, P(None, 'context')))

    q, kv, at = array((1, T, 2, 2, 64)), array((1, T, 2, 64)), (array((1, T), jnp.int32),) * 2

    def forward(q, k, v, at):
        body = partial(attention, backend='blockwise', ring=ring)
        return jax.shard_map(body, mesh=mesh, out_specs=P(None, 'context'))(q, k, v, at, at)

    def back(q, k, v, at, dout):
        return jax.vjp(lambda q, k, v: forward(q, k, v, at), q, k, v)[1](dout)

    return (jax.jit(back), (q, kv, kv, at, q)) if gradient else (jax.jit(forward), (q, kv, kv, at))


@pytest.mark.parametrize('n', [2, 4, 8])
def test_how_often_it_sends(n):
    """k, v and their places n - 1 times a pass; dk and dv, in float32, n times: the last of them home."""

    def count(gradient: bool) -> dict[str, int]:
        program, arguments = long_program(n, 8192, gradient, jnp.bfloat16)
        sent = sends(jax.make_jaxpr(program)(*arguments).jaxpr)
        return {name: sum(times for dtype, times in sent if dtype == name) for name in ('bfloat16', 'int32', 'float32')}

    assert count(gradient=False) == {'bfloat16': 2 * (n - 1), 'int32': 2 * (n - 1), 'float32': 0}
    assert count(gradient=True) == {'bfloat16': 4 * (n - 1), 'int32': 4 * (n - 1), 'float32': 2 * n}


def test_the_program_does_not_grow_with_the_ring():
    def size(n):
        program, arguments = long_program(n, 8192, gradient=True)
        return equations(jax.make_jaxpr(program)(*arguments).jaxpr)

    assert size(2) == size(4) == size(8)


@pytest.mark.parametrize('gradient', [False, True])
def test_a_send_does_not_wait_for_the_work_of_its_tick(gradient):
    """In the loop over ticks, what is sent comes straight from the loop's carry."""
    program, arguments = long_program(8, 8192, gradient)
    bodies = loops_that_send(jax.make_jaxpr(program)(*arguments).jaxpr)
    assert len(bodies) == 1 + gradient
    for body in bodies:
        sent = [var for eqn in body.eqns if eqn.primitive.name == 'ppermute' for var in eqn.invars]
        assert len(sent) >= 4
        assert all(var in body.invars for var in sent)


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('gradient', [False, True])
def test_memory_falls_with_the_ring(gradient):
    """At 32,768 tokens over 8 devices: at most a quarter of the temporary memory of blockwise attention on one."""

    def temporary(n: int) -> float:
        program, arguments = long_program(n, 32_768, gradient, ring=n > 1)
        return program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20

    one, eight = temporary(1), temporary(8)
    print(f'{"gradient" if gradient else "forward"}: {one:.1f} MiB on one device, {eight:.1f} on each of 8')
    assert eight <= one / 4


def tile_pairs(place_nT: np.ndarray, tile: int, window: int | None) -> np.ndarray:
    """[device, tick]: pairs of tiles that are not skipped."""
    n = len(place_nT)
    tiles = [(jnp.asarray(place.reshape(1, -1, tile)), jnp.ones((1, place.size // tile, tile))) for place in place_nT]
    pairs = [[tiles_see(tiles[i], tiles[(i - tick) % n], window)[0].sum() for tick in range(n)] for i in range(n)]
    return np.asarray(pairs)


@pytest.mark.parametrize('n', [2, 4, 8])
def test_zigzag_is_equal_work_in_every_tick(n):
    T, tile = 1024, 16
    zigzagged = tile_pairs(np.asarray(zigzag(T, n)), tile, None)
    assert (zigzagged == zigzagged[:1]).all()
    contiguous = tile_pairs(np.arange(T).reshape(n, -1), tile, None)
    assert contiguous.sum() == zigzagged.sum()
    assert contiguous.sum(1).max() > 1.4 * zigzagged.sum(1).max()


def test_zigzag():
    assert zigzag(6, 1).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert zigzag(12, 3).tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    with pytest.raises(AssertionError):
        zigzag(10, 4)
    mine = jax.shard_map(
        lambda: jnp.asarray(zigzag(16, 8))[jax.lax.axis_index('context')],
        mesh=make_mesh(MeshConfig(context=8)),
        in_specs=(),
        out_specs=P('context'),
    )
    assert jax.jit(mine)().tolist() == zigzag(16, 8).reshape(-1).tolist()


# Mistakes -------------------------------------------------------------------------------------------------------------


def two_onward(tree, axis):
    return ring_shift(ring_shift(tree, axis), axis)


def places_stay(tree, axis):
    """k and v go on, and (position, segment) of the keys do not."""
    return (*ring_shift(tree[:2], axis), tree[2]) if len(tree) == 3 else ring_shift(tree, axis)


def grads_stay(tree, axis):
    """dk and dv do not follow their k and v."""
    return tree if len(tree) == 2 else ring_shift(tree, axis)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
    ('send', 'wrong'),
    [
        (ring_shift, set()),
        (two_onward, {'out', 'dq', 'dk', 'dv'}),
        (places_stay, {'out', 'dq', 'dk', 'dv'}),
        (grads_stay, {'dk', 'dv'}),
    ],
)
def test_a_wrong_send_is_caught(send, wrong, monkeypatch):
    monkeypatch.setattr(ring, 'ring_shift', send)
    body = partial(in_tiles, ring_blockwise, window=None, tile=4)
    inputs = sample(1, 32, 1, 1, 4, jnp.float64)
    found = errors(over_devices(body, np.arange(32)), MeshConfig(context=4), None, inputs)
    assert {name for name, error in found.items() if not error < 1e-3} == wrong


def test_mistakes_are_named():
    q, k, v, at, _ = sample(1, 8, 1, 1, 4)
    run = over_devices(partial(attention, backend='splash', ring=True), np.arange(8), checked=False)
    with (
        jax.set_mesh(make_mesh(MeshConfig(context=2))),
        pytest.raises(UserError, match=r'splash .* with mesh\.context above 1 use blockwise'),
    ):
        run(q, k, v, at, at)
    assert [default_backend(name, context=2) for name in ('cpu', 'gpu', 'tpu')] == ['blockwise', 'flash', 'blockwise']
    assert default_backend('tpu', context=1) == 'splash'
