"""Attention from latent vectors: what its cache holds, and that decoding from it is the expanded form."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import filled
from weft.inference.step import decode, empty_cache, prefill
from weft.model import cost
from weft.model.compute import DEFAULT
from weft.model.config import MLAConfig, MLPConfig, ModelConfig, RopeScaling, RotaryConfig
from weft.model.decoder import init_decoder
from weft.model.forward import logits, place
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(('name', 'numbers'), [('deepseek-v3', 512 + 64), ('deepseek-v2-lite', 512 + 64)])
def test_a_cache_is_as_small_as_published(name, numbers):
    c = load_config(ROOT / f'configs/models/{name}.yaml').model
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = jax.eval_shape(lambda key: init_decoder(c, DEFAULT, key), jax.random.key(0))
        cache = jax.eval_shape(lambda: empty_cache(model, 3, 1000))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(cache)) == c.layers * 3 * 1000 * numbers
    assert cost.cache_numbers_per_token(c) == c.layers * numbers


@pytest.mark.parametrize('mesh', [MeshConfig(), MeshConfig(context=2, tensor=4)], ids=str)
@pytest.mark.parametrize('q_rank', [None, 24])
def test_decoding_from_latent_vectors_is_the_expanded_form(q_rank, mesh):
    c = ModelConfig(
        vocabulary=128,
        layers=2,
        model_dim=64,
        attention=MLAConfig(
            heads=8, q_lora_rank=q_rank, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
        ),
        mlp=MLPConfig(dim=64),
        positions=RotaryConfig(
            layout='interleaved',
            scaling=RopeScaling(kind='yarn', factor=8.0, original_positions=16, mscale_all_dim=1.0),
        ),
    )
    ids = np.random.default_rng(0).integers(0, 128, (2, 48), dtype=np.int32)
    places = np.arange(48, dtype=np.int32)[None].repeat(2, 0)
    with jax.set_mesh(make_mesh(mesh)):
        model = filled(c)
        full = np.asarray(jax.jit(logits)(model, *place((ids, places, np.ones_like(ids)))))
        cache = jax.jit(functools.partial(empty_cache, rows=2, length=48))(model)
        assert all(leaf.shape[-1] == mesh.tensor * (32 + 8) for leaf in jax.tree.leaves(cache))
        logit_BV, cache = jax.jit(prefill)(model, cache, *place((ids[:, :8], np.full(2, 8, np.int32))))
        found, step = [np.asarray(logit_BV)], jax.jit(decode)
        for t in range(8, 47):
            logit_BV, cache = step(model, cache, *place((ids[:, t], np.full(2, t, np.int32))))
            found.append(np.asarray(logit_BV))
    assert jnp.abs(np.stack(found, 1) - full[:, 7:47]).max() <= 1e-5 * np.abs(full).max()
