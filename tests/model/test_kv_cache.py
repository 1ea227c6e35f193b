"""Caches by kind: what they hold, where, and that decoding from them is the full forward pass, also where windows go round.

Letters: B rows, T tokens, V vocabulary.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from tests.hlo import instructions
from tests.models import filled
from tests.planner.steps import decode_step, run_config
from weft.inference.step import decode, empty_cache, extend, grown, prefill
from weft.model import block, kv_cache, stack
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.model.forward import logits, place
from weft.model.kv_cache import CacheArray, CacheSize, DenseCache, LayerCache, WindowCache
from weft.model.stack import declared_cache
from weft.planner.memory import cache_bytes
from weft.planner.plan import model_part
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config

CONFIGS = Path(__file__).parents[2] / 'configs/models'
ROWS, T, NEW = 4, 24, 12
LENGTHS = np.array([1, 12, 5, 9], np.int32)  # of the rows' prompts, which decoding goes on with by NEW tokens each

DOUBLE = ComputeConfig(dtype='float64')
DENSE = ModelConfig(
    vocabulary=96,
    layers=2,
    model_dim=32,
    attention=AttentionConfig(heads=8, kv_heads=4, head_dim=8),
    mlp=MLPConfig(dim=32),
)
WINDOWS = changed(DENSE, {'attention.window': 3})
MIXED = changed(
    DENSE,
    {'layers': 5, 'attention.window': 4, 'attention.window_pattern': (True, True, False), 'attention.sinks': True},
)
EXPERTS = changed(
    MIXED, {'layers': 3, 'attention.window': 3, 'moe': MoEConfig(experts=4, mlp_dim=16, first_dense_layers=1)}
)
LATENT = dataclasses.replace(
    DENSE,
    attention=MLAConfig(
        heads=8,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=6,
        window=4,
        window_pattern=(True, False),
    ),
)
ON = [
    (WINDOWS, MeshConfig()),
    (MIXED, MeshConfig()),
    (WINDOWS, MeshConfig(context=2, tensor=4)),
    (changed(WINDOWS, {'attention.window': 4}), MeshConfig(context=2, data=2)),
    (MIXED, MeshConfig(context=4, tensor=2)),
    (changed(MIXED, {'attention.window': 3}), MeshConfig(context=4)),
    (changed(MIXED, {'attention.window': 7}), MeshConfig(context=2, tensor=4)),
    (EXPERTS, MeshConfig(context=2, expert=2, tensor=2)),
    (changed(EXPERTS, {'attention.window': 4}), MeshConfig(expert=4, tensor=2)),
    (LATENT, MeshConfig(context=2, tensor=2)),
]


def tokens(c: ModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, c.vocabulary, (ROWS, T), dtype=np.int32)


def whole(model) -> np.ndarray:
    """Logits [B, T, V] of the full forward pass."""
    ids_BT = tokens(model.config)
    position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), ids_BT.shape)
    return np.asarray(jax.jit(logits)(model, *place((ids_BT, position_BT, np.ones_like(ids_BT)))))


def decoded(model) -> np.ndarray:
    """Logits [B, 1 + NEW, V] after each row's prompt and after each of the tokens that follow it."""
    ids_BT = tokens(model.config)
    cache = jax.jit(lambda model: empty_cache(model, ROWS, T))(model)
    traced_anew = lambda step: jax.jit(lambda *arguments: step(*arguments))  # a fault may have been planted since
    read, step = traced_anew(prefill), traced_anew(decode)
    logit_BV, cache = read(model, cache, *place((ids_BT[:, : LENGTHS.max()], LENGTHS)))
    found = [np.asarray(logit_BV)]
    for n in range(NEW):
        position_B = LENGTHS + n
        logit_BV, cache = step(model, cache, *place((ids_BT[np.arange(ROWS), position_B], position_B)))
        found.append(np.asarray(logit_BV))
    return np.stack(found, 1)


def error(model) -> float:
    """The largest difference between decoding and the full forward pass, by the largest logit."""
    whole_BTV, at_B1 = whole(model), LENGTHS[:, None] - 1
    want = whole_BTV[np.arange(ROWS)[:, None], at_B1 + np.arange(NEW + 1)]
    return np.abs(decoded(model) - want).max() / np.abs(whole_BTV).max()


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
    ('c', 'mesh'), ON, ids=lambda one: str(one) if isinstance(one, MeshConfig) else f'{one.attention.window}'
)
def test_decoding_past_the_window_is_the_full_forward_pass(c, mesh):
    """Prompts shorter and longer than the window, in one padded batch; each slot of a window is taken several times."""
    with jax.set_mesh(make_mesh(mesh)):
        assert error(filled(c, DOUBLE, gain=2)) < 1e-12


def one_slot_too_few(length, context, window=None, chunk=1):
    return slot_count(length, context, window and window - 1, chunk)


def padding_too(ctx):
    return own(dataclasses.replace(ctx, segment_BT=jnp.ones_like(ctx.segment_BT)))


slot_count, own = kv_cache.slot_count, kv_cache.own
FAULTS = {
    'slots are taken for what they held the first time': (WindowCache, 'positions', DenseCache.positions),
    'a token beyond the last slot is dropped': (WindowCache, '_slots', DenseCache._slots),
    'a window has a slot too few': (kv_cache, 'slot_count', one_slot_too_few),
    'padding is kept': (kv_cache, 'own', padding_too),
}


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_in_going_round_is_seen(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert not error(filled(WINDOWS, DOUBLE, gain=2)) < 1e-3  # or it is no number


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
    ('c', 'mesh', 'chunk'),
    [
        (MIXED, MeshConfig(), 5),
        (EXPERTS, MeshConfig(context=2, expert=2, tensor=2), 3),
        (LATENT, MeshConfig(context=4), 7),
    ],
    ids=['mixed', 'experts', 'latent'],
)
def test_text_in_pieces_past_the_window_gives_the_logits_of_all_of_it(c, mesh, chunk):
    """Rows of different lengths, whose pieces go round in other steps; a cache that grows, and decoding after it."""
    ids_BT = tokens(c)
    with jax.set_mesh(make_mesh(mesh)):
        model = filled(c, DOUBLE, gain=2)
        whole_BTV = whole(model)
        cache = jax.jit(lambda model: empty_cache(model, ROWS, 8, chunk=chunk))(model)
        read, longer, step = jax.jit(extend), jax.jit(grown, static_argnums=1), jax.jit(decode)
        begin_B, room = np.zeros(ROWS, np.int32), 8
        while (begin_B < T - 3).any():
            length_B = np.minimum(np.maximum(1, chunk - np.arange(ROWS)), T - begin_B).astype(np.int32)
            if max(begin_B + length_B) > room:
                room += 8
                cache = longer(cache, room)
            chunk_BT = np.zeros((ROWS, chunk), np.int32)
            for row, (begin, length) in enumerate(zip(begin_B, length_B, strict=True)):
                chunk_BT[row, :length] = ids_BT[row, begin : begin + length]
            # A row that has all its tokens reads the last one again, which a window must bear.
            again_B = np.minimum(begin_B, T - 1)
            chunk_BT[:, 0] = ids_BT[np.arange(ROWS), again_B]
            length_B = np.maximum(length_B, 1)
            logit_BV, cache = read(model, cache, *place((chunk_BT, again_B, length_B)))
            begin_B = again_B + length_B
            want_BV = whole_BTV[np.arange(ROWS), begin_B - 1]
            assert np.abs(np.asarray(logit_BV) - want_BV).max() < 1e-12 * np.abs(whole_BTV).max()
        last_B = begin_B - 1
        logit_BV, _ = step(model, cache, *place((ids_BT[np.arange(ROWS), last_B], last_B)))
        want_BV = whole_BTV[np.arange(ROWS), last_B]
        assert np.abs(np.asarray(logit_BV) - want_BV).max() < 1e-12 * np.abs(whole_BTV).max()


def test_a_piece_that_a_window_cannot_hold_is_refused():
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = filled(WINDOWS)
        cache = empty_cache(model, ROWS, T, chunk=2)
        numbers = place((np.zeros((ROWS, 3), np.int32), np.zeros(ROWS, np.int32), np.ones(ROWS, np.int32)))
        with pytest.raises(AssertionError, match='3 tokens at once, and a cache that was made for 2'):
            extend(model, cache, *numbers)


# What is kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('length', 'context', 'window', 'chunk', 'want'),
    [
        (10, 1, None, 1, 10),
        (10, 4, None, 1, 12),
        (10, 1, 3, 1, 3),
        (10, 4, 3, 1, 4),
        (10, 4, 3, 4, 8),  # a chunk of four sees two before its first token
        (10, 2, 8, 8, 10),  # no more than there are tokens
    ],
)
def test_slots_of_a_row(length, context, window, chunk, want):
    assert kv_cache.slot_count(length, context, window, chunk) == want


def test_a_row_goes_on_from_where_its_window_is_still_there():
    arrays = (CacheArray((1, 2, 6, 8), 'float32', P()),)
    ring = WindowCache(arrays, window=4, chunk=3)
    assert [ring.can_rewind(20, to) for to in (16, 17, 20)] == [False, True, True]
    assert ring.can_rewind(6, 0), 'nothing was written over yet'
    assert not ring.can_rewind(7, 0)
    assert DenseCache(arrays).can_rewind(20, 0)
    assert (LayerCache(arrays).can_rewind(20, 20), LayerCache(arrays).can_rewind(20, 19)) == (True, False)


def test_groups_of_layers_keep_what_each_needs():
    groups = declared_cache(MIXED, CacheSize(rows=6, length=30, context=4, tensor=2))
    kinds = [(type(group), [array.shape for array in group.arrays]) for group in groups]
    width = 4 * 8
    assert sum(group.arrays[0].shape[0] for group in groups) == MIXED.layers
    for kind, (key, value) in kinds:
        assert key == value
        assert key[1:] == (6, 4 if kind is WindowCache else 32, width)
    assert sum(key[0] for kind, (key, _) in kinds if kind is WindowCache) == 4


GEMMA = CONFIGS / 'gemma-3-27b.yaml'
LONG = 32_768  # tokens
FORMER = 62 * LONG * 2 * 16 * 128 * 2  # bytes of a row with a slot for each token in every layer


def test_gemma_3s_cache_is_a_fifth_of_what_all_tokens_would_take(monkeypatch):
    """By the plan, and as the decoding step that was compiled for it is given it: 3.12 GB of 16.6 GB."""
    run = load_config(GEMMA)
    c, compute = run.model, run.compute
    want = 2 * 16 * 128 * 2 * (10 * LONG + 52 * 1024)
    assert want == 3_120_562_176
    assert want / FORMER == 0.1875
    assert cache_bytes(c, compute, MeshConfig(), 1, LONG) == want
    assert model_part(c, LONG)['cache']['bytes'] == want
    assert cache_bytes(c, compute, MeshConfig(data=2, context=2, tensor=4), 2, LONG) == want / 8
    monkeypatch.setattr(stack, 'UNROLLED', {})  # a loop, which is compiled sooner
    with jax.set_mesh(make_mesh(MeshConfig())):
        step, (model, cache, *rest) = decode_step(run_config(c, MeshConfig(), 1, 32, compute), LONG)
        compiled = jax.jit(step, donate_argnums=1).lower(model, cache, *rest).compile()
    weights, memory = size(model), compiled.memory_analysis()
    assert size(cache) == want
    assert memory.argument_size_in_bytes - weights - want == 2 * 4  # the token and its position
    assert memory.alias_size_in_bytes == want, 'the new cache takes the place of the old one'


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('loop', [True, False])
@pytest.mark.parametrize('mesh', [MeshConfig(), MeshConfig(context=2, tensor=2)], ids=str)
def test_a_step_writes_to_the_caches_where_they_are(mesh, loop, monkeypatch):
    """No group's cache is copied: a step's new arrays are the old ones' memory."""
    monkeypatch.setattr(stack, 'UNROLLED', {} if loop else {'cpu': (8, 64)})
    c = changed(MIXED, {'layers': 6, 'attention.window': 1024})
    with jax.set_mesh(make_mesh(mesh)):
        step, (model, cache, *rest) = decode_step(run_config(c, mesh, 1, 32), 4096)
        compiled = jax.jit(step, donate_argnums=1).lower(model, cache, *rest).compile()
    stacks = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(cache)]
    found = {(opcode, shape) for opcode, shape, _ in instructions(compiled.as_text())}
    assert {('parameter', shape) for shape in stacks} <= found, 'the text is not what this test can read'
    assert not {('copy', shape) for shape in stacks} & found
    assert compiled.memory_analysis().alias_size_in_bytes == sum(4 * math.prod(shape) for shape in stacks)


# A kind that this project does not have -----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache(LayerCache):
    """An array of a fixed size a row: [L, B, D]."""


class Fading(nnx.Module):
    """A mixer whose output is a fading sum of what it read: y_t = y_{t-1} / 2 + x_t. On one device of `context`."""

    def __init__(self, c, kind):
        del c, kind

    @staticmethod
    def cache(c, kind, size):
        del kind
        return StateCache((CacheArray((size.rows, c.model_dim), size.dtype, P(kv_cache.ROWS, None)),))

    def __call__(self, x_BTD, ctx, cache, layer):
        x_BTD = ctx.gather_sequence(x_BTD)
        live_BT1 = (ctx.segment_BT > 0)[..., None]
        state_BD = jnp.zeros_like(x_BTD[:, 0])
        if cache is not None:
            first_B1 = ctx.position_BT[:, :1] == 0
            state_BD = jnp.where(first_B1, state_BD, cache.arrays[0][cache.layer])

        def add(state_BD, at):
            x_BD, live_B1 = at
            state_BD = jnp.where(live_B1, state_BD / 2 + x_BD, state_BD)
            return state_BD, state_BD

        state_BD, y_TBD = jax.lax.scan(add, state_BD, (x_BTD.swapaxes(0, 1), live_BT1.swapaxes(0, 1)))
        if cache is not None:
            cache = dataclasses.replace(cache, arrays=(cache.arrays[0].at[cache.layer].set(state_BD),))
        return y_TBD.swapaxes(0, 1), cache


@pytest.mark.usefixtures('float64')
def test_a_recurrent_state_is_a_kind_of_cache_too(monkeypatch):
    """Decoder, steps and growth know nothing of it but its arrays."""
    c = dataclasses.replace(DENSE, vocabulary=95)  # no other test's: what a config declares is kept
    monkeypatch.setattr(block, 'mixer', lambda c: Fading)
    monkeypatch.setattr(stack, 'mixer', lambda c: Fading)
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        model = filled(c, DOUBLE)
        assert error(model) < 1e-12
        cache = empty_cache(model, ROWS, T)
        assert [array.shape for array in cache.groups[0].arrays] == [(2, ROWS, 32)]
        assert jax.tree.map(jnp.shape, grown(cache, 2 * T)) == jax.tree.map(jnp.shape, cache)
