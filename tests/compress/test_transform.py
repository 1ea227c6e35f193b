"""A model in each method's form: what the form computes is what it stands for, on one device and eight; bits as promised."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.extending import harness
from weft.compress.activations import model_statistics
from weft.compress.compressed_run import placed
from weft.compress.loss import with_weights
from weft.compress.methods.base import METHODS, Options
from weft.compress.methods.structure import STRUCTURES, numbers
from weft.compress.transform import NAMES, CompressedModel, compress_model
from weft.compress.weights import layer_arrays, targets
from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.decoder import declared_decoder, weights_of
from weft.model.forward import logits, place
from weft.model.parts.attention import AttentionConfig, MLAConfig
from weft.model.parts.ends import EmbeddingConfig
from weft.model.parts.feed_forward import MLPConfig, MoEConfig
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig

DENSE = ModelConfig(
    vocabulary=harness.VOCABULARY,
    layers=4,
    model_dim=32,
    attention=AttentionConfig(heads=4, kv_heads=2, qkv_bias=True),
    mlp=MLPConfig(dim=64, bias=True),
    embedding=EmbeddingConfig(tied=False),
)
MIXTURE = dataclasses.replace(
    DENSE, layers=3, mlp=MLPConfig(dim=64), moe=MoEConfig(experts=4, mlp_dim=32), embedding=EmbeddingConfig(tied=True)
)
LATENT = dataclasses.replace(
    DENSE,
    layers=3,
    attention=MLAConfig(heads=4, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=32),
    mlp=MLPConfig(dim=64),
)
MESHES = (MeshConfig(data=2, context=2, tensor=2), MeshConfig(expert=2, context=2, tensor=2))
BUDGETS = {'magnitude': 0.75, 'wanda': 0.75, 'heads': 0.9, 'layers': 0.75, 'experts': 0.75, 'hidden-units': 0.75}
OPTIONS = Options(group=8)  # each device has whole groups


def run_of(c: ModelConfig):
    return harness.run_of(c, compute=ComputeConfig(dtype='float64', weight_dtype='float64'))


@functools.cache
def opened(c: ModelConfig):
    """A model's arrays and statistics of a text, in float64."""
    with harness.on(harness.ONE_DEVICE):
        model = harness.initial(run_of(c))
        rows = np.random.default_rng(0).integers(0, harness.VOCABULARY, (8, 16)).tolist()
        return layer_arrays(c, model), model_statistics(model, rows, 16)


def logits_of(c: ModelConfig, arrays, mesh: MeshConfig) -> np.ndarray:
    with harness.on(mesh):
        devices = jax.sharding.get_mesh()
        leaves = [x for _, x in placed(c, arrays, devices, 'float64')]
        compute = run_of(c).compute
        model = jax.tree.unflatten(jax.tree.structure(declared_decoder(c, compute)), leaves)
        batch = place(harness.batch_of(0))
        return np.asarray(jax.jit(logits)(model, batch.tokens_BT, batch.position_BT, batch.segment_BT))


def compressed(c: ModelConfig, method: str, **more) -> CompressedModel:
    arrays, statistics = opened(c)
    fixed = method in METHODS and METHODS[method].fixed
    budget = None if fixed else BUDGETS.get(method, 0.6)
    given = {'budget': budget, 'options': OPTIONS, 'statistics': statistics, **more}
    return compress_model(c, arrays, method, **given)


@pytest.mark.parametrize('c', [DENSE, MIXTURE, LATENT], ids=['dense', 'mixture', 'latent'])
def test_a_form_computes_what_it_stands_for(c, float64):
    """All methods at once, a map or two each: one model of them all is compiled once a mesh."""
    arrays, statistics = opened(c)
    maps = sorted({one.map for one in targets(c, arrays)})
    methods = [name for name in METHODS if not name.startswith('gptq')]
    found, dense, forms = dict(arrays), dict(arrays), []
    for number, method in enumerate(methods):
        layer, name = number % c.layers, maps[number // c.layers % len(maps)]
        patterns = [f'layers.{layer}.{name}']
        meant = next(one for one in targets(c, arrays) if one.name == patterns[0])
        budget = None if METHODS[method].fixed else 1 - 0.3 * meant.w.size / numbers(c)
        part = compress_model(c, arrays, method, budget, OPTIONS, statistics, maps=patterns)
        assert part.dense is not None
        leaf = next(key for key in arrays if key.startswith(f'{patterns[0]}.w_'))
        found.pop(leaf, None)
        found |= {key: w for key, w in part.arrays.items() if key.startswith(f'{leaf}.')}
        dense[leaf] = part.dense[leaf]
        forms += part.config.weights or ()
    whole = dataclasses.replace(c, weights=tuple(forms))
    assert set(found) == set(layer_arrays(whole, _zeros(whole)))
    wanted = logits_of(c, dense, harness.ONE_DEVICE)
    assert abs(wanted - logits_of(c, arrays, harness.ONE_DEVICE)).max() > 1e-3
    for mesh in (harness.ONE_DEVICE, *MESHES):
        np.testing.assert_allclose(logits_of(whole, found, mesh), wanted, atol=2e-4, err_msg=str(mesh))


def _zeros(c: ModelConfig):
    return jax.tree.map(lambda w: np.zeros(w.global_shape, w.stored('float64')), declared_decoder(c))


@pytest.mark.parametrize('budget', [0.5, 0.55, 0.59])
def test_groups_of_rounded_pairs_go_into_inputs_and_ranks(budget, float64):
    """Of 40 and 72 inputs and ranks of whole eights the largest common group is often 8, and never 32."""
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=10)
    c = dataclasses.replace(DENSE, model_dim=40, attention=attention, mlp=MLPConfig(dim=72))
    found = compressed(c, 'svd-int4', budget=budget, options=Options(), maps=['layers.*.mlp.*'])
    assert budget - 0.1 < found.share <= budget
    forms = found.config.weights
    assert forms
    for form in forms:
        assert form.rank % form.group == 0
        assert 40 % form.group == 0 or 72 % form.group == 0
    for row in found.maps:
        assert row.bits < 0.3 * row.bits_before
        assert row.weighted < 0.9


@pytest.mark.parametrize('method', METHODS)
def test_bits_and_errors(method, float64):
    for c in (DENSE, MIXTURE):
        found = compressed(c, method)
        budget = 1.0 if METHODS[method].fixed else BUDGETS.get(method, 0.6)
        assert found.bits_before == 32 * sum(w.size for w in opened(c)[0].values())
        assert found.share <= budget * (1 + 1e-9)
        assert len(found.maps) == len(targets(c, opened(c)[0]))
        for row in found.maps:
            assert 0 < row.frobenius < 1, row
            assert 0 < row.weighted < 1.2, row
        # What is stored is what is counted: numbers of pruned weights apart.
        if 'magnitude' not in method and 'wanda' not in method:
            stored = sum(8 * w.nbytes * (32 / 64 if w.dtype == 'float64' else 1) for w in found.arrays.values())
            cores = sum(1 for key in found.arrays if 'core' in key)
            assert abs(stored - found.bits) <= 32 * 1024 * cores


def test_full_rank_gives_the_model_back(float64):
    for c in (DENSE, MIXTURE):
        arrays, _ = opened(c)
        for method, fit in (('svd', {}), ('svd-slices', {}), ('tucker', {}), ('tensor-train', {}), ('svd-shared', {})):
            options = Options(objective='frobenius', **fit)
            some = [one for one in targets(c, arrays) if one.layer == 0]
            for one in some:
                done = METHODS[method].fit(one, 40 * one.bits, options)
                np.testing.assert_allclose(done.w, one.w, atol=1e-6, err_msg=f'{method} {one.name}')


def test_whitened_is_the_better_of_outputs_and_plain_of_weights(float64):
    for method in ('svd', 'svd-slices', 'tucker'):
        plain = compressed(DENSE, method, options=Options(objective='frobenius', group=8))
        whitened = compressed(DENSE, method)
        sum_of = lambda found, field: sum(getattr(row, field) for row in found.maps)
        assert sum_of(whitened, 'weighted') < sum_of(plain, 'weighted'), method
        assert sum_of(whitened, 'frobenius') > sum_of(plain, 'frobenius'), method


def test_sensitivity_gives_more_bits_where_the_loss_asks(float64):
    """A loss that only the first layer's error moves."""
    arrays, _ = opened(DENSE)

    def loss(changed):
        return 1.0 + sum(float(((w - arrays[name]) ** 2).sum()) for name, w in changed.items() if 'layers.0.' in name)

    found = compressed(DENSE, 'svd', spread='sensitivity', loss=loss)
    share = {layer: sum(row.bits for row in found.maps if f's.{layer}.' in row.name) for layer in range(4)}
    assert share[0] > 1.3 * max(share[1], share[2], share[3])
    assert found.share <= 0.6
    uniform = compressed(DENSE, 'svd')
    assert loss({key: w for key, w in (found.dense or {}).items() if 'w_' in key}) < loss(uniform.dense or {})


def test_the_middle_is_hit_first(float64):
    found = compressed(DENSE, 'svd', budget=0.75, spread='middle', hard=0.2)
    hit = {int(row.name.split('.')[1]) for row in found.maps if row.bits < row.bits_before}
    assert hit in ({1}, {1, 2})
    assert found.share <= 0.75
    some = compressed(DENSE, 'tensor-train', budget=None, spread='middle', layers=3, options=Options(order=4, rank=2))
    assert {int(row.name.split('.')[1]) for row in some.maps if row.bits < row.bits_before} == {0, 1, 2}


@pytest.mark.parametrize('method', STRUCTURES)
def test_parts_that_go(method, float64):
    """The smaller model is the larger one whose parts were taken away by hand."""
    c = MIXTURE if method == 'experts' else DENSE
    found = compressed(c, method)
    assert found.share <= BUDGETS[method]
    assert found.dense is None
    assert {key: w.shape for key, w in found.arrays.items()} == {
        key: w.shape for key, w in layer_arrays(found.config, _zeros(found.config)).items()
    }
    arrays = dict(opened(c)[0])
    if method == 'layers':
        for layer in set(range(c.layers)) - {_layer_of(found, arrays, new) for new in range(found.config.layers)}:
            for name in [key for key in arrays if key.startswith(f'layers.{layer}.')]:
                if '.o.' in name or '.down.' in name:  # such a layer adds nothing
                    arrays[name] = arrays[name] * 0
    elif method == 'experts':
        return  # tokens choose others then
    else:
        for layer in range(c.layers):
            prefix = f'layers.{layer}.'
            name = f'{prefix}attention.o.w_OI' if method == 'heads' else f'{prefix}mlp.down.w_OI'
            kept = {tuple(column) for column in found.arrays[name].T.round(9)}
            stays = [tuple(column) in kept for column in arrays[name].T.round(9)]
            assert sum(stays) == found.arrays[name].shape[1]
            arrays[name] = arrays[name] * np.array(stays)
    wanted = logits_of(c, arrays, harness.ONE_DEVICE)
    np.testing.assert_allclose(logits_of(found.config, found.arrays, harness.ONE_DEVICE), wanted, atol=1e-9)


def _layer_of(found: CompressedModel, arrays, new: int) -> int:
    key = 'attention_norm.scale_D', 'attention.q.w_IO'
    same = [
        layer
        for layer in range(4)
        if np.array_equal(found.arrays[f'layers.{new}.{key[1]}'], arrays[f'layers.{layer}.{key[1]}'])
    ]
    return same[0]


def test_experts_that_stay_are_those_that_reap_scores_highest(float64):
    arrays, statistics = opened(MIXTURE)
    found = compressed(MIXTURE, 'experts')
    assert found.config.moe is not None
    for layer, use in statistics.experts.items():
        score = use.contribution_E / np.maximum(use.count_E, 1)
        keep = np.sort(np.argsort(-score)[: found.config.moe.experts])
        np.testing.assert_array_equal(
            found.arrays[f'layers.{layer}.mlp.up.w_EIO'], arrays[f'layers.{layer}.mlp.up.w_EIO'][keep]
        )
        np.testing.assert_array_equal(
            found.arrays[f'layers.{layer}.mlp.router.w_IO'], arrays[f'layers.{layer}.mlp.router.w_IO'][:, keep]
        )


def test_replaced_weights(float64):
    with harness.on(harness.ONE_DEVICE):
        model = harness.initial(run_of(DENSE))
        new = np.full((32, 64), 3.0)
        other = layer_arrays(DENSE, with_weights(model, {'layers.2.mlp.up.w_IO': new}))
    before = layer_arrays(DENSE, model)
    assert {key for key in other if not np.array_equal(other[key], before[key])} == {'layers.2.mlp.up.w_IO'}
    np.testing.assert_array_equal(other['layers.2.mlp.up.w_IO'], new)


@pytest.mark.parametrize(
    ('method', 'more', 'said'),
    [
        ('svd', {'budget': None}, r'--budget is missing: svd needs'),
        ('svd', {'budget': 0.01}, r'--budget 0\.01: what svd leaves as it is .* nearest that works: about 0\.\d+'),
        ('svd', {'budget': 1.5}, r'--budget 1\.5: it must be above 0 and at most 1'),
        ('svdd', {}, r"--method 'svdd': no such method; did you mean 'svd'"),
        ('int8', {'budget': 0.1}, r'--budget 0\.1: int8 takes 0\.\d+ of the bits; nearest that works: 0\.\d+'),
        ('svd', {'maps': ['layers.*.mlp.upp']}, r"--maps 'layers\.\*\.mlp\.upp': no such linear map"),
        ('tensor-train', {'budget': None, 'spread': 'middle', 'layers': 9}, r'--layers 9: the model has 4; nearest: 4'),
        ('svd', {'spread': 'middle', 'budget': 0.3, 'hard': 0.5}, r'--hard 0\.5 leave 0\.\d+; nearest that works'),
        ('magnitude', {'budget': 0.22}, r'a bitmap takes'),
        ('gptq-int4', {'options': Options(group=12)}, r'int4 has group 12: .* divide the 32 inputs; nearest: 8'),
        ('experts', {}, r'--method experts: the model has none'),
        ('layers', {'budget': 0.05}, r'--budget 0\.05: with 1 of 4 layers 0\.\d+ is left; nearest'),
    ],
)
def test_what_cannot_be(method, more, said, float64):
    with pytest.raises(UserError, match=said):
        compressed(DENSE, method, **more)


def test_what_is_compressed_is_not_compressed_again(float64):
    found = compressed(DENSE, 'int8')
    with pytest.raises(UserError, match='the run is compressed already'):
        compress_model(found.config, found.arrays, 'svd', 0.5)
    assert numbers(DENSE) == sum(weight.size * len(weight.layers or (0,)) for weight in weights_of(DENSE).values())
    assert set(NAMES) == {*METHODS, *STRUCTURES}
