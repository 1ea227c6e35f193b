"""Text from prompts: one prefill, then one token a step for all of them at once, until each is done."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import numpy as np

from weft.data.tokenizer import Tokenizer
from weft.hub.chat import Rendered
from weft.inference.prompts import Prompts, read_prompts
from weft.inference.sampling import Beside, Likely, RowSampling, Sampling, check_token, describe
from weft.inference.step import Program, decode, empty_cache, encode, jit_step, prefill
from weft.model.decoder import Decoder
from weft.model.forward import place
from weft.model.kv_cache import KVCache
from weft.runtime.errors import UserError


@dataclasses.dataclass
class Completion:
    """What follows a prompt."""

    prompt: str
    text: str = ''
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # 'stop': an end token or a stop text; 'length': no room is left
    seconds: float = 0.0  # from its second token to its last
    score: float | None = None  # of beam search: see inference/beams.py
    logprobs: list[dict[str, Any]] | None = None  # of each token, where it was asked for: see `token_logprobs`

    @property
    def timed_tokens(self) -> int:
        """How many `seconds` are of: all but the first two, for the prefill gives one, and the next step may compile."""
        return max(len(self.tokens) - 2, 0)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second of this row alone, whichever others are decoded beside it."""
        return self.timed_tokens / self.seconds if self.seconds else 0.0


class TextStream:
    """A completion's text as it becomes certain: no part of a character or stop text. `whole`: it continues no prompt."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], whole: bool = False):
        self.decoder, self.stops = tokenizer.stream(whole), [stop for stop in stops if stop]
        self.text = ''  # all decoded so far
        self.sent = 0  # characters of it that are certain
        self.stopped = False

    def add(self, token: int | None) -> str:
        """New certain text after a token; None ends the stream."""
        self.text += self.decoder.finish() if token is None else self.decoder.push([token])
        found = [at for at in (self.text.find(stop, max(0, self.sent - len(stop))) for stop in self.stops) if at >= 0]
        certain = len(self.text)
        if found:
            self.stopped, certain = True, min(found)
            self.text = self.text[:certain]
        elif token is not None:
            held = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
            certain -= max(held, default=0)
        new = self.text[self.sent : certain]
        self.sent = max(self.sent, certain)
        return new


def follow(completion: Completion, stream: TextStream, token: int, ends: AbstractSet[int], room: int) -> str:
    """Adds a token to a completion that may have `room` of them, and ends it where it does; its new certain text."""
    check_token(token)
    if token in ends:
        completion.finish_reason = 'stop'
        piece = stream.add(None)
    else:
        completion.tokens.append(token)
        piece = stream.add(token)
        if stream.stopped:
            completion.finish_reason = 'stop'
        elif len(completion.tokens) == room:
            completion.finish_reason = 'length'
            piece += stream.add(None)
    completion.text += piece
    return piece


def token_logprobs(tokenizer: Tokenizer, likely: Likely, row: int, token: int) -> dict[str, Any]:
    """How likely a token was, and which ones were the most likely, for JSON: natural logarithms of probabilities."""

    def one(i: int, logprob: Any) -> dict[str, Any]:
        return {'token': i, 'text': tokenizer.decode([i]), 'logprob': float(logprob)}

    top = zip(likely.token_BK[row].tolist(), likely.logprob_BK[row], strict=True)
    return one(token, likely.logprob_B[row]) | {'top': [one(i, logprob) for i, logprob in top]}


def prefill_prompts(model: Decoder, slots: int, prompts: Prompts) -> tuple[jax.Array, KVCache]:
    """The logits [B, vocabulary] after each prompt, and the cache."""
    source = encode(model, *prompts.source) if prompts.source else None
    cache = empty_cache(model, prompts.tokens_BT.shape[0], slots, source)
    return prefill(model, cache, prompts.tokens_BT, prompts.length_B)


@functools.partial(Program, static_argnums=(1, 5))
def first_token(
    model: Decoder,
    slots: int,
    prompts: Prompts,
    choice: RowSampling | None,
    seen_BV: jax.Array | None = None,
    count: int = 0,
) -> tuple[jax.Array, KVCache, Beside]:
    """Each row's first new token, the cache of its prompt, and what `describe` tells of the token."""
    logit_BV, cache = prefill_prompts(model, slots, prompts)
    token_B, beside = describe(logit_BV, prompts.length_B - 1, choice, seen_BV, count)
    return token_B, cache, beside


@functools.partial(jit_step, static_argnums=6, donate_argnums=(1, 5))
def next_token(
    model: Decoder,
    cache: KVCache,
    token_B: jax.Array,
    position_B: jax.Array,
    choice: RowSampling | None,
    seen_BV: jax.Array | None = None,
    count: int = 0,
) -> tuple[jax.Array, jax.Array, KVCache, Beside]:
    """Each row's next token, its position, the cache with the given one, and what `describe` tells of the token."""
    logit_BV, cache = decode(model, cache, token_B, position_B)
    token_B, beside = describe(logit_BV, position_B, choice, seen_BV, count)
    return token_B, position_B + 1, cache, beside


def choices(samplings: Sequence[Sampling], rows: int) -> RowSampling | None:
    """How each row chooses, on the current mesh; None: all greedily, as rows do that only fill up the batch."""
    filled = [*samplings, *[Sampling()] * (rows - len(samplings))]

    def every(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(one, name) for one in filled], dtype)

    choice = RowSampling(
        every('temperature', np.float32),
        every('top_k', np.int32),
        every('top_p', np.float32),
        every('min_p', np.float32),
        every('seed', np.uint32),
        every('repetition_penalty', np.float32) if any(one.repetition_penalty != 1 for one in samplings) else None,
    )
    return None if choice.penalty_B is None and not choice.temperature_B.any() else place(choice)


def seeded(sampling: Sampling, number: int) -> Sampling:
    """A sampling for the prompt of a number: its seed is so much higher, and begins again at 0 after the last one."""
    return dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32)


class PromptBatch:
    """Prompts as one batch on the current mesh, and what else its programs are called with; arguments as of `generate`."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        sampling: Sampling,
        max_new_tokens: int,
        context: int,
        logprobs: int,
        first: int = 0,
        like: int = 0,
    ) -> None:
        vocabulary = model.config.vocabulary
        assert vocabulary is not None, 'the tokenizer has decided'
        if not 0 <= logprobs <= vocabulary:
            raise UserError(f'logprobs is {logprobs}: it must be at least 0 and at most {vocabulary}, the vocabulary')
        read = read_prompts(model.config, tokenizer, texts, context, like)
        samplings = [seeded(sampling, first + number) for number in range(len(texts))]
        self.choice = choices(samplings, len(read.length_B))
        penalised = self.choice is not None and self.choice.penalty_B is not None
        self.seen_BV = place(read.seen(vocabulary)) if penalised else None
        self.slots, self.prompts = read.slots(max_new_tokens, context, like), read.placed()
        self.room = [min(max_new_tokens, context - int(length)) for length in read.length_B[: len(texts)]]  # of each
        self.model, self.logprobs = model, logprobs

    def compile_first(self) -> None:
        """Begins to compile what `generate` runs first; the model may be what says its weights' shapes and layouts."""
        first_token.ahead(self.model, self.slots, self.prompts, self.choice, self.seen_BV, self.logprobs)


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    context: int,
    stops: Sequence[str] = (),
    emit: Callable[[int, str], None] = lambda prompt, text: None,
    logprobs: int = 0,
    first: int = 0,
    like: int = 0,
) -> list[Completion]:
    """Decodes all prompts as one batch; use it under `jax.set_mesh`. Prompt i draws with seed `sampling.seed` + i.

    Args:
        prompts: what is gone on with, plain or as a chat template renders it; of an encoder–decoder the sources.
        context: the most tokens that a prompt and what follows it may have together; of an encoder–decoder each of both.
        stops: texts that end a completion; they are not part of it.
        emit: called with a prompt's number and each new piece of its text.
        logprobs: how many of the most likely tokens are told with each token; 0: none.
        first: the number of the first of these prompts, for seeds.
        like: see `inference.prompts.read_prompts`.

    Raises UserError for a prompt that leaves no room in the context, or is no source that fits it.
    """
    batch = PromptBatch(model, tokenizer, prompts, sampling, max_new_tokens, context, logprobs, first, like)
    completions = [Completion(prompt, logprobs=[] if logprobs else None) for prompt in prompts]
    writes = model.config.encoder is not None  # an answer, rather than going on with the prompt
    streams = [
        TextStream(tokenizer, stops, whole=writes or (isinstance(prompt, Rendered) and not prompt.goes_on))
        for prompt in prompts
    ]
    began = 0.0

    def take(token_B: jax.Array, likely: Likely | None) -> bool:
        """Adds each row's next token and shows what is certain; whether any row goes on."""
        known = jax.tree.map(np.asarray, likely)
        for number, token in enumerate(np.asarray(token_B)[: len(prompts)].tolist()):
            completion = completions[number]
            if completion.finish_reason:
                continue
            piece = follow(completion, streams[number], token, tokenizer.ends, batch.room[number])
            completion.seconds = time.perf_counter() - began if began else 0.0
            if known and completion.logprobs is not None and len(completion.tokens) > len(completion.logprobs):
                completion.logprobs.append(token_logprobs(tokenizer, known, number, token))
            if piece:
                emit(number, piece)
        return any(completion.finish_reason is None for completion in completions)

    def step(token_B: jax.Array, position_B: jax.Array, cache: KVCache, beside: Beside) -> Any:
        return next_token(model, cache, token_B, position_B, batch.choice, beside.seen_BV, logprobs)

    token_B, cache, beside = first_token(model, batch.slots, batch.prompts, batch.choice, batch.seen_BV, logprobs)
    if take(token_B, beside.likely):  # shown before the step, which may have to be compiled
        token_B, position_B, cache, beside = step(token_B, batch.prompts.length_B, cache, beside)
        jax.block_until_ready(token_B)
        began = time.perf_counter()
        for count in range(2, (most := max(batch.room)) + 1):
            # The next step is under way while the host reads this one's tokens.
            this_B, likely = token_B, beside.likely
            if count < most:
                token_B, position_B, cache, beside = step(token_B, position_B, cache, beside)
            if not take(this_B, likely):
                break
    jax.block_until_ready(token_B)
    return completions
