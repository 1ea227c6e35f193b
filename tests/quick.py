"""A plugin of pytest that notes what passed, and runs what a change reaches: `--changed`, `--quick SECONDS`.

Every run of the tests notes for each test module, in .cache/tests/, what it rests on (`tests/changed.py`), which of its tests
passed, and how long each took. `--changed` leaves out the tests that have passed since any of that changed. `--quick SECONDS`
does so too, and of the tests that are left runs as many as fit: of each module the cheapest one, then one case of each test
function, then the rest; the cheaper and the closer to what changed, the earlier. The next call takes those that did not fit.

What a test costs is known from the last run here or, in a fresh clone, from tests/durations.json, which `make durations`
writes from what was noted. Without `--quick` the slowest modules begin first, so that no worker is left alone with one.
"""

import collections
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.changed import ORDER, Project, environment, notes_folder

UNKNOWN = 0.5  # seconds that a test which nobody has run is taken for
SHARE = 0.7  # of --quick's seconds that is planned for; the rest goes into starting, and tests that take longer than they did
FAR = 3  # imports away at most, when tests are ordered by their distance to what changed
READS = {'open', 'os.listdir', 'os.scandir'}  # audit events of Python
STARTS = {'subprocess.Popen', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.exec', 'os.system'}
FOR_ITS_CODE = ('<frozen importlib', 'linecache.py', 'tokenize.py', os.path.join('_pytest', 'assertion', 'rewrite.py'))


@dataclasses.dataclass
class Record:
    """What is kept of a test module between runs."""

    hashes: dict[str, str] = dataclasses.field(default_factory=dict)  # of what it rested on
    reads: list[str] = dataclasses.field(default_factory=list)  # files and folders that it was seen to read
    processes: bool = False  # whether it started any
    complete: bool = False  # whether all of its tests passed
    tests: dict[str, tuple[str, float]] = dataclasses.field(
        default_factory=dict
    )  # outcome ('' before it was run), seconds


@dataclasses.dataclass
class Seen:
    """What this run has seen of a test module."""

    reads: set[str] = dataclasses.field(default_factory=set)
    processes: bool = False
    tests: list[str] = dataclasses.field(default_factory=list)  # names of all that were collected
    outcomes: dict[str, set[str]] = dataclasses.field(default_factory=dict)  # of setup, call and teardown
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup('weft')
    group.addoption(
        '--changed', action='store_true', help='leave out tests that passed since what they rest on changed'
    )
    group.addoption('--quick', type=float, metavar='SECONDS', help='as --changed, and of these as many as fit')


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Notes(config), 'notes')


class Notes:
    """What one process of pytest knows of the test modules; it writes down what becomes of them."""

    def __init__(self, config: pytest.Config):
        self.root = config.rootpath
        self.folder, self.project = notes_folder(self.root), Project(self.root)
        given = getattr(config, 'workerinput', None)
        self.environment = environment() if given is None else given['environment']
        self.seconds: float | None = config.getoption('quick')
        self.changed: bool = config.getoption('changed') or self.seconds is not None
        self.deadline = time.monotonic() + self.seconds if self.seconds else float('inf')
        # Whether all tests of a module are collected: no names, and no --last-failed.
        self.whole = not any('::' in argument for argument in config.args) and not config.getoption('lf', False)
        self.seen = collections.defaultdict[str, Seen](Seen)
        self.current = ''  # the test module that is collected or run
        self.counts = collections.Counter[str]()  # alike in all workers
        self.late = 0  # tests that this process, or all workers together, had no time for
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        """Notes that the current test module reads something of the project, or starts a process."""
        if not self.current:
            return
        if event in STARTS:
            self.seen[self.current].processes = True
        elif event in READS and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.relpath(os.path.abspath(os.fsdecode(arguments[0])), self.root).replace(os.sep, '/')
            there = path in self.project.contents or (event != 'open' and not path.startswith('..'))
            if there and path != ORDER and self.of_the_project(sys._getframe(1)):
                self.seen[self.current].reads.add('' if path == '.' else path)

    def of_the_project(self, frame: Any) -> bool:
        """Whether code of the project reads, not whoever imports or shows that code."""
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(str(self.root)) and '/.venv' not in name:
                return True
            if name.startswith(FOR_ITS_CODE) or name.endswith(FOR_ITS_CODE):
                return False
            frame = frame.f_back
        return False

    # What is known of a test module, by its path.

    @functools.cache  # noqa: B019  of one run
    def record(self, path: str) -> Record:
        file = self.file(path)
        return Record(**json.loads(file.read_text(encoding='utf-8'))) if file.exists() else Record()

    def file(self, path: str) -> Path:
        return self.folder / _record_name(path)

    def hashes(self, path: str, reads: Iterable[str], processes: bool) -> dict[str, str]:
        """Of what a module rests on as it stands, with what it was seen to read and start."""
        return self.project.hashes(path, reads, processes) | {'environment': self.environment}

    @functools.cache  # noqa: B019
    def unchanged(self, path: str) -> bool:
        """Whether all that a module rests on is as it was when its record was made."""
        known = self.record(path)
        return known.hashes == self.hashes(path, known.reads, known.processes)

    def passed(self, item: pytest.Item) -> bool:
        path, test = _names(item)
        return self.unchanged(path) and self.record(path).tests.get(test, ('', 0))[0] == 'passed'

    @functools.cached_property
    def durations(self) -> dict[str, dict[str, float]]:
        """Path of a test module -> test function -> seconds of all its cases, as committed."""
        file = self.root / ORDER
        return json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}

    def cost(self, item: pytest.Item) -> float:
        """Seconds that a test is expected to take."""
        path, test = _names(item)
        if test in self.record(path).tests:
            return self.record(path).tests[test][1]
        cases = sum(_function(name) == _function(test) for name in self.seen[path].tests)
        return self.durations.get(path, {}).get(_function(test), UNKNOWN * cases) / cases

    @functools.cache  # noqa: B019
    def distance(self, path: str) -> int:
        """Imports between a test module and what changed since its record was made; 1 where there is none."""
        known, away = self.record(path), self.project.closure(path)
        now = self.hashes(path, known.reads, known.processes)
        changed = [away.get(file, FAR) for file in now if known.hashes.get(file) != now[file]]
        return min(max(1, min(changed, default=1)), FAR) if known.hashes else 1

    # What is collected.

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        path = collection_path.relative_to(self.root).as_posix()
        if self.changed and path in self.project.tests and self.record(path).complete and self.unchanged(path):
            self.counts['modules unchanged'] += 1
            return True
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        self.current = self.path(collector) if isinstance(collector, pytest.Module) else ''
        try:
            return (yield)
        finally:
            self.current = ''

    def path(self, node: pytest.Item | pytest.Collector) -> str:
        return node.path.relative_to(self.root).as_posix()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
        for item in items:
            path, test = _names(item)
            self.seen[path].tests.append(test)
        all_modules = len({_names(item)[0] for item in items})
        yield  # -k and -m
        left = [item for item in items if not (self.changed and self.passed(item))]
        chosen = self.choose(left) if self.seconds else left
        self.counts |= {
            'modules': self.counts['modules unchanged'] + all_modules,
            'modules reached': len({_names(item)[0] for item in left}),
            'tests left': len(left),
            'tests chosen': len(chosen),
        }
        taken = set(chosen)
        if out := [item for item in items if item not in taken]:
            config.hook.pytest_deselected(items=out)
        cost = collections.Counter[str]()
        for item in chosen:
            cost[_names(item)[0]] += self.cost(item)
        # Of what is cut short the closest and cheapest is to be run; of all, the slowest is to begin first.
        order = lambda path: (self.distance(path), cost[path]) if self.seconds else (0, -cost[path])
        items[:] = sorted(chosen, key=lambda item: order(_names(item)[0]))

    def choose(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """As many of the tests as are expected to take no longer than `--quick` says, in the order that they came in."""
        modules, functions = set[str](), set[tuple[str, str]]()
        ranked = list[tuple[int, float, pytest.Item]]()
        for item in sorted(items, key=lambda item: self.cost(item) * self.distance(_names(item)[0])):
            path, test = _names(item)
            failed = self.record(path).tests.get(test, ('', 0))[0] == 'failed'
            known = (path in modules) + ((path, _function(test)) in functions)
            ranked.append((-1 if failed else known, self.cost(item) * self.distance(path), item))
            modules.add(path)
            functions.add((path, _function(test)))
        left = self.seconds * SHARE * int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
        taken = set[pytest.Item]()
        for _, _, item in sorted(ranked, key=lambda one: one[:2]):
            if self.cost(item) <= left:
                left -= self.cost(item)
                taken.add(item)
        return [item for item in items if item in taken]

    # What is run.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
        path, test = _names(item)
        self.current, began = path, time.monotonic()
        try:
            result = yield
        finally:
            self.current = ''
        self.seen[path].seconds[test] = time.monotonic() - began
        if nextitem is None or _names(nextitem)[0] != path:
            self.keep(path)
        return result

    @pytest.hookimpl(tryfirst=True, specname='pytest_runtest_protocol')
    def pytest_leave_out(self, item: pytest.Item) -> bool | None:
        """Past the time of `--quick` the tests that are left are passed over."""
        if time.monotonic() < self.deadline:
            return None
        self.late += 1
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[Any]:
        report = yield
        path, test = _names(item)
        self.seen[path].outcomes.setdefault(test, set()).add(report.outcome)
        return report

    def keep(self, path: str) -> None:
        """Writes down how a module's tests came out, unless a file that it rests on was edited meanwhile."""
        before, seen = self.record(path), self.seen[path]
        everything = self.whole and seen.outcomes.keys() == set(seen.tests)
        reads = sorted(seen.reads.union(() if everything else before.reads))
        processes = seen.processes or (before.processes and not everything)
        hashes = self.hashes(path, reads, processes)
        if any(self.project.edited(file.removeprefix('read ')) for file in hashes):
            return
        # What is read for the first time is new, and no change; what is not read any more no longer counts.
        same = everything or before.hashes.items() <= hashes.items()
        tests = {test: (outcome if same else '', seconds) for test, (outcome, seconds) in before.tests.items()}
        for test, outcomes in seen.outcomes.items():
            worst = next((one for one in ('failed', 'skipped') if one in outcomes), 'passed')
            tests[test] = worst, round(seen.seconds[test], 3)
        record = Record(
            hashes=hashes,
            reads=reads,
            processes=processes,
            complete=self.whole and all(tests.get(test, ('', 0))[0] == 'passed' for test in seen.tests),
            tests={test: tests[test] for test in seen.tests if test in tests},
        )
        part = self.file(path).with_suffix(f'.{os.getpid()}')
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(record)), encoding='utf-8')
        part.replace(self.file(path))

    # What is told.

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput['environment'] = self.environment

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, 'workeroutput'):
            session.config.workeroutput['notes'] = dict(self.counts), self.late
        elif self.changed and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        counts, late = getattr(node, 'workeroutput', {}).get('notes', ({}, 0))
        self.counts |= collections.Counter(counts)
        self.late += late

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.changed:
            n, run = self.counts, self.counts['tests chosen'] - self.late
            fit = '' if run == n['tests left'] else f', as many as fit into {self.seconds:.0f} s'
            terminalreporter.write_line(
                f'{n["modules reached"]} of {n["modules"]} test modules have tests that did not pass since what they rest on '
                f'changed; of these {n["tests left"]:,} tests {run:,} were run{fit}'
            )


def _names(item: pytest.Item) -> tuple[str, str]:
    """Of a test: its module's path below the root, and its own name with its case."""
    path, _, test = item.nodeid.partition('::')
    return path, test


def _record_name(path: str) -> str:
    return f'{path.removesuffix(".py").replace("/", ".")}.json'


def _function(test: str) -> str:
    return test.partition('[')[0]


def write_durations(root: Path) -> None:
    """Writes tests/durations.json: seconds of each test function, all its cases together, as noted by this Python last."""
    notes, found = notes_folder(root), {}
    for path in sorted(Project(root).tests):
        file = notes / _record_name(path)
        tests = json.loads(file.read_text(encoding='utf-8'))['tests'] if file.exists() else {}
        seconds = collections.Counter[str]()
        for test, (_, took) in tests.items():
            seconds[_function(test)] += took
        if seconds:
            found[path] = {function: round(seconds[function], 2) for function in sorted(seconds)}
    (root / ORDER).write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    write_durations(Path(__file__).parents[1])
