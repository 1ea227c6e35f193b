"""What every script does around its work: streams that are closed, full or narrow, signals at any moment, faults in one line.

The scripts here are a few lines, so that a process takes a tenth of a second: what is tried is the frame around them.
"""

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripts.runs import ROOT
from weft.runtime import streams
from weft.runtime.errors import MachineError, NotTogether, UserError, machine_fault, shown
from weft.scripts.entry import exit_code_and_line

FRAME = """\
import sys, time, os, pathlib
from weft.scripts.entry import run
def main():
{body}
if __name__ == '__main__':
    run(main, lasting={lasting})
"""


def written(folder: Path, body: str, lasting: bool = False) -> Path:
    script = folder / 'script.py'
    script.write_text(FRAME.format(body=textwrap.indent(textwrap.dedent(body), '    '), lasting=lasting))
    return script


def shell(folder: Path, body: str, around: str, lasting: bool = False, **variables: str) -> tuple[int, str, str]:
    """Code, output and errors of a script in a shell's line, in which `{}` is the command."""
    command = around.replace('{}', f'{sys.executable} {written(folder, body, lasting)}')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHONIO', 'LC_'))}
    environment |= {'PYTHONPATH': str(ROOT), **variables}
    done = subprocess.run(
        ['bash', '-c', f'set -o pipefail; {command}'], cwd=folder, env=environment, capture_output=True, timeout=60
    )
    return done.returncode, done.stdout.decode(errors='replace'), done.stderr.decode(errors='replace')


MUCH = "for i in range(20000): print('a line of what was asked for', i)"
HELP = "import argparse; p = argparse.ArgumentParser(description='x' * 200); p.parse_args(['--help'])"
FULL, CLOSED = 'error: standard output: No space left on device\n', 'error: standard output: it is closed\n'


@pytest.mark.parametrize(
    ('body', 'around', 'code', 'says'),
    [
        (MUCH, '{} | head -1 > /dev/null', 141, ''),
        (MUCH, '{} > /dev/full', 1, FULL),
        (MUCH, '{} >&-', 1, CLOSED),
        ("print('short')", '{} > /dev/full', 1, FULL),
        ("print('short')", '{} >&-', 1, CLOSED),
        ('pass', '{} >&-', 0, ''),
        ("print('short')", '{} 2>&-', 0, ''),
        ("print('short', file=sys.stderr)", '{} 2>/dev/full', 0, ''),
        ("print('short', file=sys.stderr); print('result')", '{} >/dev/null 2>&1 <&- >&- 2>&-', 1, ''),
        ("print(sys.stdin.read(), open('made', 'w').fileno() > 2)", '{} <&- ', 0, ''),
        (HELP, '{} > /dev/full', 1, FULL),
        (HELP, 'PYTHONUNBUFFERED=1 {} > /dev/full', 1, FULL),
        (HELP, '{} >&-', 1, CLOSED),
        (HELP, '{} > /dev/null', 0, ''),
        ("import argparse; argparse.ArgumentParser().parse_args(['x'])", '{} 2>/dev/null', 2, ''),
    ],
)
def test_a_script_whose_result_is_its_output(tmp_path, body, around, code, says):
    found, _, err = shell(tmp_path, body, around)
    assert (found, err) == (code, says)


@pytest.mark.parametrize(
    'around', ['{} | head -1 > /dev/null', '{} > /dev/full', '{} >&-', '{} 2>&-', '{} >&- 2>&- <&-']
)
def test_a_script_whose_results_are_files_goes_on_without_its_streams(tmp_path, around):
    body = f"{MUCH}\nprint('said', file=sys.stderr); pathlib.Path('result').write_text('whole')"
    found, _, err = shell(tmp_path, body, around, lasting=True)
    assert (found, err.replace('said\n', '')) == (0, '')
    assert (tmp_path / 'result').read_text() == 'whole'


@pytest.mark.parametrize(('unbuffered', 'ends'), [('', '\\n'), ('1', '')])
def test_what_a_script_says_on_stderr_is_there_at_once(tmp_path, unbuffered, ends):
    said = tmp_path / 'said'
    body = f"print('a word', end='{ends}', file=sys.stderr); print(open('{said}').read() == 'a word{ends}')"
    assert shell(tmp_path, body, f'{{}} 2> {said}', PYTHONUNBUFFERED=unbuffered)[:2] == (0, 'True\n')


def test_a_script_of_weft_itself_takes_no_stream_for_its_own(tmp_path):
    """It hears of signals from its first import on, through a descriptor of its own."""
    line = f'{sys.executable} {ROOT / "scripts" / "score.py"} --help >&- 2>&- <&-'
    assert subprocess.run(['bash', '-c', line], cwd=tmp_path, timeout=60).returncode == 0


def test_a_script_whose_results_are_files_outlives_its_terminal(tmp_path):
    """The kernel answers EIO once a terminal is gone."""
    script = written(tmp_path, f"print('begun', flush=True); time.sleep(.5)\n{MUCH}\nopen('result', 'w').close()", True)
    outer, inner = os.openpty()
    process = subprocess.Popen(
        [sys.executable, script], cwd=tmp_path, stdout=inner, stderr=inner, env=os.environ | {'PYTHONPATH': str(ROOT)}
    )
    os.close(inner)
    assert b'begun' in os.read(outer, 100)
    os.close(outer)
    assert process.wait(60) == 0
    assert (tmp_path / 'result').exists()


@pytest.mark.parametrize(
    'variables',
    [
        {'PYTHONIOENCODING': 'ascii'},
        {'PYTHONIOENCODING': 'ascii:strict'},
        {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
    ],
)
def test_characters_that_a_stream_lacks_are_escaped(tmp_path, variables):
    code, out, err = shell(tmp_path, "print('caf\\xe9 \\u2500 \\ud800')", '{}', **variables)
    assert (code, out, err) == (0, 'caf\\xe9 \\u2500 \\ud800\n', '')
    assert shell(tmp_path, "print('\\u2500')", '{}', PYTHONIOENCODING='latin-1')[1] == '\\u2500\n'


FAULTS = {
    'a file': ("open('nowhere/x', 'w')", 1, 'error: nowhere/x: No such file or directory\n'),
    'a disk': ("raise OSError(28, 'No space left on device', 'a\\nb')", 1, 'error: a\\nb: No space left on device\n'),
    'memory': ('bytearray(1 << 62)', 1, 'error: out of memory: this machine has no more of it for this process\n'),
    'a text out of a file': (
        "from weft.runtime.errors import UserError; raise UserError('x\\x1b[2J\\ny' + 'z' * 5000)",
        2,
        f'error: x\\x1b[2J\\ny{"z" * 1992}…\n',
    ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_what_the_machine_or_a_file_does_is_one_line(tmp_path, name):
    body, code, says = FAULTS[name]
    found, out, err = shell(tmp_path, body, '{}')
    assert (found, out, err) == (code, '', says)


def test_a_fault_of_the_code_keeps_its_lines_and_says_whose_it_is(tmp_path):
    code, _, err = shell(tmp_path, 'assert 1 == 2, "never"', '{}')
    assert code == 1
    assert err.startswith('Traceback (most recent call last):')
    assert err.endswith(
        'AssertionError: never\n'
        'error: this is a fault of Weft, not of what you asked for: please report it, with the lines above\n'
    )


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), 'x'), 'x: Too many open files'),
        (OSError(errno.EXDEV, os.strerror(errno.EXDEV), 'a', None, 'b'), 'a → b: Invalid cross-device link'),
        (MachineError('what it says'), 'what it says'),
        (
            caused(RuntimeError('a save'), OSError(errno.EROFS, 'Read-only file system', 'x')),
            'x: Read-only file system',
        ),
        (ValueError(f'\n UNKNOWN: {"path" * 99}/file: No space left on device [source.cc:12]'), None),
        (RuntimeError('a bug'), None),
        (caused(RuntimeError('a bug'), KeyError('k')), None),
    ],
)
def test_faults_of_the_machine_are_told_from_those_of_the_code(error, line):
    found = machine_fault(error)
    if isinstance(error, ValueError):  # a library's own words: the file and the reason, and no lines of its source
        assert found is not None
        assert re.fullmatch(r'(path)*/file: No space left on device', found[found.index('path') :])
        assert len(found) < 350
    else:
        assert found == line


def test_an_error_while_a_missing_file_is_handled_is_one_of_the_code():
    error = KeyError('k')
    error.__context__ = FileNotFoundError(errno.ENOENT, 'No such file or directory', 'x')
    assert machine_fault(error) is None


# Each phase of a script's life, and how far it must have come when the signal is sent.
PHASES = {
    'python': "print('now', flush=True)\nwhile True: pass",
    'waiting': "print('now', flush=True)\nimport threading; threading.Event().wait()",
    'swallowed': """
        class Odd:
            def __del__(self):
                until = time.monotonic() + 0.3
                while time.monotonic() < until: pass
        odd = Odd()
        print('now', flush=True)
        del odd
        while True: pass
    """,
    'importing': """
        print('now', flush=True)
        open('slow_module.py', 'w').write('import time; until = time.monotonic() + 1\\nwhile time.monotonic() < until: pass')
        sys.path.insert(0, '')
        try: import slow_module
        except BaseException: print('broke an import')
        while True: pass
    """,
    'cleaning': """
        try:
            print('now', flush=True)
            time.sleep(60)
        finally:
            pathlib.Path('cleaned').touch()
    """,
}


@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize('name', ['SIGHUP', 'SIGINT', 'SIGTERM'])
def test_a_signal_ends_a_script_in_order_and_in_one_line(tmp_path, phase, name):
    number = signal.Signals[name]
    with started(tmp_path, PHASES[phase]) as process:
        assert process.stdout.readline() == 'now\n'
        time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert (out, err) == ('', 'interrupted\n' if name == 'SIGINT' else f'stopped by {name}\n')
    assert phase != 'cleaning' or (tmp_path / 'cleaned').exists()


@contextlib.contextmanager
def started(folder: Path, body: str, lasting: bool = False) -> Iterator[subprocess.Popen]:
    """A script under way; gone at the end, so that a test that fails does not wait for it."""
    with subprocess.Popen(
        [sys.executable, written(folder, body, lasting)],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_twice_ends_at_once_whatever_an_orderly_end_waits_for(tmp_path):
    body = "try:\n    print('now', flush=True); time.sleep(60)\nfinally:\n    print('still here', flush=True); time.sleep(60)"
    began = time.monotonic()
    with started(tmp_path, body) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == 'still here\n'
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, '')
    assert time.monotonic() - began < 20


def test_a_signal_that_comes_while_something_is_written_ends_the_wait_after_it(tmp_path):
    body = """
        from weft.runtime import streams
        streams.writing = True  # as within a print
        print('now', flush=True)
        streams.writing = True
        time.sleep(0.2)
        streams.writing = False
        try:
            time.sleep(60)
        finally:
            print('still here', flush=True)
    """
    began = time.monotonic()
    with started(tmp_path, body) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == 'still here\n', 'it came to its orderly end'
        assert process.wait(20) == 130
    assert time.monotonic() - began < 4, 'before the end would have been cut short'


def test_an_end_that_takes_too_long_is_cut_short(tmp_path):
    body = "try:\n    print('now', flush=True); time.sleep(60)\nfinally:\n    time.sleep(60)"
    with started(tmp_path, 'from weft.runtime import signals; signals.GRACE = 0.3\n' + body) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, '')


NOTED = """
    from weft.runtime import signals
    with signals.noted(lambda number: print('heard', number, flush=True)) as noted:
        print('now', flush=True)
        while not noted.stop:
            if noted.take(): print('asked to save', flush=True)
            time.sleep(.01)
    print('saved', flush=True)
    return 128 + noted.stop
"""


def test_a_training_is_told_of_signals_between_its_steps(tmp_path):
    with started(tmp_path, NOTED, lasting=True) as process:
        assert process.stdout.readline() == 'now\n'
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == 'asked to save\n'
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)  # by the kernel and by the shell, as when a terminal is closed
        out, err = process.communicate(timeout=30)
    assert (process.returncode, sorted(out.splitlines()), err) == (129, ['heard 1', 'saved'], '')


def test_sigint_after_sighup_ends_a_training_at_once_and_sighup_does_not(tmp_path):
    body = """
        from weft.runtime import signals
        with signals.noted(lambda number: print('heard', number, flush=True)):
            print('now', flush=True)
            while True: time.sleep(.01)
    """
    with started(tmp_path, body, lasting=True) as process:
        assert process.stdout.readline() == 'now\n'
        try:
            process.send_signal(signal.SIGHUP)
            assert process.stdout.readline() == 'heard 1\n'
            process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        finally:
            process.kill()


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_training_that_nobody_reads_ends_at_the_second_signal(tmp_path, name):
    """Its main thread waits in the middle of a print, and neither the first signal's line nor its end waits for that."""
    body = """
        from rich.console import Console
        from weft.runtime import signals
        signals.ONCE[15] = 0.1
        console = Console(width=120)
        with signals.noted(lambda number: console.print('heard')):
            while True: console.print('a line of a training')
    """
    with started(tmp_path, body, lasting=True) as process:
        try:
            process.stdout.readline()
            time.sleep(0.5)  # the pipe is full
            process.send_signal(signal.Signals[name])
            time.sleep(0.4)
            process.send_signal(signal.Signals[name])
            assert process.wait(10) == 128 + signal.Signals[name]
        finally:
            process.kill()


def test_what_is_said_at_the_end_waits_for_no_reader():
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, 'wb') as full:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(1 << 16))
        os.set_blocking(writer, True)
        began = time.monotonic()
        streams._put(full.fileno(), b'a line')
        assert time.monotonic() - began < 5


HOST = """
import faulthandler, os, signal, sys, time
from weft.runtime import signals
faulthandler.dump_traceback_later(20, exit=True)
signals.GRACE = .5
def usr1(number, frame): pass
signal.signal(signal.SIGUSR1, usr1)
SIGNALS = (1, 2, 15, signal.SIGUSR1)
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
before = [*map(signal.getsignal, SIGNALS)], sys.unraisablehook
heard = []
for turn in range(3):
    with signals.noted(heard.append) as noted:
        assert [*map(signal.getsignal, SIGNALS)] == [signals._handle] * 4
        os.kill(os.getpid(), signal.SIGINT if turn < 2 else signal.SIGTERM)
        while not noted.stop: time.sleep(.01)
        time.sleep(.1)
    assert ([*map(signal.getsignal, SIGNALS)], sys.unraisablehook) == before
    assert signal.set_wakeup_fd(writer, warn_on_full_buffer=False) == writer
assert heard == [2, 2, 15], heard
for again in range(3):
    try:
        os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
    except KeyboardInterrupt:
        time.sleep(.2)
    else:
        raise AssertionError('nothing was raised')
assert os.read(reader, 9) == bytes([2, 2, 2])
time.sleep(signals.GRACE + .5)
print('alive')
"""


def test_another_programs_signals_are_its_own_after_each_training():
    """A notebook's Ctrl-C after a training interrupts what the notebook does, and ends nothing."""
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', HOST], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'alive\n', '')


@pytest.mark.parametrize('process', [0, 1])
def test_processes_that_do_not_find_each_other_are_to_be_started_again(tmp_path, process):
    """75 in one line: a mistake's 1 or 2, or JAX's abort with a stack trace, would be for good."""
    with socket.create_server(('localhost', 0)) as server:
        port = server.getsockname()[1]
    body = f"""
        from weft.runtime import processes
        processes.TOGETHER = 1
        processes.initialize(processes.Launch('localhost:{port}', 2, {process}), 2)
    """
    found = shell(tmp_path, body, '{}', lasting=True, JAX_PLATFORMS='cpu')
    assert found == (75, '', 'error: the processes did not find each other: after 1 seconds not all are there\n')


def test_a_process_that_cannot_reach_the_others_is_to_be_started_again(capsys):
    assert exit_code_and_line(NotTogether('far')) == (75, 'error: far')
    assert capsys.readouterr().err == 'error: far\n'


def test_a_signal_in_the_middle_of_a_print_ends_the_sleep_after_it(tmp_path):
    """It is let pass there, and comes once more: a sleep would last to its end."""
    body = """
        import signal
        from weft.runtime import streams
        streams.writing = True
        os.kill(os.getpid(), signal.SIGTERM)
        streams.writing = False
        time.sleep(60)
    """
    began = time.monotonic()
    with started(tmp_path, body) as process:
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, 'stopped by SIGTERM\n')
    assert time.monotonic() - began < 5


def test_nohup_is_obeyed(tmp_path):
    body = "print('now', flush=True); time.sleep(0.5); print('done')"
    with started(tmp_path, f'import signal\nprint(signal.getsignal(1) == signal.SIG_IGN)\n{body}') as plain:
        assert plain.communicate()[0].startswith('False')
    code, out, _ = shell(tmp_path, f'{body}\nos.kill(os.getpid(), 1)\nprint("on")', "trap '' HUP; {}")
    assert (code, out.splitlines()) == (0, ['now', 'done', 'on'])


def test_a_message_shows_what_would_move_a_cursor():
    assert shown('a\x1b[2J\nb\u202e') == 'a\\x1b[2J\\nb\\u202e'
    assert str(UserError('x')) == 'x'
