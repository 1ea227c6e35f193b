"""The code of docs/research.md and the notebooks run as they stand."""

import json
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.house import ROOT
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig
from weft.sharding.mesh import make_mesh, parse_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.loss import loss_and_gradient
from weft.training.step import init

MODEL = ModelConfig(
    vocabulary=64,
    layers=2,
    model_dim=32,
    attention=AttentionConfig(heads=4),
    mlp=MLPConfig(dim=48),
    embedding=EmbeddingConfig(tied=False),
)


def test_the_page_on_research_runs():
    page = (ROOT / 'docs' / 'research.md').read_text(encoding='utf-8')
    first, *blocks = re.findall(r'^```python\n(.*?)^```$', page, re.DOTALL | re.MULTILINE)
    mesh = re.search(r"open_run\('runs/demo', '(.*?)', stacked=True\)", first)[1]
    config = RunConfig(
        name='x',
        mesh=parse_mesh(mesh),
        model=MODEL,
        training=TrainingConfig(steps=1, batch=4, sequence_length=32),
    )
    devices = make_mesh(config.mesh)
    with jax.set_mesh(devices):
        model = jax.jit(init, static_argnums=0)(config).model
        before = np.asarray(model.groups[0].attention.o.w_OI[...])
        here = {'jax': jax, 'run': types.SimpleNamespace(config=config, mesh=devices, model=model)}
        for block in blocks:
            exec(block, here)
        assert here['logit_BTV'].shape == (4, 32, 64)
        np.testing.assert_array_equal(here['by_index'], here['by_mask'])
        assert not np.asarray(here['by_mask'])[0, :, 8:16].any()
        np.testing.assert_array_equal(model.groups[0].attention.o.w_OI[...], before)
        assert jax.typeof(here['by_mask']).sharding == jax.typeof(model.groups[0].attention.o.w_OI[...]).sharding
        assert here['losses'][2] < here['losses'][1] < here['losses'][0]
        (_, figures), _ = jax.jit(loss_and_gradient)(model, here['batch'])
        np.testing.assert_allclose(here['nats'], figures['loss'], rtol=1e-5)
        assert here['total'] > here['nats']


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder that has what notebooks read, and in which their runs stand."""
    for name in ('configs', 'docs'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(name: str) -> list[str]:
    """The code of a notebook, which has no outputs: a change of it is a change of its text."""
    book = json.loads((ROOT / 'docs' / name).read_text(encoding='utf-8'))
    code = [cell for cell in book['cells'] if cell['cell_type'] == 'code']
    assert not any(cell['outputs'] or cell['execution_count'] for cell in code)
    return [''.join(cell['source']) for cell in code]


def test_the_notebook_trains_and_decodes(checkout, capsys):
    here: dict = {}
    for cell in cells('train_and_decode.ipynb'):
        exec(cell, here)
    assert here['losses'][-1] < here['losses'][0]
    assert len(here['answers']) == 2
    assert (checkout / 'runs/notebook/loss.png').is_file()
    assert '@tensor' in capsys.readouterr().out


def test_the_notebook_plans(checkout, capsys):
    here: dict = {}
    for cell in cells('plan.ipynb'):
        exec(cell, here)
    assert here['plan']['fits']
    assert here['plan']['parameters']['total'] == 70_553_706_496
    assert 'MFU' in capsys.readouterr().out
    assert eval(cells('plan.ipynb')[-1].rpartition('\n\n')[2], here)['data=32,tensor=8'] > 0
