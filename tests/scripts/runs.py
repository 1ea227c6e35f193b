"""Starting the scripts as a user does, in a folder of the test's own."""

import contextlib
import functools
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jaxlib
import pytest

from weft.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
# Compiling takes most of the time of the tests, and the CPU's newer way to make fused loops two thirds of that. jaxlib 0.12
# has no other way, and ends at an option that it does not know.
KNOWN = jaxlib.__version__.startswith('0.10.')
QUICK = ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2' if KNOWN else ''
CONFIG = """
name: tiny
mesh: {data: 2, expert: 2, tensor: 2}
model:
  {layers: 2, model_dim: 32, attention: {heads: 4, kv_heads: 2}, mlp: {dim: 32},
  moe: {experts: 4, mlp_dim: 16, first_dense_layers: 1}}
data: {source: text, vocabulary: 320}
training: {steps: 40, batch: 8, sequence_length: 32}
optimizer: {learning_rate: 1e-2, warmup_steps: 2}
checkpoint: {every: 3}
metrics: {every: 1, validate_every: 10, validation_rows: 8}
"""


def workplace(folder: Path) -> Path:
    """A folder with a config and text to learn from."""
    (folder / 'text').mkdir(parents=True)
    for number in range(20):
        lines = [f'def f{number}_{i}(x):\n    return x + {i * number}\n\n\n' for i in range(40)]
        (folder / 'text' / f'{number}.py').write_text(''.join(lines), encoding='utf-8')
    (folder / 'tiny.yaml').write_text(CONFIG, encoding='utf-8')
    return folder


class Started(subprocess.Popen):
    """A process that is killed where the block that it is used in fails: nobody waits for its end then."""

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, trace)


@functools.cache
def compiled() -> tempfile.TemporaryDirectory:
    """Programs that the scripts compiled, for all tests of this process: most of them train one model on one mesh.

    Another worker has another folder: an entry that is half written when another process reads it is told on stderr.
    """
    return tempfile.TemporaryDirectory(prefix='weft-compiled-', ignore_cleanup_errors=True)


def start(folder: Path, script: str, *arguments: str, **variables: str) -> Started:
    """A script under way in `folder`, with more environment variables."""
    environment = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
    environment |= {
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
        'JAX_COMPILATION_CACHE_DIR': compiled().name,
    }
    # Two of three seconds would go into optimising programs this small.
    environment |= {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'XLA_FLAGS': QUICK, **variables}
    command = [sys.executable, str(ROOT / 'scripts' / f'{script}.py'), *arguments]
    return Started(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, script: str, *arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """A script from start to end, with more environment variables; its exit code must be `code`."""
    with start(folder, script, *arguments, **variables) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == code, f'{script} {arguments}: exit {process.returncode}, not {code}\n{out}\n{err}'
    return subprocess.CompletedProcess(arguments, code, out, err)


def refused(folder: Path, script: str, *arguments: str) -> str:
    """What a script raises as a user's mistake, run in this process: scripts/entry.py would print it after `error: `."""
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, 'argv', [f'{script}.py', *arguments]),
        pytest.raises(UserError) as caught,
    ):
        importlib.import_module(f'scripts.{script}').main()
    line = str(caught.value)
    assert '\n' not in line
    return line


def start_together(folder: Path, processes: int, *arguments: str, **variables: str) -> list[subprocess.Popen]:
    """scripts/train.py under way as several processes of one machine, told so by the environment, as launch files do."""
    with socket.create_server(('localhost', 0)) as server:
        port = server.getsockname()[1]
    told = {'WEFT_COORDINATOR': f'localhost:{port}', 'WEFT_PROCESSES': str(processes)}
    told |= variables
    return [start(folder, 'train', *arguments, **told, WEFT_PROCESS=str(process)) for process in range(processes)]


def rows(folder: Path, name: str = 'tiny') -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / 'runs' / name / 'metrics.jsonl').read_text().splitlines()]


def everything(folder: Path) -> dict[str, tuple]:
    """What stands in a folder: path -> size and time of change, to see that nothing was touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob('*'))
    }
