"""FLOPs by formula are those of every dot in the traced programs, exactly: each family, each program, remat, meshes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import P, lax
from jax.sharding import NamedSharding

from tests.families import cases
from tests.families.encoder_cases import ENCODERS
from tests.families.loading import read
from tests.planner.steps import run_config
from weft.inference.step import decode, empty_cache, encode, prefill
from weft.model import cost
from weft.model.batch import Batch, Source
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.model.dots import dots
from weft.model.forward import logits
from weft.model.ops.attention import attention
from weft.planner.flops import BACKWARD, ONE, executed
from weft.sharding.mesh import BATCH, MeshConfig, make_mesh
from weft.training.loss import loss_and_gradient, loss_fn
from weft.training.state import abstract_state

B, T, S, SLOTS = 4, 8, 6, 12  # rows, tokens, tokens of a source, slots of a cache


# Backends whose every product is a dot of known size.
COUNTABLE = ComputeConfig(attention='reference', grouped_matmul='ragged')


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(jax.sharding.get_mesh(), P(BATCH)))


def traced(
    c: ModelConfig,
    compute: ComputeConfig,
    what: str,
    mesh: MeshConfig,
    rows: int,
    length: int,
    source: int,
    **step: int,
) -> float:
    """FLOPs of the dots in a program, all devices together."""
    with jax.set_mesh(make_mesh(mesh)):
        model = abstract_state(run_config(c, mesh, rows, length, compute)).model
        row_BT = integers(rows, length)
        batch = Batch(row_BT, row_BT, row_BT, row_BT)
        kept = None
        if c.encoder:
            row_BS = integers(rows, source)
            batch = batch._replace(source=Source(row_BS, row_BS, row_BS))
            kept = on_mesh(jax.eval_shape(encode, model, row_BS, integers(rows)))
        if what == 'train':
            run, arguments = functools.partial(loss_and_gradient, **step), (model, batch)
        elif what == 'loss':
            run, arguments = loss_fn, (model, batch)
        elif what == 'score':
            extra = {'source': Source(row_BS, row_BS, row_BS)} if c.encoder else {}
            run, arguments = functools.partial(logits, **extra), (model, row_BT, row_BT, row_BT)
        elif what == 'encode':
            run, arguments = encode, (model, row_BS, integers(rows))
        else:
            slots = length if what == 'decode' else SLOTS
            cache = on_mesh(jax.eval_shape(lambda model: empty_cache(model, rows, slots), model))
            cache = cache._replace(source=kept)
            tokens = integers(rows) if what == 'decode' else row_BT
            run, arguments = decode if what == 'decode' else prefill, (model, cache, tokens, integers(rows))
        found = dots(jax.make_jaxpr(run)(*arguments), jax.sharding.get_mesh().shape)
    assert not found.unknown
    return found.flops


def on_mesh(tree: Any) -> Any:
    mesh = jax.sharding.get_mesh()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))
    return jax.tree.map(place, tree)


def check(c: ModelConfig, what: str, mesh: MeshConfig = ONE, rows=B, length=T, compute=COUNTABLE, **step: int) -> None:
    source = S if c.encoder else 0
    length = SLOTS if what == 'decode' else length
    want = executed(c, compute, what, rows=rows, length=length, source=source, mesh=mesh, **step)
    assert sum(want.values()) == traced(c, compute, what, mesh, rows, length, source, **step), want


# Of each family the first case, and what differs in its products from that.
EXTRA = (
    'qwen3_moe-every-second-layer',
    'deepseek_v3-halves-plain-queries-two-dense',
    'deepseek_v3-two-ahead',
    'glm4_moe-one-ahead',
    'marian-sides-differ',
)
FIRST = {cases.family(name): name for name in reversed(cases.CASES)}


@pytest.mark.parametrize('name', [*FIRST.values(), *EXTRA])
def test_each_family(name):
    """Forward and backward, and one more token; where it differs from a forward pass, reading a prompt; an encoder's parts."""
    _, c = read(cases.CASES[name])
    if cases.family(name) in ENCODERS:
        programs = ['score']
    else:
        programs = [
            'decode',
            *(['prefill'] if c.attention.kind == 'mla' or c.encoder else []),
            *(['encode'] if c.encoder else []),
        ]
    for what in ['train', *programs]:
        check(c, what)


DENSE = ModelConfig(
    vocabulary=256,
    layers=2,
    model_dim=32,
    attention=AttentionConfig(heads=4, kv_heads=2),
    mlp=MLPConfig(dim=48),
)
EXPERTS = MoEConfig(experts=4, mlp_dim=16, top_k=2, shared_experts=1, first_dense_layers=1)
LATENT = MLAConfig(heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
MODELS = {
    'dense': DENSE,
    'post': changed(
        DENSE,
        {
            'norm.order': 'post',
            'norm.kind': 'layernorm',
            'attention.o_bias': True,
            'mlp.bias': True,
            'norm.bias': True,
            'mlp.activation': 'gelu',
        },
    ),
    'kinds': changed(DENSE, {'layers': 4, 'attention.window': 3, 'attention.window_pattern': (True, False)}),
    'experts': dataclasses.replace(DENSE, layers=3, moe=dataclasses.replace(EXPERTS, bias=True)),
    'gate': dataclasses.replace(DENSE, moe=dataclasses.replace(EXPERTS, first_dense_layers=0, shared_gate=True)),
    'output': changed(DENSE, {'norm.order': 'output', 'positions.pattern': (True, False)}),
    'latent': dataclasses.replace(DENSE, layers=3, attention=LATENT, moe=EXPERTS),
}


BUFFERED = ('gate', 'latent')  # mixtures whose tokens go to their experts in buffers


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('remat', ['dots', 'block'])
def test_what_rematerialisation_computes_again(name, remat):
    dispatch = 'all_to_all' if name in BUFFERED else 'auto'
    check(MODELS[name], 'train', compute=dataclasses.replace(COUNTABLE, remat=remat, dispatch=dispatch))


MESHES = [
    MeshConfig(data=2, expert=2, tensor=2),
    MeshConfig(context=2, tensor=4),
    MeshConfig(replica=2, stage=2, tensor=2),
]


@pytest.mark.parametrize(
    ('name', 'mesh'), [('dense', MESHES[1]), ('kinds', MESHES[1]), *(('latent', mesh) for mesh in MESHES)], ids=str
)
def test_each_mesh(name, mesh):
    """What devices do alike, padded and idle counts once on each of them."""
    c = dataclasses.replace(
        MODELS[name], layers=5 if MODELS[name].moe else 4
    )  # mixtures after a dense layer: four of a kind
    compute = dataclasses.replace(COUNTABLE, dispatch='all_to_all' if name in BUFFERED else 'auto')
    training = {'microbatches': 4} if mesh.stage > 1 else {}
    check(c, 'train', mesh, rows=16, compute=compute, **training)
    if mesh.stage == 1:
        check(c, 'prefill', mesh, rows=8, length=7, compute=compute)
        check(c, 'decode', mesh, rows=8, compute=compute)


@pytest.mark.parametrize('name', cases.CASES)
def test_what_a_model_needs_is_what_is_executed_where_nothing_is_masked_padded_or_repeated(name):
    """`model.cost` and `planner.flops` are one count but for masks, padding, and what is repeated."""
    _, c = read(cases.CASES[name])
    c = changed(c, {'vocabulary': 256, 'attention.window': None, 'mtp.layers': 0})
    how: dict[str, Any] = {'rows': B, 'length': T, 'source': T if c.encoder else 0}
    same = lambda a, b: {k: v for k, v in a.items() if v} == {k: v for k, v in b.items() if v}
    assert same(executed(c, DEFAULT, 'loss', **how), {k: B * T * v for k, v in cost.forward_flops(c, T).items()})
    if c.causal:
        assert same(
            executed(c, DEFAULT, 'decode', **how), {k: B * v for k, v in cost.flops_per_token(c, 'decode', T).items()}
        )
    if c.causal and not c.encoder:
        prefill = executed(c, DEFAULT, 'prefill', attention='flash', **how)
        assert same(prefill, {k: B * T * v for k, v in cost.flops_per_token(c, 'prefill', T).items()})


def test_a_step_in_parts_with_chunks_that_do_not_divide():
    """4,998 tokens a part are three chunks of 1,666; 2,049 are two of 1,025, the last token of which is padding."""
    for T, parts in ((2499, 2), (2049, 4)):
        check(dataclasses.replace(DENSE, layers=1), 'train', rows=4, length=T, accumulation=parts)


def test_tiles_compute_no_more_than_the_mask_lets_through():
    c = changed(DENSE, {'attention.window': 4, 'attention.window_pattern': (True, False)})
    how = {'rows': 1, 'length': 16}
    square, tiles = (
        executed(c, DEFAULT, 'loss', attention=name, **how)['attention'] for name in ('reference', 'flash')
    )
    seen = 16 * 17 / 2 + (4 * 5 / 2 + 12 * 4)  # of the layer without a window, and of the one with it
    assert tiles == 2 * 2 * c.attention.heads * c.attention.head_dim * seen
    assert square == 2 * 2 * c.attention.heads * c.attention.head_dim * 2 * 16 * 16
    back = executed(c, DEFAULT, 'train', attention='flash', **how)['attention']
    assert back == tiles * (1 + 7 / 2), 'the backward pass has scores twice more'


@pytest.mark.parametrize('backend', BACKWARD)
def test_products_of_a_backward_pass(backend):
    """On one tile: the kernels' own dots. Splash adds a row's products with ones, a 128th of one more."""
    q_BTKGH, k_BTKH = jnp.ones((1, 128, 2, 2, 64)), jnp.ones((1, 128, 2, 64))
    at = jnp.arange(128, dtype=jnp.int32)[None], jnp.ones((1, 128), jnp.int32)
    forward = lambda q, k, v: attention(q, k, v, at, at, backend=backend)
    both = jax.grad(lambda *inputs: forward(*inputs).sum(), (0, 1, 2))
    with jax.set_mesh(make_mesh(ONE)):
        one, all_ = (dots(jax.make_jaxpr(f)(q_BTKGH, k_BTKH, k_BTKH)).flops for f in (forward, both))
    assert 2 * (all_ - one) / one == pytest.approx(BACKWARD[backend], abs=0.01 if backend == 'splash' else 0)


def test_loops_branches_and_what_cannot_be_known():
    x = jnp.ones((4, 4))
    product = lambda x, _: (x @ x, None)
    assert dots(jax.make_jaxpr(lambda x: lax.scan(product, x, length=5))(x)).flops == 5 * 2 * 4**3
    branch = lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert dots(jax.make_jaxpr(branch)(x)).flops == 2 * 2 * 4**3
    loop = lambda x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)
    assert dots(jax.make_jaxpr(loop)(x)).unknown == ['trips of a while loop that holds a dot']


def test_a_ragged_dot_and_its_gradients_meet_each_row_once():
    x, w, sizes = jnp.ones((10, 3)), jnp.ones((4, 3, 5)), jnp.array([2, 3, 4, 1])
    both = jax.grad(lambda x, w: lax.ragged_dot(x, w, sizes).sum(), (0, 1))
    assert dots(jax.make_jaxpr(both)(x, w)).flops == 3 * 2 * 10 * 3 * 5
