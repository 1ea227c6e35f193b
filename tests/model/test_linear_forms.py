"""An opened model's linear maps in other forms: an adapter beside them, weights that are rounded as they are used."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.extending import harness
from tests.extending.lora import LoRAConfig
from tests.extending.quantized_weight import Int8Config, rounded
from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder, in_forms, weights_of
from weft.model.forward import logits, place
from weft.model.parameters import name_of
from weft.model.parts.attention import AttentionConfig, MLAConfig
from weft.model.parts.feed_forward import MLPConfig, MoEConfig
from weft.model.sizes import sizes
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, check_divides
from weft.training.config import RunConfig

# One KV head and two layers, of which the second is a mixture.
GROUPED = AttentionConfig(heads=4, kv_heads=1, qkv_bias=True)
LATENT = MLAConfig(heads=4, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
# Keys and values are repeated on four devices of `tensor`.
MESHES = (MeshConfig(), MeshConfig(data=2, tensor=4), MeshConfig(expert=2, context=2, tensor=2))


def model_of(attention: AttentionConfig | MLAConfig) -> ModelConfig:
    return ModelConfig(
        vocabulary=harness.VOCABULARY,
        layers=2,
        model_dim=16,
        attention=attention,
        mlp=MLPConfig(dim=32),
        moe=MoEConfig(experts=4, mlp_dim=8, first_dense_layers=1),
    )


def of_batch(model: Decoder) -> np.ndarray:
    batch = place(harness.batch_of(0))
    return np.asarray(jax.jit(logits)(model, batch.tokens_BT, batch.position_BT, batch.segment_BT))


def of_run(attention: AttentionConfig | MLAConfig) -> RunConfig:
    return harness.run_of(model_of(attention), compute=ComputeConfig(dtype='float64', weight_dtype='float64'))


def other(beside: Collection[str], path: Any, w: jax.Array) -> jax.Array:
    """Other values of weights whose names are in `beside`."""
    values = np.sin(np.arange(w.size) * 7.0 + len(name_of(path))).reshape(w.shape)
    return jax.device_put(jnp.asarray(values, w.dtype), w.sharding) if name_of(path) in beside else w


def merged(arrays: dict[str, np.ndarray], path: Any, w: jax.Array) -> jax.Array:
    """A weight with what the adapter beside it adds, by hand; `arrays` are those of the model with adapters."""
    beside, leaf = name_of(path).rpartition('.')[::2]
    if f'{beside}.adapter.first' not in arrays or not leaf.startswith('w_'):
        return w
    added = arrays[f'{beside}.adapter.first'] @ arrays[f'{beside}.adapter.second'] * 1.5
    return jax.device_put(jnp.asarray(np.asarray(w) + added), w.sharding)


def rounded_mlp(path: Any, w: jax.Array) -> jax.Array:
    """A weight of an MLP or of experts, rounded."""
    name = name_of(path)
    is_one = '.mlp.' in name and '.w_' in name and 'router' not in name
    return jax.device_put(rounded(np.asarray(w), -2), w.sharding) if is_one else w


@pytest.mark.parametrize(('attention', 'meshes'), [(GROUPED, MESHES), (LATENT, MESHES[2:])], ids=['gqa', 'mla'])
def test_an_adapter_of_an_opened_model_is_a_change_of_its_weights(attention, meshes, float64):
    """At first it changes nothing; with other values it adds first @ second · alpha / rank to each weight, on any mesh."""
    run = of_run(attention)
    adapted = dataclasses.replace(run.model, adapter=LoRAConfig(rank=2, alpha=3.0))
    beside = {name for name in weights_of(adapted) if '.adapter.' in name}
    assert {name.rpartition('.adapter')[0].rpartition('.')[2] for name in beside} >= {'o', 'gate', 'up', 'down'}
    for mesh in meshes:
        check_divides(mesh, sizes(adapted))
        with harness.on(mesh):
            model = harness.initial(run)
            opened = jax.jit(lambda model: in_forms(model, adapted, jax.random.key(1)))(model)
            np.testing.assert_array_equal(of_batch(opened), of_batch(model), err_msg=str(mesh))

            opened = jax.tree_util.tree_map_with_path(functools.partial(other, beside), opened)
            arrays = {name_of(path): np.asarray(w) for path, w in jax.tree_util.tree_leaves_with_path(opened)}
            whole = jax.tree_util.tree_map_with_path(functools.partial(merged, arrays), model)
            found, wanted = of_batch(opened), of_batch(whole)
            assert abs(wanted - of_batch(model)).max() > 0.1
        np.testing.assert_allclose(found, wanted, atol=1e-9, err_msg=str(mesh))


def test_weights_of_an_opened_model_are_kept_otherwise(float64):
    run = of_run(GROUPED)
    kept = dataclasses.replace(run.model, weights=(Int8Config(targets=('mlp.*', 'expert')),))
    for mesh in MESHES[::2]:
        with harness.on(mesh):
            model = harness.initial(run)
            opened = jax.jit(lambda model: in_forms(model, kept, jax.random.key(1)))(model)

            wanted = of_batch(jax.tree_util.tree_map_with_path(rounded_mlp, model))
            np.testing.assert_allclose(of_batch(opened), wanted, atol=1e-9, err_msg=str(mesh))
            assert abs(wanted - of_batch(model)).max() > 1e-4


@pytest.mark.parametrize(
    ('targets', 'said'),
    [
        (
            ('attention.qq',),
            r"model\.adapter\.targets has 'attention\.qq': no layer has such a linear map; did you mean 'attention\.q'\?",
        ),
        (('mlp.router',), r"'mlp\.router': no layer has such a linear map"),
        (('bias',), r"'bias': no layer"),
    ],
)
def test_targets_that_no_layer_has(targets, said):
    with pytest.raises(UserError, match=said):
        weights_of(dataclasses.replace(model_of(GROUPED), adapter=LoRAConfig(targets=targets)))


def test_no_target():
    with pytest.raises(UserError, match=r'targets of kind lora is \[\]: it must name a linear map'):
        LoRAConfig(targets=())
