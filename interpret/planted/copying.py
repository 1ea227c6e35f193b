"""Copying: two layers learn to go on with random tokens that they have read once, and the heads that do it are named.

The part that works is known from what is learnt: random tokens, then these once more. Nothing but the repetition tells what
comes next, so there must be what looks for earlier copies of a token and takes what followed: an induction head, fed by a head
that looks at the token before (Olsson et al. 2022, arXiv:2209.11895). Both are named by their patterns (attention.py). Then the
induction heads are set to their means, all at once. The task makes most heads of the second layer such heads, so that there are
not as many others: as many of the best as are two thirds of the heads of both layers that are neither are compared with as many
of those, drawn at random.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from weft.interpret import intervals
from weft.interpret.intervals import Estimate
from weft.interpret.planted.training import train
from weft.interpret.xray import programs
from weft.interpret.xray.attention import LEAST, mean_scores, random_twice
from weft.interpret.xray.induction import RepeatedText, interval
from weft.model.config import model_of
from weft.model.decoder import Decoder
from weft.training.config import RunConfig, TrainingConfig
from weft.training.optimizers import AdamW

VOCABULARY, HALF = 32, 16  # how many tokens there are, and are repeated at most
LEARNT = 0.1  # nats a token of the second half
DESTROYED = 0.8 * math.log(VOCABULARY)  # of what knowing nothing costs
DRAWS, TEXTS = 20, 8


class Copying(NamedTuple):
    """Losses are nats a token of the second half, in which all is foreseeable."""

    steps: int
    heads: list[tuple[int, int]]  # induction heads, layer and head, of the largest score first
    scores: list[float]
    previous: list[tuple[int, int]]  # heads that look at the token before
    others: int  # heads that are neither
    loss: float
    without: Estimate  # any induction head; over texts
    compared: int  # heads of each set: two thirds of the others, or all induction heads if they are fewer
    best: Estimate  # without so many induction heads, those of the largest scores
    random: Estimate  # without so many others; between which losses 95 % of the draws lie
    ratio: tuple[float, float, float]  # of the rises of both, with its interval

    @property
    def found(self) -> bool:
        """Whether there are such heads, without which copying is destroyed, which costs three times what random ones cost."""
        return bool(self.heads) and self.without.value >= DESTROYED and self.ratio[1] >= 3

    def figures(self) -> dict[str, Any]:
        """As JSON has it, which has null for what is infinite."""
        figures = {name: one._asdict() if isinstance(one, Estimate) else one for name, one in self._asdict().items()}
        return figures | {'ratio': [one if math.isfinite(one) else None for one in self.ratio]}

    def told(self) -> str:
        """Heads as layer.head."""
        named = lambda some: ', '.join(f'{layer}.{head}' for layer, head in some) or 'none'
        scores = ', '.join(f'{score:.2f}' for score in self.scores)
        value, low, high = self.ratio
        return (
            f'induction {named(self.heads)} (scores {scores}), previous token {named(self.previous)}; loss {self.loss:.2f}, '
            f'without the induction heads {self.without.text()}; without the best {self.compared} {self.best.text()}, without '
            f'{self.compared} random ones of {self.others} others {self.random.text()}: the rise is {value:.1f} '
            f'[{low:.1f}, {high:.1f}] times as much'
        )


def config(seed: int, steps: int = 3000) -> RunConfig:
    """Two layers of attention, whose feed-forward parts have next to nothing."""
    model = {
        'vocabulary': VOCABULARY,
        'layers': 2,
        'model_dim': 64,
        'attention.heads': 16,
        'attention.head_dim': 8,
        'mlp.dim': 8,
        'embedding.tied': False,
    }
    training = TrainingConfig(steps=steps, batch=16, sequence_length=2 * HALF)
    optimizer = AdamW(learning_rate=5e-3, warmup_steps=20)
    return RunConfig(name='copying', seed=seed, model=model_of(model), training=training, optimizer=optimizer)


def again(rng: np.random.Generator, count: int) -> np.ndarray:
    """int [B, T + 1]: different random tokens, over and over; how many differs from row to row, so that places say nothing."""
    some = rng.permuted(np.tile(np.arange(VOCABULARY), (count, 1)), axis=1)
    period_B1 = rng.integers(HALF // 2, HALF + 1, (count, 1))
    return np.take_along_axis(some, np.arange(2 * HALF + 1) % period_B1, 1)


def measure(seed: int, progress: Callable[[str], object] = lambda line: None, draws: int = DRAWS) -> Copying:
    """Trains, names and ablates on the current mesh."""
    texts = random_twice(TEXTS, 2 * HALF, VOCABULARY, [], seed + 1)

    def copies(model: Decoder) -> bool:
        return float(RepeatedText(model, texts, 0).losses([])[1].mean()) < LEARNT

    told = lambda steps, loss: progress(f'copying, seed {seed}: step {steps}, loss {loss:.3f}')
    model, steps, _ = train(config(seed), again, copies, told)
    text = RepeatedText(model, texts, 0)
    found = named_heads(model, texts)
    heads = sorted(found['induction'], key=lambda head: -text.scores_LN[head])
    free = [head for head in np.ndindex(text.scores_LN.shape) if head not in found['induction'] + found['previous']]
    compared = min(len(heads), 2 * len(free) // 3)
    loss_R, without_R, best_R = (text.losses(some)[1] for some in ([], heads, heads[:compared]))
    rng = np.random.default_rng(seed)
    random_QR = np.zeros((draws, TEXTS))
    for draw in range(draws):
        drawn = rng.choice(len(free), compared, replace=False)
        random_QR[draw] = text.losses([free[at] for at in drawn])[1]
    rise_R, rises_QR = best_R - loss_R, random_QR - loss_R
    return Copying(
        steps,
        heads,
        [float(text.scores_LN[head]) for head in heads],
        found['previous'],
        len(free),
        float(loss_R.mean()),
        intervals.mean(without_R),
        compared,
        intervals.mean(best_R),
        intervals.of_draws(random_QR.mean(1)),
        (float(rise_R.mean() / rises_QR.mean()), *interval(rise_R, rises_QR, rng)),
    )


def named_heads(model: Decoder, texts: list[list[int]]) -> dict[str, list[tuple[int, int]]]:
    """By role the heads whose pattern scores `LEAST` or more on texts that are read twice."""
    rows = programs.padded(model.config, texts, programs.columns_for(len(texts[0])))
    pattern_LBTNS = programs.captured(model, ['attention.pattern'], rows)['attention.pattern']
    T = len(texts[0])
    patterns = [pattern_LBTNS[:, row, :T, :, :T].swapaxes(1, 2) for row in range(len(texts))]
    scores = mean_scores(patterns, texts)
    return {
        role: [(int(layer), int(head)) for layer, head in np.argwhere(score_LN >= LEAST)]
        for role, score_LN in scores.items()
    }
