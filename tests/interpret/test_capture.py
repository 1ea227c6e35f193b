"""What is captured and what edits do, against a forward pass in NumPy: dense, mixture, latent attention, on 1 and 8 devices."""

import dataclasses
import functools
import zlib

import jax
import numpy as np
import pytest

from tests.extending import harness
from tests.interpret import plain
from tests.models import filled
from tests.reference import weights
from weft.inference.step import decode, empty_cache, prefill
from weft.model.capture import captured, offers
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.edits import Edit
from weft.model.forward import logits, place
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.loss import loss_and_gradient

FLOAT64 = ComputeConfig(dtype='float64')
DENSE = ModelConfig(
    vocabulary=95,  # padded: a mesh splits more
    layers=3,
    model_dim=16,
    attention=AttentionConfig(heads=4, kv_heads=2, qk_norm=True),
    mlp=MLPConfig(dim=32),
)
MIXTURE = dataclasses.replace(
    DENSE,
    attention=AttentionConfig(heads=4),
    moe=MoEConfig(experts=4, mlp_dim=16, first_dense_layers=1, shared_experts=1, routed_scale=1.5),
)
LATENT = dataclasses.replace(
    DENSE,
    layers=2,
    attention=MLAConfig(heads=4, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6),
)
SMALL_QUERIES = dataclasses.replace(LATENT, attention=dataclasses.replace(LATENT.attention, q_lora_rank=8))
ONE = MeshConfig()
CASES = [
    pytest.param(DENSE, ONE, id='dense-1'),
    pytest.param(DENSE, MeshConfig(data=2, tensor=4), id='dense-keys repeated'),
    pytest.param(MIXTURE, ONE, id='mixture-1'),
    pytest.param(MIXTURE, MeshConfig(expert=2, context=2, tensor=2), id='mixture-8'),
    pytest.param(LATENT, ONE, id='latent-1'),
    pytest.param(SMALL_QUERIES, MeshConfig(data=2, context=2, tensor=2), id='latent-8'),
]
_batch = harness.batch_of(0)
BATCH = _batch._replace(tokens_BT=np.minimum(_batch.tokens_BT, 94), target_BT=np.minimum(_batch.target_BT, 94))
LIVE_BT = BATCH.segment_BT > 0
ROWS = BATCH.tokens_BT, BATCH.position_BT, BATCH.segment_BT


def random_edit(name: str, dims: tuple[int, ...], experts: int) -> Edit:
    """An edit at some layers, tokens and units, that puts other numbers there."""
    r = np.random.default_rng(zlib.crc32(name.encode()))
    if name in ('experts.outputs', 'router.weights'):
        dims = (*dims[:3], experts, *dims[4:])
    layers = r.random((dims[0], *(1,) * (len(dims) - 1))) < 0.7
    layers[0] |= dims[0] == 1
    tokens = (r.random((1, *dims[1:3])) < 0.4) & LIVE_BT
    tokens = tokens.reshape(*tokens.shape, *(1,) * (len(dims) - 3))
    units = r.random((1, 1, 1, *dims[3:])) < 0.6
    ones = (1,) * len(dims)
    if name == 'router.choices':
        shift = np.array([3, 1], np.float32).reshape(1, 1, 1, 2)
        return Edit(name=name, where=(layers, tokens), factor=np.zeros(ones, np.float32), shift=shift)
    # In halves and quarters, exact in any float.
    factor = r.integers(0, 4, (1, 1, 1, *dims[3:])) / 4
    shift = r.integers(-2, 3, (dims[0], dims[1], 1, *(1,) * (len(dims) - 4), dims[-1])) / 4
    if name in ('attention.pattern', 'router.scores', 'router.weights'):
        shift = np.abs(shift) / 4
    return Edit(
        name=name,
        where=(layers, tokens, units),
        factor=factor.astype(np.float32).reshape(*ones[:3], *dims[3:]),
        shift=shift.astype(np.float32),
    )


def off(edit: Edit) -> Edit:
    """The edit at no place: the program is the same."""
    return dataclasses.replace(edit, where=tuple(np.zeros_like(mask) for mask in edit.where))


def in_numpy(c: ModelConfig, w: dict, edits: dict[str, Edit]) -> dict[str, np.ndarray]:
    """All places of the forward pass by name, with layers stacked, under edits."""
    found: dict[str, list[np.ndarray]] = {}
    choices: dict[int, np.ndarray] = {}

    def at(name: str, layer: int | None, value: np.ndarray) -> np.ndarray:
        edit = edits.get(name)
        if edit is not None:
            arrays = [np.broadcast_to(a[layer or 0] if len(a) > 1 else a[0], full(name, value)) for a in all_of(edit)]
            if name in ('experts.outputs', 'router.weights'):
                index = choices[layer].reshape(*choices[layer].shape, *(1,) * (value.ndim - 3))
                arrays = [np.take_along_axis(a, index, 2) for a in arrays]
            *masks, factor, shift = arrays
            where = functools.reduce(np.logical_and, masks)
            value = np.where(where, np.where(factor == 0, shift, factor * value + shift), value)
        if name == 'router.choices':
            value = choices[layer] = value.astype(int)
        found.setdefault(name, []).append(value)
        return value

    def full(name: str, value: np.ndarray) -> tuple[int, ...]:
        own = name in ('experts.outputs', 'router.weights')
        return (*value.shape[:2], c.moe.experts, *value.shape[3:]) if own else value.shape

    plain.forward(w, *ROWS, c, at)
    top = ('embedding', 'final_norm', 'logits')
    return {name: values[0] if name in top else np.stack(values) for name, values in found.items()}


def all_of(edit: Edit) -> list[np.ndarray]:
    return [*edit.where, np.asarray(edit.factor), np.asarray(edit.shift)]


def check(found: dict, wanted: dict, note: str, atol: float = 1e-9) -> None:
    """Real tokens are alike."""
    for name, array in wanted.items():
        got = np.asarray(found[name])
        assert got.shape == array.shape, (name, got.shape, array.shape)
        live = (slice(None), LIVE_BT) if array.shape[:2] != LIVE_BT.shape else (LIVE_BT,)
        np.testing.assert_allclose(got[live], array[live], atol=atol, rtol=0, err_msg=f'{name} {note}')


def edits_of(c: ModelConfig, model) -> dict[str, Edit]:
    """One at every name that the model offers."""
    experts = c.moe.experts if c.moe else 0
    made = {}
    for name, offer in offers(model, *place(ROWS)).items():
        dims = (1, *offer.shape) if offer.layers is None else (c.layers, *offer.shape[1:])
        made[name] = random_edit(name, dims, experts)
    return made


@functools.cache
def numpy_weights(c: ModelConfig) -> dict:
    with harness.on(ONE):
        found = weights(filled(c, FLOAT64))
    return jax.tree.map(lambda a: np.asarray(a, np.float64), found)


@pytest.mark.parametrize(('c', 'mesh'), CASES)
def test_captures_and_edits_are_those_of_numpy(c, mesh, float64):
    """At every place there is; the edits off, then on, in one compiled program."""
    with harness.on(mesh):
        model, traced = filled(c, FLOAT64), 0

        @jax.jit
        def run(model, edits, *rows):
            nonlocal traced
            traced += 1
            return {name: tap.value for name, tap in captured(model, ['*'], *rows, edits=edits).items()}

        edits = edits_of(c, model)
        clean = jax.device_get(run(model, tuple(map(off, edits.values())), *place(ROWS)))
        changed = jax.device_get(run(model, tuple(edits.values()), *place(ROWS)))
        assert traced == 1, 'other numbers are no other program'
    wanted = in_numpy(c, numpy_weights(c), {})
    assert wanted.keys() == clean.keys()
    check(clean, wanted, 'without edits')
    check(changed, in_numpy(c, numpy_weights(c), edits), 'with edits')
    different = [name for name, array in wanted.items() if not np.allclose(array, changed[name])]
    assert set(different) == set(wanted), 'each edit changes something'


def test_a_step_of_training_captures_and_changes(float64):
    """Rows in two parts, columns in zigzag; losses are those of the changed logits."""
    with harness.on(MeshConfig(data=2, context=2)):
        model = filled(MIXTURE, FLOAT64)
        edits = edits_of(MIXTURE, model)
        del edits['logits']
        step = functools.partial(loss_and_gradient, accumulation=2, taps=('*',), edits=tuple(edits.values()))
        (_, metrics), _ = jax.device_get(jax.jit(lambda *given: step(*given))(model, place(BATCH)))
    wanted = in_numpy(MIXTURE, numpy_weights(MIXTURE), edits)
    logit_BTV = wanted.pop('logits')
    assert wanted.keys() == metrics['taps'].keys()
    check(metrics['taps'], wanted, 'in training')
    chosen = np.take_along_axis(np.log(plain.softmax(logit_BTV)), BATCH.target_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics['loss'], -chosen[LIVE_BT].mean(), rtol=1e-9)


@pytest.mark.parametrize(
    ('c', 'mesh'),
    [
        pytest.param(DENSE, MeshConfig(context=2, tensor=2), id='dense'),
        pytest.param(LATENT, MeshConfig(data=2, context=2), id='latent'),
    ],
)
def test_reading_and_decoding_capture_and_change_what_one_pass_does(c, mesh, float64):
    """Prompts of different lengths, then one token more: captures and logits are those of the whole rows, under edits."""
    token_BT, length_B = BATCH.tokens_BT, np.array([5, 9, 3, 8, 1, 7, 2, 6], np.int32)
    column_BT = np.broadcast_to(np.arange(harness.COLUMNS, dtype=np.int32), token_BT.shape)
    whole = token_BT, column_BT, np.ones_like(column_BT)
    names = ['attention.head_outputs', 'attention.pattern', 'attention.queries', 'logits', 'residual.after_mlp']
    with harness.on(mesh):
        model = filled(c, FLOAT64)
        made = edits_of(c, model)
        pattern = made[
            'attention.pattern'
        ]  # no weight where there is none: a cache has no keys of tokens that are to come
        made['attention.pattern'] = dataclasses.replace(pattern, shift=np.zeros_like(pattern.shift))
        edits = tuple(made[name] for name in names)
        full = jax.device_get(
            jax.jit(lambda model, edits, *rows: captured(model, names, *rows, edits=edits))(model, edits, *place(whole))
        )
        wanted = {name: tap.value for name, tap in full.items()}
        cache = empty_cache(model, harness.ROWS, harness.COLUMNS)
        read = jax.jit(lambda *given, edits: prefill.capture(*given, taps=names, edits=edits))
        logit_BV, cache, found = read(model, cache, place(token_BT), place(length_B), edits=edits)
        row_B = np.arange(harness.ROWS)
        np.testing.assert_allclose(logit_BV, wanted['logits'][row_B, length_B - 1], atol=1e-9)
        np.testing.assert_allclose(found.pop('logits')[:, 0], logit_BV, atol=0)
        read_BT = column_BT < length_B[:, None]
        for name, array in found.items():
            np.testing.assert_allclose(np.asarray(array)[:, read_BT], wanted[name][:, read_BT], atol=1e-9, err_msg=name)
        step = jax.jit(lambda *given, edits: decode.capture(*given, taps=names, edits=edits))
        new_B = place(token_BT[row_B, length_B])
        logit_BV, _, found = step(model, cache, new_B, place(length_B), edits=edits)
        np.testing.assert_allclose(logit_BV, wanted['logits'][row_B, length_B], atol=1e-9)
        np.testing.assert_allclose(found.pop('logits')[:, 0], logit_BV, atol=0)
        for name, array in found.items():
            np.testing.assert_allclose(
                np.asarray(array)[:, :, 0], wanted[name][:, row_B, length_B], atol=1e-9, err_msg=name
            )


def test_edits_that_do_not_fit_are_told(float64):
    ones = lambda *shape: np.ones(shape, np.float32)
    edit = lambda name, *shape: Edit(name=name, where=(ones(*shape) > 0,), factor=ones(*shape), shift=ones(*shape))
    with harness.on(ONE):
        dense, latent = filled(DENSE), filled(LATENT)
        for model, one, message in (
            (dense, edit('mlp.outputs', 1, 1, 1, 1), r"'mlp.outputs': no layer offers .*; did you mean 'mlp.output'\?"),
            (dense, edit('mlp.output', 4, 1, 1, 1), r"'mlp.output': an array of 4 layers, and the model has 3; give 3"),
            (dense, edit('mlp.output', 1, 1, 1, 1, 1), r'an array of 5 dims, and what is tapped has 3; give one more'),
            (
                dense,
                edit('attention.keys', 1, 1, 1, 4, 1),
                r"'attention.keys': dim 3 \(from 0\) of an array is 4, and must be 2 or 1",
            ),
        ):
            with pytest.raises(UserError, match=message):
                jax.eval_shape(lambda *rows, model=model, one=one: logits(model, *rows, edits=(one,)), *place(ROWS))
        with pytest.raises(UserError, match=r'latent attention keeps none in its cache; edit attention\.latent'):
            jax.eval_shape(
                lambda *rows: prefill(
                    latent, empty_cache(latent, 8, 16), *rows, edits=(edit('attention.keys', 1, 1, 1, 1, 1),)
                ),
                *place((BATCH.tokens_BT, np.full(8, 5, np.int32))),
            )
    with harness.on(MeshConfig(stage=2)), pytest.raises(UserError, match=r'mesh\.stage is 2: capturing'):
        jax.eval_shape(lambda *given: loss_and_gradient(*given, taps=['embedding']), filled(LATENT), place(BATCH))
