"""Beam search: of each prompt the likeliest whole continuations, several being followed at once.

As transformers has it with early_stopping=False: a continuation's score is the sum of its tokens' log-probabilities over the
number of tokens (its end among them) to the power of the length penalty, and a prompt's search ends once the best beam,
were it to end here, would not be among the finished ones. Letters: B prompts, N beams, C candidates, V vocabulary.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.data.tokenizer import Tokenizer
from weft.inference.generate import Completion, prefill_prompts
from weft.inference.prompts import Prompts, read_prompts
from weft.inference.sampling import NO_TOKEN, check_token
from weft.inference.step import decode, jit_step
from weft.model.decoder import Decoder
from weft.model.forward import TOKENS, place
from weft.model.kv_cache import KVCache
from weft.model.parameters import specs
from weft.runtime.errors import UserError


class Hypothesis(NamedTuple):
    """A whole continuation."""

    score: float
    tokens: list[int]  # without the end
    ended: bool  # by the end token; else its length is used up


class Candidates(NamedTuple):
    """The best ways to go on from a prompt's beams, best first; float32 and int32 [B, C] each."""

    score_BC: Any  # of all its tokens
    beam_BC: Any
    token_BC: Any


@dataclasses.dataclass
class RowSearch:
    """One prompt's beams and what has ended of them: plain numbers, on the host."""

    beams: int
    ends: frozenset[int]
    most: int  # tokens of a continuation
    penalty: float
    running: list[tuple[float, list[int]]] = dataclasses.field(default_factory=lambda: [(0.0, [])])
    finished: list[Hypothesis] = dataclasses.field(default_factory=list)
    open: bool = True

    def step(self, scores: Sequence[float], beams: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Goes on by one token, the candidates being the best ones, best first. Returns each new beam's old number."""
        parents: list[int] = []
        running: list[tuple[float, list[int]]] = []
        for rank, (score, beam, token) in enumerate(zip(scores, beams, tokens, strict=True)):
            if not np.isfinite(score):  # of a beam that is none
                continue
            so_far = [*self.running[beam][1], token]
            if token in self.ends or len(so_far) == self.most:
                if rank < self.beams:  # those behind are there to go on with
                    ended, normalised = token in self.ends, score / len(so_far) ** self.penalty
                    found = Hypothesis(normalised, so_far[:-1] if ended else so_far, ended)
                    self.finished = sorted([*self.finished, found], key=lambda one: -one.score)[: self.beams]
            elif len(running) < self.beams:
                running.append((score, so_far))
                parents.append(beam)
        self.running = running
        if running and len(self.finished) == self.beams:
            best = running[0][0] / len(running[0][1]) ** self.penalty
            self.open = best > self.finished[-1].score
        self.open = self.open and bool(running)
        return parents


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def first_candidates(
    model: Decoder, slots: int, beams: int, per_beam: int, prompts: Prompts
) -> tuple[Candidates, KVCache]:
    """Candidates after the prompts, and their cache with each row `beams` times."""
    logit_BV, cache = prefill_prompts(model, slots, prompts)
    found = candidates(logit_BV, jnp.zeros(logit_BV.shape[0], out_sharding=TOKENS), per_beam * beams, 1)
    return found, by_row(cache, lambda a, axis: jnp.repeat(a, beams, axis))


@functools.partial(jit_step, static_argnums=(2, 3), donate_argnums=1)
def next_candidates(
    model: Decoder,
    cache: KVCache,
    beams: int,
    per_beam: int,
    parent_R: jax.Array,
    token_R: jax.Array,
    score_R: jax.Array,
    position_R: jax.Array,
) -> tuple[Candidates, KVCache]:
    """Candidates after one more token in each of B × N rows, whose beams come from others of their prompt."""

    def chosen(a: jax.Array, axis: int, parent_R: jax.Array) -> jax.Array:
        first_R = jnp.arange(len(parent_R), dtype=parent_R.dtype) // beams * beams
        return jnp.take(a, first_R + parent_R, axis)

    own = cache._replace(source=None)  # the beams of a prompt have one source
    cache = by_row(own, chosen, parent_R)._replace(source=cache.source)
    logit_RV, cache = decode(model, cache, token_R, position_R)
    return candidates(logit_RV, score_R, per_beam * beams, beams), cache


def candidates(logit_RV: jax.Array, score_R: jax.Array, count: int, beams: int) -> Candidates:
    """The `count` best continuations of each prompt's `beams` rows, or all that there are."""

    def one_device(logit_RV: jax.Array, score_R: jax.Array) -> Candidates:
        V = logit_RV.shape[1]
        score_RV = score_R[:, None] + jax.nn.log_softmax(logit_RV, axis=-1)
        score_BC, which_BC = jax.lax.top_k(score_RV.reshape(-1, beams * V), min(count, beams * V))
        return Candidates(score_BC, which_BC // V, which_BC % V)

    return jax.shard_map(one_device, in_specs=P(TOKENS[0]), out_specs=P(TOKENS[0]))(logit_RV, score_R)


def by_row(cache: KVCache, change: Callable[..., jax.Array], *rows: jax.Array) -> KVCache:
    """A cache of other rows: `change(array, axis of its rows, *rows)` for each array, on each device by itself."""
    layout = specs(cache)

    def change_all(cache: KVCache, *rows: jax.Array) -> KVCache:
        return cache.map_rows(lambda array, axis: change(array, axis, *rows))

    return jax.shard_map(change_all, in_specs=(layout, *[TOKENS] * len(rows)), out_specs=layout)(cache, *rows)


def beam_search(
    model: Decoder, prompts: Prompts, beams: int, ends: frozenset[int], most: Sequence[int], penalty: float, slots: int
) -> tuple[list[list[Hypothesis]], float]:
    """Each row's best whole continuations, best first; and the seconds of all steps but the first two, which compile.

    Args:
        prompts: B rows, those that fill up a device's share among them.
        beams: followed at once in each row, N.
        ends: tokens that end a continuation.
        most: tokens of each row's continuation at most.
        penalty: the power of a continuation's length by which its score is divided.
        slots: tokens of a row that the cache has room for.
    """
    searches = [RowSearch(beams, ends, of_row, penalty) for of_row in most]
    per_beam = 1 + len(ends)  # candidates: if all ends are among its best, one more goes on
    found, cache = first_candidates(model, slots, beams, per_beam, prompts.placed())
    position_R = np.repeat(prompts.length_B, beams).astype(np.int32)
    began: float | None = None
    while True:
        rows = advance(searches, beams, found)
        if not any(one.open for one in searches):
            return [one.finished for one in searches], time.perf_counter() - began if began else 0.0
        found, cache = next_candidates(model, cache, beams, per_beam, *place((*rows, position_R)))
        position_R = position_R + 1
        if began is None:
            jax.block_until_ready(found)
            began = time.perf_counter()


class NextRows(NamedTuple):
    """What the next step reads of each of R = B × N rows; rows without a beam have a score of -inf."""

    parent_R: np.ndarray  # int32: which of its prompt's rows it goes on from
    token_R: np.ndarray  # int32: its last token
    score_R: np.ndarray  # float32: of all its tokens


def advance(searches: Sequence[RowSearch], beams: int, found: Candidates) -> NextRows:
    """Takes each open search a token further, and returns its beams. Raises MachineError where logits are not finite."""
    shape = len(searches), beams
    parent_BN, token_BN = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    total_BN = np.full(shape, -np.inf, np.float32)
    score_BC, beam_BC, token_BC = map(np.asarray, found)
    for b, one in enumerate(searches):
        if not one.open:
            continue
        if not np.isfinite(score_BC[b, 0]):  # the best one's
            check_token(NO_TOKEN)
        parents = one.step(score_BC[b].tolist(), beam_BC[b].tolist(), token_BC[b].tolist())
        for n, (parent, (score, tokens)) in enumerate(zip(parents, one.running, strict=True)):
            parent_BN[b, n], token_BN[b, n], total_BN[b, n] = parent, tokens[-1], score
    return NextRows(parent_BN.reshape(-1), token_BN.reshape(-1), total_BN.reshape(-1))


def generate_by_beams(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    beams: int,
    max_new_tokens: int,
    context: int,
    length_penalty: float = 1.0,
) -> list[Completion]:
    """The likeliest continuation of each prompt, of `beams` that are followed. Raises UserError as `generate` does."""
    if beams < 1:
        raise UserError(f'beams is {beams}: it must be at least 1; 1 is greedy')
    prompts = read_prompts(model.config, tokenizer, texts, context)
    slots = prompts.slots(max_new_tokens, context)
    most_B = np.minimum(max_new_tokens, context - prompts.length_B)
    found, seconds = beam_search(model, prompts, beams, tokenizer.ends, most_B.tolist(), length_penalty, slots)
    completions = []
    for text, (best, *_) in zip(texts, found, strict=False):
        reason = 'stop' if best.ended else 'length'
        answer = tokenizer.decode(best.tokens, whole=model.config.encoder is not None)
        completions.append(Completion(text, answer, best.tokens, reason, seconds, best.score))
    return completions
