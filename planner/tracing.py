"""Counting by tracing: a model with a kind of layer that does not say what it costs (`model.costs`) is counted in its programs.

They are traced by shapes alone on a mesh that has no devices, a loop's layers once, in about a second. FLOPs are those of every
product of the program, masked scores too (attention's backend is `reference`), and not by part; what is kept for the backward
pass is what JAX's rules keep, of which a compiler may drop some. A search over hundreds of meshes takes minutes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.extend.core import Literal
from jax.sharding import NamedSharding

from weft.inference.step import decode, empty_cache, encode, prefill
from weft.model.batch import Batch, Source
from weft.model.compute import ComputeConfig
from weft.model.config import ModelConfig
from weft.model.costs import What
from weft.model.decoder import Decoder, declared_decoder
from weft.model.dots import dots
from weft.model.forward import logits
from weft.model.parameters import abstract as abstract_module
from weft.planner.traffic.tables import Traffic
from weft.planner.traffic.traced import jaxpr_traffic
from weft.sharding.mesh import BATCH, MeshConfig, abstract_mesh
from weft.training.loss import loss_and_gradient, loss_fn


@functools.lru_cache(maxsize=2**12)
def traced_flops(
    c: ModelConfig,
    compute: ComputeConfig,
    mesh: MeshConfig,
    what: What,
    rows: int,
    length: int,
    source: int = 0,
    microbatches: int = 1,
) -> float:
    """Matmul FLOPs of a call of a program, all devices together; see `planner.flops.executed`. A step in parts has as many."""
    # With `expert` as `data` devices multiply as much, and no buffer has rows that visit no expert of its device.
    mesh = MeshConfig(stage=mesh.stage, data=mesh.span(BATCH), context=mesh.context, tensor=mesh.tensor)
    dispatch = 'all_gather' if compute.dispatch == 'auto' else compute.dispatch
    countable = dataclasses.replace(compute, attention='reference', grouped_matmul='ragged', dispatch=dispatch)
    jaxpr = traced(c, countable, mesh, what, rows, length, source, 1, microbatches)
    return dots(jaxpr, dataclasses.asdict(mesh)).flops


@functools.lru_cache(maxsize=2**12)
def traced_traffic(c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, what: What, *sizes: int) -> Traffic:
    """What one device of a TPU sends in a call of a program, its loss's scalars too, but not the norm of the gradient.

    `sizes`: rows, length, source, accumulation and microbatches, as `planner.flops.executed` has them.
    """
    return jaxpr_traffic(traced(c, compute, mesh, what, *sizes), dataclasses.asdict(mesh))


@functools.lru_cache(maxsize=2**12)
def traced_activations(
    c: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, rows: int, length: int, microbatches: int, platform: str
) -> float:
    """Bytes that one device keeps from the forward pass of a step for its backward pass, beside the weights and the batch."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh, platform)):
        batch = _batch(c, rows, length, length if c.encoder else 0)

        def kept(model: Decoder, batch: Batch) -> list[jax.Array]:
            pullback = jax.vjp(lambda model: loss_fn(model, batch, microbatches=microbatches)[0], model)[1]
            return jax.tree.leaves(pullback)

        jaxpr = jax.make_jaxpr(kept)(_model(c, compute), batch).jaxpr
    given = {id(v) for v in jaxpr.invars}
    arrays: dict[int, Any] = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given and not isinstance(v, Literal)}
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays.values())


@functools.lru_cache(maxsize=16)
def traced(
    c: ModelConfig,
    compute: ComputeConfig,
    mesh: MeshConfig,
    what: What,
    rows: int,
    length: int,
    source: int = 0,
    accumulation: int = 1,
    microbatches: int = 1,
    platform: str = 'tpu',
) -> Any:
    """The jaxpr of a program; the arguments are those of `planner.flops.executed`."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh, platform)):
        model, batch = _model(c, compute), _batch(c, rows, length, source)
        if what == 'train':
            step = functools.partial(loss_and_gradient, accumulation=accumulation, microbatches=microbatches)
            return jax.make_jaxpr(step)(model, batch)
        if what == 'loss':
            return jax.make_jaxpr(loss_fn)(model, batch)
        if what == 'score':
            given = (batch.tokens_BT, batch.position_BT, batch.segment_BT)
            return jax.make_jaxpr(functools.partial(logits, source=batch.source))(model, *given)
        kept = None
        if c.encoder:
            sources = (model, _integers(rows, source), _integers(rows))
            if what == 'encode':
                return jax.make_jaxpr(encode)(*sources)
            kept = _placed(jax.eval_shape(encode, *sources))
        cache = _placed(jax.eval_shape(lambda model: empty_cache(model, rows, length), model))._replace(source=kept)
        tokens = _integers(rows) if what == 'decode' else _integers(rows, length)
        return jax.make_jaxpr(decode if what == 'decode' else prefill)(model, cache, tokens, _integers(rows))


def _model(c: ModelConfig, compute: ComputeConfig) -> Decoder:
    return abstract_module(declared_decoder(c, compute), compute.parameter_dtype)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(jax.sharding.get_abstract_mesh(), P(BATCH)))


def _batch(c: ModelConfig, rows: int, length: int, source: int) -> Batch:
    row_BT, row_BS = _integers(rows, length), _integers(rows, source)
    return Batch(row_BT, row_BT, row_BT, row_BT, Source(row_BS, row_BS, row_BS) if c.encoder else None)


def _placed(tree: Any) -> Any:
    """Shapes with the layouts of their types as layouts on the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))
    return jax.tree.map(place, tree)
