"""“Bottom Layers: Extract grammar … Middle Layers: Capture entity relationships … Top Layers: … no longer processes specific
words”: what can be read off a word, layer by layer?

Three probes (probes.py) of the residual stream at a word, row 0 the embedding, row l after layer l:

    part of speech    nouns and verbs of one form (*walk*), in contexts that make them the one or the other
    kind of thing     animals, food, tools …: what a word names, in contexts that do not tell
    which word        of all these nouns, to be told in contexts that the probe has not seen

Of the first two no word that is tried was there to be fitted to, and every word is there as both parts of speech, so that
knowing words by heart gives nothing. Beside each stands the probe of shuffled labels.

Letters: R rows of the stream, B prompts, D model, W words.
"""

from typing import Any

import numpy as np

from weft.inference.run import TrainedRun
from weft.interpret import intervals, probes
from weft.interpret.claims.heads import Progress, prompts_of, token_of
from weft.interpret.claims.words import AS_NOUN, AS_VERB, BOTH, KINDS, NEUTRAL

SHUFFLES = 5
NEAR = 0.95  # of what is best above chance: there a curve is said to have come up


def layers(run: TrainedRun, seed: int, say: Progress) -> dict[str, Any]:
    """All figures by name; `curve` has a share for each row."""
    rng = np.random.default_rng(seed)
    both = [word for word in BOTH if token_of(run, word)]
    named = [(word, kind) for kind, words in enumerate(KINDS.values()) for word in words.split() if token_of(run, word)]
    say('part of speech')
    cases = [
        (word, text, as_verb) for word in both for as_verb, texts in enumerate((AS_NOUN, AS_VERB)) for text in texts
    ]
    stream_RBD = prompts_of(run, [f'{text} {word}' for word, text, _ in cases]).stream()
    word_B, speech_B = np.array([both.index(word) for word, *_ in cases]), np.array([case[2] for case in cases])
    late_B = np.array([text in (*AS_NOUN[2:], *AS_VERB[2:]) for _, text, _ in cases])
    test_W = halved(len(both), rng)
    # Neither the words nor the contexts that are tried were seen.
    speech = curve(stream_RBD, speech_B, ~test_W[word_B] & ~late_B, test_W[word_B] & late_B, rng, word_B)
    say('kind of thing')
    things = [(at, text) for at in range(len(named)) for text in NEUTRAL]
    stream_RBD = prompts_of(run, [f'{text} {named[at][0]}' for at, text in things]).stream()
    word_B, kind_B = np.array([at for at, _ in things]), np.array([named[at][1] for at, _ in things])
    test_W = halved(len(named), rng)
    kind = curve(stream_RBD, kind_B, ~test_W[word_B], test_W[word_B], rng, word_B)
    say('which word')
    late_B = np.array([text == NEUTRAL[-1] for _, text in things])
    word = curve(stream_RBD, word_B, ~late_B, late_B, rng, word_B)
    found = {'part of speech': speech, 'kind of thing': kind, 'which word': word}
    return {
        name: one | {'words': words, 'classes': classes}
        for (name, one), words, classes in zip(
            found.items(), (len(both), len(named), len(named)), (2, len(KINDS), len(named)), strict=True
        )
    }


def halved(count: int, rng: np.random.Generator) -> np.ndarray:
    """bool [W]: which words are tried."""
    return rng.permutation(count) < count // 2


def curve(
    stream_RBD: np.ndarray,
    class_B: np.ndarray,
    fit_B: np.ndarray,
    test_B: np.ndarray,
    rng: np.random.Generator,
    word_B: Any,
) -> dict[str, Any]:
    """Of each row the share in which a probe is right, the best row, and the first that is nearly as good."""
    right = [
        probes.right(row_BD[fit_B], class_B[fit_B], row_BD[test_B], class_B[test_B]).astype(float)
        for row_BD in stream_RBD
    ]
    share = [float(one.mean()) for one in right]
    best = int(np.argmax(share))
    middle_BD = stream_RBD[best]
    shuffled = [
        probes.right(middle_BD[fit_B], rng.permutation(class_B[fit_B]), middle_BD[test_B], class_B[test_B]).mean()
        for _ in range(SHUFFLES)
    ]
    chance = float(np.bincount(class_B[test_B]).max() / test_B.sum())
    up = next(row for row, one in enumerate(share) if one - chance >= NEAR * (share[best] - chance))
    by_word = lambda row: intervals.mean(of_groups(right[row], word_B[test_B]))
    return {
        'curve': share,
        'embedding': by_word(0),
        'best_row': best,
        'best': by_word(best),
        'up_row': up,
        'last': by_word(len(share) - 1),
        'shuffled': float(np.mean(shuffled)),
        'chance': chance,
        'tried': int(test_B.sum()),
    }


def of_groups(value_B: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """The mean of each group: prompts of one word say the same thing many times."""
    return np.array([value_B[group_B == group].mean() for group in np.unique(group_B)])
