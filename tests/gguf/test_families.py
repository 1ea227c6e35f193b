"""Tiny models of every architecture, written as llama.cpp's converters write them, equal their published folders."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from model import hub
from sharding.mesh import MeshConfig, make_mesh
from tests.families import cases, folders
from tests.gguf import written

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
    assert file.model == folder.model
    mesh = make_mesh(MeshConfig())
    ours, theirs = dict(file.arrays(mesh)), dict(folder.arrays(mesh))
    assert ours.keys() == theirs.keys()
    for leaf, x in ours.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(theirs[leaf]), err_msg=leaf)
    json.loads(file.of_gguf.config_json())
