"""Are the heads that look like induction heads the ones that make a model repeat? Ablation beside random heads.

On random tokens that are read twice only the repetition says what comes next. Heads whose pattern scores as induction
(attention.py) are set to their mean over all tokens but the first of each text, all of these heads at once, and the loss on
the second half is measured; then as many heads drawn at random from the others of the same layers, many times (after Olsson et
al. 2022, arXiv:2209.11895, In-context learning and induction heads, argument 3). The interval is of a bootstrap over draws and
texts.

Letters: L layers, N heads, T tokens, B rows, H head width, V vocabulary, R texts, Q draws.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from weft.interpret.xray import programs
from weft.interpret.xray.attention import mean_scores, random_twice
from weft.interpret.xray.patching import HEADS
from weft.model.decoder import Decoder
from weft.model.edits import Edit
from weft.model.forward import logits, place
from weft.runtime.errors import UserError

BOOTSTRAPS = 2000
LOWEST, HIGHEST = 2.5, 97.5  # percentiles of an interval


@dataclasses.dataclass(frozen=True)
class InductionTest:
    """Losses are nats a token of the second half."""

    heads: list[tuple[int, int]]  # layer and head, of the largest score first
    scores: list[float]
    loss: float  # with nothing changed
    first_half: float
    without: float  # with these heads ablated
    random: list[float]  # of each draw
    ratio: (
        float  # of the rises: that of these heads over the mean of the draws; infinite where random heads cost nothing
    )
    interval: tuple[float, float]  # 95 %

    def figures(self) -> dict[str, object]:
        """As JSON, which has null for what is infinite."""
        told = lambda value: value if math.isfinite(value) else None
        ratios = {'ratio': told(self.ratio), 'interval': [told(one) for one in self.interval]}
        return dataclasses.asdict(self) | ratios | {'draws': len(self.random)}


@jax.jit
def _losses(model: Decoder, rows: programs.Padded, target_BT: jax.Array, edits: tuple[Edit, ...]) -> jax.Array:
    logit_BTV = logits(model, rows.tokens_BT, rows.position_BT, rows.segment_BT, edits=edits)
    target_BT1 = jax.reshard(target_BT, jax.P(*jax.typeof(logit_BTV).sharding.spec[:2]))[..., None]
    at_BTV = jnp.arange(logit_BTV.shape[-1])[None, None] == target_BT1
    return jax.nn.logsumexp(logit_BTV, -1) - jnp.where(at_BTV, logit_BTV, 0).sum(-1)


class RepeatedText:
    """Random tokens, twice, and the loss on their second half with any heads ablated."""

    def __init__(self, model: Decoder, texts: list[list[int]], prefix: int) -> None:
        self.model, self.texts, self.prefix = model, texts, prefix
        self.half = (len(texts[0]) - prefix) // 2
        self.rows = programs.padded(model.config, texts, programs.columns_for(len(texts[0])))
        taps = programs.captured(model, ['attention.pattern', HEADS], self.rows)
        T = len(texts[0])
        patterns = [taps['attention.pattern'][:, row, :T, :, :T].swapaxes(1, 2) for row in range(len(texts))]
        self.scores_LN = mean_scores(patterns, texts)['induction']
        heads_LBTNH = taps[HEADS][:, : len(texts), :T]
        self.mean_L11NH = heads_LBTNH[:, :, 1:].mean((1, 2), keepdims=True)

    def losses(self, heads: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """float32 [R] each: of every text the mean loss of the first and of the second half, with these heads ablated."""
        mask = np.zeros((*self.scores_LN.shape, 1), bool)
        for layer, head in heads:
            mask[layer, head] = True
        mask = mask[:, None, None]
        later = (np.arange(self.rows.tokens_BT.shape[1]) > 0).reshape(1, 1, -1, 1, 1)
        zero = jnp.zeros((1,) * mask.ndim, jnp.float32)
        where = jnp.asarray(mask), jnp.asarray(later)
        edit = Edit(name=HEADS, where=where, factor=zero, shift=jnp.asarray(self.mean_L11NH))
        target_BT = np.roll(self.rows.tokens_BT, -1, 1)
        loss_BT = programs.host(_losses(self.model, place(self.rows), place(target_BT), (edit,)))
        last = self.prefix + 2 * self.half - 1  # the last place whose next token is there
        # The first token of the second half cannot be foreseen: nothing says that the repetition begins.
        middle = self.prefix + self.half
        loss_RT = loss_BT[: len(self.texts)]
        return loss_RT[:, max(self.prefix - 1, 0) : middle].mean(1), loss_RT[:, middle:last].mean(1)


def induction_test(
    model: Decoder,
    prefix: Sequence[int],
    context: int,
    *,
    draws: int,
    least: float,
    texts: int = 8,
    length: int = 64,
    seed: int = 0,
    leave_out: frozenset[int] = frozenset(),
    stage: Callable[[str, int], Callable[[int], object]] = lambda what, count: lambda done: None,
) -> InductionTest:
    """Finds the induction heads and tests them; `prefix` begins a text, `leave_out` are tokens that no text has.

    `stage(what, of how many)` is told what goes on, and gives who is told how many are done.

    Raises UserError where no head scores `least`, or no other head is left in their layers.
    """
    vocabulary = model.config.vocabulary
    assert vocabulary is not None
    rows = random_twice(texts, min(length, context), vocabulary, prefix, seed, leave_out)
    text = RepeatedText(model, rows, len(prefix))
    score_LN = text.scores_LN
    found = [(int(layer), int(head)) for layer, head in np.argwhere(score_LN >= least)]
    found.sort(key=lambda one: -score_LN[one])
    if not found:
        raise UserError(
            f'--least {least:g}: no head scores that much as induction; the largest score is {score_LN.max():.4g}'
        )
    others = others_of(found, score_LN.shape[1])
    progress = stage('draws of random heads', draws)
    first_R, loss_R = text.losses([])
    _, without_R = text.losses(found)
    rng = np.random.default_rng(seed)
    random_QR = []
    for done in range(draws):
        drawn = [
            (layer, int(head)) for layer, (count, free) in others.items() for head in rng.choice(free, count, False)
        ]
        random_QR.append(text.losses(drawn)[1])
        progress(done + 1)
    rise_R, rises_QR = without_R - loss_R, np.stack(random_QR) - loss_R
    return InductionTest(
        found,
        [float(score_LN[one]) for one in found],
        float(loss_R.mean()),
        float(first_R.mean()),
        float(without_R.mean()),
        [float(one) for one in np.stack(random_QR).mean(1)],
        ratio(rise_R, rises_QR),
        interval(rise_R, rises_QR, rng),
    )


def others_of(found: Sequence[tuple[int, int]], heads: int) -> dict[int, tuple[int, list[int]]]:
    """By layer how many random heads are to be drawn there, and of which.

    Raises UserError for a layer that has fewer others than heads that were found.
    """
    others = {}
    for layer in sorted({layer for layer, _ in found}):
        taken = [head for at, head in found if at == layer]
        free = [head for head in range(heads) if head not in taken]
        if len(free) < len(taken):
            raise UserError(
                f'layer {layer}: {len(taken)} of its {heads} heads score as induction, and {len(free)} are left to draw as '
                'many from; a larger --least names fewer'
            )
        others[layer] = len(taken), free
    return others


def ratio(rise_R: np.ndarray, rises_QR: np.ndarray) -> float:
    """Of the mean rises; infinite where that of random heads is none."""
    cost = float(rises_QR.mean())
    return float(rise_R.mean()) / cost if cost > 0 else math.inf


def interval(rise_R: np.ndarray, rises_QR: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the ratio of rises, by drawing texts and draws anew (percentile bootstrap)."""
    Q, R = rises_QR.shape
    text, draw = rng.integers(R, size=(BOOTSTRAPS, R)), rng.integers(Q, size=(BOOTSTRAPS, Q))
    ratios = [ratio(rise_R[r], rises_QR[q][:, r]) for r, q in zip(text, draw, strict=True)]
    low, high = np.percentile(ratios, [LOWEST, HIGHEST], method='nearest')
    return float(low), float(high)
