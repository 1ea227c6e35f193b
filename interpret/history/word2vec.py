"""word2vec: skip-gram with negative sampling (Mikolov et al. 2013, arXiv:1310.4546, eq. 4 and sections 2.2 and 2.3).

A word's vector x predicts the words around it: of each pair of a word w and a neighbour c, with K random words n,

    loss = − log σ(x_w · y_c) − Σ_n log σ(− x_w · y_n)

Neighbours stand at most a random 1 to `window` places away; frequent words are left out with probability 1 − √(t / frequency);
random words come from frequency^¾. The gradient is taken of many pairs at once and applied by Adam, where the paper takes them
one by one.

Letters: S tokens of all texts, P pairs, V vocabulary, D model, K random words, N words.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from weft.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipGram:
    """What is learnt, and how."""

    vocabulary: int
    dim: int = 64
    window: int = 5
    negatives: int = 5
    subsample: float = 1e-3  # t, a frequency; 0: no word is left out
    epochs: int = 2
    pairs: int = 1024  # of a step
    learning_rate: float = 5e-3  # at the first step; falls along a line to 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ('vocabulary', 'dim', 'window', 'negatives', 'epochs', 'pairs'):
            if getattr(self, field) < 1:
                raise UserError(f'word2vec: {field} is {getattr(self, field)}: it must be at least 1')


def train(config: SkipGram, texts: Sequence[np.ndarray]) -> np.ndarray:
    """The words' vectors, float32 [V, D], of texts of word numbers. Raises UserError where no two words stand together."""
    random = np.random.default_rng(config.seed)
    count_V = np.bincount(np.concatenate(texts), minlength=config.vocabulary)
    if len(count_V) > config.vocabulary:
        raise UserError(f'word2vec: word {len(count_V) - 1} is outside of 0 to {config.vocabulary - 1}')
    epochs = [shuffled(neighbours(config, texts, count_V, random), random) for _ in range(config.epochs)]
    steps = sum(len(pair_P2) // config.pairs for pair_P2 in epochs)
    if not steps:
        found = sum(map(len, epochs))
        raise UserError(f'word2vec: {found} pairs of neighbours, and a step takes {config.pairs}; give more text')
    rule = optax.adam(optax.linear_schedule(config.learning_rate, 0.0, steps))
    key = jax.random.key(config.seed)
    tables = {
        'x_VD': jax.random.uniform(key, (config.vocabulary, config.dim), minval=-0.5, maxval=0.5) / config.dim,
        'y_VD': jnp.zeros((config.vocabulary, config.dim)),
    }
    chance_V = jnp.log(jnp.asarray(count_V**0.75 + 1e-30, jnp.float32))
    state = (tables, rule.init(tables), key)
    run = jax.jit(functools.partial(steps_of, config, rule))
    for pair_P2 in epochs:
        whole = len(pair_P2) // config.pairs * config.pairs
        state = run(state, jnp.asarray(pair_P2[:whole].reshape(-1, config.pairs, 2)), jnp.cumsum(jnp.exp(chance_V)))
    return np.asarray(state[0]['x_VD'])


def steps_of(config: SkipGram, rule: Any, state: Any, pair_nP2: jax.Array, sum_V: jax.Array) -> Any:
    """The state after one step for each row of pairs. `sum_V`: running sums of what random words are drawn by."""

    def loss_of(tables: dict[str, jax.Array], pair_P2: jax.Array, random_PK: jax.Array) -> jax.Array:
        x_PD, y_PD = tables['x_VD'][pair_P2[:, 0]], tables['y_VD'][pair_P2[:, 1]]
        near_P = (x_PD * y_PD).sum(-1)
        far_PK = jnp.einsum('PD,PKD->PK', x_PD, tables['y_VD'][random_PK])
        return -(jax.nn.log_sigmoid(near_P) + jax.nn.log_sigmoid(-far_PK).sum(-1)).mean()

    def step(state: Any, pair_P2: jax.Array) -> tuple[Any, None]:
        tables, moments, key = state
        key, own = jax.random.split(key)
        drawn_PK = jax.random.uniform(own, (len(pair_P2), config.negatives), maxval=sum_V[-1])
        random_PK = jnp.searchsorted(sum_V, drawn_PK, side='right')
        gradient = jax.grad(loss_of)(tables, pair_P2, random_PK)
        updates, moments = rule.update(gradient, moments, tables)
        return (optax.apply_updates(tables, updates), moments, key), None

    return jax.lax.scan(step, state, pair_nP2)[0]


def neighbours(
    config: SkipGram, texts: Sequence[np.ndarray], count_V: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Pairs of a word and one of its neighbours, int32 [P, 2], of one reading of the texts."""
    word_S = np.concatenate(texts)
    text_S = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    if config.subsample:
        share_V = count_V / count_V.sum()
        keep_V = np.sqrt(config.subsample / np.maximum(share_V, config.subsample))
        kept_S = random.random(len(word_S)) < keep_V[word_S]
        word_S, text_S = word_S[kept_S], text_S[kept_S]
    reach_S = random.integers(1, config.window + 1, len(word_S))
    found = []
    for distance in range(1, config.window + 1):
        together_S = text_S[:-distance] == text_S[distance:]
        left_S, right_S = word_S[:-distance], word_S[distance:]
        # Each of the two is the word whose neighbour the other is, if it reaches so far.
        for near_S, word, other in ((reach_S[:-distance], left_S, right_S), (reach_S[distance:], right_S, left_S)):
            chosen_S = together_S & (near_S >= distance)
            found.append(np.stack([word[chosen_S], other[chosen_S]], 1))
    return np.concatenate(found).astype(np.int32)


def shuffled(pair_P2: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The pairs in a random order."""
    return pair_P2[random.permutation(len(pair_P2))]


def unit(x_VD: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return x_VD / np.maximum(np.linalg.norm(x_VD, axis=-1, keepdims=True), 1e-12)


def nearest(x_VD: np.ndarray, word: int, count: int, among: np.ndarray) -> list[tuple[int, float]]:
    """The words of `among` with the largest cosines to a word, itself left out, with their cosines."""
    unit_VD = unit(x_VD)
    cosine_N = unit_VD[among] @ unit_VD[word]
    order = np.argsort(-cosine_N, kind='stable')
    return [(int(among[i]), float(cosine_N[i])) for i in order if among[i] != word][:count]


def analogies(x_VD: np.ndarray, question_N4: np.ndarray) -> np.ndarray:
    """The answers [N] to questions 'a is to b as c is to …' of which the fourth column holds the right ones.

    3CosAdd (Mikolov et al. 2013, NAACL; Levy and Goldberg 2014, eq. 2): the word nearest to b − a + c by its cosine, the
    question's own three left out.
    """
    unit_VD = unit(x_VD)
    a_N, b_N, c_N = question_N4[:, :3].T
    cosine_NV = unit(unit_VD[b_N] - unit_VD[a_N] + unit_VD[c_N]) @ unit_VD.T
    np.put_along_axis(cosine_NV, question_N4[:, :3], -np.inf, axis=1)
    return np.argmax(cosine_NV, axis=1)


def planted(
    rows: int = 12, columns: int = 4, sentences: int = 8000, seed: int = 0
) -> tuple[list[np.ndarray], np.ndarray, int]:
    """A corpus whose words are related by construction, the questions [N, 4] that it answers, and its vocabulary.

    Word (i, j) of a table stands beside words that are those of row i, whatever j, and beside words that are those of column j:
    as king and queen stand beside words of royalty, and king and man beside words of men. So (i, j) is to (i, l) as (k, j) is
    to (k, l).
    """
    random, of_each = np.random.default_rng(seed), 3
    table = np.arange(rows * columns).reshape(rows, columns)
    of_row = table.size + np.arange(rows * of_each).reshape(rows, of_each)
    of_column = table.size + of_row.size + np.arange(columns * of_each).reshape(columns, of_each)
    texts = []
    for _ in range(sentences):
        i, j = random.integers(rows), random.integers(columns)
        row, column = random.choice(of_row[i], 2, replace=False), random.choice(of_column[j], 2, replace=False)
        texts.append(np.array([row[0], column[0], table[i, j], row[1], column[1]]))
    questions = [
        (table[i, j], table[i, m], table[k, j], table[k, m])
        for i in range(rows)
        for k in range(rows)
        for j in range(columns)
        for m in range(columns)
        if i != k and j != m
    ]
    return texts, np.array(questions), table.size + of_row.size + of_column.size
