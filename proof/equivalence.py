"""That every mesh gives one device's numbers: models, meshes, and how far a mesh's figures are from one device's."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding

from weft.data.config import DataConfig
from weft.model import stack
from weft.model.batch import Batch
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.model.decoder import Decoder, init_decoder
from weft.model.forward import place
from weft.sharding.mesh import AXES, MeshConfig, factorizations, make_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.loss import loss_and_gradient
from weft.training.optimizers import AdamW
from weft.training.step import init, train_step

DEVICES = 8
TOLERANCE = {'gradient': 1e-10, 'initial': 0.0}
LOSSES_TOLERANCE = {'float32': (1e-5, 1e-4), 'float64': (1e-10, 1e-10)}  # of the first 20 steps, and of all 50
VOCABULARY, B, T = 200, 16, 128

DENSE = ModelConfig(
    vocabulary=VOCABULARY,
    layers=8,
    model_dim=32,
    attention=AttentionConfig(heads=8, kv_heads=4, window=48, qk_norm=True),
    mlp=MLPConfig(dim=32),
)
EXPERTS = MoEConfig(experts=8, top_k=2, mlp_dim=16, router='sigmoid', bias_update_rate=0.001)
MIXTURE = changed(DENSE, {'attention.window': None, 'attention.qk_norm': False, 'moe': EXPERTS})
MODELS = {
    'dense': DENSE,
    # With what compiles longest: rematerialisation, shared experts, and a dense layer before the pipeline.
    'all_gather': dataclasses.replace(
        MIXTURE, layers=9, moe=dataclasses.replace(EXPERTS, shared_experts=1, first_dense_layers=1)
    ),
    'all_to_all': MIXTURE,
    'ragged': MIXTURE,
}
COMPUTE = {
    'dense': ComputeConfig(),
    'all_gather': ComputeConfig(dispatch='all_gather', remat='block'),
    # As many rows as there are: nothing is dropped, so that all dispatchers mean the same.
    'all_to_all': ComputeConfig(dispatch='all_to_all', capacity_factor=4.0),
    'ragged': ComputeConfig(dispatch='ragged'),
}
ACCUMULATION = {'dense': 2, 'all_to_all': 2}  # parts a step, on every mesh but the one device; 1 for the others

RUNS = ('dense', 'all_gather')  # models of whole runs
MESHES = [MeshConfig(**dict(zip(AXES, shape, strict=True))) for shape in factorizations(DEVICES, len(AXES))]
PAIRED = (
    ('replica', 'stage', 'data'),
    ('replica', 'context', 'expert'),
    ('replica', 'stage', 'tensor'),
    ('stage', 'data', 'context'),
    ('stage', 'context', 'tensor'),
    ('stage', 'expert', 'tensor'),
    ('data', 'expert', 'tensor'),
    ('context', 'expert', 'tensor'),
)
# Of whole runs: every axis alone, and is on in at least four of them.
LONG = [MeshConfig(**{axis: DEVICES}) for axis in AXES] + [MeshConfig(**dict.fromkeys(axes, 2)) for axes in PAIRED]


def packed_batch(seed: int) -> Batch:
    """Random rows of documents, numbered from 1, the last tokens padding; each token is followed by one of two."""
    r = np.random.default_rng(seed)
    segment_BT = (1 + np.cumsum(r.random((B, T)) < 0.03, axis=1)).astype(np.int32)
    column_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    starts_BT = np.diff(segment_BT, axis=1, prepend=0) > 0
    position_BT = column_BT - np.maximum.accumulate(np.where(starts_BT, column_BT, 0), axis=1)
    length_B1 = T - r.integers(0, 9, (B, 1))
    padding_BT = column_BT >= length_B1
    token_BT = np.zeros((B, T + 1), np.int32)
    token_BT[:, 0] = r.integers(0, VOCABULARY, B)
    for t in range(T):
        token_BT[:, t + 1] = (token_BT[:, t] * 7 + r.integers(1, 3, B)) % VOCABULARY
    return Batch(
        tokens_BT=token_BT[:, :-1],
        target_BT=token_BT[:, 1:],
        position_BT=np.where(padding_BT, 0, position_BT),
        segment_BT=np.where(padding_BT, 0, segment_BT),
    )


def run_of(kind: str, mesh: MeshConfig, dtype: Literal['float32', 'float64']) -> RunConfig:
    """The run of a kind of model on a mesh."""
    accumulation = ACCUMULATION.get(kind, 1) if mesh.size > 1 else 1
    config = RunConfig(
        name='proof',
        mesh=mesh,
        model=MODELS[kind],
        compute=dataclasses.replace(COMPUTE[kind], dtype=dtype),
        data=DataConfig(),
        training=TrainingConfig(steps=50, batch=B, sequence_length=T, accumulation=accumulation),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=10),
    )
    config.check_sizes()
    return config


@contextlib.contextmanager
def running(config: RunConfig) -> Iterator[None]:
    """On the run's mesh, in its dtype, and with programs that compile quickly: loops over layers as on accelerators."""
    before = jax.config.read('jax_enable_x64')
    jax.config.update('jax_enable_x64', config.compute.dtype == 'float64')
    try:
        with mock.patch.object(stack, 'UNROLLED', {}), jax.set_mesh(make_mesh(config.mesh)):
            yield
    finally:
        jax.config.update('jax_enable_x64', before)


def arrays_by_name(tree: Any) -> dict[str, np.ndarray]:
    """A model's arrays on the host, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value'): np.asarray(x)
        for path, x in leaves
    }


def initial(config: RunConfig) -> Decoder:
    """Initial parameters, made on the run's mesh."""
    return jax.jit(functools.partial(init_decoder, config.model, config.compute))(jax.random.key(config.seed))


def gradient(kind: str, mesh: MeshConfig) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient of the first step in float64, from one device's initial parameters."""
    config = run_of(kind, mesh, 'float64')
    with running(config):
        if mesh.size == 1:
            model = initial(config)
        else:
            put = lambda x, w: jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), w.sharding.spec))
            model = jax.tree.map(put, one_model(kind), jax.eval_shape(functools.partial(initial, config)))
        run = functools.partial(
            loss_and_gradient, microbatches=config.microbatches, accumulation=config.training.accumulation
        )
        (loss, _), found = jax.jit(run)(model, place(packed_batch(0)))
        return float(loss), arrays_by_name(found)


@functools.cache
def one_model(kind: str) -> Decoder:
    """Initial parameters in float64, made on one device, on the host."""
    config = run_of(kind, MeshConfig(), 'float64')
    with running(config):
        return jax.tree.map(np.asarray, initial(config))


def initial_arrays(kind: str, mesh: MeshConfig) -> dict[str, np.ndarray]:
    """Initial parameters in float32, made on the mesh."""
    config = run_of(kind, mesh, 'float32')
    with running(config):
        return arrays_by_name(initial(config))


def losses_dtype(kind: str) -> Literal['float32', 'float64']:
    """Of whole runs: float32, with a router float64.

    Where a token's second and third expert score the same to a float32's last digits, the order of a sum decides which one it
    visits, and an expert's load which way its bias goes: two right runs in float32 are then 1e-3 apart after 20 steps.
    """
    return 'float64' if MODELS[kind].moe else 'float32'


def losses(kind: str, mesh: MeshConfig) -> list[float]:
    """Losses of a whole run: AdamW, and the update of the routers' biases."""
    config = run_of(kind, mesh, losses_dtype(kind))
    with running(config):
        state = jax.jit(functools.partial(init, config))()
        step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
        found = []
        for number in range(config.training.steps):
            state, figures = step(state, place(packed_batch(number)))
            found.append(float(figures['loss']))
    return found


one_gradient = functools.cache(lambda kind: gradient(kind, MeshConfig()))
one_initial = functools.cache(lambda kind: initial_arrays(kind, MeshConfig()))
one_losses = functools.cache(lambda kind: losses(kind, MeshConfig()))


def gradient_error(kind: str, mesh: MeshConfig) -> dict[str, Any]:
    """How far loss and gradient of a mesh are from one device's: of each leaf max |Δ| over max |g|; the worst leaf."""
    (loss, found), (one_loss, one) = gradient(kind, mesh), one_gradient(kind)
    assert found.keys() == one.keys()
    scale = {name: np.abs(one[name]).max() or 1.0 for name in one}  # the router's bias has no gradient: 0 must be 0
    errors = {name: float(np.abs(found[name] - one[name]).max() / scale[name]) for name in one}
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    return {'loss': abs(loss / one_loss - 1), 'error': errors[worst], 'leaf': worst, 'leaves': len(errors)}


def initial_error(kind: str, mesh: MeshConfig) -> dict[str, Any]:
    """How many initial parameters are not bit for bit one device's."""
    found, one = initial_arrays(kind, mesh), one_initial(kind)
    return {
        'error': float(sum((found[name] != one[name]).sum() for name in one)),
        'parameters': sum(leaf.size for leaf in one.values()),
    }


def losses_error(kind: str, mesh: MeshConfig) -> dict[str, Any]:
    """The largest relative difference of 20 and of 50 losses from one device's."""
    found, one = np.array(losses(kind, mesh)), np.array(one_losses(kind))
    apart = np.abs(found / one - 1)
    return {
        'error': float(apart[:20].max()),
        'error of 50': float(apart.max()),
        'first': one[0],
        'last': float(found[-1]),
    }
