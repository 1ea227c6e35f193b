"""What layers say of themselves: metrics are sums over all devices, taps are what was computed; unasked they leave no trace."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from tests.extending import harness
from tests.models import filled
from weft.inference.step import decode, empty_cache, prefill
from weft.model.capture import capture
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.context import ForwardContext
from weft.model.forward import hidden_states, logits, place
from weft.model.layers.mlp import Mlp
from weft.model.records import Metric, Records, Tap, join
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.loss import loss_and_gradient

AFTER = 'residual.after_mlp'
OUTPUTS = ('attention.output', 'mlp.output', AFTER)
MODEL = ModelConfig(
    vocabulary=96,
    layers=4,
    model_dim=16,
    attention=AttentionConfig(heads=4, window=4, window_pattern=(True, False)),
    mlp=MLPConfig(dim=32),
)
MIXED = dataclasses.replace(
    MODEL,
    layers=3,
    attention=AttentionConfig(heads=4),
    moe=MoEConfig(experts=4, mlp_dim=16, first_dense_layers=1),
)


def rows():
    batch = place(harness.batch_of(0))
    return batch.tokens_BT, batch.position_BT, batch.segment_BT


@functools.cache
def captured(mesh: MeshConfig) -> dict[str, np.ndarray]:
    with harness.on(mesh):
        model, found = filled(MODEL), jax.jit(functools.partial(capture, names=OUTPUTS))
        arrays = found(model, tokens_BT=rows()[0], position_BT=rows()[1], segment_BT=rows()[2])
        layouts = {name: x.sharding.spec for name, x in arrays.items()}
        split = {axis for axis in ('data', 'expert', 'context', 'tensor') if getattr(mesh, axis) > 1}
        for spec in layouts.values():
            named = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
            assert split <= named, f'{spec} on {mesh}: each device has its own part'
        final = np.asarray(jax.jit(hidden_states)(model, *rows()))
    return {name: np.asarray(x) for name, x in arrays.items()} | {'final': final}


@pytest.mark.parametrize('mesh', harness.MESHES, ids=str)
def test_activations_are_those_of_one_device_in_the_order_of_the_layers(mesh):
    """Layers of two kinds take turns here, and are kept by kind."""
    found, wanted = captured(mesh), captured(MeshConfig())
    for name, array in wanted.items():
        assert name == 'final' or array.shape == (4, harness.ROWS, harness.COLUMNS, 16)
        np.testing.assert_allclose(found[name], array, atol=2e-5, err_msg=name)
    live_BT = harness.batch_of(0).segment_BT > 0
    for layer in range(1, 4):
        after = found[AFTER][layer - 1] + found['attention.output'][layer] + found['mlp.output'][layer]
        np.testing.assert_allclose(after[live_BT], found[AFTER][layer][live_BT], atol=1e-5)


def test_a_name_that_no_layer_offers_is_refused():
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2))):
        with pytest.raises(
            UserError, match=r"'atention.output': no layer offers such an activation; did you mean 'attention.output'\?"
        ):
            capture(filled(MODEL), ['atention.output'], *rows())
        with pytest.raises(UserError, match=r'known: attention\.head_outputs, attention\.input'):
            capture(filled(MODEL), ['scores'], *rows())
    with jax.set_mesh(make_mesh(MeshConfig(stage=2))), pytest.raises(UserError, match=r'mesh\.stage is 2: capturing'):
        capture(filled(MODEL), [AFTER], *rows())


def say(self: Mlp, x_BTD, ctx: ForwardContext):
    """An MLP that says how large its input is, and offers it."""
    ctx.tap('mlp_input', x_BTD)
    ctx.metric('input_square', (x_BTD**2 * ctx.live_BT[..., None]).sum())
    ctx.metric('input_rows', ctx.live_BT[:, :1].sum() * 1.0, per='rows', report=by_layer)
    return QUIET(self, x_BTD, ctx)


def by_layer(x_L):
    return {'input_rows': x_L, 'input_rows_sum': x_L.sum()}


QUIET = Mlp.__call__


def programs(c: ModelConfig) -> dict[str, str]:
    """Compiled programs of each way through a model, without what says where in the source they are from."""
    with harness.on(MeshConfig(data=2, tensor=2)):
        model, batch = filled(c), place(harness.batch_of(0))
        cache, number_B = empty_cache(model, harness.ROWS, harness.COLUMNS), place(np.full(harness.ROWS, 5, np.int32))
        lowered = {
            'prefill': jax.jit(lambda *args: prefill(*args)).lower(model, cache, batch.tokens_BT, number_B),
            'decode': jax.jit(lambda *args: decode(*args)).lower(model, cache, number_B, number_B),
            'logits': jax.jit(lambda *args: logits(*args)).lower(model, *rows()),
            'gradient': jax.jit(lambda *args: loss_and_gradient(*args)).lower(model, batch),
        }
        text = {name: one.compile().as_text() for name, one in lowered.items()}
    return {
        name: re.sub(
            r', metadata=\{[^}]*\}|(?m:^.*(FileNames|FunctionNames|FileLocations|StackFrames)[\s\S]*?\n\n)', '', one
        )
        for name, one in text.items()
    }


@pytest.mark.parametrize('c', [MODEL, MIXED], ids=['dense', 'experts'])
def test_unasked_they_leave_the_compiled_program_as_it_is(c, monkeypatch):
    """Scoring, reading and decoding ask for nothing, and training for metrics alone."""
    quiet = programs(c)
    monkeypatch.setattr(ForwardContext, 'metric', lambda *args, **kwargs: None)
    monkeypatch.setattr(ForwardContext, 'tap', lambda ctx, name, value, *args, **kwargs: value)
    for question in ('asks', 'edits'):
        monkeypatch.setattr(ForwardContext, question, lambda *args: False)
    without = programs(c)
    for name in ('logits', 'prefill', 'decode'):
        assert without[name] == quiet[name]
    if c is MODEL:
        assert without['gradient'] == quiet['gradient']
    else:
        assert without['gradient'] != quiet['gradient'], 'the balance loss is a metric'


def test_a_new_metric_is_summed_and_logged_on_every_mesh(monkeypatch, float64):
    monkeypatch.setattr(Mlp, '__call__', say)
    found = {}
    for mesh in (MeshConfig(), harness.MESHES[1], MeshConfig(stage=2, tensor=2)):
        with harness.on(mesh):
            microbatches = 2 if mesh.stage > 1 else 1
            (_, metrics), _ = jax.jit(functools.partial(loss_and_gradient, microbatches=microbatches))(
                filled(MIXED, ComputeConfig(dtype='float64')), place(harness.batch_of(0))
            )
            found[mesh] = jax.device_get(metrics)
    wanted = found[MeshConfig()]
    assert wanted['input_square'] > 0
    for mesh, metrics in found.items():
        np.testing.assert_allclose(metrics['input_square'], wanted['input_square'], rtol=1e-10, err_msg=str(mesh))
        for name in ('router.entropy', 'router.balance_loss', 'router.z_loss', 'router.load', 'router.max_share'):
            np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-10, err_msg=f'{name} on {mesh}')
    assert wanted['input_rows'].shape == (1,), 'one layer is an MLP'
    np.testing.assert_allclose(wanted['router.load'].sum(-1), 1, rtol=1e-12)


def test_groups_are_joined_by_name():
    tap = lambda *values: Tap(jnp.array(values), P())
    metric = lambda *values: Metric(jnp.array(values), 'tokens', 0.5, None)
    first = Records({'a': metric(1.0, 2.0)}, {'x': tap(10, 30), 'y': tap(7)})
    second = Records({'a': metric(3.0), 'b': metric(4.0)}, {'x': tap(20, 40)})
    found = join([first, second], [range(0, 4, 2), range(1, 4, 2)])
    assert found.metrics['a'].total.tolist() == [1, 2, 3]
    assert found.metrics['b'].total.tolist() == [4]
    assert {name: one.value.tolist() for name, one in found.taps.items()} == {'x': [10, 20, 30, 40], 'y': [7]}
    counts = {'tokens': jnp.array(10), 'rows': jnp.array(2)}
    assert float(found.metrics['a'].loss(counts)) == pytest.approx(0.5 * 2 / 10)
    assert found.metrics['a'].logged('a', counts) == {'a': pytest.approx(0.2)}
