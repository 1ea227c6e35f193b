"""Meshes that fit are accepted, those that do not are refused with ones that do."""

import jax
import pytest

from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.sizes import batch_sizes, sizes
from weft.runtime.errors import UserError
from weft.sharding.mesh import (
    AXES,
    Divides,
    MeshConfig,
    check_divides,
    factorizations,
    make_mesh,
    nearest_meshes,
    parse_mesh,
)

MODEL = ModelConfig(
    layers=2,
    model_dim=64,
    attention=AttentionConfig(heads=12, kv_heads=4, head_dim=8),
    mlp=MLPConfig(dim=96),
    moe=MoEConfig(experts=6, mlp_dim=48),
)


def test_mesh_is_explicit_over_all_axes():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == (1, 1, 2, 1, 1, 4)
    assert mesh.are_all_axes_explicit


@pytest.mark.parametrize(
    ('mesh', 'field'),
    [
        (MeshConfig(tensor=5), 'model.attention.heads is 12'),
        (MeshConfig(tensor=6), 'model.attention.kv_heads is 4'),
        (MeshConfig(expert=4), 'model.moe.experts is 6'),
        (MeshConfig(data=3), 'model.model_dim is 64'),
        (MeshConfig(data=4), 'training.batch is 6'),
    ],
)
def test_sizes_that_do_not_divide_name_field_and_ways_out(mesh, field):
    rules = [*sizes(MODEL), *batch_sizes(6, 64)]
    with pytest.raises(UserError) as error:
        check_divides(mesh, rules)
    message = str(error.value)
    assert field in message
    assert '\n' not in message
    offered = message.split('nearest meshes that work: ')[1].split('; ')
    assert offered
    for option in offered:
        check_divides(parse_mesh(option.strip('()').replace(' ', ',')), rules)


def test_kv_heads_may_be_repeated():
    rule = Divides(('tensor',), 'model.attention.kv_heads', 2, or_repeats=True)
    assert [n for n in range(1, 9) if rule.holds(MeshConfig(tensor=n))] == [1, 2, 4, 6, 8]


def test_nearest_meshes_keep_the_number_of_devices_first():
    options = list(nearest_meshes(MeshConfig(tensor=8), [Divides(('tensor',), 'heads', 4)]))
    assert options[0].size == 8
    assert options[0] == min(options[:8], key=lambda m: abs(m.tensor - 8))
    assert options[-1].size == 1


def test_factorizations_are_all_and_no_more():
    found = list(factorizations(8, 3))
    assert len(found) == len(set(found)) == 10
    assert all(a * b * c == 8 for a, b, c in found)


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=f'asks for 64 devices; this machine has {jax.device_count()}'):
        make_mesh(MeshConfig(data=64))


@pytest.mark.parametrize('text', ['tensor=x', 'model=2', 'tensor', 'tensor=0', 'tensor=-1'])
def test_mesh_text_that_is_none(text):
    with pytest.raises(UserError):
        parse_mesh(text)
    assert parse_mesh('expert=2, tensor=4') == MeshConfig(expert=2, tensor=4)
