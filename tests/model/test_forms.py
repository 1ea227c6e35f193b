"""Weights in other forms (model/forms/): the same numbers on every mesh, by factors and rebuilt, saved, counted, trained."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from tests.extending import harness
from tests.extending.configs import config
from weft.inference.step import decode, empty_cache
from weft.model.decoder import weights_of
from weft.model.forms.rounded import decode as decoded
from weft.model.forms.rounded import packed
from weft.model.forward import logits, place
from weft.model.parameters import name_of
from weft.runtime.errors import UserError
from weft.training.config import RunConfig
from weft.training.step import init, train_step

MIXTURE = {'layers': 2, 'moe': {'experts': 4, 'mlp_dim': 8, 'first_dense_layers': 1}}
# One KV head, which devices of `tensor` repeat: what is made of all heads is cut as a weight is.
REPEATED = {'attention': {'heads': 4, 'kv_heads': 1}}
HEADS = {'kind': 'low_rank', 'rank': 2, 'slices': 'heads'}
TRAIN = {'kind': 'tensor_train', 'rows': [4, 4], 'columns': [4, 8], 'ranks': [3]}
# Layer 0 has an MLP, layer 1 a mixture.
FORMS: dict[str, dict[str, Any]] = {
    'pairs': {
        'model': {
            'weights': [
                {'kind': 'low_rank', 'rank': 3, 'targets': ['matrix'], 'layers': [0]},
                {
                    'kind': 'low_rank',
                    'rank': 2,
                    'slices': 'heads',
                    'shared': 'hidden',
                    'targets': ['attention.[vo]'],
                    'layers': [1],
                },
                {'kind': 'low_rank', 'rank': 3, 'shared': 'model', 'targets': ['mlp.gate'], 'layers': [1]},
                {'kind': 'low_rank', 'rank': 3, 'targets': ['mlp.up'], 'layers': [1]},
                {'kind': 'low_rank', 'rank': 3, 'shared': 'hidden', 'targets': ['mlp.down'], 'layers': [1]},
            ],
            **MIXTURE,
            **REPEATED,
        }
    },
    'tensors': {
        'model': {
            'weights': [
                {'kind': 'tucker', 'ranks': [2, 5, 3], 'targets': ['attention.q', 'attention.o'], 'layers': [0]},
                {'kind': 'tucker', 'ranks': [1, None, 3], 'targets': ['attention.k'], 'layers': [0]},
                {'kind': 'tucker', 'ranks': [None, 5, None], 'targets': ['attention.v'], 'layers': [0]},
                {'kind': 'cp', 'rank': 5, 'targets': ['attention.*'], 'layers': [1]},
                {**TRAIN, 'targets': ['mlp.*'], 'layers': [0]},
                {'kind': 'tucker', 'ranks': [3, 5, 6], 'targets': ['mlp.gate'], 'layers': [1]},
                {**TRAIN, 'columns': [4, 2], 'targets': ['mlp.up'], 'layers': [1]},
                {'kind': 'cp', 'rank': 4, 'targets': ['mlp.down'], 'layers': [1]},
            ],
            **MIXTURE,
            **REPEATED,
        }
    },
    'more tensors, pruned': {
        'model': {
            'weights': [
                {'kind': 'pruned', 'targets': ['attention.*', 'mlp.down']},
                {'kind': 'tucker', 'ranks': [None, 5, None], 'targets': ['mlp.gate'], 'layers': [1]},
                {'kind': 'tucker', 'ranks': [3, None, 6], 'targets': ['mlp.up'], 'layers': [1]},
            ],
            **MIXTURE,
        }
    },
}
ROUNDED: dict[str, dict[str, Any]] = {
    'tied': {
        'model': {
            'weights': [
                {'kind': 'int8', 'targets': ['attention.*', 'embedding']},
                {'kind': 'int4', 'group': 4, 'targets': ['mlp.up', 'mlp.down']},
                {'kind': 'fp8', 'targets': ['mlp.gate']},
            ],
            **MIXTURE,
            'embedding': {'tied': True},
        }
    },
    'untied': {
        'model': {
            'weights': [
                {'kind': 'int4', 'group': 4, 'targets': ['embedding', 'head', 'attention.q']},
                {'kind': 'fp8', 'targets': ['attention.[vo]']},
                {'kind': 'low_rank', 'rank': 4, 'bits': 8, 'targets': ['mlp.*']},
                {'kind': 'low_rank', 'rank': 4, 'bits': 4, 'group': 4, 'targets': ['attention.k']},
            ],
            'embedding': {'tied': False},
        }
    },
}
ALL = FORMS | ROUNDED


def run_of(name: str, *overrides: str) -> RunConfig:
    return config(ALL[name], *overrides)


@pytest.mark.parametrize('name', ALL)
def test_gradients_are_those_of_one_device(name, float64):
    """Also those of what the rounded weights leave to learn; codes and scales have none."""
    run = run_of(name, 'compute.dtype=float64', 'compute.weight_dtype=float64')
    harness.check_gradients(run, 1e-10)
    learning = {weight.role.learns for key, weight in weights_of(run.model).items() if '.w_' in key}
    assert (name in ROUNDED) == (False in learning)


@pytest.mark.parametrize('name', ALL)
def test_they_are_saved_and_counted(name, tmp_path):
    harness.check_checkpoint(run_of(name), tmp_path / 'run')
    harness.check_plan(run_of(name))


@pytest.mark.parametrize('name', ['pairs', 'tensors'])
def test_by_factors_and_rebuilt_is_the_same(name, float64):
    found = []
    for compute in ('factors', 'rebuild', 'auto'):
        run = run_of(name, 'compute.dtype=float64', 'compute.weight_dtype=float64')
        forms = tuple(dataclasses.replace(form, compute=compute) for form in run.model.weights)
        with harness.on(harness.ONE_DEVICE):
            model = harness.initial(dataclasses.replace(run, model=dataclasses.replace(run.model, weights=forms)))
            batch = place(harness.batch_of(0))
            found.append(np.asarray(jax.jit(logits)(model, batch.tokens_BT, batch.position_BT, batch.segment_BT)))
    assert np.ptp(found[0]) > 0.1
    np.testing.assert_allclose(found[1], found[0], atol=1e-10)
    np.testing.assert_allclose(found[2], found[0], atol=1e-10)


def test_training_keeps_codes_and_zeros():
    for name in ('untied', 'more tensors, pruned'):
        run = run_of(name)
        with harness.on(harness.ONE_DEVICE):
            state, model = jax.jit(functools.partial(init, run))(), harness.initial(run)
            if name not in ROUNDED:
                model = jax.tree.map(lambda w: w * (abs(w) > 0.05), model)
            step = jax.jit(functools.partial(train_step, run))
            after, _ = step(state._replace(model=model), place(harness.batch_of(0)))
        kept = {key for key, w in named(model).items() if np.array_equal(w, named(after.model)[key])}
        moments = {key.rpartition('.')[2] for key in named(after.optimizer)}
        if name == 'untied':
            assert kept == {key for key in named(model) if key.endswith(('.codes', '.scale'))}
            assert not moments & {'codes', 'scale'}
            assert 'scale_D' in moments
        else:
            for key, w in named(model).items():
                if '.attention.' in key:
                    assert key not in kept
                    assert (w == 0).any()
                    np.testing.assert_array_equal(named(after.model)[key] == 0, w == 0, err_msg=key)


@pytest.mark.parametrize('axis', [-1, -2])
def test_int4_is_two_to_a_byte(axis):
    codes = np.random.default_rng(0).integers(-8, 8, (2, 12, 24)).astype(np.int8)
    scale = np.full((2, 12, 4) if axis == -1 else (2, 2, 24), 0.5, np.float16)
    kept = packed(codes, 6, axis)
    assert kept.dtype == np.uint8
    assert kept.size * 2 == codes.size
    np.testing.assert_array_equal(np.asarray(decoded(kept, scale, 'int4', axis, 'float32')), codes * 0.5)


def test_codes_have_a_dtype_of_their_own():
    weights = weights_of(run_of('tied').model)
    dtypes = {name: str(weight.stored('float32')) for name, weight in weights.items() if not weight.role.learns}
    assert dtypes['embed_VD.codes'] == 'int8'
    assert dtypes['embed_VD.scale'] == 'float32'
    assert dtypes['groups.0.mlp.up.w_IO.rounded.codes'] == 'uint8'
    assert dtypes['groups.1.mlp.down.w_EOI.rounded.scale'] == 'float16'
    assert weights['groups.1.mlp.down.w_EOI.rounded.scale'].shape == (4, 16, 2)


@pytest.mark.parametrize(
    ('weights', 'said'),
    [
        (
            [{'kind': 'int4', 'group': 5, 'targets': ['mlp.up']}],
            r'int4 has group 5: .* divide the 16 inputs; nearest: 4',
        ),
        (
            [{'kind': 'int8', 'targets': ['mlp.*']}, {'kind': 'fp8', 'targets': ['mlp.up']}],
            r'model\.weights\.1 is a fp8 of mlp\.up, as another',
        ),
        ([{'kind': 'low_rank', 'rank': 2, 'targets': ['embedding']}], r'tables can be int8, int4 and fp8'),
        ([{'kind': 'int8', 'targets': ['head']}], r'the model has no head of its own; name embedding'),
        ([{'kind': 'cp', 'rank': 2, 'targets': ['mlp.up']}], r'kind cp, and mlp has a map without heads or experts'),
        ([{'kind': 'low_rank', 'rank': 2, 'shared': 'model'}], r'shared is model of a map without experts'),
        (
            [{'kind': 'tucker', 'ranks': [9, 2, 2], 'targets': ['attention.q']}],
            r'ranks has 9 of 4 slices: .* at most 4',
        ),
        ([{**TRAIN, 'targets': ['attention.q']}], r'columns is \[4, 8\]: their product is 32 and must be 16'),
        ([{**TRAIN, 'ranks': [2, 2]}], r'a tensor train of 2 rows, 2 columns and 2 ranks'),
        ([{'kind': 'low_rank', 'rank': 0}], r'rank is 0'),
        (
            [{'kind': 'int8', 'targets': ['mlp.upp']}],
            r"model\.weights\.0\.targets has 'mlp\.upp': .* did you mean 'mlp\.up'",
        ),
    ],
)
def test_what_cannot_be(weights, said):
    with pytest.raises(UserError, match=said):
        weights_of(config({'model': {'weights': weights, 'embedding': {'tied': True}}}).model)


def named(tree: Any) -> dict[str, np.ndarray]:
    return {name_of(path): np.asarray(w) for path, w in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize('name', ROUNDED)
def test_a_step_of_decoding_is_the_full_forward_pass(name, float64):
    """On a CPU few tokens meet rounded weights in sums, many in products."""
    run = run_of(name, 'compute.dtype=float64', 'compute.weight_dtype=float64')
    with harness.on(harness.ONE_DEVICE):
        model, batch = harness.initial(run), harness.batch_of(0)
        tokens_BT = batch.tokens_BT[:1]
        position_BT, segment_BT = np.arange(16, dtype=np.int32)[None], np.ones((1, 16), np.int32)
        wanted = jax.jit(logits)(model, *map(jax.numpy.asarray, (tokens_BT, position_BT, segment_BT)))
        cache, step = empty_cache(model, 1, 16), jax.jit(decode)
        for column in range(4):
            found, cache = step(
                model, cache, jax.numpy.asarray(tokens_BT[:, column]), jax.numpy.asarray([column], np.int32)
            )
            np.testing.assert_allclose(np.asarray(found)[0], np.asarray(wanted)[0, column], atol=1e-9)
