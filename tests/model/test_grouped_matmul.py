"""Every backend of the grouped matmul against the reference, values and gradients; the way to the experts and back
against autodiff.

R: rows   E: experts   D, F: widths   N: tokens   K: choices a token
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax

from weft.model.ops.blocked_matmul import BLOCKS
from weft.model.ops.grouped_matmul import (
    BACKENDS,
    combine,
    default_backend,
    expert_mlp,
    grouped_apply,
    grouped_matmul,
    permute,
)
from weft.runtime.errors import UserError

WIDE = ['blocked', 'ragged']  # in float64 too
FAST = [*WIDE, 'gmm']
D, F = 6, 10
# Sizes of the groups: 4 rows go to their groups one by one; 20 rows are smaller than any block or in few small ones, 1,300 end
# inside and outside of each kind of block; empty groups, one that holds everything, one block exactly, rows left over, nothing
# at all. Few shapes, so that each is compiled once.
CASES = [
    (4, (1, 0, 2)),
    (4, (0, 0, 0)),
    (20, (8, 0, 12)),
    (20, (0, 0, 0)),
    (20, (0, 5, 6)),
    (1300, (128, 32, 0, 512, 628)),
    (1300, (100, 0, 513, 20, 0)),
    (1300, (1, 577, 31, 0, 691)),
    (1300, (0, 0, 0, 0, 1300)),
    (1300, (1299, 0, 0, 0, 0)),
]


def inputs(R, sizes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (R, D), *[(len(sizes), D, F)] * 3
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes], jnp.asarray(sizes, jnp.int32)


def close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        scale = jnp.max(jnp.abs(b.astype(jnp.promote_types(b.dtype, jnp.float32))), initial=0)
        np.testing.assert_allclose(a.astype(scale.dtype), b.astype(scale.dtype), rtol=0, atol=float(tolerance * scale))


@functools.partial(jax.jit, static_argnums=0)
def matmul_and_gradients(backend, arrays, sizes_E):
    return value_and_gradients(lambda x, w: grouped_matmul(x, w, sizes_E, backend=backend), arrays[:2])


@functools.partial(jax.jit, static_argnums=0)
def mlp_and_gradients(backend, arrays, sizes_E):
    return value_and_gradients(lambda *a: expert_mlp(*a, sizes_E, backend=backend), arrays)


@functools.partial(jax.jit, static_argnums=0)
def biased_mlp_and_gradients(backend, arrays, sizes_E):
    def mlp(x_RD, gate, up, down):  # what is added is some of the weights' own numbers
        biases = (gate[:, 0], up[:, 1]), down[:, :, 2]
        return expert_mlp(x_RD, gate, up, down, sizes_E, biases=biases, backend=backend)

    return value_and_gradients(mlp, arrays)


def value_and_gradients(f, arrays):
    y, vjp = jax.vjp(f, *arrays)
    return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@pytest.mark.parametrize(('R', 'sizes'), CASES)
def test_reference_is_one_matmul_a_group(float64, R, sizes):
    (x_RD, w_EDF, *_), sizes_E = inputs(R, sizes, jnp.float64)
    groups = [x @ w for x, w in zip(np.split(x_RD, np.cumsum(sizes)), [*w_EDF, np.zeros((D, F))], strict=True)]
    close(grouped_matmul(x_RD, w_EDF, sizes_E, backend='reference'), jnp.concatenate(groups), 1e-14)


@pytest.mark.parametrize('compute', [matmul_and_gradients, mlp_and_gradients, biased_mlp_and_gradients])
@pytest.mark.parametrize(('R', 'sizes'), CASES)
@pytest.mark.parametrize('backend', WIDE)
def test_values_and_gradients_float64(float64, backend, R, sizes, compute):
    arrays, sizes_E = inputs(R, sizes, jnp.float64)
    close(compute(backend, arrays, sizes_E), compute('reference', arrays, sizes_E), 1e-12)


@pytest.mark.parametrize('backend', FAST)
def test_values_and_gradients_float32_for_any_sizes(backend):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sizes = rng.multinomial(1300, rng.dirichlet(np.ones(6)))[:5]  # the sixth group's rows are left over
        arrays, sizes_E = inputs(1300, sizes, jnp.float32, seed)
        close(mlp_and_gradients(backend, arrays, sizes_E), mlp_and_gradients('reference', arrays, sizes_E), 1e-5)


@pytest.mark.parametrize('backend', BACKENDS)
def test_bfloat16_sums_in_float32(backend):
    # Down a column of x are 511 ones and 510 minus ones, in one block each; bfloat16 has no 511, and would find 0 or 2.
    x_RD = jnp.zeros((1300, 1024), jnp.bfloat16).at[:511].set(1).at[512:1022].set(-1)
    w_EDF = jnp.ones((1, 1024, 1), jnp.bfloat16)
    y_RF, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array([1300]), backend=backend), x_RD, w_EDF)
    dw_EDF = vjp(jnp.ones_like(y_RF))[1]
    assert y_RF.dtype == dw_EDF.dtype == jnp.bfloat16
    assert (y_RF == 1024 * x_RD[:, :1]).all()  # summed in bfloat16 it would stop near 256
    assert (dw_EDF == 1).all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_rows_past_the_sum_reach_nothing(backend):
    arrays, sizes_E = inputs(300, (70, 0, 99), jnp.float32)
    clean = mlp_and_gradients(backend, arrays, sizes_E)
    dirty = mlp_and_gradients(backend, [arrays[0].at[169:].set(jnp.nan), *arrays[1:]], sizes_E)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    y_RD, (dx_RD, *_) = clean
    assert (y_RD[169:] == 0).all()
    assert (dx_RD[169:] == 0).all()
    assert (dx_RD[:169] != 0).any(1).all()


def test_work_follows_the_rows_that_are_there():
    # The row counts of the blocks that ran are the work; the rest of x is never touched.
    def rows(sizes):
        seen = []

        def f(matmul, x_BD, w):
            jax.debug.callback(lambda x: seen.append(x.shape[0]), x_BD)
            return matmul(x_BD, w)

        (x_RD, w_EDF, *_), sizes_E = inputs(2000, sizes, jnp.float32)
        jax.block_until_ready(grouped_apply(f, x_RD, w_EDF, sizes_E, backend='blocked'))
        jax.effects_barrier()
        return sum(seen)

    for sizes in ((0, 0, 0), (1, 0, 1), (700, 512, 33), (2000, 0, 0)):
        assert sum(sizes) <= rows(sizes) < sum(sizes) + BLOCKS[-1] * sum(n > 0 for n in sizes) + 1


@pytest.mark.parametrize('backend', WIDE)
def test_inside_shard_map_as_outside(backend, float64):
    """Rows over data and expert, weights over expert and the hidden width over tensor; the weights' gradients are
    summed by their types alone."""
    mesh = jax.make_mesh((2, 2, 2), ('data', 'expert', 'tensor'))
    R, sizes = 160, np.array([[[33, 100], [160, 0]], [[0, 0], [70, 50]]])  # [data, expert, local experts]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2, R, D))
    gate, up, down = (rng.standard_normal((4, D, F)) for _ in range(3))

    def here(x, gate, up, down, sizes):
        y_RD = expert_mlp(x[0, 0], gate, up, down, sizes[0, 0], backend=backend)
        return lax.psum(y_RD, 'tensor')[None, None]

    specs = (P('data', 'expert'), *[P('expert', None, 'tensor')] * 3, P('data', 'expert'))
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, s) for a, s in zip((x, gate, up, down, sizes), specs, strict=True)]
        sharded = jax.shard_map(here, in_specs=specs, out_specs=P('data', 'expert'))
        value, gradients = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(sharded(*a))), argnums=(0, 1, 2, 3)))(
            *arrays
        )

    def one_device(x, gate, up, down):
        total = 0.0
        for d in range(2):
            for e in range(2):
                mine = slice(2 * e, 2 * e + 2)
                weights = gate[mine], up[mine], down[mine]
                total += jnp.sum(jnp.sin(expert_mlp(x[d, e], *weights, jnp.asarray(sizes[d, e]), backend='reference')))
        return total

    want, want_gradients = jax.value_and_grad(one_device, argnums=(0, 1, 2, 3))(*map(jnp.asarray, (x, gate, up, down)))
    close(jax.device_get((value, gradients)), jax.device_get((want, want_gradients)), 1e-12)


def test_under_remat_and_scan_as_alone(float64):
    arrays, sizes_E = inputs(300, (128, 32, 140), jnp.float64)

    def layers(backend):
        @jax.checkpoint
        def layer(x_RD, weights):
            return x_RD + expert_mlp(x_RD, *weights, sizes_E, backend=backend), None

        def loss(x_RD, stacked):
            return jnp.sum(lax.scan(layer, x_RD, stacked)[0] ** 2)

        stacked = tuple(jnp.stack([w, -w]) * 0.1 for w in arrays[1:])
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(arrays[0], stacked)

    close(layers('blocked'), layers('reference'), 1e-12)


def test_permute_and_combine_against_autodiff(float64):
    N, K, E = 50, 3, 4
    rng = np.random.default_rng(0)
    order_R = jnp.argsort(jnp.asarray(rng.integers(0, E, N * K)))
    inverse_R = jnp.argsort(order_R)
    x_ND, share_NK = jnp.asarray(rng.standard_normal((N, D))), jnp.asarray(rng.random((N, K)))

    def ours(x_ND, share_NK):
        return combine(jnp.sin(permute(x_ND, order_R, inverse_R)), share_NK, order_R, inverse_R)

    def plain(x_ND, share_NK):
        y_RD = jnp.sin(x_ND[order_R // K]) * share_NK.reshape(-1)[order_R][:, None]
        return jnp.zeros_like(x_ND).at[order_R // K].add(y_RD)

    def twice(f):
        return lambda *a: lax.scan(lambda x, _: (f(x, a[1]), None), a[0], None, 2)[0]

    want = value_and_gradients(twice(plain), (x_ND, share_NK))
    close(value_and_gradients(jax.jit(twice(ours)), (x_ND, share_NK)), want, 1e-14)
    backward = jax.jit(lambda x, s: jax.vjp(ours, x, s)[1](x)).lower(x_ND, share_NK).as_text()
    assert 'scatter' not in backward


def test_backends_by_platform():
    assert [default_backend(p) for p in ('cpu', 'gpu', 'tpu')] == ['blocked', 'gmm', 'ragged']
    assert default_backend('gpu', 'float64') == 'ragged'
    arrays, sizes_E = inputs(5, (2, 0, 3), jnp.float32)
    with pytest.raises(UserError, match="backend 'blockd' does not exist; did you mean 'blocked'"):
        grouped_matmul(*arrays[:2], sizes_E, backend='blockd')
