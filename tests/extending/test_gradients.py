"""Gradients of each change are those of one device, on meshes that split all that there is."""

import pytest
from jax import lax

from tests.extending import harness
from tests.extending.configs import CHANGES, config
from tests.extending.feed_forward import SquaredRelu


@pytest.mark.parametrize('name', CHANGES)
def test_gradients_are_those_of_one_device(name, float64):
    # The weights beside the adapters are kept as they are.
    idle = ('attention.q.w_', 'attention.v.w_', 'mlp.gate.w_', 'mlp.up.w_', 'mlp.down.w_') if name == 'lora' else ()
    metrics = harness.check_gradients(config(CHANGES[name], 'compute.dtype=float64'), idle=idle)
    if name == 'router':
        assert metrics['router.balance_loss'] >= 1, 'even scores have the least'
    if name == 'captured_activation':
        assert 0.1 < metrics['mlp.idle_share'] < 0.9


def test_what_depends_on_the_mesh_is_found(monkeypatch, float64):
    """The checks can fail: here a layer's output counts once for each device of `tensor`."""
    true = SquaredRelu.__call__
    monkeypatch.setattr(SquaredRelu, '__call__', lambda self, x, ctx: true(self, x, ctx) * lax.axis_size('tensor'))
    with pytest.raises(AssertionError, match=r'embed_VD.* off'):
        harness.check_gradients(config(CHANGES['feed_forward'], 'compute.dtype=float64'))
