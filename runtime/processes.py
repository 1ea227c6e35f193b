"""Several processes as one run: how this one finds the others, what it is to them, and what they must agree on.

A process is told where it stands (`--coordinator HOST:PORT --processes N --process I`, or the environment's
WEFT_COORDINATOR, WEFT_PROCESSES and WEFT_PROCESS), or it stands in a place that JAX knows: a SLURM job of several tasks,
a TPU of several hosts, on GKE or not. Anything else is a process on its own, which starts nothing.
"""

import argparse
import atexit
import collections
import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax import P
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from weft.runtime import rendezvous as peers
from weft.runtime import streams
from weft.runtime.errors import NotTogether, UserError, shown

TOLD = {
    'coordinator': ('--coordinator', 'WEFT_COORDINATOR'),
    'processes': ('--processes', 'WEFT_PROCESSES'),
    'process': ('--process', 'WEFT_PROCESS'),
}
TOGETHER = 300  # seconds in which processes find each other that do not start at the same time
SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')


class Launch(NamedTuple):
    """Where a process stands among several. None: JAX finds it out."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a script that may run as several processes."""
    group = parser.add_argument_group(
        'several processes',
        'found by themselves under SLURM and on TPUs of many hosts; where one is lost, or gives no sign of life for '
        f'{peers.PATIENCE:g} seconds ({peers.VARIABLE}=SECONDS says otherwise), all end with {peers.LOSS}, to be started '
        f'again; so do processes that have not found each other {TOGETHER} seconds after they began',
    )
    group.add_argument('--coordinator', metavar='HOST:PORT', help='where process 0 runs, and a free port there')
    group.add_argument('--processes', metavar='N', help='how many processes there are')
    group.add_argument('--process', metavar='I', help='which one this is, from 0')


def detect_launch(told: Mapping[str, str | None], environment: Mapping[str, str] | None = None) -> Launch | None:
    """Where this process stands: by the options, else the WEFT_ variables, else what JAX knows. None: it is alone.

    Raises UserError where what was told is incomplete or makes no sense.
    """
    environment = os.environ if environment is None else environment
    said, names = dict[str, str](), dict[str, str]()
    for key, (option, variable) in TOLD.items():
        if value := told.get(key) or environment.get(variable):
            said[key], names[key] = value, option if told.get(key) else variable
    if not said:
        return _detect(environment)
    if missing := [f'{option} (or {variable})' for key, (option, variable) in TOLD.items() if key not in said]:
        given = ', '.join(names.values())
        raise UserError(f'{given} without {", ".join(missing)}: a process among several must be told all three')
    place = re.fullmatch(r'(\[[0-9a-fA-F:.]+\]|[^\s:]+):([0-9]{1,5})', said['coordinator'])
    if not place or not 0 < int(place[2]) < 1 << 16:
        given = shown(said['coordinator'], 80, quoted=True)
        raise UserError(f'{names["coordinator"]} is {given}: it must be HOST:PORT, as in host-0:9876')
    processes = _number(names['processes'], said['processes'], 1)
    process = _number(names['process'], said['process'], 0)
    if process >= processes:
        raise UserError(
            f'{names["process"]} is {process} and {names["processes"]} is {processes}: processes count from 0; '
            f'nearest that works: {processes - 1}'
        )
    return Launch(said['coordinator'], processes, process) if processes > 1 else None


def _number(name: str, text: str, least: int) -> int:
    """What an option or a variable says. Raises UserError for what is no number of processes."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < least:
        raise UserError(
            f'{name} is {shown(text, 40, quoted=True)}: it must be a whole number of at least {least} and at most 9 digits'
        )
    return int(text)


def check_devices(devices: int, processes: int, mesh: object) -> None:
    """Raises UserError where a mesh's devices cannot be shared out evenly."""
    if devices % processes:
        below, above = devices // processes * processes, -(-devices // processes) * processes
        raise UserError(
            f'mesh ({mesh}) asks for {devices} devices and there are {processes} processes: each must have as many '
            f'devices as the others; nearest that work: {f"{below} or " if below else ""}{above} devices'
        )


def initialize(launch: Launch, devices: int) -> None:
    """Joins the others; `devices`: those of the whole mesh. Call it after `sharding.mesh.configure_jax`, before JAX has begun.

    Raises NotTogether where they do not find each other (or ends the process, after `TOGETHER` seconds), UserError where they
    have not just the devices of the mesh.
    """
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM, which means save and stop
    method = 'deactivate' if launch.coordinator else None  # what was told is all, wherever this runs
    # JAX aborts with a stack trace when it loses a process: `peers` is to be first.
    beats = max(100, math.ceil(2 * peers.patience()))
    late = threading.Timer(TOGETHER, _not_together)  # JAX would abort when its own time is up
    late.daemon = True
    late.start()
    try:
        try:
            jax.distributed.initialize(
                *launch,
                cluster_detection_method=method,
                initialization_timeout=2 * TOGETHER + 60,
                heartbeat_timeout_seconds=beats,
            )
        finally:
            late.cancel()
        if jax.process_count() > 1:
            if jax.default_backend() == 'cpu':
                _hush()
            if jax.process_index() == 0:
                _outlive()
            peers.join(jax.process_index(), jax.process_count(), _exchange, jax.distributed.shutdown)
    except Exception as error:
        raise NotTogether(f'the processes did not find each other: {" ".join(str(error).split())}') from error
    if jax.device_count() != devices:
        raise UserError(
            f'the mesh asks for {devices} devices and the {jax.process_count()} processes have {jax.device_count()} '
            f'({jax.local_device_count()} each): the sizes along its axes must multiply to {jax.device_count()}'
        )


def _not_together() -> NoReturn:
    streams.say(f'error: the processes did not find each other: after {TOGETHER} seconds not all are there')
    os._exit(peers.LOSS)


def _hush() -> None:
    """Gloo, which connects CPUs, tells of each connection on standard output: only Python's own lines go there from now on."""
    sys.stdout.flush()
    real = streams.moved(sys.stdout, os.dup(1))
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = real


def _outlive() -> None:
    """Keeps process 0's connections to JAX's coordination open for some seconds after it dies.

    The moment they close, JAX aborts all other processes with a stack trace (100 seconds after any other kind of loss);
    so `peers` comes first and says what was lost. A small process holds copies of them until its input ends and a little
    longer; the port itself is free at once.
    """
    connections = []
    for number in range(3, 4096):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as copy:
                listens = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if copy.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                    connections.append(number)
    holder = subprocess.Popen(
        ['sh', '-c', 'trap "" INT TERM HUP; cat; sleep 20'],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=connections,
        start_new_session=True,
    )
    atexit.register(holder.kill)


class Agreement:
    """A number that any process may raise, seen by all at the same call: the largest of those given `late` calls before.

    Alone, a process agrees with itself at once. Use it under `jax.set_mesh`, in all processes alike.
    """

    def __init__(self, late: int):
        self.late = late  # an accelerator would stand still if the host waited for what has just been asked
        self.asked: collections.deque[jax.Array] = collections.deque()

    def __call__(self, mine: int) -> int:
        if not peers.several():
            return mine
        mesh = jax.sharding.get_mesh()
        split = NamedSharding(mesh, P(mesh.axis_names))
        mine_D = jax.make_array_from_callback((mesh.size,), split, lambda _: np.full(1, mine, np.int32))
        self.asked.append(_largest(mine_D))
        return int(self.asked.popleft()) if len(self.asked) > self.late else 0


@jax.jit
def _largest(number_D: jax.Array) -> jax.Array:
    return number_D.max()


def _exchange(message: dict[str, Any]) -> dict[str, Any]:
    """Gives all processes the message of process 0, over the devices."""
    text = json.dumps(message).encode()
    letters = np.frombuffer(text.ljust(2048), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(letters)).tobytes())


def _detect(environment: Mapping[str, str]) -> Launch | None:
    if all(name in environment for name in SLURM):
        for name in 'SLURM_PROCID', 'SLURM_LOCALID':  # which JAX reads
            _number(name, environment[name], 0)
        tasks = _number('SLURM_NTASKS', environment['SLURM_NTASKS'], 1)
        return Launch(processes=tasks) if tasks > 1 else None
    if environment.get('JAX_PLATFORMS', 'tpu') not in ('', 'tpu', 'tpu,cpu') or not _has_tpu():
        return None
    hosts = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
    if hosts is None and 'TPU_SKIP_MDS_QUERY' not in environment:
        hosts = _metadata('worker-network-endpoints')
    slices = _number('MEGASCALE_NUM_SLICES', environment.get('MEGASCALE_NUM_SLICES') or '1', 0)
    return Launch() if ',' in (hosts or '') or slices > 1 else None


@functools.cache
def _has_tpu() -> bool:
    chips = any(Path('/dev').glob('accel[0-9]*')) or any(Path('/dev/vfio').glob('[0-9]*'))
    return chips and importlib.util.find_spec('libtpu') is not None


def _metadata(key: str) -> str | None:
    url = f'http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}'
    request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()
    return None
