"""What is looked for in how a command ends can be found: each fault of a script that has it is reported."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import commands, disks, pairs, signals, streams
from tests.fuzz.commands import COMMANDS, Command, Ended
from weft.scripts.command import NOT_COMMANDS

SCRIPT = Path(__file__).parent / 'fakes' / 'script.py'


class Fake(Command):
    """The script of fakes/ as a command, without what makes Python slow to start."""

    def line(self, base: Path, scratch: Path) -> list[str]:
        return [sys.executable, '-I', '-S', str(SCRIPT), self.words[0], str(scratch / self.result)]


def signalled(tmp_path, fault: str, sent: str, result: str, trained: bool = True) -> str | None:
    command = Fake('train' if result == 'made' else 'import', (fault,), result)
    phase = signals.Phase(command, said='working', trained=trained)
    return signals.signalled(phase, sent, 'preparing', tmp_path, tmp_path / 'base')


@pytest.mark.parametrize('sent', ['SIGINT', 'SIGTERM', 'SIGHUP'])
@pytest.mark.parametrize('result', ['made', 'made.npy'])
def test_a_script_that_takes_a_signal_as_it_must_has_no_fault(tmp_path, sent, result):
    assert signalled(tmp_path, 'none', sent, result) is None


@pytest.mark.parametrize(
    ('fault', 'result', 'told'),
    [
        ('exits 0', 'made', 'exit code 0 where {130} is right'),
        (
            'traceback',
            'made',
            'exit code 1, and on stderr: Traceback (most recent call last): … RuntimeError: what a user',
        ),
        ('aborts', 'made', 'exit code 134 where {130} is right'),
        ('hangs', 'made', 'hangs: it had to be killed'),
        ('two lines', 'made', 'exit code 1 where {130} is right'),
        ('saves nothing', 'made', 'it has not saved: its checkpoints are []'),
        ('skips a step', 'made', 'started again: its metrics are of the steps [1, 2, 3, 5, 6'),
        ('does not go on', 'made', 'started again: exit code 2 where {0} is right; stderr: error: it is damaged'),
        ('leaves a half', 'made', 'started again: made.partial is left'),
        ('ends too soon', 'made', 'it was not seen preparing: it came to its end'),
        ('exits 0', 'made.npy', 'exit code 0 where {130} is right'),
        ('named too early', 'made.npy', 'exit code 130, and made.npy has its name'),
        ('does not go on', 'made.npy', 'started again: exit code 2'),
        ('makes nothing', 'made.npy', 'started again: it made no made.npy'),
        ('leaves a half', 'made.npy', 'started again: made.npy.partial is left'),
    ],
)
def test_a_fault_of_a_script_that_takes_a_signal_is_reported(tmp_path, monkeypatch, fault, result, told):
    monkeypatch.setattr(commands, 'LIMIT', 1.0)
    found = signalled(tmp_path, fault, 'SIGINT', result)
    assert found is not None
    assert found.startswith(told), found


@pytest.mark.parametrize(
    ('ended', 'codes', 'told'),
    [
        (Ended(1, b'', b'error: full\n'), {1}, None),
        (Ended(2, b'', b'a word before\nerror: no\n'), {2}, None),
        (Ended(141, b'', b''), {0, 141}, None),
        (Ended(130, b'text', b'interrupted\n'), {130}, None),
        (Ended(0, b'', b'', hung=True), {0}, 'hangs'),
        (Ended(1, b'', b''), {0}, 'exit code 1 where {0} is right'),
        (Ended(1, b'', b''), {1}, 'exit code 1 without one line that says why'),
        (Ended(2, b'', b'error: one\nerror: two\n'), {2}, 'exit code 2 without one line'),
        (Ended(2, b'', b'error: one\nand more\n'), {2}, 'exit code 2 without one line'),
        (Ended(75, b'', b'lost\n'), {75}, 'exit code 75 without one line'),
        (Ended(2, b'', b'error: ' + b'x' * 9000), {2}, 'a line of 9007 bytes'),
        (Ended(141, b'', b'error: gone\n'), {141}, 'exit code 141, which is to be quiet'),
        (Ended(141, b'', b'said before\n'), {141}, None),
        (Ended(0, b'Traceback (most recent call last):\n', b''), {0}, 'exit code 0, and on stdout: Traceback'),
        (
            Ended(0, b'', b'Exception ignored in: <x>\nOSError: 28\n'),
            {0},
            'exit code 0, and on stderr: Exception ignored',
        ),
        (
            Ended(134, b'', b'terminate called after throwing\n'),
            {134},
            'exit code 134, and on stderr: terminate called',
        ),
        (Ended(1, b'', b"thread 'main' panicked at x\n"), {1}, 'exit code 1, and on stderr: panicked at'),
        (Ended(1, b'', b'F0000 12 x.cc] Check failed\n'), {1}, 'exit code 1, and on stderr: F0000'),
        (Ended(2, b'', b'error: \x1b[2J\n'), {2}, 'exit code 2, and on stderr'),
    ],
)
def test_what_is_wrong_with_how_a_command_ended(ended, codes, told):
    found = commands.wrong(ended, codes)
    assert found is None if told is None else found.startswith(told), found


def test_lines_on_stderr_are_counted_where_there_is_to_be_none():
    assert commands.wrong(Ended(141, b'', b'gone\n'), {141}, 0) == '1 lines on stderr where 0 are right: gone'


def test_exit_codes_are_those_of_a_shell():
    done = subprocess.run(['sh', '-c', 'kill -TERM $$'], check=False)
    assert done.returncode == -signal.SIGTERM
    assert commands.shell_code(done.returncode) == 143
    assert commands.shell_code(2) == 2


@pytest.mark.parametrize(
    ('name', 'half'),
    [
        ('x.partial', True),
        ('runs/.made.abcd1234.partial/checkpoints/0/model', True),
        ('runs/made/checkpoints/saving/4/meta.json', True),
        ('runs/made/data.old/x', True),
        ('runs/made/config.yaml.tmp', True),
        ('runs/.made.new/x', True),
        ('runs/made/checkpoints/4/model', False),
        ('runs/made/data/data.json', False),
    ],
)
def test_what_is_half_made_has_a_name_of_its_own(tmp_path, name, half):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / 'runs' / 'other' / 'checkpoints' / 'saving').mkdir(parents=True)
    assert (commands.half_made(tmp_path) is not None) == half


class Said(Command):
    """A shell's words as a command."""

    def line(self, base: Path, scratch: Path) -> list[str]:
        return ['sh', '-c', self.words[0]]


@pytest.mark.parametrize(
    ('way', 'words', 'codes', 'told'),
    [
        ('stdout closed', 'echo x', {1}, 'without one line'),
        ('stdout closed', 'exit 0', {0}, None),
        ('stdout full', 'echo x 2>&- || { echo error: full >&2; exit 1; }', {1}, None),
        ('stdout full', 'echo x', {0}, 'exit code'),
        ('reader gone', 'echo x', {141}, None),
        ('reader gone', 'exit 0', {141}, 'exit code 0 where {141} is right'),
        ('reader leaves', 'echo x; sleep 0.3; echo y', {141}, None),
        ('stderr closed', 'echo x >&2', {0}, 'exit code'),
        ('stdin closed', 'cat', {1}, 'without one line'),
        ('stdout in ASCII', 'test $PYTHONIOENCODING = ascii', {0}, None),
        ('an ASCII locale', 'test $LC_ALL = C', {0}, None),
    ],
)
def test_streams_are_as_they_are_called(tmp_path, way, words, codes, told):
    ended = streams.ended_in(way, Said('said', (words,)), tmp_path, tmp_path)
    found = commands.wrong(ended, codes)
    assert found is None if told is None else told in found, (found, ended)


@pytest.mark.parametrize(
    ('way', 'words', 'told'),
    [
        ('full', 'head -c 10000 /dev/zero > {} 2>&- || { echo error: full >&2; exit 1; }', 'has its name'),
        ('full', 'head -c 10000 /dev/zero > {}.partial; rm {}.partial; echo error: full >&2; exit 1', None),
        ('full', 'head -c 10000 /dev/zero > {}.partial; echo error: full >&2; exit 1', 'is left'),
        (
            'full after 4 kB',
            'head -c 3000 /dev/zero > {} || { echo error: full >&2; exit 1; }',
            'exit code 0 where {1} is right',
        ),
        (
            'without inodes',
            'mkdir 1 2 3 4 5 6 7 && dd if=/dev/zero of=x count=9 && exit 3; rm -rf [x1-7]; echo error: full >&2; exit 1',
            None,
        ),
        ('read-only', 'touch {} || { echo error: read-only >&2; exit 2; }', None),
        ('small files', 'head -c 10000 /dev/zero > {} && exit 3; rm {}; echo error: large >&2; exit 1', None),
        ('of temporary files full', 'head -c 9 /dev/zero > $TMPDIR/x && exit 3; echo > {}', None),
        ('of the cache full', 'head -c 9 /dev/zero > $XDG_CACHE_HOME/x && exit 3; echo > {}', None),
        ('of the cache full', 'true', 'there is no plan.html'),
    ],
)
@pytest.mark.parametrize('mounts', [True, False])
def test_disks_are_as_they_are_called_and_what_is_left_is_seen(tmp_path, monkeypatch, way, words, told, mounts):
    if not mounts:  # as on a machine that does not allow it
        monkeypatch.setattr(disks, 'mounts', bool)
    again = 'test -e begun && { rm -f plan.html.partial; echo > plan.html; exit 0; }; '
    (tmp_path / 'disk').mkdir()
    script = 'trap "" XFSZ; ' + again.replace('begun', str(tmp_path / 'begun')) + words.replace('{}', 'plan.html')
    command = Said('plan page', (script,), 'plan.html')
    with disks.disk(tmp_path / 'disk', 60 if way == 'without inodes' else 1000) as mounted:
        ended = disks.tried(command, way, tmp_path / 'disk', tmp_path, tmp_path, mounted)
        (tmp_path / 'begun').touch()
        place = tmp_path / ('out' if way.startswith('of ') else 'disk')
        found = commands.wrong(ended, disks.codes(way)) or disks.left(command, ended, place, tmp_path)
    assert found is None if told is None else told in (found or ''), (found, ended)


def test_every_script_and_each_of_its_ways_is_among_the_commands():
    scripts = {path.stem for path in (commands.ROOT / 'scripts').glob('*.py')} - NOT_COMMANDS
    assert {command.words[0] for command in COMMANDS.values()} == scripts
    ways = (commands.ROOT / 'scripts' / 'convert.py').read_text(encoding='utf-8').count('ways.add_parser(')
    assert len({command.words[1] for command in COMMANDS.values() if command.words[0] == 'convert'}) == ways
    assert set(disks.AFTER) == set(disks.WRITES)


def test_a_process_that_does_not_name_the_one_it_lost_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, 'WAITS', 1.0)
    monkeypatch.setattr(pairs, 'SOON', 0.5)
    work = 'mkdir -p made; for i in $(seq 30); do echo "{\\"step\\": $i}"; done > made/metrics.jsonl; '
    for end, told in (
        ('sleep 0.2; echo error: process 1 hangs >&2; exit 75', 'started again'),
        ('sleep 0.2; echo error: one hangs >&2; exit 75', 'its line does not name process 1'),
        ('sleep 0.2; kill -ABRT $$', 'exit code 134'),
        ('exec sleep 100', 'hangs'),
    ):
        command = Said('train', (f'mkdir -p made/checkpoints/20; {work} {end}',), 'made')
        found = pairs.stopped(1, tmp_path, tmp_path, command)
        assert found is not None
        assert found.startswith(told), found
