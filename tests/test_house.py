"""The house: imports go down the rooms, in no circle; the packages are those that are installed, under one name."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import weft
from tests.house import ROOMS, ROOT

FILES = {
    ('weft.' + path.relative_to(ROOT).as_posix()[:-3].replace('/', '.')).removesuffix('.__init__'): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob('*.py'))
}


def imports(module: str, whole: bool = True) -> set[str]:
    """The project's modules that one imports, those inside functions too or, without `whole`, only when it is loaded."""
    tree = ast.parse(FILES[module].read_text(encoding='utf-8'))
    nodes = ast.walk(tree) if whole else _at_load(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{module}: imports are absolute'
            for alias in node.names:
                full = f'{node.module}.{alias.name}'
                found.add(full if full in FILES else str(node.module))
    return {name for name in found if name in FILES and name != module}


def _at_load(tree: ast.AST):
    """The nodes of a module but for those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from _at_load(node)


def test_imports_go_down_the_rooms():
    place = {room: number for number, room in enumerate(ROOMS)}
    room = lambda module: place[module.split('.')[1]]
    up = [f'{module} imports {found}' for module in FILES for found in imports(module) if room(found) < room(module)]
    assert not up


def test_no_modules_import_each_other_in_a_circle():
    open_, done = list[str](), set[str]()

    def visit(module: str) -> None:
        assert module not in open_, ' → '.join([*open_[open_.index(module) :], module])
        if module in done:
            return
        open_.append(module)
        for found in sorted(imports(module, whole=False)):
            visit(found)
        done.add(open_.pop())

    for module in FILES:
        visit(module)


def test_nothing_is_imported_by_a_rooms_own_name():
    wrong = []
    for path in [*FILES.values(), *sorted((ROOT / 'tests').rglob('*.py'))]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            wrong += [f'{path.relative_to(ROOT)}: {name}' for name in names if name.split('.')[0] in ROOMS]
    assert not wrong


LONGEST = 350  # lines of a file that a reader holds in mind
# Files that may be longer, and why.
LONGER = {
    'model/ops/attention/blockwise.py': 'a kernel: tiles of attention forward and backward, which share their masks and sums',
}


def test_files_are_no_longer_than_a_reader_holds_in_mind():
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding='utf-8').splitlines()) for path in FILES.values()
    }
    long = {name for name, count in lines.items() if count > LONGEST}
    assert long == LONGER.keys(), 'take apart what is too long; what is short again needs no exception'


def test_the_packages_that_are_installed_are_those_that_are_there():
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    folders = {path.parent.relative_to(ROOT).as_posix().replace('/', '.') for path in FILES.values()}
    assert settings['tool']['setuptools']['packages'] == ['weft', *sorted(f'weft.{folder}' for folder in folders)]
    assert all((ROOT / folder.replace('.', '/') / '__init__.py').is_file() for folder in folders)
    assert set(settings['tool']['mypy']['packages']) == {f'weft.{room}' for room in ROOMS}


def test_the_face_has_what_it_names():
    for name in weft.__all__:
        assert getattr(weft, name).__name__ == name
    with pytest.raises(AttributeError, match='no attribute'):
        weft.nothing  # noqa: B018


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that has a `data` or a `model.py` of its own, as many have."""
    for name in ('data/__init__.py', 'model.py', 'training/__init__.py', 'sharding/x.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('')
    return tmp_path


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    'way',
    [
        [f'{ROOT}/scripts/plan.py'],
        ['-m', 'weft.scripts.plan'],
        ['-c', 'from weft.scripts.command import main; main()', 'plan'],
    ],
    ids=['file', 'module', 'command'],
)
def test_a_folder_with_packages_of_such_names_hides_nothing(folder, way):
    done = started(folder, *way, f'{ROOT}/configs/models/gpt2.yaml', '--chip', 'h100', '--chips', '0')
    assert (done.returncode, done.stderr) == (2, 'error: --chips is 0: it must be above 0\n')
    assert started(folder, '-c', 'import weft; weft.open_run; import data, model').returncode == 0


def test_the_command_lists_its_names_and_corrects_them(folder):
    command = ['-c', 'from weft.scripts.command import main; main()']
    done = started(folder, *command, 'trian')
    assert done.returncode == 2
    assert done.stderr.startswith("error: weft trian: no such command; did you mean 'train'?")
    assert 'train' in started(folder, *command).stdout
    assert started(folder, *command, '--version').stdout.startswith('weft ')
    assert 'usage: weft decode' in started(folder, *command, 'decode', '--help').stdout
