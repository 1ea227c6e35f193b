"""Speed and memory of real steps on this machine. Figures are medians of steps that are waited for one by one."""

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from weft.inference.generate import next_token
from weft.inference.run import in_compute_dtype
from weft.inference.step import empty_cache, prefill
from weft.inference.unstacked import divided, is_written_out, unstacked
from weft.model import cost
from weft.model.batch import Batch
from weft.model.forward import logits, place
from weft.model.ops.grouped_matmul import default_backend, expert_mlp
from weft.model.sizes import sizes
from weft.planner.chips import Chip, chip_of_device
from weft.proof.kernels import check_profiled, kernel_table, kernels
from weft.sharding.mesh import BATCH, SEQUENCE, Divides, check_divides, make_mesh, platform
from weft.training.config import RunConfig
from weft.training.step import init, train_step


def seconds_each(step: Callable[[], Any], count: int, warm: int = 2) -> list[float]:
    """Times of `count` calls, each waited for, after `warm` that are not counted (the first compiles)."""
    times = []
    for _ in range(warm + count):
        began = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - began)
    return times[warm:]


def in_turns(
    first: Callable[[], Any], second: Callable[[], Any], turns: int, warm: int = 2
) -> tuple[list[float], list[float]]:
    """Times of `turns` calls of each, one after the other, so that what else the machine does meets both."""
    pairs = [(*seconds_each(first, 1, warm=0), *seconds_each(second, 1, warm=0)) for _ in range(warm + turns)]
    return [a for a, _ in pairs[warm:]], [b for _, b in pairs[warm:]]


class Trainer:
    """Real training steps on random tokens, one document a row, that capture `taps`. Use it under `jax.set_mesh`."""

    def __init__(self, config: RunConfig, taps: Sequence[str] = ()):
        t = config.training
        shape = (t.batch, t.sequence_length + 1)
        ids = np.random.default_rng(0).integers(0, config.model.vocabulary, shape, dtype=np.int32)
        places = np.broadcast_to(np.arange(t.sequence_length, dtype=np.int32), (t.batch, t.sequence_length))
        self.batch = place(Batch(ids[:, :-1], ids[:, 1:], places, np.ones_like(places)))
        self.state = jax.jit(functools.partial(init, config))()
        self.run = jax.jit(functools.partial(train_step, config, taps=taps), donate_argnums=0)

    def step(self) -> Any:
        """One step; its loss, and what is captured."""
        self.state, figures = self.run(self.state, self.batch)
        return figures['loss'], figures.get('taps')


def measure_training(config: RunConfig, steps: int, profile: int = 0, taps: Sequence[str] = ()) -> dict[str, Any]:
    """The training figures of the command-line contract, and what they rest on; `profile` kernels are listed on stderr.

    Tokens a second are those of all rows on all devices. With `taps`, names of activations or patterns of them, a step that
    captures these takes turns with one that does not.
    """
    config = config.with_planned_vocabulary()
    config.check_sizes()
    if profile:
        check_profiled()
    t = config.training
    with jax.set_mesh(make_mesh(config.mesh)):
        step = Trainer(config).step
        captured: dict[str, Any] = {}
        if taps:
            plain, tapped = in_turns(step, Trainer(config, taps).step, steps)
            ratios = [b / a for a, b in zip(plain, tapped, strict=True)]
            captured = {'taps': ' '.join(taps), 'taps_step_seconds': statistics.median(tapped)}
            captured |= {'taps_ratio': statistics.median(ratios), 'taps_ratio_range': [min(ratios), max(ratios)]}
        seconds = statistics.median(plain if taps else seconds_each(step, steps))
        if profile:
            print(kernel_table(kernels(step), seconds, profile), file=sys.stderr)
    tokens = t.batch * t.sequence_length / seconds
    flops = cost.training_flops(config.model, t.sequence_length)
    peak, basis = peak_flops(config)
    return {
        'step_seconds': seconds,
        'tokens_per_second': tokens,
        'flops_per_token': flops,
        'achieved_flops': flops * tokens,
        'peak_flops': peak,
        'peak_share': flops * tokens / peak if peak else None,
        'peak_basis': basis,
        'peak_memory_bytes': peak_memory(),
        **_where(config),
        **captured,
    }


def measure_decoding(config: RunConfig, rows: int, prompt: int, new: int, profile: int = 0) -> dict[str, Any]:
    """The decoding figures of the command-line contract, for `rows` sequences of `prompt` tokens and `new` more.

    `recompute_seconds` is a token's cost without a cache: the full forward pass over as many tokens as the median step sees.
    """
    config = config.with_planned_vocabulary()
    if profile:
        check_profiled()
    c, mesh = config.model, make_mesh(config.mesh)
    check_divides(
        config.mesh, [*sizes(c), Divides(BATCH, '--rows', rows), Divides(SEQUENCE, '--prompt + --new', prompt + new)]
    )
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: in_compute_dtype(init(config).model))()
        model = unstacked(model, divided) if is_written_out(model) else model
        ids = np.random.default_rng(0).integers(0, c.vocabulary, (rows, prompt + new), dtype=np.int32)
        read = jax.jit(lambda model, *at: prefill(model, empty_cache(model, rows, prompt + new), *at))
        tokens_BT, length_B = place(ids[:, :prompt]), place(np.full(rows, prompt, np.int32))
        prefill_seconds = statistics.median(seconds_each(lambda: read(model, tokens_BT, length_B), 3))
        state = [place(ids[:, prompt]), length_B, read(model, tokens_BT, length_B)[1]]

        def step() -> Any:
            token_B, position_B, cache = state
            *state[:], _ = next_token(model, cache, token_B, position_B, None)
            return state[0]

        seconds = statistics.median(seconds_each(step, new - 2))
        if profile:
            print(kernel_table(kernels(step), seconds, profile), file=sys.stderr)
        everything = jax.jit(lambda model, *at: jnp.argmax(logits(model, *at)[:, -1], -1))
        seen = -(-(prompt + new // 2) // config.mesh.span(SEQUENCE)) * config.mesh.span(SEQUENCE)
        places = np.broadcast_to(np.arange(seen, dtype=np.int32), (rows, seen))
        arguments = place(ids[:, :seen]), place(places), place(np.ones_like(places))
        again = statistics.median(seconds_each(lambda: everything(model, *arguments), 5))
    width = jnp.dtype(config.compute.dtype).itemsize
    bytes_ = cost.decode_bytes(c, rows, prompt + new / 2, width, width)
    bandwidth, basis = peak_bandwidth(config)
    return {
        'step_seconds': seconds,
        'tokens_per_second': rows / seconds,
        'tokens_per_second_per_row': 1 / seconds,
        'flops_per_token': sum(cost.flops_per_token(c, 'decode', prompt + new / 2).values()),
        'bytes_per_token': bytes_,
        'bandwidth_share': bytes_ * rows / seconds / bandwidth if bandwidth else None,
        'bandwidth_basis': basis,
        'prefill_seconds': prefill_seconds,
        'recompute_seconds': again,
        'peak_memory_bytes': peak_memory(),
        'rows': rows,
        'prompt': prompt,
        'new': new,
        **_where(config),
    }


def measure_experts(
    rows: int, experts: int, dim: int, hidden: int, dtype: str = 'float32', backend: str = 'auto', rounds: int = 15
) -> dict[str, Any]:
    """The experts' gated MLP on sorted rows beside one plain matmul [rows, dim] @ [dim, hidden], in turns, one device.

    Rates count the MLP's three matmuls (with gradient: nine, what is computed again not counted). `forward_share` and
    `gradient_share` are of the plain matmul's forward rate, `gradient_share_of_gradient` of its rate with its own gradient.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    x_RD = jax.random.normal(keys[0], (rows, dim), dtype)
    gate_EDF, up_EDF, down_EDF = (
        jax.random.normal(key, (experts, dim, hidden), dtype) * fan_in**-0.5
        for key, fan_in in zip(keys[1:4], (dim, dim, hidden), strict=True)
    )
    sizes_E = jnp.bincount(jax.random.randint(keys[4], (rows,), 0, experts), length=experts).astype(jnp.int32)
    backend = default_backend(platform()) if backend == 'auto' else backend
    mlp = lambda x, gate, up, down: expert_mlp(x, gate, up, down, sizes_E, backend=backend)
    plain = lambda x, w: x @ w
    gradient = lambda f: jax.jit(lambda dy, *a: jax.vjp(f, *a)[1](dy))
    weights, plain_weights = (x_RD, gate_EDF, up_EDF, down_EDF), (x_RD, gate_EDF[0])
    runs = {
        'mlp': functools.partial(jax.jit(mlp), *weights),
        'plain': functools.partial(jax.jit(plain), *plain_weights),
        'mlp_gradient': functools.partial(gradient(mlp), x_RD, *weights),
        'plain_gradient': functools.partial(gradient(plain), jnp.ones((rows, hidden), dtype), *plain_weights),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            took = seconds_each(run, 1, warm=0)
            times[name] += took if turn >= 2 else []
    seconds = {name: statistics.median(values) for name, values in times.items()}
    # vjp of the plain matmul needs no forward pass, that of the MLP does.
    products = {'mlp': 3, 'plain': 1, 'mlp_gradient': 9, 'plain_gradient': 2}
    rate = {name: count * 2.0 * rows * dim * hidden / seconds[name] for name, count in products.items()}
    return {
        'rows': rows,
        'experts': experts,
        'dim': dim,
        'hidden': hidden,
        'dtype': dtype,
        'backend': backend,
        **{f'{name}_seconds': seconds[name] for name in ('mlp', 'plain', 'mlp_gradient')},
        'plain_flops': rate['plain'],
        'forward_share': rate['mlp'] / rate['plain'],
        'gradient_share': rate['mlp_gradient'] / rate['plain'],
        'gradient_share_of_gradient': rate['mlp_gradient'] / rate['plain_gradient'],
        'device': jax.devices()[0].device_kind,
    }


def peak_flops(config: RunConfig) -> tuple[float | None, str]:
    """FLOP/s that the mesh's devices (a CPU: this machine) can reach at most in the config's dtype, and how that is known."""
    n = 2048
    multiply = jax.jit(lambda a: a @ a)
    measure = lambda a: 2 * n**3 / min(seconds_each(lambda: multiply(a), 8))
    about = f'best of 8 float32 matmuls of {n} × {n} in this process'
    described = lambda chip: chip.flops(config.compute.dtype) * config.mesh.size
    return _peak(described, lambda: measure(jnp.ones((n, n), 'float32')), about)


def peak_bandwidth(config: RunConfig) -> tuple[float | None, str]:
    """Bytes/s that the mesh's devices (a CPU: this machine) can read at most, and how that is known."""
    size = 2**27
    measure = lambda: 2 * size / min(seconds_each(np.ones(size, np.uint8).copy, 5, warm=0))
    about = 'best of 5 copies of 128 MiB on one core in this process, reading and writing'
    return _peak(lambda chip: chip.bandwidth * config.mesh.size, measure, about)


def _peak(described: Callable[[Chip], float], measure: Callable[[], float], about: str) -> tuple[float | None, str]:
    """By the data sheet of this machine's chip; of a CPU as measured, which is `about` something; else nobody knows."""
    if chip := chip_of_device(jax.devices()[0].device_kind):
        return described(chip), chip.source
    return (measure(), about) if _is_cpu() else (None, 'not described in planner/chips.py')


def peak_memory() -> int:
    """The most bytes that were in use: on the first device where it says so, else in this whole process."""
    stats = None if _is_cpu() else jax.devices()[0].memory_stats()
    if stats:
        return int(stats['peak_bytes_in_use'])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_cpu() -> bool:
    return jax.default_backend() == 'cpu'


def _where(config: RunConfig) -> dict[str, Any]:
    simulated = ' (simulated)' if _is_cpu() and config.mesh.size > 1 else ''
    return {'mesh': str(config.mesh), 'device': f'{config.mesh.size} × {jax.devices()[0].device_kind}{simulated}'}
