"""How a Pallas (Triton) kernel is called: compiled on a GPU, interpreted on a CPU."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    *inputs: jax.Array,
    warps: int,
    stages: int,
) -> list[jax.Array]:
    """The kernel's outputs, of these (shape, dtype).

    Args:
        kernel: takes a ref of each input, then of each output.
        warps: of 32 threads a program.
        stages: tiles that a loop loads ahead.
    """
    kind = jax.typeof(inputs[0]).manual_axis_type  # outputs vary over the mesh axes that the inputs vary over

    def run(*inputs: jax.Array, interpret: bool) -> list[jax.Array]:
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(*out, manual_axis_type=kind) for out in out_shapes],
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name=name,
        )(*inputs)

    compiled, interpreted = partial(run, interpret=False), partial(run, interpret=True)
    return lax.platform_dependent(*inputs, cuda=compiled, rocm=compiled, cpu=interpreted)
