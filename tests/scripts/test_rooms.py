"""A folder that has a `data` or a `model.py` of its own, as many have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.runs import ROOT

NAMES = ('data/__init__.py', 'model.py', 'training/__init__.py', 'sharding/x.py')


def started(folder: Path, *arguments: str, path: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('')
    return tmp_path


@pytest.mark.parametrize('way', [[f'{ROOT}/scripts/plan.py'], ['-m', 'scripts.plan']], ids=['file', 'module'])
def test_a_script_takes_its_own_packages(folder, way):
    config = f'{ROOT}/configs/models/gpt2.yaml'
    done = started(folder, *way, config, '--chip', 'h100', '--chips', '0', path=f'.:{ROOT}')
    assert (done.returncode, done.stderr) == (2, 'error: --chips is 0: it must be above 0\n')


def test_an_import_that_finds_another_package_says_which_and_what_helps(folder):
    done = started(folder, '-c', 'import decoding.sampling', path=str(ROOT))
    assert f'data is {folder}/data/__init__.py, which hides the data of Weft in {ROOT}: start Python in' in done.stderr
    assert started(folder, '-P', '-c', 'import decoding.sampling', path=str(ROOT)).returncode == 0


def test_a_script_that_is_imported_leaves_the_path_as_it_is(tmp_path):
    asked = 'import sys; before = [*sys.path]; import scripts; assert sys.path == before'
    assert started(tmp_path, '-c', asked, path=str(ROOT)).returncode == 0
