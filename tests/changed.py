"""What a test module rests on: code and data that it can reach, by hash, so that only what a change reaches is run again.

A test module rests on

- what it imports, and what that imports, inside functions too; with them the packages above it, each conftest.py above it,
  pyproject.toml, the interpreter, and the versions of all that is installed (`environment`);
- what its code names in strings: modules (`'weft.training.loss.parts'`, as patches have them); where modules are imported by a
  computed name, all of that package; and, of tests and of code that knows its own place, files and folders of data;
- data beside it: whatever is no code in its folder of tests/;
- what it was seen to read while it ran (`tests/quick.py` records that), and, if it started a process, all of the project but
  other test modules and prose.

Code is compared without comments and docstrings, unless it reads docstrings. Every rule errs to the safe side: what is listed
too much costs a run, what is missing would hide a mistake.
"""

import ast
import collections
import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from tests.house import ROOMS
from weft.proof.code_hash import without_docstrings

ALWAYS = ('pyproject.toml',)
ORDER = 'tests/durations.json'  # which tests come first, and none of what they find
UNTRACKED = {'runs', 'build', 'dist', '__pycache__', 'node_modules'}
BY_NAME = {'import_module', 'run_module', 'run_path', '__import__'}  # these import modules whose names are computed
VARIABLES = ('JAX_', 'XLA_', 'WEFT_', 'GOLDENS', 'GGUF_', 'REGOLD')
FORMAT = 2  # of Source in the cache: counts up when parsing changes


@dataclasses.dataclass(frozen=True)
class Source:
    """What one Python file says, wherever it stands."""

    code: str  # hash without comments and docstrings
    prose: str  # hash of the docstrings
    imports: list[str]  # dotted names, `from a import b` as both a and a.b
    at_load: list[str]  # those of them that are imported when the module is loaded
    strings: list[str]  # words of its string constants that may name a module or a file
    by_name: bool  # imports modules by computed names
    placed: bool  # knows where it stands (`__file__`, ROOT), so its strings may name data
    own_docstrings: bool  # reads its own docstring
    all_docstrings: bool  # reads those of others
    processes: bool  # starts processes in a way that no audit event tells


def parse(text: str) -> Source:
    """Of Python source."""
    tree = without_docstrings(text)
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words = {
        word
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in re.findall(r'[\w./-]*\w[\w./-]*', node.value)
    }
    imports, at_load = sorted(set(_imported(nodes))), sorted(set(_imported(_at_load(tree))))
    tops = {name.split('.')[0] for name in imports}
    return Source(
        code=_hash(ast.dump(tree)),
        prose=_hash('\0'.join(_docstrings(ast.parse(text)))),
        imports=imports,
        at_load=at_load,
        strings=sorted(words),
        by_name=bool(BY_NAME & (names | attributes)),
        placed=bool({'__file__', 'ROOT'} & (names | attributes)) or any('ROOT' in name.split('.') for name in imports),
        own_docstrings='__doc__' in names,
        all_docstrings=bool({'__doc__', 'getdoc'} & attributes),
        processes='multiprocessing' in tops,
    )


def _imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'imports are absolute, not .{node.module}'
            yield str(node.module)
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _at_load(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is loaded: not those of functions, nor those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        typing = isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)
        if not typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _at_load(node)


def _docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def _hash(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def notes_folder(root: Path) -> Path:
    """Where the tests of a project keep what they note, apart for each Python."""
    return root / '.cache' / 'tests' / f'{sys.version_info.major}.{sys.version_info.minor}'


class Project:
    """The files below a root, as they are when this is made. Paths are relative to the root, with slashes."""

    def __init__(self, root: Path):
        self.root, cache = (
            root,
            notes_folder(root) / 'sources.json',
        )  # by a file's hash, so that it is never out of date
        self.contents: dict[str, str] = {}  # path -> hash of its bytes
        known: dict[str, dict] = {}
        if cache.exists():
            known = json.loads(cache.read_text(encoding='utf-8'))
            known = known if known.get('format') == FORMAT else {}
        self.sources: dict[str, Source] = {}
        seen: dict[str, dict] = {}
        for path in _files(root):
            content = (root / path).read_bytes()
            digest = self.contents[path] = _hash(content)
            if path.endswith('.py'):
                fields = known.get(digest) or dataclasses.asdict(parse(content.decode()))
                self.sources[path], seen[digest] = Source(**fields), fields
        if seen.keys() - known.keys():
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(f'.{os.getpid()}')
            part.write_text(json.dumps({'format': FORMAT, **seen}), encoding='utf-8')
            part.replace(cache)

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """Dotted name -> path: model/stack.py is weft.model.stack, tests/models.py is tests.models."""
        found = {}
        for path in self.sources:
            name = path[:-3].replace('/', '.').removesuffix('__init__').rstrip('.')
            top = name.split('.')[0]
            if top == 'tests':
                found[name] = path
            elif top in ROOMS or not name:
                found[f'weft.{name}'.rstrip('.')] = path
        return found

    @functools.cached_property
    def packages(self) -> dict[str, list[str]]:
        """Dotted name of a folder -> the modules below it."""
        found = collections.defaultdict[str, list[str]](list)
        for name in self.modules:
            parts = name.split('.')
            for depth in range(1, len(parts) + 1):
                found['.'.join(parts[:depth])].append(name)
        return found

    @functools.cached_property
    def data(self) -> dict[str, list[str]]:
        """Name of a file that is no code, or of a folder at the top or below configs/ -> such files."""
        found = collections.defaultdict[str, list[str]](list)
        for path in self.contents:
            if path.endswith('.py') or path == ORDER:
                continue
            folder, _, name = path.rpartition('/')
            found[name].append(path)
            if folder.split('/')[0] not in ('', 'tests', *ROOMS):
                parts = folder.split('/')
                for depth in range(1, len(parts) + 1):
                    found['/'.join(parts[:depth])].append(path)
        return found

    @functools.cached_property
    def tests(self) -> set[str]:
        """Paths of the test modules."""
        return {path for path in self.sources if path.startswith('tests/') and _is_test(path)}

    def edited(self, path: str) -> bool:
        """Whether a file has changed since this was made; what was none then has not."""
        if path not in self.contents:
            return False
        return not (self.root / path).is_file() or _hash((self.root / path).read_bytes()) != self.contents[path]

    def closure(self, path: str) -> dict[str, int]:
        """Files that a test module rests on, by what its text says alone -> how many imports away they are."""
        parts = path.split('/')
        above = ['/'.join([*parts[:depth], 'conftest.py']) for depth in range(1, len(parts))]
        found = {file: 1 for file in ALWAYS if file in self.contents}
        todo = collections.deque([(path, True, 0), *((file, True, 1) for file in above if file in self.contents)])
        entered = set[tuple[str, bool]]()
        while todo:
            file, whole, depth = todo.popleft()
            if (file, whole) not in entered:
                entered.add((file, whole))
                found.setdefault(file, depth)
                todo.extend((*other, depth + 1) for other in self._next(file, whole))
        return found

    def everything(self, path: str) -> dict[str, int]:
        """Of a test module that starts processes: all files but other test modules, and prose that no code names."""
        found = self.closure(path)
        code = [file for file in self.sources if not _is_test(file)]
        named = {other for file in code for other in self._named_data(file)}
        rest = [file for file in self.contents if not file.endswith(('.py', '.md')) and file != ORDER]
        return dict.fromkeys([*code, *named, *rest], 3) | found

    def hashes(self, path: str, reads: Iterable[str] = (), processes: bool = False) -> dict[str, str]:
        """What a test module rests on, by hash: files, folders that it lists (`reads` has either), and the environment."""
        files = self.everything(path) if processes or self._starts(path) else self.closure(path)
        docstrings = any(self.sources[file].all_docstrings for file in files if file in self.sources)
        found = {}
        for file in files:
            source = self.sources.get(file)
            if source is None:
                found[file] = self.contents[file]
            else:
                prose = docstrings or source.own_docstrings
                found[file] = source.code + (source.prose if prose else '')
        for read in reads:
            found[f'read {read}'] = self._read(read)
        return found

    def _starts(self, path: str) -> bool:
        return any(
            self.sources[file].processes
            for file in self.closure(path)
            if file.startswith('tests/') and file in self.sources
        )

    def _read(self, path: str) -> str:
        """Hash of a file's bytes, or of the names in a folder; '' where there is neither."""
        if path in self.contents:
            return self.contents[path]
        below = path + '/' if path else ''
        return _hash(
            '\0'.join(sorted({name[len(below) :].split('/')[0] for name in self.contents if name.startswith(below)}))
        )

    @functools.cache  # noqa: B019  a project lives as long as the process
    def _next(self, path: str, whole: bool) -> list[tuple[str, bool]]:
        """Files that one file leads to, each with whether all of it counts.

        Of a package that is only on the way to a module (`weft` of `weft.model.stack`) nobody asks for its functions, lazy
        imports among them: with `whole` False what it imports when it is loaded is all that it leads to.
        """
        source = self.sources.get(path)
        if source is None:
            return []
        found = [file for name in (source.imports if whole else source.at_load) for file in self._with_parents(name)]
        if not whole:
            return found
        for word in source.strings:
            found += self._with_parents(self._named_module(word))
        if source.by_name:
            own = next((name for name, file in self.modules.items() if file == path), '')
            inside = own if path.endswith('__init__.py') else own.rpartition('.')[0]
            packages = [inside, *(word.rstrip('.') for word in source.strings)]
            found += [(self.modules[name], True) for package in packages for name in self._below(package)]
        data = self._named_data(path)
        if path.startswith('tests/') and path.count('/') > 1:
            beside = '/'.join(path.split('/')[:2]) + '/'
            data += [file for file in self.contents if file.startswith(beside) and not file.endswith('.py')]
        return list(dict.fromkeys([*found, *((file, True) for file in data)]))

    def _with_parents(self, name: str) -> list[tuple[str, bool]]:
        """A module's file, after those of the packages that it is in."""
        if name not in self.modules:
            return []
        parts = name.split('.')
        parents = ['.'.join(parts[:depth]) for depth in range(1, len(parts))]
        return [*((self.modules[one], False) for one in parents if one in self.modules), (self.modules[name], True)]

    def _below(self, package: str) -> list[str]:
        return self.packages.get(package) or self.packages.get(f'weft.{package}', []) if package else []

    def _named_module(self, word: str) -> str:
        """The module that a dotted name begins with, of `weft.training.loss.parts` weft.training.loss; '' for none."""
        parts = word.strip('./').split('.')
        for depth in range(len(parts), 1, -1):
            for name in ('.'.join(parts[:depth]), '.'.join(['weft', *parts[:depth]])):
                if name in self.modules:
                    return name
        return ''

    def _named_data(self, path: str) -> list[str]:
        """Files and folders of data that the strings of a file name."""
        if not (path.startswith('tests/') or self.sources[path].placed):
            return []
        found = []
        for word in self.sources[path].strings:
            clean = word.strip('/').removeprefix('./')
            if clean in self.data:
                found += self.data[clean]
            elif '/' in clean:
                found += [file for file in self.data.get(clean.rpartition('/')[2], ()) if file.endswith(clean)]
        return found


def _is_test(path: str) -> bool:
    return path.rpartition('/')[2].startswith('test_')


def _files(root: Path) -> Iterator[str]:
    """Paths of the files of a project, those that no commit would have left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name == '.ci' or (not name.startswith('.') and name not in UNTRACKED and not name.endswith('.egg-info'))
        )
        for name in sorted(files):
            if not name.endswith('.pyc') and os.path.isfile(os.path.join(folder, name)):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')


@functools.cache
def environment() -> str:
    """Hash of the interpreter, the kind of machine, all that is installed by version, and variables that JAX or tests read."""
    installed = sorted(f'{one.name}=={one.version}' for one in metadata.distributions())
    told = sorted(f'{name}={value}' for name, value in os.environ.items() if name.startswith(VARIABLES))
    return _hash('\n'.join([sys.version, platform.machine(), *installed, *told]))
