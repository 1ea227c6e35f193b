"""One seed gives one run on every mesh: initial parameters, losses, greedy text, and decoding with a cache."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax import P

from tests import reference
from tests.families.cases import CASES
from tests.families.loading import read
from tests.models import on
from weft.inference.step import decode, empty_cache, prefill
from weft.model.batch import Batch
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.decoder import init_decoder
from weft.model.forward import logits
from weft.sharding.mesh import AXES, BATCH, MeshConfig, make_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.optimizers import AdamW
from weft.training.step import init, train_step

MESHES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 8),
    (1, 1, 2, 1, 2, 2),
    (2, 1, 1, 2, 1, 2),
    (1, 1, 2, 4, 1, 1),
    (1, 2, 1, 1, 2, 2),
]
COMBINED = [shape for shape in MESHES if max(shape) < 8 and shape != MESHES[0]]
DECODING = [shape for shape in MESHES if shape[1] == 1]  # there is no pipeline in decoding
STEPS = 20
PROMPTS = [3, 9, 1, 5, 8, 2, 7, 4]  # tokens
NEW = 104  # more than the window
# tensor = 8 is a multiple of the KV heads: they are repeated there.
RUN = RunConfig(
    name='meshes',
    model=ModelConfig(
        vocabulary=300,
        layers=3,
        model_dim=32,
        attention=AttentionConfig(heads=8, kv_heads=4, window=100),
        mlp=MLPConfig(dim=32),
        moe=MoEConfig(experts=8, mlp_dim=16, shared_experts=1, first_dense_layers=1),
    ),
    training=TrainingConfig(steps=STEPS, batch=8, sequence_length=32),
    optimizer=AdamW(learning_rate=1e-2, warmup_steps=4),
)


def batches() -> list[Batch]:
    """Text with something to learn: each token is followed by one of two."""
    r = np.random.default_rng(0)
    found = []
    for step in range(STEPS):
        batch = reference.packed_batch(300, B=8, T=33, seed=step, padding=0)
        ids = np.zeros((8, 33), np.int32)
        ids[:, 0] = r.integers(0, 300, 8)
        for t in range(1, 33):
            ids[:, t] = (ids[:, t - 1] * 7 + r.integers(1, 3, 8)) % 300
        found.append(Batch(ids[:, :-1], ids[:, 1:], batch.position_BT[:, :32], batch.segment_BT[:, :32]))
    return found


def place(batch):
    return jax.tree.map(lambda array: jax.device_put(array, P(BATCH)), batch)


@functools.cache
def run_on(shape: tuple[int, ...], dtype: str) -> dict:
    """Initial weights, losses of 20 steps, and then greedy text: its tokens and how far apart the two best logits were."""
    config = dataclasses.replace(RUN, mesh=MeshConfig(**dict(zip(AXES, shape, strict=True))))
    config = dataclasses.replace(config, compute=ComputeConfig(dtype=dtype))
    with on(config.mesh):
        state = jax.jit(functools.partial(init, config))()
        born = jax.tree.map(np.asarray, state.model)
        for leaf in jax.tree.leaves(state.model):
            ways = np.prod(
                [config.mesh.span(axes if isinstance(axes, tuple) else (axes,)) for axes in leaf.sharding.spec if axes]
            )
            assert all(shard.data.size * ways == leaf.size for shard in leaf.addressable_shards), (
                'no device holds more than its shard'
            )
        step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
        losses = []
        for batch in batches():
            state, figures = step(state, place(batch))
            losses.append(float(figures['loss']))
        found = {'born': born, 'losses': losses}
        if dtype == 'float32' and config.mesh.stage == 1:
            found |= greedy(state.model)
    return found


def greedy(model) -> dict:
    """Greedy continuations of prompts of mixed lengths, and the logits of decoding beside those of the full forward pass."""
    r = np.random.default_rng(1)
    B, T = len(PROMPTS), max(PROMPTS)
    tokens_BT = np.zeros((B, T + NEW), np.int32)
    for b, n in enumerate(PROMPTS):
        tokens_BT[b, :n] = r.integers(0, 300, n)
    length_B, rows = np.array(PROMPTS, np.int32), np.arange(B)
    cache = empty_cache(model, B, T + NEW)
    read, step = jax.jit(prefill), jax.jit(decode, donate_argnums=1)
    logit_BV, cache = read(model, cache, *place((tokens_BT[:, :T], length_B)))
    margins, seen = [], []
    for n in range(NEW):
        logit_BV = np.asarray(logit_BV)
        seen.append(logit_BV)
        best = np.sort(logit_BV, -1)
        margins.append(best[:, -1] - best[:, -2])
        tokens_BT[rows, length_B + n] = logit_BV.argmax(-1)
        logit_BV, cache = step(model, cache, *place((tokens_BT[rows, length_B + n], length_B + n)))
    # The same tokens at once, without a cache; T + NEW is 113, and 128 splits over every mesh.
    padded = np.pad(tokens_BT, ((0, 0), (0, 128 - T - NEW)))
    places = np.broadcast_to(np.arange(128, dtype=np.int32), padded.shape)
    full = np.asarray(jax.jit(logits)(model, *place((padded, places, np.ones_like(places)))))
    at = length_B[:, None] - 1 + np.arange(NEW)
    apart = np.abs(np.stack(seen, 1) - full[rows[:, None], at]).max() / np.abs(full).max()
    return {'text': np.take_along_axis(tokens_BT, at + 1, 1), 'margins': np.stack(margins, 1), 'cache_error': apart}


@pytest.mark.parametrize('shape', DECODING)
def test_decoding_with_a_cache_equals_the_full_forward_pass(shape):
    assert run_on(shape, 'float32')['cache_error'] <= 1e-5


@pytest.mark.parametrize('shape', MESHES[1:])
def test_float32_runs_agree(shape):
    one, many = run_on(MESHES[0], 'float32'), run_on(shape, 'float32')
    assert jax.tree.all(jax.tree.map(np.array_equal, one['born'], many['born'])), 'initial parameters are bit-equal'
    np.testing.assert_allclose(many['losses'], one['losses'], rtol=1e-5)
    assert one['losses'][-1] < one['losses'][0] - 0.5, 'something was learnt'


@pytest.mark.parametrize('name', ['bert-pretraining', 't5-v1.1', 'deepseek_v3-two-ahead'])
def test_other_kinds_of_models_are_born_alike(name):
    c, born = read(CASES[name])[1], []
    for mesh in (MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)):
        with jax.set_mesh(make_mesh(mesh)):
            model = jax.jit(lambda key: init_decoder(c, DEFAULT, key))(jax.random.key(0))
            born.append(jax.tree.map(np.asarray, model))
    assert jax.tree.all(jax.tree.map(np.array_equal, *born))


@pytest.mark.parametrize('shape', DECODING[1:])
def test_greedy_text_agrees(shape):
    one, many = run_on(MESHES[0], 'float32'), run_on(shape, 'float32')
    for mine, other, margins in zip(one['text'], many['text'], one['margins'], strict=True):
        # Past a near tie two right runs may write different text.
        sure = list(itertools.takewhile(lambda margin: margin > 1e-4, margins))
        np.testing.assert_array_equal(mine[: len(sure)], other[: len(sure)])
    assert (one['margins'] > 1e-4).mean() > 0.98, 'nearly all of the text was compared'


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('shape', COMBINED)
def test_float64_losses_agree(shape):
    np.testing.assert_allclose(run_on(shape, 'float64')['losses'], run_on(MESHES[0], 'float64')['losses'], rtol=1e-10)
