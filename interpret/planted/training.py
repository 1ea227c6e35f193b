"""Small models for experiments, trained by the project's own step on rows that a function makes, until they have learnt.

Letters: B rows, T tokens of a row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from weft.model.batch import Batch
from weft.model.decoder import Decoder
from weft.model.forward import place
from weft.runtime.errors import UserError
from weft.training.config import RunConfig
from weft.training.step import init, train_step

Draw = Callable[[np.random.Generator, int], np.ndarray]  # so many rows, int32 [B, T + 1]
EVERY = 25  # steps between looks at how far it is


class Learnt(NamedTuple):
    """A trained model."""

    model: Decoder
    steps: int
    loss: float  # nats a token, of the last step


def train(
    config: RunConfig,
    draw: Draw,
    learnt: Callable[[Decoder], bool],
    progress: Callable[[int, float], object] = lambda step, loss: None,
) -> Learnt:
    """Trains on the current mesh until `learnt` says so, which is asked every `EVERY` steps.

    Raises UserError where it has not learnt after `config.training.steps`. `progress` is told steps and loss.
    """
    t, rng = config.training, np.random.default_rng(config.seed)
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    state = jax.jit(functools.partial(init, config))()
    loss = float('nan')
    for number in range(1, t.steps + 1):
        rows = draw(rng, t.batch).astype(np.int32)
        state, metrics = step(state, place(batch_of(rows)))
        if number % EVERY == 0:
            loss = float(metrics['loss'])
            progress(number, loss)
            if learnt(state.model):
                return Learnt(state.model, number, loss)
    raise UserError(f'{config.name}: not learnt after {t.steps} steps (loss {loss:.3f}); another --seed may')


def batch_of(rows: np.ndarray) -> Batch:
    """Rows of one document each, in which every token but the first is to be predicted."""
    tokens_BT, target_BT = rows[:, :-1], rows[:, 1:]
    position_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return Batch(tokens_BT, target_BT, position_BT, np.ones_like(tokens_BT))
