"""One step of training: pure functions of the state and a batch. Nothing here has a clock, a file or a socket."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weft.model.batch import Batch
from weft.model.decoder import Decoder, init_decoder, learning, with_rest
from weft.model.edits import Edit
from weft.model.layers.moe import MoE, updated_bias
from weft.runtime.errors import UserError
from weft.training.config import RunConfig
from weft.training.loss import loss_and_gradient
from weft.training.optimizers import roles


class State(NamedTuple):
    """All that a step changes. Optimizer state is laid out as the weights are."""

    model: Decoder
    optimizer: Any  # optax state
    step: jax.Array  # steps taken, int32
    key: jax.Array  # of everything random after the start


def optimizer(config: RunConfig, model: Decoder) -> optax.GradientTransformation:
    """The run's optimizer of the weights of `model`."""
    return config.optimizer.build(config.training.steps, roles(learning(model)))


def init(config: RunConfig, model: Decoder | None = None) -> State:
    """The state before the first step, of `model` or random weights, the same on every mesh; under `jax.jit` and a mesh."""
    weights, rest = jax.random.split(jax.random.key(config.seed))
    if model is None:
        model = init_decoder(config.model, config.compute, weights)
    return State(model, optimizer(config, model).init(learning(model)), jnp.int32(0), rest)


def train_step(
    config: RunConfig, state: State, batch: Batch, taps: Collection[str] = (), edits: Sequence[Edit] = ()
) -> tuple[State, dict[str, Any]]:
    """One optimizer step on a global batch. Returns the new state and the step's metrics, on the device.

    Metrics: loss (mean cross-entropy in nats), tokens (real ones), grad_norm (before clipping), learning_rate, with
    `mtp.layers` mtp_loss, and what layers say (`ForwardContext.metric`), such as router.entropy. `taps` are names of
    activations that are captured, and come back under 'taps'; `edits` change activations on the way (model/edits.py).
    """
    key = jax.random.fold_in(state.key, state.step) if config.model.dropout else None
    (_, metrics), gradient = loss_and_gradient(
        state.model, batch, key, config.microbatches, config.training.accumulation, taps, edits
    )
    updates, moments = optimizer(config, state.model).update(gradient, state.optimizer, learning(state.model))
    metrics |= {
        'grad_norm': optax.tree.norm(gradient),
        'learning_rate': config.optimizer.schedule(config.training.steps)(state.step),
    }
    model = with_rest(optax.apply_updates(learning(state.model), updates), state.model)
    if config.model.moe and config.model.moe.bias_update_rate:
        balance_choices(model, metrics)
    return State(model, moments, state.step + 1, state.key), metrics


def balance_choices(model: Decoder, metrics: dict[str, Any]) -> None:
    """Moves the routers' biases by what the whole step's tokens chose, whatever devices and parts they were on."""
    moe = model.config.moe
    assert moe is not None
    if 'router.load' not in metrics:
        raise UserError(
            f'model.moe.bias_update_rate is {moe.bias_update_rate}: a mixture of kind {moe.kind} logs no router.load, by which '
            'the bias moves; set it to 0'
        )
    # Shares of all choices back to whole numbers, so that every mesh compares the same.
    load_LE = jnp.round(metrics['router.load'] * (metrics['tokens'] * moe.top_k))
    first = 0
    for blocks in [*model.groups, model.mtp] if model.config.mtp.layers else model.groups:
        if isinstance(blocks.mlp, MoE):
            bias_LE = blocks.mlp.correction_E
            mine_LE = load_LE[first : first + len(bias_LE[...])]
            spec = jax.typeof(bias_LE[...]).sharding.spec
            bias_LE[...] = updated_bias(bias_LE[...], jax.reshard(mine_LE, spec), moe.bias_update_rate)
            first += len(mine_LE)
