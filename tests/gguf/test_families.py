"""Tiny models of every architecture, written as llama.cpp's converters write them, equal their published folders."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.families import cases, folders
from tests.gguf import written
from weft.hub import read as hub
from weft.hub.gguf.file import Contents
from weft.hub.gguf.keys import Keys
from weft.hub.gguf.rope_scaling import llama3_scaling
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.exporting import export_run
from weft.training.importing import import_run

YARN = {'rope_type': 'yarn', 'factor': 32.0, 'beta_fast': 32.0, 'beta_slow': 1.0, 'truncate': False}
GLM = {'n_shared_experts': 1, 'norm_topk_prob': True, 'n_group': 1, 'topk_group': 1}
# Cases whose model a file can say; the fields that it cannot, with what it says in their place, and those that transformers
# fills in before a converter sees them.
CASES: dict[str, dict[str, Any]] = {
    'llama-grouped': {},
    'llama-multi-head-tied-all-biases': {},
    'llama-multi-query-wide-heads': {},
    'llama-llama3-scaling': {},
    'llama-linear-scaling': {},
    'llama-yarn': {},
    'mistral-no-window-wide-heads': {},
    'mixtral-plain': {},
    'mixtral-top-1-tied': {},
    'qwen2-plain': {},
    'qwen2-yarn': {},
    'qwen3-plain': {},
    'qwen3-biases-tied': {},
    'qwen3_moe-plain': {},
    'gemma2-as-published': {'query_pre_attn_scalar': 16},
    'gemma3-as-published': {'query_pre_attn_scalar': 16},
    'gemma3-two-ropes-yarn-capped-biases-untied': {},
    'gemma3-no-windows': {'sliding_window': None, 'rope_theta': 1e6, 'query_pre_attn_scalar': 16},
    'gpt_oss-as-published': {'swiglu_limit': 7.0},
    'gpt_oss-defaults-no-biases-tied': {
        'rope_theta': 150_000.0,
        'rope_scaling': YARN | {'original_max_position_embeddings': 4096},
    },
    'phi3-plain-window': {},
    'phi3-longrope-long': {},
    'phi3-longrope-short': {},
    'phi3-partly-rotary-tied': {},
    'phi3-4-mini': {},
    'gpt2-plain': {},
    'deepseek_v2-lite': {'n_shared_experts': 2},
    'deepseek_v2-groups': {},
    'deepseek_v2-biases-no-dense-layer': {'n_shared_experts': 2},
    'deepseek_v3-as-published': {},
    'deepseek_v3-biases-two-mscales': {'rope_scaling': cases.MSCALE | {'mscale': 0.707}},
    'glm4_moe-air': GLM,
    'glm4_moe-qk-norm': GLM,
    'glm4_moe-groups-two-dense': {},
    'glm4_moe-one-ahead': GLM,
}
SPLIT = [(name, True) for name in CASES] + [('deepseek_v2-groups', False), ('deepseek_v3-as-published', False)]


@pytest.fixture(autouse=True)
def begun() -> None:
    """JAX has its eight devices before an import would begin it with as many as its own mesh has."""
    jax.devices()


@pytest.mark.parametrize(('name', 'split'), SPLIT, ids=[f'{name}{"" if split else "-joint"}' for name, split in SPLIT])
def test_a_file_equals_the_folder_that_it_was_made_of(name, split, tmp_path):
    config = cases.CASES[name] | CASES[name]
    if CASES[name].get('sliding_window', 1) is None:
        config['layer_types'] = ['full_attention'] * config['num_hidden_layers']
    tensors = {tensor: np.array(x) for tensor, x in folders.named(name).items()}
    folder = hub.read(folders.write(tmp_path / 'folder', config, tensors))
    keys, packed = written.of_folder(config, tensors, split)
    file = hub.read(written.write(tmp_path / 'model.gguf', keys, packed))
    assert (file.model, file.compute) == (folder.model, folder.compute)
    mesh = make_mesh(MeshConfig())
    ours, theirs = dict(file.arrays(mesh)), dict(folder.arrays(mesh))
    assert ours.keys() == theirs.keys()
    for leaf, x in ours.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(theirs[leaf]), err_msg=leaf)
    json.dumps(file.of_gguf.config)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16], ids=['F16', 'BF16'])
def test_a_file_in_16_bits_is_kept_in_them(dtype, tmp_path):
    """Converters write vectors as float32 then; those that 16 bits hold exactly come back in them."""
    config = cases.CASES['llama-grouped']
    tensors = {name: x.astype(dtype) for name, x in folders.named('llama-grouped').items()}
    folder = hub.read(folders.write(tmp_path / 'folder', config, tensors))
    keys, packed = written.of_folder(config, tensors)
    packed = {name: x.astype(np.float32) if x.ndim == 1 else x for name, x in packed.items()}
    file = hub.read(written.write(tmp_path / 'a.gguf', keys, packed))
    assert (file.model, file.compute) == (folder.model, folder.compute)
    assert {one.name: file.sources[one.name].read().tobytes() for one in file.table} == {
        one.name: x.tobytes() for one in file.table for x in [tensors[one.name]]
    }
    packed['output_norm.weight'] = packed['output_norm.weight'] + np.float32(1e-6)
    odd = hub.read(written.write(tmp_path / 'b.gguf', keys, packed))
    assert (odd.compute.weight_dtype, odd.compute.dtype) == ('float32', folder.compute.dtype)
    assert odd.sources['model.norm.weight'].read().tobytes() == packed['output_norm.weight'].tobytes()


def mxfp4(x: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random nibbles and exponents for a matrix: uint8 [..., groups, 32], uint8 [..., groups]."""
    groups = (*x.shape[:-1], x.shape[-1] // 32)
    return draw.integers(0, 16, (*groups, 32), np.uint8), draw.integers(110, 130, groups, np.uint8)


def test_gpt_oss_in_mxfp4_equals_its_folder_in_mxfp4(tmp_path):
    """As published, and as its converter packs the same bits again: gate and up apart, halves of a block in one byte."""
    name = 'gpt_oss-as-published'
    config = cases.CASES[name] | CASES[name]
    rounded = {tensor: x.astype(jnp.bfloat16) for tensor, x in folders.named(name).items()}
    keys, packed = written.of_folder(config, {tensor: x.astype(np.float32) for tensor, x in rounded.items()})
    folder = {tensor: x for tensor, x in rounded.items() if not tensor.endswith(('gate_up_proj', 'down_proj'))}
    draw = np.random.default_rng(0)
    for i in range(config['num_hidden_layers']):
        bits = {kind: mxfp4(packed[f'blk.{i}.ffn_{kind}_exps.weight'], draw) for kind in ('gate', 'up', 'down')}
        for kind, (four, scale) in bits.items():
            raw = np.concatenate([scale[..., None], four[..., :16] | four[..., 16:] << 4], -1)
            packed[f'blk.{i}.ffn_{kind}_exps.weight'] = written.Packed(raw.reshape(*raw.shape[:-2], -1), 39, 32, 17)
        both = [np.stack([bits['gate'][k], bits['up'][k]], 2) for k in (0, 1)]
        both = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in both]
        for published, (four, scale) in (('gate_up_proj', both), ('down_proj', bits['down'])):
            base = f'model.layers.{i}.mlp.experts.{published}'
            folder[f'{base}_blocks'] = np.ascontiguousarray(four[..., 0::2] | four[..., 1::2] << 4)
            folder[f'{base}_scales'] = scale
    packed = {
        tensor: x.astype(jnp.bfloat16) if isinstance(x, np.ndarray) and x.ndim > 1 else x
        for tensor, x in packed.items()
    }
    said = {'quantization_config': {'quant_method': 'mxfp4'}}
    theirs = hub.read(folders.write(tmp_path / 'folder', config | said, folder))
    ours = hub.read(written.write(tmp_path / 'a.gguf', keys, packed))
    assert ours.of_gguf.packed == ['MXFP4']
    assert (ours.model, ours.compute, ours.compute.weight_dtype) == (theirs.model, theirs.compute, 'bfloat16')
    for one in theirs.table:
        a, b = (np.ascontiguousarray(found.sources[one.name].read()) for found in (ours, theirs))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=one.name)  # the folder has a negative 0
        if one.name.endswith('gate_up_proj'):
            part = (slice(1, 3), slice(5, 40), slice(3, 60, 2))
            np.testing.assert_array_equal(ours.sources[one.name].read(part), b[part])
            part = (slice(1, 2), slice(33, 34), slice(2, 40, 3))
            np.testing.assert_array_equal(ours.sources[one.name].read(part), b[part])


def test_a_run_of_a_file_is_exported_as_a_folder(tmp_path):
    """Blocks become float32, and the folder has the file's numbers under published names."""
    name = 'gemma3-as-published'
    config = cases.CASES[name] | CASES[name]
    keys, packed = written.of_folder(config, folders.named(name))
    raw = np.random.default_rng(0).integers(0, 256, (96, 2, 34), np.uint8)
    raw[..., :2] = np.float16(0.01).reshape(1).view(np.uint8)
    packed['blk.3.ffn_up.weight'] = written.Packed(raw.reshape(96, -1), 8, 32, 34)
    path = written.write(tmp_path / 'a.gguf', keys, packed)
    found = hub.read(path)
    import_run(path, tmp_path / 'run', MeshConfig(), say=lambda said: None)
    export_run(tmp_path / 'run', tmp_path / 'out', say=lambda said: None)
    back = hub.read(tmp_path / 'out')
    assert back.model == found.model
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['architectures'] == ['Gemma3ForCausalLM']
    for one in found.table:
        x, y = found.sources[one.name], back.sources[one.name]
        assert (x.dtype, x.read().tobytes()) == (y.dtype, y.read().tobytes()), one.name


def test_copies_in_blocks_are_left_out(tmp_path):
    """GLM-4.5's layer that predicts further ahead repeats the embedding, which a file may round otherwise there."""
    config = cases.CASES['glm4_moe-one-ahead'] | CASES['glm4_moe-one-ahead']
    keys, packed = written.of_folder(config, folders.named('glm4_moe-one-ahead'))
    whole = hub.read(written.write(tmp_path / 'a.gguf', keys, packed))
    assert len(whole.copies) == 2
    raw = np.zeros((200, 2, 18), np.uint8).reshape(200, -1)
    packed['blk.3.nextn.embed_tokens.weight'] = written.Packed(raw, 2, 32, 18)
    found = hub.read(written.write(tmp_path / 'b.gguf', keys, packed))
    assert found.copies == {}
    assert found.model == whole.model
    for name in ('embed_tokens', 'shared_head_head', 'eh_proj', 'enorm'):  # a converter may leave the whole layer out
        del packed[f'blk.3.nextn.{name}.weight']
    packed = {name: x for name, x in packed.items() if not name.startswith('blk.3.')}
    keys['glm4moe.block_count'] = 3
    keys['glm4moe.nextn_predict_layers'] = 0
    assert hub.read(written.write(tmp_path / 'c.gguf', keys, packed)).model.mtp.layers == 0


def test_experts_of_early_files_are_a_tensor_each(tmp_path):
    config = cases.CASES['mixtral-plain']
    keys, packed = written.of_folder(config, folders.named('mixtral-plain'))
    one = hub.read(written.write(tmp_path / 'a.gguf', keys, packed))
    apart = {}
    for name, x in packed.items():
        if '_exps.' in name:
            apart |= {name.replace('_exps.', f'.{e}.'): np.array(x[e]) for e in range(len(x))}
        else:
            apart[name] = x
    other = hub.read(written.write(tmp_path / 'b.gguf', keys, apart))
    assert other.model == one.model
    for name, source in one.sources.items():
        assert source.read().tobytes() == other.sources[name].read().tobytes(), name


def test_scaling_that_is_llama_3s_is_known_by_its_factors():
    """Of Llama 3.1's and 3.2's published settings, and of others, the factors give the settings again."""
    keys = Keys(Contents(Path('a.gguf'), {}, {}), 'llama')
    for factor, high, old, theta, width in (
        (8.0, 4.0, 8192, 5e5, 128),
        (32.0, 4.0, 8192, 5e5, 64),
        (8.0, 3.0, 4096, 1e6, 96),
        (4.0, 4.0, 100, 1e4, 16),
    ):
        settings = {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': 1.0, 'high_freq_factor': high}
        settings |= {'original_max_position_embeddings': old}
        config = {'rope_scaling': settings, 'rope_theta': theta, 'head_dim': width, 'num_hidden_layers': 1}
        said = written.Said(config | {'num_attention_heads': 1, 'hidden_size': width}, 'llama', True)
        factors = said.extra()['rope_freqs.weight']
        assert llama3_scaling(keys, factors, theta, width) == settings
