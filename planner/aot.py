"""The real steps compiled for machines that are not here: what they keep on a device, and what they send.

Each compiler has an environment of its own, which `make compilers` makes, and each program a process of its own with a
time-out. Only the compiler is asked: nothing runs.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from weft.inference.run import NO_PIPELINE
from weft.model.sizes import sizes
from weft.planner.chips import CHIPS
from weft.planner.topology import compile_target
from weft.planner.traffic.tables import Traffic, difference
from weft.runtime.errors import UserError
from weft.sharding.mesh import BATCH, Divides, check_divides
from weft.training import config as configs
from weft.training.config import RunConfig

ROOT = Path(__file__).parents[1]
PLUGINS = {'tpu': 'libtpu', 'cuda': 'jax_cuda13_plugin'}  # packages that hold a compiler


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a step, or why it made nothing."""

    # What is compiled may yet not fit: see `fits`.
    status: Literal['compiled', 'does not fit', 'not finished', 'failed']
    seconds: dict[str, float]  # trace, lower, compile
    # Bytes on one device: arguments, outputs, aliased, temporaries, code, total; empty if there are none.
    memory: dict[str, int]
    available: int  # bytes of a device
    sent: Traffic  # by the compiled program, on each device, by kind and mesh axes
    asked: Traffic  # by the program that was compiled, in the same words
    message: str = ''  # where it is not compiled: the compiler's own, or what ended it
    # Of jax and of the package that holds the compiler.
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool | None:
        """Whether a device's memory holds the program; None where nobody knows."""
        if self.status == 'compiled':
            return self.memory['total'] <= self.available
        return False if self.status == 'does not fit' else None

    def unplanned(self) -> list[str]:
        """Lines for what the compiled program sends that its source does not ask for; what is below 1 % is not told."""
        return difference(self.asked, self.sent, slack=0.01, ignore=0.01)


def compile_step(
    config: RunConfig,
    chip: str,
    what: str = 'train',
    *,
    rows: int | None = None,
    length: int | None = None,
    timeout: float = 1800,
    hlo: Path | None = None,
) -> Compiled:
    """One step of a run, compiled for as many devices of a kind as its mesh has.

    Args:
        config: the run; its mesh is that of the machine.
        chip: a name of planner/chips.py.
        what: 'train', the whole step of training; 'decode', one more token in each row; 'prefill', the reading of prompts.
        rows: of the global batch; default `training.batch`.
        length: tokens of a row, or slots of its cache; default `training.sequence_length`.
        timeout: seconds until a compiler is ended.
        hlo: a file for the compiled program's text.

    Raises UserError where no compiler for the chip is installed, no machine has so many of it, or the mesh does not divide the
    model or the batch.
    """
    assert what in ('train', 'decode', 'prefill'), what
    target = compile_target(chip, config.mesh.size)
    t = config.training
    rows, length = t.batch if rows is None else rows, t.sequence_length if length is None else length
    t = dataclasses.replace(
        t, batch=rows, sequence_length=length, accumulation=t.accumulation if what == 'train' else 1
    )
    config = dataclasses.replace(config, training=t)
    if what == 'train':
        config.check_sizes()
    else:
        split = Divides(BATCH, 'the number of rows', rows)
        check_divides(config.mesh, [*sizes(config.model), NO_PIPELINE, split])
    request = {'config': configs.dump(config), 'what': what, 'rows': rows, 'length': length, 'hlo': hlo and str(hlo)}
    request |= {'platform': target.platform, 'topology': target.name, 'description': target.description}
    return read_compiled(_run(target.platform, request, timeout), int(CHIPS[chip].memory_bytes))


def interpreter(platform: str) -> str:
    """Python with the compiler of a platform: of `make compilers`, else this one. Raises UserError where there is none."""
    own = ROOT / '.compilers' / platform / 'bin' / 'python'
    if own.exists():
        return str(own)
    if find_spec(PLUGINS[platform]):
        return sys.executable
    raise UserError(f'no compiler for {platform} is installed here: `make compilers` makes an environment with it')


def _run(platform: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    # No metadata server is asked, and more than one process may hold libtpu, for nothing runs.
    env |= {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    command = [interpreter(platform), '-m', 'weft.planner.aot_worker']
    try:
        ended = subprocess.run(
            command, input=json.dumps(request), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {'status': 'not finished', 'message': f'not compiled after {timeout:g} s'}
    if ended.returncode == 0:
        return json.loads(ended.stdout.splitlines()[-1])
    if ended.returncode < 0:
        cause = f'the compiler was ended by signal {-ended.returncode}; 9 is often this machine out of memory'
        return {'status': 'not finished', 'message': cause}
    return {'status': 'failed', 'message': ended.stderr[-4000:]}


def read_compiled(answer: Mapping[str, Any], available: int = 0) -> Compiled:
    """What a worker answered, or a record keeps; `available` where it does not say so."""
    sent, asked = (Traffic.from_json(answer[name]) if name in answer else Traffic() for name in ('sent', 'asked'))
    return Compiled(
        status=answer['status'],
        seconds=answer.get('seconds', {}),
        memory=answer.get('memory', {'total': answer['needed']} if 'needed' in answer else {}),
        available=answer.get('available', available),
        sent=sent,
        asked=asked,
        message=answer.get('message', ''),
        versions=answer.get('versions', {}),
    )
