"""The pipeline applies every layer to every microbatch once, does the work its formula says, and keeps what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from tests import reference
from weft.model import stack
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig
from weft.model.decoder import init_decoder
from weft.model.dots import dots
from weft.model.forward import place
from weft.sharding.collectives import mark_varying
from weft.sharding.mesh import AXES, MeshConfig, make_mesh
from weft.sharding.pipeline import bubble, microbatch, my_microbatches, pipeline, ticks
from weft.training.config import RunConfig, TrainingConfig
from weft.training.loss import loss_and_gradient
from weft.training.report import kept_inputs, pipeline_line

MODEL = ModelConfig(vocabulary=100, layers=8, model_dim=16, attention=AttentionConfig(heads=2), mlp=MLPConfig(dim=16))
COMPUTE = ComputeConfig(remat='block', attention='reference')
B, T = 16, 8


@pytest.mark.parametrize(('stages', 'microbatches'), [(1, 3), (2, 2), (2, 6), (4, 4), (4, 8), (8, 8)])
def test_every_layer_meets_every_microbatch_once_and_in_order(stages, microbatches):
    """x -> 2 x + layer is not commutative: its result tells which layers were applied, in which order."""
    layers, rows = 8, 2
    r = np.random.default_rng(0)
    x_BD, side_B = r.normal(size=(microbatches * rows, 3)), r.normal(size=microbatches * rows)

    def body(weight_L, x_BD, side_B):
        def apply(x_BD, number):
            side_b = microbatch(side_B, number, microbatches)
            for w in weight_L:
                x_BD = 2 * x_BD + w * side_b[:, None]
            return x_BD, {'seen': mark_varying(jnp.ones(())), 'number': mark_varying(number + 0.0)}

        x_BD = mark_varying(my_microbatches(x_BD, microbatches))
        y_mBD, sums = pipeline(apply, x_BD.reshape(-1, rows, 3))
        sums = jax.tree.map(lambda a: a[None], sums)
        return y_mBD, sums

    with jax.set_mesh(make_mesh(MeshConfig(stage=stages))):
        run = jax.shard_map(
            body, in_specs=(P('stage'), P(), P()), out_specs=(P(AXES), {'seen': P(AXES), 'number': P(AXES)})
        )
        weight_L = np.arange(1.0, layers + 1)
        y, sums = jax.jit(run)(*(jax.device_put(a, s) for a, s in ((weight_L, P('stage')), (x_BD, P()), (side_B, P()))))
        y = np.asarray(y)
    want = x_BD
    for w in weight_L:
        want = 2 * want + w * side_B[:, None]
    # Stage s holds microbatches s, s + S, …
    by_stage = want.reshape(microbatches // stages, stages, rows, 3).swapaxes(0, 1).reshape(-1, rows, 3)
    np.testing.assert_allclose(y, by_stage, rtol=1e-5)
    np.testing.assert_array_equal(sums['seen'], microbatches)  # what the bubble gives is not counted
    np.testing.assert_array_equal(sums['number'], microbatches * (microbatches - 1) / 2)


def traced(stages: int, microbatches: int, layers: int = 8):
    """The program of a loss and its gradient, traced."""
    c = dataclasses.replace(MODEL, layers=layers)
    with jax.set_mesh(make_mesh(MeshConfig(stage=stages))):
        model = jax.eval_shape(lambda key: init_decoder(c, COMPUTE, key), jax.random.key(0))
        batch = place(reference.packed_batch(100, B, T))
        return jax.make_jaxpr(functools.partial(loss_and_gradient, microbatches=microbatches))(model, batch).jaxpr


@pytest.mark.parametrize(('stages', 'microbatches'), [(2, 2), (2, 8), (4, 4), (4, 8), (8, 16)])
def test_bubble_in_counted_work_is_the_formulas(stages, microbatches):
    """FLOPs of the layers alone: those of a model less those of one with fewer layers, on one device."""
    work = lambda stages, microbatches, layers: dots(traced(stages, microbatches, layers)).flops
    one_device = work(1, 1, 16) - work(1, 1, 8)
    staged = work(stages, microbatches, 16) - work(stages, microbatches, 8)
    useful = one_device / stages  # a device's share
    assert 1 - useful / staged == pytest.approx(bubble(microbatches, stages), abs=1e-12)


def stacked_outputs(jaxpr, length: int) -> list:
    """Shapes of what a loop over `length` ticks stacks up, one for each tick."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'scan' and equation.params['length'] == length:
            one_tick = [v.aval.shape for v in equation.params['jaxpr'].jaxpr.outvars]
            outputs = [v.aval for v in equation.outvars]
            found += [a for a, shape in zip(outputs, one_tick, strict=True) if a.shape == (length, *shape)]
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, 'eqns') or hasattr(v, 'jaxpr')
        ):
            value = getattr(value, 'jaxpr', value)
            if hasattr(value, 'eqns'):
                found += stacked_outputs(value, length)
    return found


@pytest.mark.parametrize(('stages', 'microbatches'), [(2, 8), (4, 8)])
def test_kept_activations_are_those_that_the_report_states(stages, microbatches, monkeypatch):
    monkeypatch.setattr(stack, 'UNROLLED', {})
    t = TrainingConfig(steps=1, batch=B, sequence_length=T, microbatches=microbatches)
    config = RunConfig(name='kept', mesh=MeshConfig(stage=stages), model=MODEL, compute=COMPUTE, training=t)
    length = ticks(microbatches, stages)
    kept = [a for a in stacked_outputs(traced(stages, microbatches), length) if jnp.issubdtype(a.dtype, jnp.floating)]
    shape = (length, MODEL.layers // stages, B // microbatches, T, MODEL.model_dim)
    assert shape in [a.shape for a in kept]
    activations = sum(a.size * a.dtype.itemsize for a in kept if a.shape[-1] == MODEL.model_dim)
    assert activations == kept_inputs(config)
    assert f'bubble of {bubble(microbatches, stages):.1%}' in pipeline_line(config)
