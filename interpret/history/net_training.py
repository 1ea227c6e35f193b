"""Trains a small net (`history.nets`) as the project trains its decoder: the same rows, optimizer, schedule and measure.

Letters: B rows, T sequence, V vocabulary.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from weft.data.packing import Samples
from weft.data.tokenizer import Tokenizer
from weft.interpret.history.nets import Net, Statistics, Weights
from weft.model.batch import Batch
from weft.model.parameters import Role
from weft.runtime.errors import Diverged
from weft.training.evaluation import spread
from weft.training.optimizers import OptimizerConfig

COMPILING = 2  # steps at the start that may compile: they count as the later ones do on average
ROWS = 16  # of the validation split at a time


class Point(NamedTuple):
    """Where a curve is: what was spent until then, and the measure on the validation split."""

    tokens: int
    seconds: float  # of training, without compiling, validating and saving
    bits_per_byte: float


class Trained(NamedTuple):
    """A net after its last step."""

    weights: Weights
    seen: Statistics
    curve: list[Point]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is learnt from, and how."""

    train: Samples
    validation: Samples
    tokenizer: Tokenizer
    optimizer: OptimizerConfig
    steps: int
    batch: int  # rows a step
    seed: int
    validate_every: int  # steps
    validation_rows: int  # each time; the end reads all


def nats(
    net: Net, w: Weights, seen: Statistics, batch: Batch, learns: bool
) -> tuple[jax.Array, tuple[Any, Statistics]]:
    """Mean cross-entropy of the real tokens, with its sum and their number, and the statistics after the batch."""
    mixed_BTD, after = net.mix(w, w['embed_VD'][batch.tokens_BT], batch.segment_BT, seen, learns)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(net.logits(w, mixed_BTD), batch.target_BT)
    live_BT = batch.segment_BT > 0
    total, count = jnp.where(live_BT, loss_BT, 0).sum(), live_BT.sum()
    return total / jnp.maximum(count, 1), ((total, count), after)


def train(net: Net, plan: Plan, say: Callable[[str], object]) -> Trained:
    """Takes all steps of a plan. `say` is told at each validation how far it is. Raises Diverged where a loss is not finite."""
    weights, seen = net.initial(jax.random.key(plan.seed)), net.statistics()
    roles = {name: Role.MATRIX if x.ndim > 1 else Role.SCALE for name, x in weights.items()}
    rule = plan.optimizer.build(plan.steps, roles)
    moments = rule.init(weights)

    @jax.jit
    def step(w: Weights, moments: Any, seen: Statistics, batch: Batch) -> tuple[Weights, Any, Statistics, jax.Array]:
        gradient_of = jax.value_and_grad(functools.partial(nats, net), has_aux=True)
        (loss, (_, after)), gradient = gradient_of(w, seen, batch, True)
        updates, moments = rule.update(gradient, moments, w)
        return optax.apply_updates(w, updates), moments, after, loss

    curve, tokens, times = list[Point](), 0, list[float]()
    for number in range(plan.steps):
        batch = plan.train.batch(plan.seed, number, plan.batch)
        began = time.perf_counter()
        weights, moments, seen, loss = step(weights, moments, seen, on_device(batch))
        value = float(loss)
        times.append(time.perf_counter() - began)
        if not math.isfinite(value):
            raise Diverged(f'step {number + 1} of {plan.steps} has loss {value}')
        tokens += int((batch.segment_BT > 0).sum())
        last = number + 1 == plan.steps
        if (number + 1) % plan.validate_every == 0 or last:
            seconds = float(np.mean(times[COMPILING:] or times)) * len(times)
            rows = len(plan.validation) if last else plan.validation_rows
            bits = bits_per_byte(net, weights, seen, plan, spread(rows, len(plan.validation)))
            curve.append(Point(tokens, seconds, bits))
            say(
                f'step {number + 1}/{plan.steps}  loss {value:.4f}  {tokens / seconds:,.0f} tokens/s  {bits:.4f} bits/byte'
            )
    return Trained(weights, seen, curve)


def bits_per_byte(
    net: Net, w: Weights, seen: Statistics, plan: Plan, numbers: Sequence[int] | np.ndarray, learns: bool = False
) -> float:
    """Of rows of the validation split; with `learns` batch norms use each batch's own statistics."""
    bytes_V = np.array([len(piece) for piece in plan.tokenizer.pieces])
    sums = _sums(net, learns)
    total, bytes_ = 0.0, 0
    for start in range(0, len(numbers), ROWS):
        taken = np.asarray(numbers[start : start + ROWS])
        batch = plan.validation.take(np.pad(taken, (0, ROWS - len(taken))))
        batch.segment_BT[len(taken) :] = 0
        total += float(sums(w, seen, on_device(batch)))
        bytes_ += int(np.where(batch.segment_BT > 0, bytes_V[batch.target_BT], 0).sum())
    return total / math.log(2) / bytes_


@functools.lru_cache(maxsize=4)
def _sums(net: Net, learns: bool) -> Callable[[Weights, Statistics, Batch], jax.Array]:
    """The compiled sum of a batch's cross-entropy."""
    return jax.jit(lambda w, seen, batch: nats(net, w, seen, batch, learns)[1][0][0])


def on_device(batch: Batch) -> Batch:
    """A batch on the device, without what an encoder would read."""
    tokens_BT, target_BT, position_BT, segment_BT = (jnp.asarray(a) for a in batch[:4])
    return Batch(tokens_BT, target_BT, position_BT, segment_BT)


def continued(
    net: Net,
    w: Weights,
    seen: Statistics,
    ids: Sequence[int],
    choose: Callable[[np.ndarray], int],
    count: int,
    ends: Sequence[int],
) -> list[int]:
    """So many tokens after `ids`, or up to the first of `ends`; `choose` takes one by its probabilities, float64 [V]."""
    length = len(ids) + count
    ones_BT, found = jnp.ones((1, length), jnp.int32), list(ids)

    @jax.jit
    def given(tokens_BT: jax.Array, at: int) -> jax.Array:
        mixed_BTD, _ = net.mix(w, w['embed_VD'][tokens_BT], ones_BT, seen, False)
        return net.logits(w, mixed_BTD)[0, at]

    while len(found) < length:
        tokens_BT = np.zeros((1, length), np.int32)
        tokens_BT[0, : len(found)] = found
        logit_V = np.asarray(given(tokens_BT, len(found) - 1), np.float64)
        p_V = np.exp(logit_V - logit_V.max())
        found.append(choose(p_V / p_V.sum()))
        if found[-1] in ends:
            break
    return found[len(ids) :]
