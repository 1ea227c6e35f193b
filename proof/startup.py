"""Time from a command to its first token: scripts/decode.py in processes of their own, as a user starts it."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from weft.runtime.errors import UserError

DECODE = Path(__file__).parents[1] / 'scripts' / 'decode.py'


def measure_start(run: str, prompt: str, turns: int) -> dict[str, Any]:
    """Medians over `turns`, each with a cache of compiled programs of its own: one process fills it, the next finds it full.

    Files are in the system's memory as the process before has left them.
    """
    cold, warm = list[tuple[float, float]](), list[tuple[float, float]]()
    for _ in range(turns):
        with tempfile.TemporaryDirectory(prefix='weft-') as cache:
            cold.append(first_token(run, prompt, cache))
            warm.append(first_token(run, prompt, cache))
    figures: dict[str, Any] = {}
    for name, times in (('cold', cold), ('warm', warm)):
        first, all_ = zip(*times, strict=True)
        figures |= {f'{name}_seconds': statistics.median(first), f'{name}_most_seconds': max(first)}
        figures[f'{name}_end_seconds'] = statistics.median(all_)
    return figures | {'turns': turns, 'cores': len(os.sched_getaffinity(0))}


def first_token(run: str, prompt: str, cache: str) -> tuple[float, float]:
    """Seconds from the start of a process to its first token's text, and to its end after 8 tokens."""
    environment = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    command = [sys.executable, str(DECODE), run, '--prompt', prompt, '--max-new-tokens', '8']
    began = time.perf_counter()
    environment['XDG_CACHE_HOME'] = cache
    with (
        tempfile.TemporaryFile() as told,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=told) as process,
    ):
        assert process.stdout, 'it is a pipe'
        process.stdout.read(len(prompt.encode()) + 1)
        first = time.perf_counter() - began
        process.stdout.read()
        if code := process.wait():
            told.seek(0)
            raise UserError(f'decode.py {run} ended with {code}: {told.read().decode(errors="replace").strip()}')
    return first, time.perf_counter() - began
