"""“Grammar Head: Finds subject-verb-object relationships”: does a model's agreement of verb and subject rest on few heads?

After *The keys near the cabinet* the verb is *are*, whatever stands between (agreement with an attractor: Linzen et al. 2016,
arXiv:1611.01368). All four combinations of numbers are asked equally often, with nouns that are one token each.
"""

from typing import Any

import numpy as np

from weft.inference.run import TrainedRun
from weft.interpret.claims.heads import Choices, Progress, token_of, try_heads
from weft.interpret.claims.words import BETWEEN, NOUNS

PER_CASE = 16  # sentences of each of the four combinations


def choices(nouns: list[tuple[str, str]], rng: np.random.Generator) -> Choices:
    """Sentences of these nouns."""
    texts, right, wrong = list[str](), list[str](), list[str]()
    for plural in range(2):
        for other in range(2):
            for _ in range(PER_CASE):
                subject, attractor = rng.choice(len(nouns), 2, replace=False)
                pair = nouns[subject][plural], nouns[attractor][other]
                texts.append(f'The {pair[0]} {rng.choice(BETWEEN)} the {pair[1]}')
                right.append(('is', 'are')[plural])
                wrong.append(('are', 'is')[plural])
    return Choices(texts, right, wrong)


def grammar(run: TrainedRun, seed: int, say: Progress) -> dict[str, Any]:
    """All figures by name."""
    rng = np.random.default_rng(seed)
    nouns = [(one, many) for one, many in NOUNS if token_of(run, one) and token_of(run, many)]
    nouns = [nouns[at] for at in rng.permutation(len(nouns))]
    found = try_heads(run, choices(nouns[::2], rng), choices(nouns[1::2], rng), seed, say)
    return found | {'nouns': len(nouns)}
