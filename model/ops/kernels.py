"""How a Pallas (Triton) kernel is called: compiled on a GPU, interpreted on a CPU."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from weft.runtime.errors import UserError

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class Tiling(Protocol):
    """How large a kernel's tiles are, and how a program works on them."""

    @property
    def warps(self) -> int:
        """Of 32 threads, a program."""

    @property
    def stages(self) -> int:
        """Tiles that a loop loads ahead."""


def check_dtype(backend: str, dtype: jnp.dtype) -> None:
    """Raises UserError for a dtype that the kernels do not compute in."""
    if dtype not in DTYPES:
        names = ', '.join(jnp.dtype(one).name for one in DTYPES)
        raise UserError(f'{backend} has no {dtype}; it computes in {names}, reference in any')


def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    *inputs: jax.Array,
    tiling: Tiling,
) -> list[jax.Array]:
    """The kernel's outputs, of these (shape, dtype).

    Args:
        kernel: takes a ref of each input, then of each output.
    """
    kind = jax.typeof(inputs[0]).manual_axis_type  # outputs vary over the mesh axes that the inputs vary over

    def run(*inputs: jax.Array, interpret: bool) -> list[jax.Array]:
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(*out, manual_axis_type=kind) for out in out_shapes],
            compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
            interpret=interpret,
            name=name,
        )(*inputs)

    compiled, interpreted = partial(run, interpret=False), partial(run, interpret=True)
    return lax.platform_dependent(*inputs, cuda=compiled, rocm=compiled, cpu=interpreted)
