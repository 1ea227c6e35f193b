"""A weight is one line in its layer: initial values, decay, the plan's counts, mesh rules, checkpoints follow from it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from tests.extending import harness
from weft.hub.families import families
from weft.hub.tensor_table import array_shapes, tensors
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig
from weft.model.cost import parameters
from weft.model.decoder import declared_decoder, init_decoder, weights_of
from weft.model.parameters import Role, Size, parameter
from weft.model.parts.registry import FEED_FORWARDS
from weft.model.sizes import sizes
from weft.planner.weights import inventory
from weft.runtime.errors import UserError
from weft.sharding.collectives import unshard
from weft.sharding.mesh import FSDP, Divides, MeshConfig, check_divides, make_mesh
from weft.training.optimizers import decays, roles

D, F = 16, 32
PLAIN = ModelConfig(
    vocabulary=harness.VOCABULARY, layers=2, model_dim=D, attention=AttentionConfig(heads=4), mlp=MLPConfig(dim=F)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A feed-forward layer of three weights."""

    kind: Literal['toy'] = 'toy'
    dim: int


class Toy(nnx.Module):
    """x + (tanh(x W) slope) Wᵀ-like, over `tensor` by hidden units."""

    def __init__(self, c: ModelConfig):
        D, F = Size(c.model_dim, 'model.model_dim'), Size(c.mlp.dim, 'model.mlp.dim')
        self.in_DF = parameter((D, F), P(FSDP, 'tensor'), Role.MATRIX, scale=D**-0.5, gathered=FSDP, part='mlp')
        self.slope_F = parameter((F,), P('tensor'), Role.VECTOR, value=1.0, part='mlp')
        self.out_DF = parameter(
            (D, F), P(FSDP, 'tensor'), Role.MATRIX, scale=F**-0.5, out_first=True, gathered=FSDP, part='mlp'
        )

    def __call__(self, x_BTD: jax.Array, ctx: Any) -> jax.Array:
        x_BTD = ctx.gather_sequence(x_BTD)
        h_BTF = jnp.tanh(x_BTD @ unshard(self.in_DF[...], x_BTD.dtype)) * self.slope_F.astype(x_BTD.dtype)[None, None]
        return ctx.reduce_scatter_sequence(h_BTF @ unshard(self.out_DF[...], x_BTD.dtype).T)


@pytest.fixture
def toy() -> Iterator[ModelConfig]:
    FEED_FORWARDS.register('toy', ToyConfig, Toy)
    try:
        yield ModelConfig(
            vocabulary=harness.VOCABULARY,
            layers=2,
            model_dim=D,
            attention=AttentionConfig(heads=4),
            mlp=ToyConfig(dim=F),
        )
    finally:
        del FEED_FORWARDS.configs['toy'], FEED_FORWARDS.modules['toy']


TOYS = {f'groups.0.mlp.{name}' for name in ('in_DF', 'slope_F', 'out_DF')}


def made(c: ModelConfig, mesh: MeshConfig) -> dict[str, jax.Array]:
    with jax.set_mesh(make_mesh(mesh)):
        model = jax.jit(lambda key: init_decoder(c, DEFAULT, key))(jax.random.key(0))
    return dict(zip(weights_of(c), jax.tree.leaves(model), strict=True))


def test_its_initial_values_are_those_of_one_device_and_each_device_has_its_part(toy):
    one, eight = (made(toy, mesh) for mesh in (MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)))
    assert eight.keys() >= TOYS
    for name, array in eight.items():
        np.testing.assert_array_equal(array, one[name], err_msg=name)
    shards = {name: eight[name].addressable_shards[0].data.shape for name in TOYS}
    assert shards == {
        'groups.0.mlp.in_DF': (2, D // 4, F // 2),
        'groups.0.mlp.slope_F': (2, F // 2),
        'groups.0.mlp.out_DF': (2, D // 4, F // 2),
    }
    assert not np.array_equal(one['groups.0.mlp.in_DF'][0], one['groups.0.mlp.in_DF'][1]), 'layers differ'
    assert np.std(one['groups.0.mlp.in_DF']) == pytest.approx(D**-0.5, rel=0.1)


def test_it_changes_no_other_weights_values(toy):
    with_toy, without = (made(c, MeshConfig()) for c in (toy, PLAIN))
    both = with_toy.keys() & without.keys()
    assert with_toy.keys() - both == TOYS
    for name in both:
        np.testing.assert_array_equal(with_toy[name], without[name], err_msg=name)


def test_a_layers_values_do_not_depend_on_how_layers_are_grouped():
    alike = dataclasses.replace(PLAIN, layers=4, attention=AttentionConfig(heads=4, window=4))
    apart = dataclasses.replace(alike, attention=AttentionConfig(heads=4, window=4, window_pattern=(True, False)))
    assert len(alike.layer_groups[0].specs) == 1
    assert len(apart.layer_groups[0].specs) == 2
    one, two = (made(c, MeshConfig()) for c in (alike, apart))
    for layer in range(4):
        np.testing.assert_array_equal(
            one['groups.0.mlp.up.w_IO'][layer], two[f'groups.{layer % 2}.mlp.up.w_IO'][layer // 2], err_msg=str(layer)
        )


def test_it_decays_by_its_role(toy):
    found = dict(zip(weights_of(toy), jax.tree.leaves(decays(roles(declared_decoder(toy)))), strict=True))
    assert {name: found[name] for name in TOYS} == {
        'groups.0.mlp.in_DF': True,
        'groups.0.mlp.slope_F': False,
        'groups.0.mlp.out_DF': True,
    }


def test_the_plan_counts_it(toy):
    assert parameters(toy)['mlp'] == toy.layers * (2 * D * F + F)
    (group,) = inventory(toy).groups
    assert sum(weight.size for weight in group.weights if weight.declared.part == 'mlp') == 2 * D * F + F
    mesh = MeshConfig(data=2, tensor=2)
    held = sum(numbers for _, numbers in inventory(toy).held(mesh))
    assert held == sum(math.prod(array.addressable_shards[0].data.shape) for array in made(toy, mesh).values())


def test_a_mesh_that_does_not_divide_it_is_refused_by_its_field(toy):
    assert Divides(('tensor',), 'model.mlp.dim', F) in sizes(toy)
    wide = dataclasses.replace(toy, mlp=ToyConfig(dim=33))
    with pytest.raises(
        UserError, match=r'mesh\.tensor is 2 and model\.mlp\.dim is 33: the first must divide the second'
    ):
        check_divides(MeshConfig(tensor=2), sizes(wide))


@pytest.mark.usefixtures('float64')
def test_its_gradients_are_those_of_one_device_and_it_is_saved_and_restored(toy, tmp_path):
    config = harness.run_of(toy, compute=ComputeConfig(dtype='float64'))
    harness.check_gradients(config)
    harness.check_checkpoint(config, tmp_path / 'run')


def test_a_published_family_refuses_it_by_name(toy):
    llama = next(family for family in families() if family.name == 'llama')
    with jax.set_mesh(make_mesh(MeshConfig())), pytest.raises(UserError) as caught:
        tensors(llama, toy, array_shapes(toy))
    assert 'family llama has no tensor for groups.0.mlp.' in str(caught.value)


def test_a_dim_that_an_axis_splits_must_name_its_field():
    nameless = parameter((D, F), P(FSDP, None), Role.MATRIX, scale=1.0)
    with pytest.raises(AssertionError, match='names its field'):
        list(nameless.get_value().rules())
