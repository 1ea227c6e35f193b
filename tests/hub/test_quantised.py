"""Weights in FP8 and MXFP4 stand for what transformers makes of them, bit for bit, also a part at a time."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.families import cases, folders
from weft.hub import read as hub
from weft.hub import tensor_files
from weft.hub.families.fields import Fields
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.exporting import export_run
from weft.training.importing import import_run

GOLDEN = Path(__file__).with_name('quantised.npz')
FP8 = {'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic', 'weight_block_size': [16, 32]}
MXFP4 = {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}


@pytest.fixture(autouse=True)
def begun() -> None:
    """JAX has its eight devices before an import would begin it with as many as its own mesh has."""
    jax.devices()


def golden(kind: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Packed tensors, and the bits of the bfloat16 that they stand for."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        if kind == 'fp8':
            packed = {'x': file['fp8_weight'].view(jnp.float8_e4m3fn), 'x_scale_inv': file['fp8_scale']}
        else:
            packed = {'x_blocks': file['mxfp4_blocks'], 'x_scales': file['mxfp4_scales']}
        return packed, file[kind]


def source(folder: Path, packed: dict[str, np.ndarray], said: dict) -> hub.TensorSource:
    kinds = {name: (x.dtype, x.shape) for name, x in packed.items()}
    tensor_files.write(folder / 'f.safetensors', kinds, lambda name: packed[name])
    config = Fields({'quantization_config': said}, str(folder / 'config.json'))
    (found,) = hub.unpacked(tensor_files.header(folder / 'f.safetensors'), config).values()
    return found


@pytest.mark.parametrize(('kind', 'said'), [('fp8', FP8), ('mxfp4', MXFP4)])
def test_packed_tensors_are_what_transformers_makes_of_them(kind, said, tmp_path):
    packed, bits = golden(kind)
    found = source(tmp_path, packed, said)
    assert found.shape == bits.shape
    np.testing.assert_array_equal(np.ascontiguousarray(found.read()).view(np.uint16), bits)
    draw = np.random.default_rng(0)
    for _ in range(100):
        take = []
        for size in bits.shape:
            begin = int(draw.integers(size))
            take.append(slice(begin, int(draw.integers(begin + 1, size + 1)), int(draw.integers(1, 4))))
        part = np.ascontiguousarray(found.read(tuple(take))).view(np.uint16)
        np.testing.assert_array_equal(part, bits[tuple(take)])


def test_blocks_at_the_border_are_smaller(tmp_path):
    weight = folders.bits('w', (40, 70), np.uint8) & 0x3F
    scale = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    found = source(tmp_path, {'x': weight.view(jnp.float8_e4m3fn), 'x_scale_inv': scale}, FP8)
    factors = np.repeat(np.repeat(scale, 16, 0), 32, 1)[:40, :70]
    expected = weight.view(jnp.float8_e4m3fn).astype(np.float32) * factors
    np.testing.assert_array_equal(found.read(), expected.astype(jnp.bfloat16))


def in_fp8(found: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors whose projections are in FP8, and what they stand for."""
    packed, plain = {}, {}
    for name, x in folders.in_bfloat16(found).items():
        packed[name] = plain[name] = x
        if '_proj.weight' in name:
            packed[name] = (x * 4).astype(jnp.float8_e4m3fn)
            packed[f'{name}_scale_inv'] = np.full((-(-x.shape[0] // 16), -(-x.shape[1] // 32)), 0.25, np.float32)
            plain[name] = (packed[name].astype(np.float32) / 4).astype(jnp.bfloat16)
    return packed, plain


def in_mxfp4(found: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors whose experts' matrices are in MXFP4, and what they stand for: any bytes will do."""
    packed, plain = {}, {}
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name, x in folders.in_bfloat16(found).items():
        if not name.endswith(('gate_up_proj', 'down_proj')):
            packed[name] = plain[name] = x
            continue
        experts, inner, rows = x.shape
        blocks = folders.bits(name, (experts, rows, inner // 32, 16), np.uint8)
        scales = folders.bits(f'{name}s', blocks.shape[:-1], np.uint8) % 8 + 120
        halves = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
        numbers = np.where(halves & 8, -1, 1) * table[halves & 7] * 2.0 ** (scales[..., None].astype(int) - 127)
        packed[f'{name}_blocks'], packed[f'{name}_scales'] = blocks, scales
        plain[name] = numbers.reshape(experts, rows, inner).swapaxes(1, 2).astype(jnp.bfloat16)
    return packed, plain


@pytest.mark.parametrize('mesh', [MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)], ids=str)
@pytest.mark.parametrize(('pack', 'said', 'family'), [(in_fp8, FP8, 'qwen3_moe'), (in_mxfp4, MXFP4, 'gpt_oss')])
def test_a_packed_model_is_imported_and_exported_unpacked(pack, said, family, mesh, tmp_path):
    name = next(case for case in cases.CASES if cases.family(case) == family)
    packed, plain = pack(folders.named(name))
    assert len(packed) > len(plain)
    config = cases.CASES[name] | {'quantization_config': said, 'dtype': 'bfloat16'}
    folder = folders.write(tmp_path / 'source', config, packed, files=2)
    assert {x.dtype.name for _, x in hub.read(folder).arrays(make_mesh(mesh))} == {'bfloat16'}
    import_run(folder, tmp_path / 'run', mesh, say=str)
    export_run(tmp_path / 'run', tmp_path / 'target', say=str)
    found = folders.stored(tmp_path / 'target')
    assert found.keys() == plain.keys()
    for tensor, x in plain.items():
        np.testing.assert_array_equal(found[tensor], x, err_msg=tensor)
    written = json.loads((tmp_path / 'target' / 'config.json').read_text())
    assert 'quantization_config' not in written


MISTAKES = {
    'another method': ({'quant_method': 'awq'}, {}, ["'awq'", 'fp8', 'mxfp4']),
    'no blocks': (FP8 | {'weight_block_size': None}, {}, ['weight_block_size', '[128, 128]']),
    'static activations': (FP8 | {'activation_scheme': 'static'}, {}, ['activation_scheme', "'static'", "'dynamic'"]),
    'unknown field': (MXFP4 | {'bits': 3}, {}, ['quantization_config.bits']),
    'no factors': (FP8, {'x_scale_inv': None}, ['x_scale_inv', 'missing']),
    'misshapen factors': (FP8, {'x_scale_inv': np.ones((3, 2), np.float32)}, ['x_scale_inv', '[3, 2]', '[2, 3]']),
    'factors that are bytes': (FP8, {'x_scale_inv': np.ones((2, 3), np.uint8)}, ['uint8', 'float32']),
    'no exponents': (MXFP4, {'x_scales': None}, ['x_scales', 'missing']),
    'misshapen exponents': (MXFP4, {'x_scales': np.ones((2, 6, 2), np.uint8)}, ['x_scales', '[2, 6, 2]']),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_told(name, tmp_path):
    said, changes, words = MISTAKES[name]
    packed = golden(said['quant_method'] if said['quant_method'] != 'awq' else 'fp8')[0] | changes
    with pytest.raises(UserError) as error:
        source(tmp_path, {name: x for name, x in packed.items() if x is not None}, said)
    assert all(word in str(error.value) for word in words), error.value
