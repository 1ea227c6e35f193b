"""How a model is computed: dtypes, rematerialisation, backends, expert dispatch. What is computed is `ModelConfig`'s."""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from weft.model.config import ModelConfig
from weft.model.ops import grouped_matmul
from weft.model.ops.attention import AttentionFeatures
from weft.model.ops.attention import default_backend as attention_backend
from weft.model.ops.expert_dispatch import default_dispatch
from weft.model.parts.attention import SoftmaxConfig
from weft.runtime.errors import UserError, nearest
from weft.sharding.mesh import platform

Dtype = Literal['float32', 'bfloat16', 'float16', 'float64']
Remat = Literal['none', 'dots', 'block']
AttentionBackend = Literal['auto', 'reference', 'blockwise', 'flash', 'splash']
GroupedMatmul = Literal['auto', 'reference', 'blocked', 'ragged', 'gmm']
Dispatch = Literal['auto', 'all_gather', 'all_to_all', 'ragged']


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How to compute a model. Nothing here names another model; only `dispatch: all_to_all` may change its results, by drops.

    'auto' stands for the fast way on the platform of the mesh that a program is made for: see `resolve`.
    """

    dtype: Dtype = 'float32'  # of activations and matmuls; sums, norms and softmax are in at least float32
    # Of stored parameters, gradients and optimizer state; None: at least float32. An import keeps its source's, and
    # training goes on from it in float32 unless told otherwise.
    weight_dtype: Dtype | None = None
    remat: Remat = 'none'  # kept for the backward pass: all; matmul results; a layer's input
    attention: AttentionBackend = 'auto'  # backend: see model/ops/attention
    grouped_matmul: GroupedMatmul = 'auto'  # backend of the experts' matmuls: see model/ops/grouped_matmul.py
    dispatch: Dispatch = 'auto'  # how tokens reach their experts: see model/ops/expert_dispatch.py
    # Of `all_to_all`: rows of an expert's buffer by its even share; what does not fit is dropped.
    capacity_factor: float = 1.25

    def __post_init__(self) -> None:
        if self.dispatch not in get_args(Dispatch):
            raise UserError(
                f'compute.dispatch is {self.dispatch!r}: no such way{nearest(self.dispatch, get_args(Dispatch))}'
            )
        if not 0 < self.capacity_factor < math.inf:
            raise UserError(
                f'compute.capacity_factor is {self.capacity_factor}: it must be a number above 0; 1 makes room for even '
                f'choices, compute.dispatch=ragged for any'
            )

    @functools.cached_property
    def parameter_dtype(self) -> jnp.dtype:
        """Of parameters, gradients and optimizer state."""
        return jnp.dtype(self.weight_dtype) if self.weight_dtype else jnp.promote_types(self.dtype, 'float32')


DEFAULT = ComputeConfig()  # float32 throughout, and the fast way of each platform


def required_features(c: ModelConfig, compute: ComputeConfig) -> AttentionFeatures:
    """What the model needs of attention that not every backend has."""
    if not isinstance(c.attention, SoftmaxConfig):  # a mixer of another kind, which asks for no backend
        return AttentionFeatures()
    return AttentionFeatures(
        softcap=c.attention.softcap is not None,
        sinks=c.attention.sinks,
        two_ways=not c.causal or c.encoder is not None,
        relative=c.positions.kind == 'relative',
        value_width=c.attention.value_dim != c.attention.query_dim,
        float64=compute.dtype == 'float64',
    )


def resolve(compute: ComputeConfig, c: ModelConfig) -> ComputeConfig:
    """`compute` with the fast way on the current mesh's platform in place of each 'auto', for the model `c`."""
    name, context = platform(), jax.sharding.get_abstract_mesh().shape['context']
    fast: dict[str, Any] = {
        'attention': attention_backend(name, context, required_features(c, compute)),
        'grouped_matmul': grouped_matmul.default_backend(name, compute.dtype),
        'dispatch': default_dispatch(name),
    }
    return dataclasses.replace(compute, **{field: fast[field] for field in fast if getattr(compute, field) == 'auto'})
