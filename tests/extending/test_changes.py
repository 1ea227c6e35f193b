"""The nine changes of docs/extending.md: each is one file here, the project is not edited, and all is held to the usual."""

import dataclasses
import os
import re
import runpy
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from tests.extending import harness
from tests.extending.configs import CHANGES, config
from tests.families import folders
from tests.house import ROOT
from weft.hub import read as hub
from weft.hub import streaming
from weft.hub.families import ADDED, Family, Fields, families, register
from weft.hub.tensor_table import tensors
from weft.inference.step import decode, empty_cache, prefill
from weft.model.capture import capture
from weft.model.forward import logits, place
from weft.runtime.errors import UserError
from weft.sharding.mesh import make_mesh
from weft.training.config import dump, parse
from weft.training.optimizers import OPTIMIZERS


@pytest.mark.parametrize('name', CHANGES)
def test_it_is_saved_and_counted_and_its_config_is_read_back(name, tmp_path):
    run = config(CHANGES[name])
    assert parse(dump(run), 'again.yaml') == run
    harness.check_checkpoint(run, tmp_path / 'run')
    harness.check_plan(run)


def test_an_optimizer(float64, tmp_path):
    change = {
        'optimizer': {'kind': 'normalized_momentum', 'learning_rate': 0.1, 'warmup_steps': 0, 'weight_decay': 0.01}
    }
    run = config(change, 'compute.dtype=float64')
    harness.check_training(run)
    harness.check_checkpoint(run, tmp_path / 'run')
    harness.check_plan(run)


def test_a_captured_activation_is_that_of_one_device(float64):
    found = {}
    for mesh in (harness.ONE_DEVICE, *harness.MESHES):
        with harness.on(mesh):
            batch = place(harness.batch_of(0))
            run = jax.jit(lambda *rows: capture(rows[0], ['hidden_units', 'residual.after_mlp'], *rows[1:]))
            units = run(
                harness.initial(config(CHANGES['captured_activation'], 'compute.dtype=float64')),
                batch.tokens_BT,
                batch.position_BT,
                batch.segment_BT,
            )
            assert (
                units['hidden_units'].sharding.shard_shape((2, harness.ROWS, harness.COLUMNS, 32))[-1]
                == 32 // mesh.tensor
            )
            found[mesh] = jax.device_get(units)
    wanted = found[harness.ONE_DEVICE]
    assert wanted['hidden_units'].shape == (2, harness.ROWS, harness.COLUMNS, 32)
    for mesh in harness.MESHES:
        for name, array in wanted.items():
            np.testing.assert_allclose(found[mesh][name], array, atol=1e-12, err_msg=f'{name} on {mesh}')


@pytest.mark.parametrize('name', ['attention_variant', 'recurrent_state'])
def test_decoding_equals_the_full_forward_pass(name, float64):
    """Rows of different lengths; what the layer keeps goes from the prompt's pass to the steps."""
    run, new = config(CHANGES[name], 'compute.dtype=float64'), 3
    token_BT = harness.batch_of(0).tokens_BT
    length_B = np.array([5, 9, 3, 8, 1, 7, 2, 6], np.int32)
    column_BT = np.broadcast_to(np.arange(harness.COLUMNS, dtype=np.int32), token_BT.shape)
    for mesh in harness.MESHES:
        with harness.on(mesh):
            model = harness.initial(run)
            rows = place((token_BT, column_BT, np.ones_like(column_BT)))
            whole_BTV = np.asarray(jax.jit(logits)(model, *rows))
            cache = empty_cache(model, harness.ROWS, harness.COLUMNS)
            logit_BV, cache = jax.jit(prefill)(model, cache, place(token_BT[:, :10]), place(length_B))
            step = jax.jit(decode)
            for ahead in range(new):
                here = length_B - 1 + ahead
                np.testing.assert_allclose(
                    logit_BV, whole_BTV[np.arange(harness.ROWS), here], atol=1e-9, err_msg=str(mesh)
                )
                token_B = token_BT[np.arange(harness.ROWS), here + 1]
                logit_BV, cache = step(model, cache, place(token_B), place(here + 1))


def test_a_quantized_weight_has_at_most_255_values(float64):
    from tests.extending.quantized_weight import rounded

    w = np.random.default_rng(0).normal(size=(4000, 3))
    found = np.asarray(rounded(w, 0))
    assert max(len(np.unique(column)) for column in found.T) <= 255
    np.testing.assert_allclose(found, w, atol=np.abs(w).max() / 250)
    np.testing.assert_allclose(jax.grad(lambda w: (rounded(w, 0) * w).sum())(w), found + w, rtol=1e-12)


PUBLISHED = {
    'architectures': ['LoomForCausalLM'],
    'model_type': 'loom',
    'vocab_size': 96,
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'hidden_act': 'silu',
}


@pytest.fixture
def loom() -> Iterator[Family]:
    """The family of this folder, which no other test knows."""
    runpy.run_path(str(ROOT / 'tests' / 'extending' / 'family.py'))
    yield next(family for family in families() if family.name == 'loom')
    ADDED.clear()


def test_a_family_comes_back_bit_for_bit(loom, tmp_path):
    """A published folder as arrays on a mesh, and as published tensors again; its config too."""
    c = loom.read(Fields(PUBLISHED, 'config.json'))
    assert loom.read(Fields(loom.write(c), 'config.json')) == c
    r = np.random.default_rng(0)
    given = {one.name: r.normal(size=one.shape).astype(np.float32) for one in tensors(loom, c, hub.shapes_of(c))}
    assert given['layers.1.mlp.gate_up.weight'].shape == (64, 16)
    for mesh in harness.MESHES:
        published = hub.read(folders.write(tmp_path / str(mesh.expert), PUBLISHED, given))
        assert published.model == c
        arrays = dict(published.arrays(make_mesh(mesh)))
        back = {one.name: streaming.published(one, arrays) for one in published.table}
        assert back.keys() == given.keys()
        for name, array in given.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_an_architecture_has_one_family():
    (llama,) = (one for one in families() if one.name == 'llama')
    with pytest.raises(ValueError, match="family 'llama' has the architecture LlamaForCausalLM already"):
        register(dataclasses.replace(llama, name='other'))


def test_the_page_shows_the_files_as_they_are():
    """UPDATE=1 writes them into it."""
    path = ROOT / 'docs' / 'extending.md'
    page = path.read_text(encoding='utf-8')
    shown = re.compile(r'`tests/extending/(\w+)\.py`:\n\n```python\n(.*?)```\n', re.DOTALL)
    files = {file.stem: file.read_text(encoding='utf-8') for file in (ROOT / 'tests' / 'extending').glob('*.py')}
    assert {name for name, _ in shown.findall(page)} == files.keys() - {
        'harness',
        'configs',
        'test_changes',
        'test_gradients',
    }
    wanted = shown.sub(lambda one: f'`tests/extending/{one[1]}.py`:\n\n```python\n{files[one[1]]}```\n', page)
    if os.environ.get('UPDATE'):
        path.write_text(wanted, encoding='utf-8')
        return
    assert page == wanted


def test_the_environment_names_modules_that_a_config_needs(monkeypatch, tmp_path):
    (tmp_path / 'my_optimizer.py').write_text(
        (ROOT / 'tests/extending/optimizer.py').read_text().replace('normalized_momentum', 'mine')
    )
    (tmp_path / 'broken.py').write_text('import nowhere_at_all\n')
    change = {'optimizer': {'kind': 'mine'}}
    with pytest.raises(UserError, match=r"optimizer\.kind is 'mine': no such kind"):
        config(change)
    monkeypatch.setenv('WEFT_IMPORT', 'my_optimizer')
    with pytest.raises(UserError, match="WEFT_IMPORT: no module 'my_optimizer' on the path of Python; PYTHONPATH may"):
        config(change)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert config(change).optimizer.kind == 'mine'
    finally:
        OPTIMIZERS.configs.pop('mine', None)
    monkeypatch.setenv('WEFT_IMPORT', 'broken')
    with pytest.raises(ModuleNotFoundError, match='nowhere_at_all'):
        config({})
