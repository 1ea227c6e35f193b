"""What holds in every test: eight simulated CPU devices, strict JAX settings, float64 only where a test asks for it."""

import gc
import os
import platform
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from tests.scripts.runs import QUICK
from weft.runtime.errors import UserError
from weft.sharding.mesh import run_in_order

pytest_plugins = ['tests.quick']
DEVICES = 8
TOO_FEW = re.compile(r'asks for \d+ devices; this machine has|Number of devices \d+ must be')

# Under nohup, and in the background of a shell, what the tests start would pass these signals over.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before the first use of a device. Not through the environment: scripts that tests start find it as in a user's shell.
jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS', 'cpu'))
if '--xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', DEVICES)
run_in_order()
# NumPy reads it when it is loaded: in the workers. They share the cores, and where threads of BLAS find none free they wait for
# each other at full speed: decompositions of many small matrices took 15 times as long.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# For this process alone: those that tests start may be of another jaxlib (planner/aot.py), or as in a user's shell.
before = os.environ['XLA_FLAGS']
os.environ['XLA_FLAGS'] = before + QUICK
jax.devices()  # reads them
os.environ['XLA_FLAGS'] = before
# [B, T] + [T] is more often a mistake than meant.
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Else GPUs and TPUs multiply float32 in fewer bits, and no tight tolerance holds there.
jax.config.update('jax_default_matmul_precision', 'highest')
# The tests compile longer than they compute: a second run takes a fifth of the time. Machine code is for one machine.
jax.config.update('jax_compilation_cache_dir', str(Path(__file__).parents[1] / '.cache' / 'jax' / platform.node()))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
# Tracing makes many short-lived objects and hardly a cycle: looking for cycles as often as usual takes a seventh of the time.
gc.set_threshold(100_000, 20, 20)
# Programs are compiled three times faster this way, and mean the same; a test of what optimising changes asks for `optimized`,
# and test_pairs.py has a run whose programs are those of users.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: the collector need not look at it again after every module


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """On accelerators a test whose mesh needs more of them than there are is skipped; a CPU plays as many as it takes."""
    try:
        return (yield)
    except (UserError, ValueError) as error:
        if jax.default_backend() != 'cpu' and TOO_FEW.search(str(error)):
            pytest.skip(str(error))
        raise


@pytest.fixture
def optimized() -> Iterator[None]:
    """The test compiles with the optimisations that users have."""
    jax.config.update('jax_disable_most_optimizations', False)
    try:
        yield
    finally:
        jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(autouse=True)
def cached() -> None:
    """Each test begins with the compilation cache, which a mesh with sends turns off (`sharding.mesh.compile_anew`)."""
    if not jax.config.jax_enable_compilation_cache:
        jax.config.update('jax_enable_compilation_cache', True)
        reset_cache()


@pytest.fixture
def float64() -> Iterator[None]:
    """The test computes in 64 bits: jnp's default dtypes are float64 and int64 until it ends."""
    jax.config.update('jax_enable_x64', True)
    try:
        yield
    finally:
        jax.config.update('jax_enable_x64', False)


@pytest.fixture(autouse=True, scope='module')
def forgotten() -> Iterator[None]:
    """Programs of a finished module are let go: a thousand tests would keep gigabytes of them."""
    yield
    jax.clear_caches()
    gc.collect()
