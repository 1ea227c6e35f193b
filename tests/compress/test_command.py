"""scripts/compress.py on a run, and what goes on with the runs that it makes: training, another mesh, export."""

import contextlib
import importlib
import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from tests.scripts.runs import refused, workplace
from weft.compress.compressed_run import REPORT
from weft.inference.run import open_run
from weft.model.forward import logits, place
from weft.sharding.mesh import MeshConfig
from weft.training.config import parse
from weft.training.exporting import export_run
from weft.training.importing import import_run
from weft.training.loop import train

SVD = ['runs/tiny', '--method', 'svd', '--out', 'runs/x']
LESS = ['runs/tiny', '--budget', '0.7', '--out', 'runs/x', '--method']
OTHER = 'replica=2,context=2,tensor=2'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the run `runs/tiny`, of one layer with an MLP and one with experts."""
    folder = workplace(tmp_path_factory.mktemp('compress'))
    trained(folder, 'tiny.yaml', 'training.steps=4')
    return folder


def trained(folder: Path, config: str, *overrides: str) -> None:
    with contextlib.chdir(folder):
        text = Path(config).read_text(encoding='utf-8')
        assert train(parse(text, config, list(overrides)), Path('runs')) == 0


def compressed(folder: Path, *words: str) -> None:
    with contextlib.chdir(folder), mock.patch('sys.argv', ['compress.py', *words]):
        importlib.import_module('weft.scripts.compress').main()


def scored(run: Path, mesh: str | None = None, **how) -> np.ndarray:
    """Logits of some tokens."""
    opened = open_run(run, mesh, stacked=True, **how)
    rows = np.random.default_rng(0).integers(0, 300, (8, 32), np.int32)
    position, segment = np.tile(np.arange(32, dtype=np.int32), (8, 1)), np.ones((8, 32), np.int32)
    with jax.set_mesh(opened.mesh):
        return np.asarray(jax.jit(logits)(opened.model, *(place(a) for a in (rows, position, segment))))


@pytest.mark.parametrize(
    'words',
    [('--method', 'svd-shared', '--budget', '0.8'), ('--method', 'int4', '--group', '4')],
    ids=['factors', 'int4'],
)
def test_it_trains_resumes_on_another_mesh_and_gives_equal_logits_at_each_hand_over(folder, words, tmp_path):
    name = words[1]
    compressed(folder, 'runs/tiny', *words, '--tokens', '256', '--out', f'runs/{name}')
    run = folder / 'runs' / name
    born = scored(run)
    np.testing.assert_allclose(scored(run, OTHER), born, atol=2e-5)
    report = json.loads((run / REPORT).read_text())
    assert report['share'] <= 0.8
    assert len(report['maps']) == 14
    assert report['perplexity_before'] == pytest.approx(report['perplexity'], rel=0.5)
    trained(folder, f'runs/{name}/config.yaml', 'training.steps=3')
    here = scored(run)
    assert abs(here - born).max() > 1e-4
    np.testing.assert_allclose(scored(run, OTHER), here, atol=2e-5)
    trained(folder, f'runs/{name}/config.yaml', 'training.steps=6', 'mesh={replica: 2, context: 2, tensor: 2}')
    # The steps are kept at checkpoints 3 and 6: what was resumed from is what was.
    np.testing.assert_allclose(scored(run, step=3), here, atol=2e-5)
    assert abs(scored(run) - here).max() > 1e-4
    losses = [json.loads(line)['loss'] for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert len(losses) == 6
    with pytest.raises(Exception, match='published folders keep each weight whole'):
        export_run(run, tmp_path / 'out')


def test_pruned_weights_and_fewer_parts_are_exported(folder, tmp_path):
    trained(folder, 'tiny.yaml', 'name=mixed', 'training.steps=2', 'model.moe.first_dense_layers=0')
    for name, method, budget in (('pruned', 'wanda', '0.8'), ('fewer', 'experts', '0.8')):
        compressed(
            folder, 'runs/mixed', '--method', method, '--budget', budget, '--tokens', '256', '--out', f'runs/{name}'
        )
        export_run(folder / 'runs' / name, tmp_path / name)
        import_run(tmp_path / name, tmp_path / f'{name}-again', MeshConfig())
        np.testing.assert_allclose(scored(tmp_path / f'{name}-again'), scored(folder / 'runs' / name), atol=2e-5)
    zeros = [
        float((np.asarray(w) == 0).mean())
        for w in jax.tree.leaves(open_run(folder / 'runs' / 'pruned', stacked=True).model)
    ]
    assert max(zeros) > 0.1


def test_convert_quantise_is_the_same_code(folder):
    compressed(folder, 'runs/tiny', '--method', 'int8', '--out', 'runs/by-compress')
    with (
        contextlib.chdir(folder),
        mock.patch('sys.argv', ['convert.py', 'quantise', 'runs/tiny', 'runs/by-convert', '--to', 'int8']),
    ):
        importlib.import_module('weft.scripts.convert').main()
    np.testing.assert_array_equal(scored(folder / 'runs/by-convert'), scored(folder / 'runs/by-compress'))


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['runs/tiny', '--method', 'svdd', '--out', 'runs/x'], "--method 'svdd': no such method; did you mean 'svd'"),
        (['runs/tiny', '--method', 'svd', '--out', 'runs/x'], '--budget is missing'),
        (['runs/tiny', '--method', 'svd'], '--out is missing: the run to make'),
        (
            ['runs/tiny', '--method', 'svd', '--budget', '2', '--out', 'runs/x'],
            '--budget: 2.0: it must be above 0 and at most 1',
        ),
        (
            ['runs/tiny', '--method', 'svd', '--budget', '0.9', '--rank', '0', '--out', 'runs/x'],
            '--rank: 0: it must be at least 1',
        ),
        (['runs/tiny', '--method', 'int8', '--out', 'runs/tiny'], 'runs/tiny: exists'),
        (['runs/tinny', '--method', 'int8', '--out', 'runs/x'], 'runs/tinny: not a run'),
        (['runs/tiny', '--method', 'int4', '--group', '12', '--out', 'runs/x'], 'int4 has group 12'),
        (['runs/tiny', '--method', 'int8', '--data', 'nothing.txt', '--out', 'runs/x'], 'nothing.txt'),
        (
            ['runs/tiny', '--method', 'layers', '--budget', '0.7', '--out', 'runs/x'],
            'layers of this model are of several kinds',
        ),
        ([*LESS, 'hidden-units'], 'some layers have an MLP'),
        (
            ['runs/tiny', '--method', 'svd', '--budget', '0.9', '--maps', 'layers.7.*', '--out', 'runs/x'],
            "--maps 'layers.7.*'",
        ),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(folder, words, said):
    assert said in refused(folder, 'compress', *words)
    assert not (folder / 'runs/x').exists()
