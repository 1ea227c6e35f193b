"""What the documentation names is there: links, files, modules, targets of make, renamed keys."""

import re
from pathlib import Path

import pytest

from tests.changed import Project
from tests.house import ROOMS, ROOT
from weft.training.renamed import RENAMED, RENAMED_VALUES

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


@pytest.mark.parametrize('page', ['docs/architecture.md', 'docs/glossary.md', 'docs/meshes.md'])
def test_names_are_those_of_the_code(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    for name, file in re.findall(r'`(\w+)` (?:in|of) \[[^\]]*\]\(([^)]+\.py)\)', text):
        assert re.search(rf'\b{name}\b', (ROOT / page).parent.joinpath(file).read_text(encoding='utf-8')), (name, file)
    code = '\n'.join(
        (ROOT / path).read_text(encoding='utf-8') for path in PROJECT.sources if not path.startswith('tests/')
    )
    words = set(re.findall(r'\w+', code))
    named = {name for name in re.findall(r'`([A-Za-z_][\w.]*)`', text) if not name.endswith(('.py', '.yaml'))}
    assert len(named) > 5
    assert not {name for name in named if name.rpartition('.')[2] not in words}


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


def test_the_changelog_lists_each_key_that_was_renamed():
    log = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    rows = [f'| `{old}` | `{new}` |' for old, new in {**RENAMED, **RENAMED_VALUES}.items()]
    missing = [row for row in rows if row not in log]
    assert not missing, '\n'.join(missing)
