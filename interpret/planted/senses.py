"""A word with two senses, in a language made for it: in which layer do they part, and is it there that the answer is decided?

A sentence is neutral words, among which one tells of the river or of money, anywhere, then *bank*, and then a word that goes
with the one bank or the other. *Bank* is one token with one vector: only by attention can it come to be two things.

The senses part at the first row of the residual stream, at *bank*, on which a linear probe (probes.py) is right in `PARTED` of
sentences that it was not fitted to. Row 0 is the embedding, row l stands after layer l. There a sentence is given what a
sentence of the other sense has there (activation patching: Meng et al. 2022, arXiv:2202.05262), and the answer swaps if more
probability is on the words of the other sense then.

Letters: B sentences, T words before the answer, L layers, D model, C classes (2 senses).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from weft.interpret import intervals, probes
from weft.interpret.intervals import Estimate
from weft.interpret.passes import Change, Prompts, softmax
from weft.interpret.planted.training import train
from weft.model.config import model_of
from weft.model.decoder import Decoder
from weft.training.config import RunConfig, TrainingConfig
from weft.training.optimizers import AdamW

BANK, CUES, ANSWERS, NEUTRAL = 0, 8, 4, 16  # how many words tell of a sense, go with it, and say nothing
CUE, ANSWER, OTHER = 1, 1 + 2 * CUES, 1 + 2 * CUES + 2 * ANSWERS  # where the ids of each begin
WORDS = 10
PARTED = 0.99  # of sentences a probe is right in
SWAPPED = 0.95  # of answers
LEARNT = 0.97  # mean probability of words of the right sense
FIT, TEST = 512, 256  # sentences
SHUFFLES = 20


class Senses(NamedTuple):
    """What a probe reads at *bank* in each row, and what patching there does to the answer; shares with intervals."""

    steps: int
    probe: list[Estimate]  # rows 0 to L
    swapped: list[Estimate]
    control: Estimate  # probes of the last row, fitted to senses that were shuffled, several times
    row: int | None  # at which the senses part

    @property
    def found(self) -> bool:
        """Whether the senses part, and patching the row where they do swaps the answer."""
        return self.row is not None and self.swapped[self.row].value >= SWAPPED

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            'steps': self.steps,
            'probe': [one._asdict() for one in self.probe],
            'swapped': [one._asdict() for one in self.swapped],
            'control': self.control._asdict(),
            'row': self.row,
        }

    def told(self) -> str:
        """Per cent of sentences, of each row."""
        per_cent = lambda some: ', '.join(one.text(0, 100) for one in some)
        where = 'nowhere' if self.row is None else f'after layer {self.row}' if self.row else 'in the embedding'
        return (
            f'the senses part {where}. Rows 0 to {len(self.probe) - 1}: a probe is right in {per_cent(self.probe)} % of '
            f'sentences, patching swaps {per_cent(self.swapped)} % of answers; probes of shuffled senses are right in '
            f'{self.control.text(0, 100)} %'
        )


def sentences(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """int [B, T + 1], the last word the answer, and the sense of each, 0 or 1."""
    word_BT, sense_B = rng.integers(OTHER, OTHER + NEUTRAL, (count, WORDS + 1)), rng.integers(2, size=count)
    word_BT[np.arange(count), rng.integers(WORDS - 1, size=count)] = (
        CUE + CUES * sense_B + rng.integers(CUES, size=count)
    )
    word_BT[:, WORDS - 1] = BANK
    word_BT[:, WORDS] = ANSWER + ANSWERS * sense_B + rng.integers(ANSWERS, size=count)
    return word_BT, sense_B


def config(seed: int, steps: int = 3000) -> RunConfig:
    """Four layers, so that there are several where the senses could part."""
    model = {
        'vocabulary': OTHER + NEUTRAL,
        'layers': 4,
        'model_dim': 32,
        'attention.heads': 4,
        'mlp.dim': 64,
        'embedding.tied': False,
    }
    training = TrainingConfig(steps=steps, batch=32, sequence_length=WORDS)
    optimizer = AdamW(learning_rate=3e-3, warmup_steps=20)
    return RunConfig(name='senses', seed=seed, model=model_of(model), training=training, optimizer=optimizer)


class Sentences:
    """Some sentences, and what a model makes of them up to *bank*."""

    def __init__(self, model: Decoder, count: int, seed: tuple[int, int]) -> None:
        word_BT, self.sense_B = sentences(np.random.default_rng(seed), count)
        self.prompts = Prompts(model, word_BT[:, :-1].tolist(), at_once=128)

    def senses(self, changes: tuple[Change, ...] = ()) -> np.ndarray:
        """float [B, C]: the probability of words that go with each sense."""
        p_BV = softmax(self.prompts.logits(changes))
        return p_BV[:, ANSWER:OTHER].reshape(-1, 2, ANSWERS).sum(-1)


def measure(seed: int, progress: Callable[[str], object] = lambda line: None) -> Senses:
    """Trains and looks, on the current mesh."""
    c = config(seed)

    def knows(model: Decoder) -> bool:
        some = Sentences(model, TEST, (seed, 1))
        return some.senses()[np.arange(TEST), some.sense_B].mean() > LEARNT

    told = lambda steps, loss: progress(f'senses, seed {seed}: step {steps}, loss {loss:.3f}')
    model, steps, _ = train(c, lambda rng, count: sentences(rng, count)[0], knows, told)
    fit, test = Sentences(model, FIT, (seed, 2)), Sentences(model, TEST, (seed, 3))
    fit_LBD, test_LBD = fit.prompts.stream(), test.prompts.stream()
    rng = np.random.default_rng((seed, 4))
    other_B = np.array([rng.choice(np.flatnonzero(test.sense_B != sense)) for sense in test.sense_B])
    probe, swapped = list[Estimate](), list[Estimate]()
    for row, (fit_BD, test_BD) in enumerate(zip(fit_LBD, test_LBD, strict=True)):
        probe.append(intervals.share(probes.right(fit_BD, fit.sense_B, test_BD, test.sense_B)))
        said_B = test.senses((patched(row, c.model.layers, test_BD[other_B]),)).argmax(-1)
        swapped.append(intervals.share(said_B != test.sense_B))
    shuffled = [rng.permutation(fit.sense_B) for _ in range(SHUFFLES)]
    control = intervals.mean([probes.right(fit_LBD[-1], one, test_LBD[-1], test.sense_B).mean() for one in shuffled])
    parted = next((row for row, one in enumerate(probe) if one.value >= PARTED), None)
    return Senses(steps, probe, swapped, control, parted)


def patched(row: int, layers: int, value_BD: np.ndarray) -> Change:
    """At *bank*, in a row of the residual stream, other values."""
    place_T = (np.arange(WORDS) == WORDS - 1).reshape(1, 1, -1, 1)
    value_LBTD = np.where(place_T, value_BD[None, :, None], 0).astype(np.float32)
    if row == 0:
        return Change('embedding', place_T, value_LBTD)
    layer_L = (np.arange(layers) == row - 1).reshape(-1, 1, 1, 1)
    return Change('residual.after_mlp', layer_L & place_T, value_LBTD)
