"""“Coreference Head: Resolves pronouns (like ‘he’ or ‘it’)”: is there a head that finds whom a pronoun means?

Two things are asked. After *Mary stayed at home because* a model that knows whom it speaks of goes on with *she* rather than
*he*: on which heads does that rest? And in *Mary met John in the park, and she*: is there a head that looks from the pronoun at
the person of its gender rather than at the other, whoever is named first? Names are one token each; those that heads are chosen
with are not those that they are tried with.
"""

import itertools
from typing import Any

import numpy as np

from weft.inference.prompts import rows_of
from weft.inference.run import TrainedRun
from weft.interpret import intervals
from weft.interpret.claims.heads import Choices, Progress, looks, token_of, try_heads
from weft.interpret.claims.words import DEEDS, MEETINGS, MEN, WOMEN

PRONOUNS = ('she', 'he')


def coreference(run: TrainedRun, seed: int, say: Progress) -> dict[str, Any]:
    """All figures by name."""
    rng = np.random.default_rng(seed)
    known = [[name for name in names if token_of(run, name)] for names in (WOMEN, MEN)]
    count = min(map(len, known)) // 2 * 2
    names = [[some[at] for at in rng.permutation(len(some))[:count]] for some in known]
    halves = [some[::2] for some in names], [some[1::2] for some in names]
    found = try_heads(run, deeds(halves[0]), deeds(halves[1]), seed, say)
    say('where heads look')
    (ranked, *ranked_at), (tried, *tried_at) = (meetings(run, some) for some in halves)
    chosen = looks(run, ranked, *ranked_at)
    layer, head = np.unravel_index(chosen.mean(-1).argmax(), chosen.shape[:2])
    seen_B = looks(run, tried, *tried_at)[layer, head]
    first_B = np.array(tried_at[0]) < np.array(tried_at[1])
    return found | {
        'names': 2 * count,
        'looks': (int(layer), int(head)),
        'looks_at_antecedent': intervals.share(seen_B),
        'where_it_is_named_first': intervals.share(seen_B[first_B]),
        'where_it_is_named_last': intervals.share(seen_B[~first_B]),
        'meetings': len(tried),
    }


def deeds(names: list[list[str]]) -> Choices:
    """Each name in each sentence of one person."""
    pairs = [(text, name, kind) for kind in range(2) for name in names[kind] for text in DEEDS]
    texts = [text.format(name) for text, name, _ in pairs]
    return Choices(texts, [PRONOUNS[kind] for *_, kind in pairs], [PRONOUNS[1 - kind] for *_, kind in pairs])


def meetings(run: TrainedRun, names: list[list[str]]) -> tuple[list[str], list[int], list[int]]:
    """Sentences of a woman and a man, in both orders and with both pronouns; where the person meant stands, and the other."""
    assert run.tokenizer is not None
    texts, meant = [], []
    pairs = list(zip(names[0], names[1], strict=True))
    for (woman, man), text, turned, kind in itertools.product(pairs, MEETINGS, range(2), range(2)):
        texts.append(f'{text.format(*((man, woman) if turned else (woman, man)))} {PRONOUNS[kind]}')
        meant.append(((woman, man)[kind], (man, woman)[kind]))
    rows = rows_of(run.tokenizer, texts)
    at, beside = list[int](), list[int]()
    for row, text, pair in zip(rows, texts, meant, strict=True):
        at.append(place(run, row, text, pair[0]))
        beside.append(place(run, row, text, pair[1]))
    return texts, at, beside


def place(run: TrainedRun, row: list[int], text: str, name: str) -> int:
    """Where a name stands among a text's tokens; at the beginning it is written without a space."""
    assert run.tokenizer is not None
    if text.startswith(name):
        return len(run.tokenizer.prefix) + len(run.tokenizer.encode_batch([name])[0]) - 1
    token = token_of(run, name)
    assert token is not None
    return row.index(token)
