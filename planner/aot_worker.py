"""Compiles one step and says what became of it: `python -m weft.planner.aot_worker` with a request on stdin (planner/aot.py).

Runs in an environment that has the compiler, which is not the one that computes: with libtpu or the CUDA plugin
installed plain CPU runs start slower, and only one process may hold libtpu. The last line of stdout is the answer, as JSON.
"""

import functools
import inspect
import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.experimental import topologies
from jax.sharding import NamedSharding

from weft.inference.generate import first_token, next_token
from weft.inference.prompts import Prompts
from weft.inference.run import in_compute_dtype
from weft.inference.sampling import RowSampling
from weft.inference.step import OPTIONS as DECODING
from weft.inference.unstacked import is_written_out, kinds, unstacked
from weft.model.batch import Batch, Source
from weft.planner.aot import PLUGINS
from weft.planner.traffic.hlo import compiled_traffic
from weft.planner.traffic.traced import jaxpr_traffic
from weft.sharding.mesh import BATCH, make_mesh
from weft.sharding.mesh import platform as device_kind
from weft.training import config as configs
from weft.training.config import RunConfig
from weft.training.state import abstract, abstract_state
from weft.training.step import init, train_step

UNTIMED = {'cuda': {'xla_gpu_autotune_level': 0}}  # compiler options: there is no GPU here whose kernels could be timed


def rows(*shape: int, dtype: Any = jnp.int32) -> Any:
    """Numbers, rows first, as they come to a step on the current mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), P(BATCH)))


def training_step(config: RunConfig, batch: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """The step of training, which keeps its state's memory, and its arguments."""
    row_BT = rows(batch, length)
    source = Source(row_BT, row_BT, row_BT) if config.model.encoder else None
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0, keep_unused=True)
    return step, (abstract_state(config), Batch(row_BT, row_BT, row_BT, row_BT, source))


def serving_step(config: RunConfig, what: str, batch: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """The step that reads prompts of `length` tokens, or that decodes one more token with a cache of as many slots."""
    model = abstract(lambda: in_compute_dtype(init(config).model))
    model = unstacked(model, kinds) if is_written_out(model) else model
    wide, whole = (rows(batch, dtype=dtype) for dtype in (np.float32, np.int32))
    choice = RowSampling(wide, whole, wide, wide, rows(batch, dtype=np.uint32))
    source = (rows(batch, length), rows(batch)) if config.model.encoder else None
    # Not compiled yet: options of a compiler may be given to the outermost program alone.
    first, after = inspect.unwrap(first_token), inspect.unwrap(next_token)
    prompts = Prompts(rows(batch, length), rows(batch), source)
    if what == 'prefill':
        read = lambda model, prompts, choice: first(model, length, prompts, choice)
        return jax.jit(read, keep_unused=True), (model, prompts, choice)
    cache = abstract(lambda *known: first(known[0], length, *known[1:])[1], model, prompts, choice)
    return jax.jit(after, donate_argnums=1, keep_unused=True), (model, cache, rows(batch), rows(batch), choice)


def memory(compiled: Any, platform: str) -> dict[str, int]:
    """Bytes on one device as the compiler laid them out. `total`: what the program takes, its arguments among it.

    On GPUs that is arguments, temporaries, which are one buffer, and results of their own. What TPUs' compiler calls
    temporaries counts memory again that arrays use one after the other: it refuses a program by its fullest moment, and
    compiles one whose arguments and temporaries are a quarter more than a chip has (benchmarks/plan.md names it).
    """
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {
        'arguments': m.argument_size_in_bytes,
        'outputs': m.output_size_in_bytes,
        'aliased': m.alias_size_in_bytes,  # results that take an argument's place
        'temporaries': m.temp_size_in_bytes,
        'code': m.generated_code_size_in_bytes,
        'total': m.peak_memory_in_bytes if platform == 'tpu' else total,
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    config = configs.parse(request['config'], 'the config')
    platform, batch, length = request['platform'], request['rows'], request['length']
    name, options = request['topology'], dict[str, Any]()
    if platform == 'cuda':
        name, options = '', {'target_config': request['description'], 'topology': name}
    elif config.mesh.size == 1:
        options = {'chips_per_host_bounds': (1, 1, 1)}  # a host has four by default
    topology = topologies.get_topology_desc(name, platform=platform, **options)
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name], began = round(now - began, 2), now

    with jax.set_mesh(make_mesh(config.mesh, topology.devices)):
        mesh = dict(jax.sharding.get_mesh().shape)
        what = request['what']
        step, arguments = (
            training_step(config, batch, length) if what == 'train' else serving_step(config, what, batch, length)
        )
        traced = step.trace(*arguments)
        asked = jaxpr_traffic(traced.jaxpr, mesh)
        lap('trace')
        lowered = traced.lower()
        lap('lower')
        try:
            own = DECODING.get(device_kind(), {}) if what == 'decode' else {}
            compiled = lowered.compile(compiler_options=UNTIMED.get(platform, {}) | own or None)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            lap('compile')
            return {'status': 'does not fit', 'seconds': seconds, 'message': str(error), **needed(str(error))}
        lap('compile')
        text = compiled.as_text()
        if request.get('hlo'):
            Path(request['hlo']).write_text(text)
        return {
            'status': 'compiled',
            'seconds': seconds,
            'memory': memory(compiled, platform),
            'sent': compiled_traffic(text, mesh).to_json(),
            'asked': asked.lowered().to_json(),
        }


def needed(message: str) -> dict[str, Any]:
    """The bytes that the compiler says a program needs and has, where it says them."""
    said = re.search(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm', message)
    if not said:
        return {}
    size = lambda number, unit: int(float(number) * 2 ** (10 * (1 + 'KMGT'.index(unit))))
    return {'needed': size(said[1], said[2]), 'available': size(said[3], said[4])}


if __name__ == '__main__':
    wanted = json.load(sys.stdin)
    versions = {name: metadata.version(name) for name in ('jax', PLUGINS[wanted['platform']])}
    print('\n' + json.dumps(answer(wanted) | {'versions': versions}))
