"""“The FFN is a key–value memory … most hard knowledge lives here”: are there cells that hold a fact?

Facts are capitals, of which the model finds the right one likeliest. Cells are named by attribution on one prompt, *The capital
of France is*: activation times gradient of the capital's log-odds against the capital that the model finds likeliest of the
others, which is what zeroing a cell does, to first order (as knowledge neurons: Dai et al. 2021, arXiv:2104.08696). The
`CELLS_NAMED` best are set to zero where the fact is asked in other words, and where all other facts are; and as many random
cells of the same layers. As the best cells may serve any capital, they are named a second way, `of its own`: by how much more
they do for this fact than for the others on average.

Letters: P facts, L layers, T columns, F cells of a layer, V vocabulary.
"""

from typing import Any

import numpy as np

from weft.inference.run import TrainedRun
from weft.interpret import intervals
from weft.interpret.claims.heads import Progress, live, prompts_of, token_of
from weft.interpret.claims.words import ASKED, CAPITAL_OF
from weft.interpret.passes import CELLS, HEADS, Change, softmax
from weft.runtime.errors import UserError

CELLS_NAMED = 20
FACTS, LEAST = 12, 4  # that are tried, at most and at least
DRAWS = 3
KNOWN = 0.2  # least probability of the capital, however it is asked


def facts(run: TrainedRun, seed: int, say: Progress) -> dict[str, Any]:
    """All figures by name; what is lost is probability of the capital, in shares of 1."""
    pairs = [(country, capital) for country, capital in CAPITAL_OF if token_of(run, capital)]
    token_P = np.array([token_of(run, capital) for _, capital in pairs])
    asked = [prompts_of(run, [text.format(country) for country, _ in pairs]) for text in ASKED]
    say('which facts are known')
    p_WPV = np.stack([softmax(one.logits()) for one in asked])
    p_WP = p_WPV[:, np.arange(len(pairs)), token_P]
    known = np.flatnonzero(p_WP.min(0) >= KNOWN)[:FACTS]
    if len(known) < LEAST:
        raise UserError(
            f'facts: the model knows {len(known)} of {len(pairs)} capitals, and {LEAST} are needed; leave it out'
        )
    pairs, token_P = [pairs[at] for at in known], token_P[known]
    asked = [prompts_of(run, [text.format(country) for country, _ in pairs]) for text in ASKED]
    other_P = np.zeros_like(token_P)
    for n, at in enumerate(known):  # the likeliest of the others
        rest_P = np.delete(token_P, n)
        other_P[n] = rest_P[p_WPV[0, at][rest_P].argmax()]
    say('which cells: gradients')
    value, gradient = asked[0].gradients(token_P, other_P, (HEADS, CELLS))[CELLS]
    effect_PLF = ((value * gradient) * live(asked[0])[None, :, :, None]).sum(2).swapaxes(0, 1)
    mine_PLF = effect_PLF - (effect_PLF.sum(0) - effect_PLF) / (len(pairs) - 1)
    before_P = np.mean([probabilities(one, token_P) for one in asked[1:]], 0)
    found: dict[str, Any] = {
        'facts': len(pairs),
        'known': int((p_WP.min(0) >= KNOWN).sum()),
        'asked': len(p_WP[0]),
        'countries': [country for country, _ in pairs],
        'cells_each': CELLS_NAMED,
        'probability': intervals.mean(before_P),
    }
    for way, score_PLF in (('', effect_PLF), ('_of_its_own', mine_PLF)):
        named = np.zeros(score_PLF.shape, bool)
        for n, score_LF in enumerate(score_PLF):
            named[n].reshape(-1)[np.argsort(-score_LF, None)[:CELLS_NAMED]] = True
        rng = np.random.default_rng(seed)
        lost_PP, random_QP = np.zeros((len(pairs), len(pairs))), np.zeros((DRAWS, len(pairs)))
        for n in range(len(pairs)):
            say(f'fact {n + 1} of {len(pairs)}: {pairs[n][0]}')
            lost_PP[n] = before_P - np.mean([probabilities(one, token_P, named[n]) for one in asked[1:]], 0)
            for draw in range(DRAWS if not way else 0):
                drawn_LF = as_many(named[n], rng)
                random_QP[draw, n] = (
                    before_P[n] - np.mean([probabilities(one, token_P, drawn_LF) for one in asked[1:]], 0)[n]
                )
        own_P = lost_PP.diagonal()
        found |= {
            f'own{way}': intervals.mean(own_P),
            f'others{way}': intervals.mean((lost_PP.sum(1) - own_P) / (len(pairs) - 1)),
            f'lost_most{way}': float(own_P.max()),
            f'layers{way}': [int(one) for one in np.percentile(np.nonzero(named)[1], [10, 50, 90]) + 1],
        }
        if not way:
            found['random'] = intervals.mean(random_QP.mean(0))
    return found


def probabilities(prompts: Any, token_P: np.ndarray, ablated_LF: np.ndarray | None = None) -> np.ndarray:
    """float [P]: of each fact's capital, without some cells."""
    mask_LF = np.zeros((1, 1), bool) if ablated_LF is None else ablated_LF
    if ablated_LF is None:
        mask_LF = np.zeros((prompts.model.config.layers, prompts.model.config.mlp.dim), bool)
    none = Change(CELLS, mask_LF[:, None, None], np.zeros((1, 1, 1, 1), np.float32))
    return softmax(prompts.logits([none]))[np.arange(len(token_P)), token_P]


def as_many(named_LF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [L, F]: in each layer as many other cells, drawn at random."""
    drawn_LF = np.zeros_like(named_LF)
    for layer, named_F in enumerate(named_LF):
        drawn_LF[layer, rng.choice(np.flatnonzero(~named_F), int(named_F.sum()), replace=False)] = True
    return drawn_LF
