"""Statistics of what linear maps read are those of a forward pass in NumPy, on any mesh and in any batches."""

import dataclasses
import functools
from concurrent.futures import Future

import jax
import numpy as np
import pytest
from flax import nnx

from tests.extending import harness
from tests.interpret import plain
from tests.interpret.test_trace import opened
from tests.models import filled
from tests.reference import weights
from weft.compress.activations import InputStatistics, all_maps, input_statistics, model_statistics
from weft.inference.unstacked import divided, unstacked
from weft.interpret.xray.programs import padded
from weft.model.capture import capture
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.forward import place
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig

FLOAT64 = ComputeConfig(dtype='float64')
DENSE = ModelConfig(
    vocabulary=95,
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
    attention=MLAConfig(heads=4, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6),
)
ONE = MeshConfig()
CASES = [
    pytest.param(DENSE, ONE, id='dense-1'),
    pytest.param(DENSE, MeshConfig(data=2, context=2, tensor=2), id='dense-8'),
    pytest.param(MIXTURE, ONE, id='mixture-1'),
    pytest.param(MIXTURE, MeshConfig(expert=2, context=2, tensor=2), id='mixture-8'),
    pytest.param(LATENT, MeshConfig(data=2, tensor=2), id='latent-4'),
]
random = np.random.default_rng(0)
ROWS = [random.integers(0, 95, length).tolist() for length in (24, 9, 1, 17, 24, 5, 20)]


@functools.cache
def in_numpy(c: ModelConfig) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Of each place the numbers of all tokens, one after another, [L, tokens, …], and the weights of each layer."""
    with harness.on(ONE):
        w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights(filled(c, FLOAT64)))
    found: dict[tuple[str, int], list[np.ndarray]] = {}

    def at(name: str, layer: int | None, value: np.ndarray) -> np.ndarray:
        if name == 'router.choices':
            value = value.astype(int)
        if layer is not None:
            found.setdefault((name, layer), []).append(value[0])
        return value

    for row in ROWS:
        tokens_BT = np.array([row])
        plain.forward(w, tokens_BT, np.arange(len(row))[None], np.ones_like(tokens_BT), c, at)
    patterns = {key for key in found if key[0] == 'attention.pattern'}
    return {key: np.concatenate(parts) for key, parts in found.items() if key not in patterns}, w['layers']


def check_gram(found: InputStatistics, name: str, x_NI: np.ndarray) -> None:
    x_NI = x_NI.reshape(len(x_NI), -1)
    wanted = x_NI.T @ x_NI
    assert found.map(name).gram.dtype == np.float64
    np.testing.assert_allclose(found.map(name).gram, wanted, atol=1e-10 * np.abs(wanted).max(), err_msg=name)
    np.testing.assert_allclose(found.map(name).norm, np.linalg.norm(x_NI, axis=0), atol=1e-9)
    assert found.map(name).count == len(x_NI)


@pytest.mark.parametrize(('c', 'mesh'), CASES)
def test_inputs_of_every_map_have_the_products_of_numpy(c, mesh, float64):
    """Each input is known by what it gives: the output of the map, which stands at another place, is x W."""
    with harness.on(mesh):
        found = model_statistics(filled(c, FLOAT64), ROWS, context=64, tokens_at_once=128)
    places, layers = in_numpy(c)
    assert found.tokens == sum(map(len, ROWS))
    assert set(found.maps) == set(all_maps(c))
    for layer, w in enumerate(layers):
        here = lambda name, layer=layer: places[name, layer]
        name = f'layers.{layer}.'
        before, after = here('residual.before_attention'), here('residual.after_mlp')
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        np.testing.assert_allclose(found.cosine_L[layer], ((before * after).sum(1) / lengths).mean(), atol=1e-10)
        normed = plain.rms(before, w['attention_norm.scale_D'], c.norm.epsilon)
        between = plain.rms(here('residual.after_attention'), w['mlp_norm.scale_D'], c.norm.epsilon)
        for part in ('q', 'k', 'v', 'q_down', 'kv_down'):
            if f'attention.{part}.w_IO' in w:
                check_gram(found, f'{name}attention.{part}', normed)
        if c is LATENT:
            query = plain.rms(normed @ w['attention.q_down.w_IO'], w['attention.q_scale_Q'], 1e-6)
            check_gram(found, f'{name}attention.q_up', query)
            check_gram(found, f'{name}attention.kv_up', here('attention.latent'))
        heads = here('attention.head_outputs')
        np.testing.assert_allclose(
            heads.reshape(len(heads), -1) @ w['attention.o.w_OI'].T, here('attention.output'), atol=1e-12
        )
        check_gram(found, f'{name}attention.o', heads)
        if 'mlp.router.w_IO' not in w:
            check_gram(found, f'{name}mlp.gate', between)
            check_gram(found, f'{name}mlp.up', between)
            units = here('mlp.hidden_units')
            np.testing.assert_allclose(units @ w['mlp.down.w_OI'].T, here('mlp.output'), atol=1e-12)
            check_gram(found, f'{name}mlp.down', units)
            continue
        check_gram(found, f'{name}mlp.router', between)
        check_gram(found, f'{name}mlp.shared.up', between)
        check_gram(found, f'{name}mlp.shared.down', here('shared_experts.hidden_units'))
        check_experts(found, layer, w, between, here)


def check_experts(found: InputStatistics, layer: int, w: dict, x_ND: np.ndarray, here) -> None:
    """Each expert's tokens one after another."""
    use, choice_NK, output_NKD = found.experts[layer], here('router.choices'), here('experts.outputs')
    assert len(set(use.count_E)) > 1, 'experts differ'
    for e in range(len(use.count_E)):
        n, k = np.nonzero(choice_NK == e)
        assert use.count_E[e] == len(n)
        np.testing.assert_allclose(use.contribution_E[e], np.linalg.norm(output_NKD[n, k], axis=1).sum(), atol=1e-10)
        units = plain.silu(x_ND[n] @ w['mlp.gate.w_EIO'][e]) * (x_ND[n] @ w['mlp.up.w_EIO'][e])
        weight_N = here('router.weights')[n, k]
        np.testing.assert_allclose(weight_N[:, None] * (units @ w['mlp.down.w_EOI'][e].T), output_NKD[n, k], atol=1e-12)
        for part, x_NI in (('gate', x_ND[n]), ('up', x_ND[n]), ('down', units)):
            inputs = found.map(f'layers.{layer}.mlp.{part}')
            np.testing.assert_allclose(inputs.gram[e], x_NI.T @ x_NI, atol=1e-10, err_msg=f'{part} of expert {e}')
            assert inputs.count[e] == len(n)
            mean_square = (x_NI**2).sum(0) / max(len(n), 1)
            np.testing.assert_allclose(inputs.mean_square[e], mean_square, atol=1e-9)


def test_hidden_units_of_experts_with_biases_and_without_gates(float64):
    """Rows of padding alone, which fill up the mesh, visit no expert."""
    c = dataclasses.replace(
        MIXTURE,
        layers=1,
        mlp=MLPConfig(dim=32, activation='gelu'),
        moe=MoEConfig(experts=4, mlp_dim=16, bias=True),
    )
    rows = ROWS[:3]
    with harness.on(MeshConfig(expert=2, context=2, tensor=2)):
        model = filled(c, FLOAT64)
        found = model_statistics(model, rows, 64, ['*.mlp.down'])
        w = weights(model)['layers'][0]
        filled_up = place(padded(c, rows, 64))
        run = jax.jit(lambda model, *rows: capture(model, ['mlp.input', 'router.choices'], *rows))
        taps = jax.device_get(run(model, *filled_up))
        live_BT = np.asarray(filled_up.segment_BT) > 0
    x_ND, choice_NK = (taps[name][0][live_BT] for name in ('mlp.input', 'router.choices'))
    assert len(x_ND) == found.tokens
    for e in range(4):
        x_nD = x_ND[(choice_NK == e).any(1)]
        units = np.asarray(jax.nn.gelu(x_nD @ w['mlp.up.w_EIO'][e] + w['mlp.up.b_EO'][e]))
        inputs = found.map('layers.0.mlp.down')
        assert inputs.count[e] == len(x_nD)
        np.testing.assert_allclose(inputs.gram[e], units.T @ units, atol=1e-10)


def test_an_opened_run_is_read_with_its_layers_apart_or_stacked():
    """Decoding keeps each layer as a module of its own; the sums are the same."""
    found = []
    for apart in (False, True):
        run = opened(MIXTURE, ONE)
        if apart:
            with jax.set_mesh(run.mesh):
                reading = Future()
                reading.set_result((unstacked(run.model, divided), 1))
                run = dataclasses.replace(run, reading=reading)
                assert any(isinstance(group, nnx.List) for group in run.model.groups)
        found.append(input_statistics(run, ROWS[:2]))
    stacked, apart = found
    assert set(stacked.maps) == set(apart.maps)
    for name, inputs in stacked.maps.items():
        scale = np.abs(inputs.gram).max()
        np.testing.assert_allclose(apart.map(name).gram, inputs.gram, atol=1e-5 * scale, err_msg=name)
        np.testing.assert_array_equal(apart.map(name).count, inputs.count)


def test_only_the_maps_that_are_asked_for_are_kept(float64):
    with harness.on(ONE):
        model = filled(MIXTURE, FLOAT64)
        done = []
        found = model_statistics(
            model, ROWS, 64, ['layers.1.attention.*', '*.mlp.shared.down'], 64, lambda *at: done.append(at)
        )
    wanted = {f'layers.1.attention.{part}' for part in 'qkvo'} | {f'layers.{n}.mlp.shared.down' for n in (1, 2)}
    assert set(found.maps) == wanted
    assert done[-1] == (7, 7)
    assert len(done) > 1
    assert [use.count_E.sum() for use in found.experts.values()] == [2 * found.tokens] * 2
    places, _ = in_numpy(MIXTURE)
    check_gram(found, 'layers.2.mlp.shared.down', places['shared_experts.hidden_units', 2])
    with pytest.raises(UserError, match=r"'layers\.2\.attention\.q': there are no statistics .* mean 'layers\.1\.att"):
        found.map('layers.2.attention.q')


MISTAKES = [
    ({'maps': ['layers.9.attention.q']}, r"'layers\.9\.attention\.q': no layer has such a linear map; did you mean"),
    ({'rows': []}, r'rows: none is given'),
    ({'rows': [[3], [4, 95]]}, r'row 1: 95 is no token; ids are from 0 to 94'),
    ({'rows': [[0] * 65]}, r'row 0 has 65 tokens: it must have from 1 to 64'),
]


@pytest.mark.parametrize(('given', 'message'), MISTAKES, ids=[message[:16] for _, message in MISTAKES])
def test_mistakes_are_told_before_anything_is_computed(given, message):
    with harness.on(ONE), pytest.raises(UserError, match=message):
        model_statistics(filled(DENSE), **{'rows': [[1]], 'context': 64} | given)
