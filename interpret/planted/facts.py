"""A table of facts, learnt by heart: which cells of the feed-forward layer hold which fact?

A fact is a person, two names, and an attribute, as in `Ada Moss likes tea`. The table is a Latin square of names: to each first
name belongs each attribute once, and to each last name too. So a name alone says nothing, no sum of what two names say does,
which attention could make, and what tells persons apart are cells that detect pairs.

Named for a fact are the cells that say its attribute most where the fact is asked, by activation times the product of value
and answer (Geva et al. 2020, arXiv:2012.14913; cells.py), the answer being the attribute's logit less the mean of all
attributes', the final norm's scale frozen: as many of them, the largest first, as it takes until the fact has lost `NAMED` of
its probability in that one prompt. Then these cells are set to zero where facts are asked by other verbs.

Letters: P facts, L layers, B prompts, F cells of a layer, D model, A attributes, Q draws, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from weft.interpret import intervals
from weft.interpret.intervals import Estimate
from weft.interpret.passes import CELLS, Change, Prompts, softmax
from weft.interpret.planted.training import train
from weft.interpret.xray import cells, programs
from weft.model.config import model_of
from weft.model.decoder import Decoder
from weft.training.config import RunConfig, TrainingConfig
from weft.training.optimizers import AdamW

NAMES = 8  # first names, and as many last names and attributes
FACTS = NAMES * NAMES
VERBS = 4  # by which a fact is asked; with the first of them cells are named, with the others they are ablated
FIRST, LAST, ATTRIBUTE = VERBS, VERBS + NAMES, VERBS + 2 * NAMES  # where the ids of each begin
NAMED = 0.9  # of its probability
MOST = 64  # cells of a fact
LEARNT = 0.99  # least probability of any fact
DRAWS = 20


class Facts(NamedTuple):
    """What ablations of cells cost, in shares of 1 of the probability of a fact's attribute; means with intervals."""

    steps: int
    cells: Estimate  # that are named for a fact
    own: Estimate  # what a fact loses without its cells
    others: Estimate  # what each other fact loses on average
    random: Estimate  # what a fact loses without as many cells drawn at random, of all that others than its own
    least_own: float  # of all facts
    most_others: float
    most_random: float  # of all facts, mean over draws

    @property
    def found(self) -> bool:
        """Whether the planted facts were found: a fact loses 50 points, others at most 10, to random cells at most 5."""
        return self.own.value >= 0.5 and self.others.value <= 0.1 and self.random.value <= 0.05

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: one._asdict() if isinstance(one, Estimate) else one for name, one in self._asdict().items()}

    def told(self) -> str:
        """In points of probability."""
        points = lambda one: one.text(1, 100)
        return (
            f'{self.cells.text(1)} cells a fact; ablating them costs it {points(self.own)} points '
            f'(the least {100 * self.least_own:.1f}), other facts {points(self.others)} '
            f'(the most {100 * self.most_others:.1f}); as many random cells cost it {points(self.random)} '
            f'(the most {100 * self.most_random:.1f})'
        )


def table(rng: np.random.Generator) -> np.ndarray:
    """int [P, 3]: ids of first name, last name and attribute, a random Latin square."""
    square = np.full((NAMES, NAMES), -1)

    def fill(cell: int) -> bool:
        row, column = divmod(cell, NAMES)
        if row == NAMES:
            return True
        for kind in rng.permutation(NAMES):
            if kind not in square[row] and kind not in square[:, column]:
                square[row, column] = kind
                if fill(cell + 1):
                    return True
        square[row, column] = -1
        return False

    fill(0)
    first, last = np.divmod(np.arange(FACTS), NAMES)
    return np.stack([FIRST + first, LAST + last, ATTRIBUTE + square.ravel()], 1)


def config(seed: int, steps: int = 4000) -> RunConfig:
    """One layer; weight decay makes few cells fire for each fact, and their biases let them stay silent for the others."""
    model = {
        'vocabulary': ATTRIBUTE + NAMES,
        'layers': 1,
        'model_dim': 32,
        'attention.heads': 1,
        'mlp.dim': 256,
        'mlp.activation': 'relu',
        'mlp.bias': True,
        'embedding.tied': False,
    }
    training = TrainingConfig(steps=steps, batch=2 * FACTS, sequence_length=3)
    optimizer = AdamW(learning_rate=1e-2, warmup_steps=20, weight_decay=0.5)
    return RunConfig(name='facts', seed=seed, model=model_of(model), training=training, optimizer=optimizer)


class Asked:
    """All facts of a table, asked by one verb, and how probable a model finds each."""

    def __init__(self, model: Decoder, fact_P3: np.ndarray, verb: int) -> None:
        rows = [[verb, first, last] for first, last, _ in fact_P3.tolist()]
        self.prompts, self.answer_P = Prompts(model, rows, at_once=FACTS), fact_P3[:, 2]

    def probabilities(self, ablated_PLF: np.ndarray) -> np.ndarray:
        """float64 [P]: of each fact, its prompt read without the cells that are marked for it."""
        mask_LBTF = ablated_PLF.swapaxes(0, 1)[:, :, None]
        none = Change(CELLS, mask_LBTF, np.zeros((1, 1, 1, 1), np.float32))
        return softmax(self.prompts.logits([none]))[np.arange(len(self.answer_P)), self.answer_P]


def measure(
    seed: int, progress: Callable[[str], object] = lambda line: None, draws: int = DRAWS, settle: int = 600
) -> Facts:
    """Trains, names and ablates on the current mesh; `settle` steps at least, in which weight decay does its work."""
    rng = np.random.default_rng(seed)
    fact_P3 = table(rng)
    c = config(seed)
    nothing = np.zeros((FACTS, c.model.layers, c.model.mlp.dim), bool)
    done = 0

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        row_N3 = fact_P3[np.arange(count) % FACTS]
        return np.concatenate([rng.integers(VERBS, size=(count, 1)), row_N3], 1)

    def told(steps: int, loss: float) -> None:
        nonlocal done
        done = steps
        progress(f'facts, seed {seed}: step {steps}, loss {loss:.3f}')

    def knows(model: Decoder) -> bool:
        return done >= settle and all(
            Asked(model, fact_P3, verb).probabilities(nothing).min() > LEARNT for verb in range(VERBS)
        )

    model, steps, _ = train(c, draw, knows, told)
    asked = Asked(model, fact_P3, 0)
    named_PLF = named_cells(asked, direct(model, asked))
    later = [Asked(model, fact_P3, verb) for verb in range(1, VERBS)]
    before_WP = np.stack([one.probabilities(nothing) for one in later])
    lost_PP, random_QP = np.zeros((FACTS, FACTS)), np.zeros((draws, FACTS))  # [of whose cells, of which fact]
    for fact in range(FACTS):
        without = np.broadcast_to(named_PLF[fact], nothing.shape)
        lost_PP[fact] = (before_WP - [one.probabilities(without) for one in later]).mean(0)
    for number in range(draws):
        drawn_PLF = np.stack([as_many(named_LF, rng) for named_LF in named_PLF])
        random_QP[number] = (before_WP - [one.probabilities(drawn_PLF) for one in later]).mean(0)
    own_P = lost_PP.diagonal()
    others_P = (lost_PP.sum(1) - own_P) / (FACTS - 1)
    random_P = random_QP.mean(0)
    count, own, others, random = map(intervals.mean, (named_PLF.sum((1, 2)), own_P, others_P, random_P))
    least, most, most_random = float(own_P.min()), float(others_P.max()), float(random_P.max())
    return Facts(steps, count, own, others, random, least, most, most_random)


def direct(model: Decoder, asked: Asked) -> np.ndarray:
    """float [P, L, F]: what each cell adds to its fact's answer, through the final norm with its scale frozen."""
    taps = asked.prompts.taps([CELLS, 'residual.after_mlp'])
    x_PD = taps['residual.after_mlp'][-1]
    scale_D = np.asarray(jax.device_get(model.norm.scale_D[...]), np.float32)
    rms_P1 = np.sqrt((x_PD**2).mean(-1, keepdims=True) + model.config.norm.epsilon)
    head_AD = programs.head_vectors(model, np.arange(ATTRIBUTE, ATTRIBUTE + NAMES))
    says_PD = scale_D * (head_AD[asked.answer_P - ATTRIBUTE] - head_AD.mean(0)) / rms_P1
    units = taps[CELLS].shape[-1]
    return np.stack(
        [
            hidden_PF * (says_PD @ cells.values(model, layer, range(units), units).T)
            for layer, hidden_PF in enumerate(taps[CELLS])
        ],
        1,
    )


def named_cells(asked: Asked, direct_PLF: np.ndarray) -> np.ndarray:
    """bool [P, L, F]: of each fact the cells that say most of it, until without them it has lost `NAMED`."""
    shape = direct_PLF.shape
    order_PC = np.argsort(-direct_PLF.reshape(len(direct_PLF), -1), -1, kind='stable')
    named_PC = np.zeros(order_PC.shape, bool)
    before_P = asked.probabilities(named_PC.reshape(shape))
    open_P = np.ones(len(order_PC), bool)
    for place in range(min(MOST, order_PC.shape[1])):
        named_PC[open_P, order_PC[open_P, place]] = True
        open_P &= before_P - asked.probabilities(named_PC.reshape(shape)) < NAMED
        if not open_P.any():
            break
    return named_PC.reshape(shape)


def as_many(named_LF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [L, F]: as many cells that are not among those, drawn at random."""
    drawn_C = np.zeros(named_LF.size, bool)
    drawn_C[rng.choice(np.flatnonzero(~named_LF), min(int(named_LF.sum()), int((~named_LF).sum())), replace=False)] = (
        True
    )
    return drawn_C.reshape(named_LF.shape)
