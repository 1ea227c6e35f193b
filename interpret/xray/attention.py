"""What each head looks at: patterns, and the roles of heads by scores of their patterns.

A[t, s] is how much of its attention a head gives at token t to token s; x are token ids. Scores are means over the tokens t
for which the sum below is of anything:

    previous   A[t, t − 1]                                     (Elhage et al. 2021, transformer circuits: previous token heads)
    first      A[t, 0], t > 0                                  (Xiao et al. 2023, arXiv:2309.17453: attention sinks)
    duplicate  Σ A[t, s] over s < t with x_s = x_t             (Wang et al. 2022, arXiv:2211.00593: duplicate token heads)
    induction  Σ A[t, s + 1] over s + 1 < t with x_s = x_t     (Olsson et al. 2022, arXiv:2209.11895: prefix matching)

Words repeat in a text for many reasons. So roles are named by the scores on random tokens that are read twice (Olsson et al.
2022): nothing but the repetition tells there what comes next, and each token of the second half has one earlier copy.

Letters: L layers, N heads, T queries and S keys of one text.
"""

from collections.abc import Mapping, Sequence

import numpy as np

ROLES = ('previous', 'first', 'duplicate', 'induction')
LEAST = 0.3  # score from which on a head is said to have a role


def targets(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """bool [T, S] for each role: the keys that a head of that role looks at from each query."""
    T = len(ids)
    id_T, at_T = np.asarray(ids), np.arange(T)
    same_TS = id_T[:, None] == id_T[None]
    before_TS = at_T[None] < at_T[:, None]
    duplicate_TS = same_TS & before_TS
    induction_TS = np.zeros((T, T), bool)
    induction_TS[:, 1:] = duplicate_TS[:, :-1]
    return {
        'previous': at_T[None] == at_T[:, None] - 1,
        'first': (at_T[None] == 0) & before_TS,
        'duplicate': duplicate_TS,
        'induction': induction_TS & before_TS,
    }


def scores(pattern_LNTS: np.ndarray, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """float32 [L, N] for each role, in [0, 1]; 0 where no token of the text has what a head of that role looks for."""
    found = {}
    for role, target_TS in targets(ids).items():
        some_T = target_TS.any(1)
        sum_LNT = np.einsum('LNTS,TS->LNT', pattern_LNTS, target_TS.astype(np.float32))
        found[role] = sum_LNT[..., some_T].sum(-1) / max(int(some_T.sum()), 1)
    return found


def mean_scores(patterns: Sequence[np.ndarray], texts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """The means of the scores of several texts as long as each other."""
    each = [scores(pattern, ids) for pattern, ids in zip(patterns, texts, strict=True)]
    return {role: np.mean([one[role] for one in each], 0) for role in ROLES}


def roles(found: Mapping[str, np.ndarray], least: float = LEAST) -> list[list[str]]:
    """For each layer and head its role: the one of the largest score, '' where none is at least `least`."""
    score_RLN = np.stack([found[role] for role in ROLES])
    best_LN = score_RLN.argmax(0)
    return [
        [ROLES[role] if score_RLN[role, layer, head] >= least else '' for head, role in enumerate(of_layer)]
        for layer, of_layer in enumerate(best_LN)
    ]


def random_twice(
    count: int, length: int, vocabulary: int, first: Sequence[int], seed: int, leave_out: frozenset[int] = frozenset()
) -> list[list[int]]:
    """Rows of at most `length` ids: what begins a text, then different random ids, then these once more in the same order."""
    rng = np.random.default_rng(seed)
    some = np.array([one for one in range(vocabulary) if one not in leave_out and one not in first])
    half = min((length - len(first)) // 2, len(some))
    found = []
    for _ in range(count):
        ids = rng.choice(some, half, replace=False).tolist()
        found.append([*first, *ids, *ids])
    return found


def top_keys(pattern_LNTS: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each query the k keys with the largest weights, uint16 [L, N, T, k], and these weights, float32; the largest first."""
    k = min(k, pattern_LNTS.shape[-1])
    key_LNTk = np.argsort(-pattern_LNTS, -1, kind='stable')[..., :k]
    return key_LNTk.astype(np.uint16), np.take_along_axis(pattern_LNTS, key_LNTk, -1).astype(np.float32)
