"""`--changed` and `--quick` leave out a test only where nothing that it rests on has changed since it passed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.changed import Project
from tests.house import ROOT

FILES = {
    'pyproject.toml': (
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\npythonpath = ["."]\naddopts = "--import-mode=importlib"\n'
    ),
    'README.md': 'Prose.\n',
    '__init__.py': (
        'import importlib\n\n\n'
        'def __getattr__(name):\n    if name != "face":\n        raise AttributeError\n'
        '    return importlib.import_module("weft.model.lazy")\n'
    ),
    'configs/a.yaml': 'a: 1\n',
    'jottings/1.txt': '1\n',
    'model/__init__.py': '',
    'model/direct.py': (
        '"""Direct."""\nfrom weft.model import further\n\n\n'
        'def f():\n    """Calls it."""\n    return further.g()  # of g\n'
    ),
    'model/further.py': 'def g():\n    from weft.model import inside\n\n    return inside.h()\n',
    'model/inside.py': 'def h():\n    return 1\n',
    'model/lazy.py': 'value = 1\n',
    'model/patched.py': 'def f():\n    return 1\n',
    'model/told.py': '"""Told."""\n\n\ndef help():\n    return __doc__\n',
    'hub/__init__.py': '',
    'hub/families/__init__.py': 'import importlib\n\nfind = lambda name: importlib.import_module(f"{__name__}.{name}")\n',
    'hub/families/llama.py': 'value = 1\n',
    'tests/conftest.py': 'pytest_plugins = ["tests.quick"]\n',
    'tests/helper.py': 'from pathlib import Path\n\nROOT = Path(__file__).parents[1]\n',
    'tests/a/conftest.py': '',
    'tests/a/beside.json': '1\n',
    'tests/a/test_imports.py': 'from weft.model.direct import f\n\n\ndef test_it():\n    assert f() < 100\n',
    'tests/b/test_face.py': 'import weft\n\n\ndef test_it():\n    assert weft.face.value\n',
    'tests/b/test_named.py': (
        'from unittest import mock\n\n\ndef test_it():\n    with mock.patch("weft.model.patched.f"):\n        pass\n'
    ),
    'tests/b/test_family.py': 'from weft.hub.families import find\n\n\ndef test_it():\n    assert find("llama").value\n',
    'tests/b/test_help.py': 'from weft.model.told import help\n\n\ndef test_it():\n    assert help()\n',
    'tests/b/test_data.py': (
        'from tests.helper import ROOT\n\n\ndef test_it():\n    assert (ROOT / "configs/a.yaml").exists()\n'
    ),
    'tests/b/test_reads.py': (
        'from tests.helper import ROOT\n\n\n'
        'def test_it():\n    assert [path.read_text() for path in sorted((ROOT / "jot" "tings").iterdir())]\n'
    ),
    'tests/b/test_process.py': 'import subprocess\n\n\ndef test_it():\n    subprocess.run(["true"], check=True)\n',
    'tests/b/test_alone.py': 'def test_it():\n    pass\n',
}  # fmt: skip
ALL = {re.sub(r'.*/test_|\.py', '', path) for path in FILES if '/test_' in path}
MODEL_INIT = {'imports', 'face', 'named', 'help', 'process'}
EDITS = {
    'a function of an imported module': ('model/direct.py', 'return', 'return 1 +', {'imports', 'face', 'process'}),
    'of one that this imports': ('model/further.py', 'return', 'return 1 +', {'imports', 'face', 'process'}),
    'of one that this imports in a function': ('model/inside.py', '1', '2', {'imports', 'face', 'process'}),
    'what is imported by a name': ('model/lazy.py', '1', '2', {'face', 'process'}),
    'what a patch names': ('model/patched.py', '1', '2', {'named', 'face', 'process'}),
    'of many that are imported by computed names one': ('hub/families/llama.py', '1', '2', {'family', 'face', 'process'}),
    'a package': ('model/__init__.py', '', 'a = 1\n', MODEL_INIT),
    'the package above it': ('hub/__init__.py', '', 'a = 1\n', {'family', 'face', 'process'}),
    'a docstring and a comment': ('model/direct.py', 'return further.g()  # of g', 'return further.g()  # of it', set()),
    'a docstring': ('model/direct.py', '"""Calls it."""', '"""Calls g."""', set()),
    'a docstring that is read': ('model/told.py', 'Told', 'Tells', {'help', 'face', 'process'}),
    'data beside it': ('tests/a/beside.json', '1', '2', {'imports', 'process'}),
    'data that it names': ('configs/a.yaml', '1', '2', {'data', 'process'}),
    'data that it was seen to read': ('jottings/1.txt', '1', '2', {'reads', 'process'}),
    'a new file where it looks': ('jottings/2.txt', '', '2', {'reads', 'process'}),
    'a conftest': ('tests/a/conftest.py', '', 'a = 1\n', {'imports', 'process'}),
    'the conftest of all': ('tests/conftest.py', '\n', '\na = 1\n', ALL),
    'a helper of tests': ('tests/helper.py', '[1]', '[True]', {'data', 'reads', 'process'}),
    'a test': ('tests/b/test_alone.py', 'pass', 'return', {'alone'}),
    'pyproject.toml': ('pyproject.toml', '\n', '\n# more\n', ALL),
    'the version of jax': ('installed/jax-1.dist-info/METADATA', 'Version: 1', 'Version: 2', ALL),
    'prose': ('README.md', 'Prose', 'More prose', set()),
    'nothing': ('README.md', 'Prose', 'Prose', set()),
}  # fmt: skip


def pytest_of(place: Path, *arguments: str) -> tuple[int, set[str], str]:
    """Runs pytest there: its exit code, the modules whose tests were run, and what it wrote."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST')}
    environment['PYTHONPATH'] = os.pathsep.join([str(place / 'build'), str(place / 'installed')])
    command = [sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider', *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, set(re.findall(r'test_(\w+)\.py::\S+ [A-Z]', done.stdout)), done.stdout


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text() if file.exists() else ''
    file.write_text(text.replace(old, new, 1) if old else text + new)


@pytest.fixture(scope='module')
def passed(tmp_path_factory) -> Path:
    """A project of our shape, of which all tests have passed."""
    place = tmp_path_factory.mktemp('project')
    for name in ('tests/quick.py', 'tests/changed.py', 'tests/house.py', 'proof/__init__.py', 'proof/code_hash.py'):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    for name, text in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (place / 'build').mkdir()
    (place / 'build/weft').symlink_to('..')
    (place / 'installed/jax-1.dist-info').mkdir(parents=True)
    (place / 'installed/jax-1.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: jax\nVersion: 1\n')
    code, run, text = pytest_of(place, '--changed')
    assert (code, run) == (0, ALL), text
    return place


@pytest.fixture
def project(passed, tmp_path) -> Path:
    return shutil.copytree(passed, tmp_path / 'project', symlinks=True)


@pytest.mark.parametrize('what', EDITS)
def test_an_edit_runs_what_it_reaches(project, what):
    file, old, new, reached = EDITS[what]
    edit(project / file, old, new)
    code, run, text = pytest_of(project, '--changed')
    assert (code, run) == (0, reached), text


def test_what_did_not_pass_runs_again(project):
    test = project / 'tests/b/test_alone.py'
    test.write_text(
        'import pytest\n\n\n'
        'def test_a():\n    assert False\n\n\ndef test_b():\n    pytest.skip()\n\n\ndef test_c():\n    pass\n'
    )
    for names in ({'test_a', 'test_b', 'test_c'}, {'test_a', 'test_b'}):
        code, run, text = pytest_of(project, '--changed')
        assert (code, run) == (1, {'alone'})
        assert set(re.findall(r'::(\w+) [A-Z]', text)) == names
    test.write_text('def test_a():\n    pass\n\n\ndef test_b():\n    pass\n')
    assert pytest_of(project, '--changed', '-k', 'not test_b')[1] == {'alone'}
    code, run, text = pytest_of(project, '--changed')
    assert set(re.findall(r'::(\w+) [A-Z]', text)) == {'test_b'}
    edit(test, 'pass', 'return')
    assert pytest_of(project, 'tests/b/test_alone.py::test_a')[1] == {'alone'}
    assert set(re.findall(r'::(\w+) [A-Z]', pytest_of(project, '--changed')[2])) == {'test_b'}
    assert pytest_of(project, '--changed')[1] == set()


def test_an_edit_while_a_test_runs_counts_as_one_after_it(project):
    test = project / 'tests/b/test_alone.py'
    test.write_text(
        'from tests.helper import ROOT\n\n\ndef test_it():\n    (ROOT / "tests/helper.py").open("a").write("a = 1\\n")\n'
    )
    for _ in range(2):
        assert 'alone' in pytest_of(project, '--changed')[1]


def test_quick_takes_what_fits_and_later_the_rest(project):
    cases = '@pytest.mark.parametrize("case", range(3))\n'
    tests = ''.join(
        f'\n\n{cases if name == "cases" else ""}def test_{name}({"case" * (name == "cases")}):\n    pass\n'
        for name in ('slow', 'cases', 'fast')
    )
    (project / 'tests/b/test_alone.py').write_text(f'import pytest\n{tests}')
    (project / 'tests/b/test_other.py').write_text('def test_it():\n    pass\n')
    seconds = {
        'tests/b/test_alone.py': {'test_slow': 1000, 'test_cases': 60, 'test_fast': 1},
        'tests/b/test_other.py': {'test_it': 30},
    }
    (project / 'tests/durations.json').write_text(json.dumps(seconds))
    for _ in range(2):  # what has passed takes no time of the second call
        code, _, text = pytest_of(
            project, '--quick', '100'
        )  # 70 s of them for tests: 1 and 30 of each module one, 20 of a case
        if 'test_other.py' in text:
            assert code == 0
            assert set(re.findall(r'::(\S+) [A-Z]', text)) == {'test_it', 'test_fast', 'test_cases[0]'}
            assert 'as many as fit into 100 s' in text
    assert set(re.findall(r'::(\S+) [A-Z]', text)) == {'test_cases[1]', 'test_cases[2]'}
    assert set(re.findall(r'::(\S+) [A-Z]', pytest_of(project, '--changed')[2])) == {'test_slow'}
    assert pytest_of(project, '--quick', '100')[1] == set()


def test_quick_begins_no_test_past_its_time(project):
    sleeping = 'import time\n\n\ndef test_long():\n    time.sleep(2)\n\n\ndef test_next():\n    pass\n'
    (project / 'tests/b/test_alone.py').write_text(sleeping)
    seconds = {'tests/b/test_alone.py': {'test_long': 0.1, 'test_next': 0.1}}
    (project / 'tests/durations.json').write_text(json.dumps(seconds))
    code, _, text = pytest_of(project, '--quick', '2')
    assert code == 0
    assert set(re.findall(r'::(\S+) [A-Z]', text)) == {'test_long'}
    assert 'of these 2 tests 1 were run, as many as fit into 2 s' in text
    assert set(re.findall(r'::(\S+) [A-Z]', pytest_of(project, '--changed')[2])) == {'test_next'}


def test_what_is_read_no_more_no_longer_counts(project):
    test = project / 'tests/b/test_reads.py'
    test.write_text('def test_it():\n    pass\n')
    assert pytest_of(project, '--changed')[1] == {'reads'}
    assert pytest_of(project, '--changed')[1] == set()
    edit(project / 'jottings/1.txt', '1', '2')
    assert pytest_of(project, '--changed')[1] == {'process'}


def test_imports_that_are_found_are_those_that_are_made():
    code = 'import sys, tests.sharding.test_pipeline; print(*sys.modules)'
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True)
    project = Project(ROOT)
    loaded = {project.modules[name] for name in done.stdout.split() if name in project.modules}
    assert len(loaded) > 20
    assert loaded <= project.closure('tests/sharding/test_pipeline.py').keys()
