"""The documentation: what it names is there, its code and notebooks run as they stand."""

import json
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.changed import Project
from tests.house import ROOMS, ROOT
from weft.model.config import ModelConfig
from weft.sharding.mesh import make_mesh, parse_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.loss import loss_and_gradient
from weft.training.step import init

MODEL = ModelConfig(vocabulary=64, layers=2, model_dim=32, heads=4, mlp_dim=48, tied_embedding=False)


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


PROJECT = Project(ROOT)
FILES = {*PROJECT.contents, *(str(parent) for file in PROJECT.contents for parent in Path(file).parents)}
PAGES = sorted(path for path in PROJECT.contents if path.endswith('.md'))
OURS = (*ROOMS, 'benchmarks', 'configs', 'docs', 'tests')


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_to_what_is_there(page):
    text, here = (ROOT / page).read_text(encoding='utf-8'), Path(page).parent
    links = re.findall(
        r'\]\(([^)#\s]+)(?:#[^)]*)?\)', re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)
    )
    local = [link for link in links if '://' not in link]
    reached = {link: (ROOT / here / link).resolve().relative_to(ROOT).as_posix() for link in local}
    assert not {link for link, path in reached.items() if path not in FILES}


@pytest.mark.parametrize('page', sorted({*PAGES} - {'CHANGELOG.md'}))
def test_files_modules_and_targets_that_are_named_are_there(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    paths = re.findall(rf'(?<![\w/.~-])((?:{"|".join(OURS)})(?:/[\w.-]+)*/?)(?=[\s`\'")\],:;]|$)', text, re.MULTILINE)
    assert not {
        path for path in paths if '/' in path.rstrip('/') and 'NAME' not in path and path.rstrip('/.') not in FILES
    }
    modules = {name.rstrip('.') for name in re.findall(r'python -m (weft[\w.]*)', text)}
    assert modules <= PROJECT.modules.keys()
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
    asked = re.findall(r'(?:`|^|&& )(?:\w+=\S+ )*make ([a-z-]+)', text, re.MULTILINE)
    assert set(asked) <= {*targets}


@pytest.mark.parametrize('page', sorted(path for path in PAGES if path.startswith('docs/')))
def test_a_page_begins_with_the_question_that_it_answers(page):
    assert re.match(r'# [^\n]+\?\n', (ROOT / page).read_text(encoding='utf-8'))


def test_the_picture_names_files_that_are_there():
    picture = (ROOT / 'docs/token.svg').read_text(encoding='utf-8')
    paths = re.findall(
        r'[\w]+(?:/\w+)*/(?:\w+\.py)?', re.sub(r'<style>.*?</style>|<[^>]*>', '\n', picture, flags=re.DOTALL)
    )
    assert len(paths) > 10
    assert not {path for path in paths if path.rstrip('/') not in FILES and f'model/{path}' not in FILES}
    assert 'prefers-color-scheme: dark' in picture


def test_the_readme_is_short_and_so_is_the_forward_pass():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(readme.splitlines()) <= 120
    lines = int(re.search(r'some ([\d,]+) lines', readme)[1].replace(',', ''))
    found, todo = set[str](), ['weft.model.forward']
    while todo:
        path = PROJECT.modules[todo.pop()]
        if path not in found:
            found.add(path)
            todo += [name for name in PROJECT.sources[path].imports if name in PROJECT.modules]
    counted = sum(
        bool(line.strip()) for path in found for line in (ROOT / path).read_text(encoding='utf-8').splitlines()
    )
    assert abs(counted - lines) < 0.1 * lines, counted


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
