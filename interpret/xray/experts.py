"""The paths of tokens through mixtures of experts: which they choose, how surely, and which kinds of tokens choose which.

Prefill and decoding are looked at apart: text that is read, and text that the model writes itself, one token a step.

Letters: M layers of experts, T tokens, K experts of a token, E experts.
"""

import functools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from weft.inference.step import decode, empty_cache, prefill
from weft.interpret.xray import programs
from weft.model.decoder import Decoder
from weft.model.forward import place
from weft.model.kv_cache import KVCache

TAPS = ('router.choices', 'router.scores', 'router.weights')
KINDS = ('word', 'number', 'punctuation', 'space', 'other')


class Paths(NamedTuple):
    """Of one text."""

    chosen_MTK: np.ndarray  # int32: experts, the one of the largest weight first
    weight_MTK: np.ndarray  # what each counts
    entropy_MT: np.ndarray  # of the scores over all experts, made to sum to 1; nats: 0 is sure


def paths(choices_MTK: np.ndarray, scores_MTE: np.ndarray, weights_MTK: np.ndarray) -> Paths:
    """Of what the routers of one text have said."""
    order_MTK = np.argsort(-weights_MTK, -1, kind='stable')
    share_MTE = scores_MTE / np.maximum(scores_MTE.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    entropy_MT = -(share_MTE * np.log(np.where(share_MTE > 0, share_MTE, 1))).sum(-1)
    take = lambda a_MTK: np.take_along_axis(a_MTK, order_MTK, -1)
    return Paths(take(choices_MTK), take(weights_MTK), entropy_MT)


def kind_of(text: str) -> str:
    """What kind of token a text is, by its first character that is no space."""
    inner = text.strip()
    if not inner:
        return 'space' if text else 'other'
    group = unicodedata.category(inner[0])[0]
    return {'L': 'word', 'M': 'word', 'N': 'number', 'P': 'punctuation', 'S': 'punctuation'}.get(group, 'other')


def load_by_kind(chosen_MTK: np.ndarray, texts: Sequence[str], experts: int) -> dict[str, np.ndarray]:
    """For each kind that the tokens have, float32 [M, E]: the share of its tokens' choices that fall on each expert."""
    kinds = np.array([kind_of(text) for text in texts])
    found = {}
    for kind in KINDS:
        if (these := kinds == kind).any():
            chosen = chosen_MTK[:, these].reshape(len(chosen_MTK), -1)
            found[kind] = np.stack([np.bincount(one, minlength=experts) for one in chosen]) / chosen.shape[1]
    return found


@functools.partial(jax.jit, static_argnums=3)
def _begin(model: Decoder, tokens_BT: jax.Array, length_B: jax.Array, slots: int) -> tuple[jax.Array, KVCache]:
    return prefill(model, empty_cache(model, tokens_BT.shape[0], slots), tokens_BT, length_B)


@functools.partial(jax.jit, donate_argnums=1)
def _step(
    model: Decoder, cache: KVCache, token_B: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, KVCache, dict[str, jax.Array]]:
    return decode.capture(model, cache, token_B, position_B, taps=TAPS)


def greedy(model: Decoder, ids: Sequence[int], new: int, context: int) -> tuple[list[int], Paths | None]:
    """The tokens that the model goes on with, the likeliest each time, and their paths while they are read one by one.

    `new` at most, as far as the context allows; with no room for one there are no paths.
    """
    new = min(new, context - len(ids))
    if new < 1:
        return [], None
    rows = programs.padded(model.config, [ids], programs.columns_for(len(ids))).tokens_BT
    length_B = np.ones(len(rows), np.int32)
    length_B[0] = len(ids)
    slots = programs.columns_for(max(rows.shape[1], len(ids) + new))
    logit_BV, cache = _begin(model, *place((rows, length_B)), slots)
    found, taps = list[int](), list[dict[str, np.ndarray]]()
    for _ in range(new):
        found.append(int(np.asarray(logit_BV)[0].argmax()))
        token_B = np.full(len(rows), found[-1], np.int32)
        logit_BV, cache, taken = _step(model, cache, *place((token_B, length_B)))
        length_B = length_B + np.int32(1)
        taps.append({name: programs.host(array)[:, 0] for name, array in taken.items()})
    joined = {name: np.concatenate([one[name] for one in taps], 1) for name in TAPS}
    return found, paths(*(joined[name] for name in TAPS))
