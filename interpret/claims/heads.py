"""Which heads a choice between two next words rests on, and what is lost without them, beside random heads.

Heads are ranked on some prompts by attribution patching (passes.py): what setting a head to its mean over all prompts does, to
first order, to logit[right word] − logit[wrong word]. The best ones are then ablated, all at once, on prompts of other words;
and as many random ones of the same layers, many times.

Letters: L layers, B prompts, T columns, N heads, H head width, Q draws.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from weft.inference.prompts import rows_of
from weft.inference.run import TrainedRun
from weft.interpret import intervals
from weft.interpret.passes import CELLS, HEADS, Change, Prompts

COLUMNS, AT_ONCE = 16, 32  # of all prompts here, so that they run one program
BEST = 5  # heads that are ablated together
DRAWS = 20
Progress = Callable[[str], object]


class Choices(NamedTuple):
    """Prompts after which one word is right and another wrong."""

    texts: list[str]
    right: list[str]
    wrong: list[str]


def token_of(run: TrainedRun, word: str) -> int | None:
    """The token of a word inside a text; None: it has several."""
    assert run.tokenizer is not None
    (ids,) = run.tokenizer.encode_batch([f' {word}'])
    return ids[0] if len(ids) == 1 else None


def prompts_of(run: TrainedRun, texts: Sequence[str]) -> Prompts:
    """Texts as prompts of the one shape that all experiments have."""
    assert run.tokenizer is not None
    return Prompts(run.model, rows_of(run.tokenizer, texts), AT_ONCE, COLUMNS)


class Asked:
    """Choices as a model reads them."""

    def __init__(self, run: TrainedRun, choices: Choices) -> None:
        self.prompts = prompts_of(run, choices.texts)
        self.right_B, self.wrong_B = (np.array([token_of(run, word) for word in some]) for some in choices[1:])

    def differences(self, changes: Sequence[Change] = ()) -> np.ndarray:
        """float [B]: logit[right] − logit[wrong]."""
        logit_BV = self.prompts.logits(changes)
        row_B = np.arange(len(logit_BV))
        return logit_BV[row_B, self.right_B] - logit_BV[row_B, self.wrong_B]


def live(prompts: Prompts) -> np.ndarray:
    """bool [B, T]: the tokens of prompts but the first of each, which many models make a resting place of attention."""
    column_T = np.arange(prompts.columns)
    return (column_T > 0) & (column_T <= prompts.last_B[:, None])


def without(heads: Sequence[tuple[int, int]], mean_LNH: np.ndarray) -> Change:
    """Heads at their means, at all tokens but the first."""
    mask_LN = np.zeros(mean_LNH.shape[:2], bool)
    for layer, head in heads:
        mask_LN[layer, head] = True
    later_T = np.arange(COLUMNS) > 0
    return Change(HEADS, mask_LN[:, None, None, :, None] & later_T[None, None, :, None, None], mean_LNH[:, None, None])


def try_heads(run: TrainedRun, ranked: Choices, tried: Choices, seed: int, say: Progress) -> dict[str, Any]:
    """Ranks heads on some choices and ablates the best on others; all figures by name."""
    say('which heads: gradients')
    rank, asked = Asked(run, ranked), Asked(run, tried)
    value, gradient = rank.prompts.gradients(rank.right_B, rank.wrong_B, (HEADS, CELLS))[HEADS]
    live_BT = live(rank.prompts)
    mean_LNH = value[:, live_BT].mean(1)
    effect_LBT = ((mean_LNH[:, None, None] - value) * gradient).sum(-1)
    effect_LN = (effect_LBT * live_BT[None, :, :, None]).sum((1, 2)) / len(value[0])
    order = np.argsort(effect_LN, None)[:BEST]
    best = [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, effect_LN.shape), strict=True)]
    before_B = asked.differences()
    after_B = asked.differences([without(best, mean_LNH)])
    rng = np.random.default_rng(seed)
    random_QB = np.zeros((DRAWS, len(before_B)))
    for draw in range(DRAWS):
        say(f'random heads: draw {draw + 1} of {DRAWS}')
        random_QB[draw] = asked.differences([without(others(best, effect_LN.shape[1], rng), mean_LNH)])
    lost_B, lost_QB = before_B - after_B, before_B - random_QB
    return {
        'sentences': len(before_B),
        'right': intervals.share(before_B > 0),
        'difference': intervals.mean(before_B),
        'heads': best,
        'right_without': intervals.share(after_B > 0),
        'lost': intervals.mean(lost_B),
        'right_without_random': intervals.of_draws((random_QB > 0).mean(1)),
        'lost_to_random': intervals.of_draws(lost_QB.mean(1)),
        'draws': DRAWS,
    }


def others(best: Sequence[tuple[int, int]], heads: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """As many other heads of the same layers, or all others of a layer where most are among the best."""
    found = []
    for layer in sorted({layer for layer, _ in best}):
        taken = [head for at, head in best if at == layer]
        free = [head for head in range(heads) if head not in taken]
        drawn = rng.choice(free, min(len(taken), len(free)), replace=False)
        found += [(layer, int(head)) for head in drawn]
    return found


def looks(run: TrainedRun, texts: Sequence[str], at: Sequence[int], beside: Sequence[int]) -> np.ndarray:
    """bool [L, N, B]: whether a head looks from the last token rather at the token `at` than at the one `beside`."""
    prompts = prompts_of(run, texts)
    pattern_LBNS = prompts.taps(['attention.pattern'])['attention.pattern']
    pick = lambda places: np.take_along_axis(pattern_LBNS, np.asarray(places).reshape(1, -1, 1, 1), 3)[..., 0]
    return np.moveaxis(pick(at) > pick(beside), 1, 2)
