"""Text from prompts: one prefill, then one token a step for all of them at once, until each is done."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data.tokenizer import Tokenizer
from decoding.prompts import Prompts, read_prompts
from decoding.sampling import Choice, Sampling, choose
from decoding.step import Program, decode, empty_cache, encode, jit_step, prefill
from model.decoder import Decoder
from model.forward import place
from sharding.errors import UserError


@dataclasses.dataclass
class Completion:
    """What follows a prompt."""

    prompt: str
    text: str = ''
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = (
        None  # 'stop': an end token or a stop text; 'length': max_new_tokens or the context is used up
    )
    seconds: float = 0.0  # from its second token to its last
    score: float | None = None  # of beam search: see decoding/beams.py

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second, but for the first two: the prefill gives one, and the next step may compile."""
        return max(len(self.tokens) - 2, 0) / self.seconds if self.seconds else 0.0


class TextStream:
    """A completion's text as it becomes certain: whole characters, and nothing that may be the start of a stop text.

    `whole`: it is a text of its own, as an encoder–decoder's answer, and does not go on its prompt.
    """

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


@functools.partial(Program, static_argnums=1)
def first_token(model: Decoder, slots: int, prompts: Prompts, choice: Choice | None):
    """Each row's first new token, and the cache of its prompt."""
    logit_BV, cache = begin(model, slots, prompts)
    return choose(logit_BV, prompts.length_B - 1, choice), cache


def begin(model: Decoder, slots: int, prompts: Prompts):
    """The logits [B, vocabulary] after each prompt, and the cache."""
    source = encode(model, *prompts.source) if prompts.source else None
    cache = empty_cache(model, prompts.tokens_BT.shape[0], slots, source)
    return prefill(model, cache, prompts.tokens_BT, prompts.length_B)


@functools.partial(jit_step, donate_argnums=1)
def next_token(model: Decoder, cache: Any, token_B: jax.Array, position_B: jax.Array, choice: Choice | None):
    """Each row's next token, its position, and the cache with the given one."""
    logit_BV, cache = decode(model, cache, token_B, position_B)
    return choose(logit_BV, position_B, choice), position_B + 1, cache


def choices(sampling: Sampling, rows: int) -> Choice | None:
    """How each of a batch's rows chooses, on the current mesh; None: the most likely token, all of them."""
    if not sampling.temperature:
        return None
    every = lambda value, dtype: np.full(rows, value, dtype)
    return place(
        Choice(
            every(sampling.temperature, np.float32),
            every(sampling.top_k, np.int32),
            every(sampling.top_p, np.float32),
            every(sampling.min_p, np.float32),
            ((sampling.seed + np.arange(rows, dtype=np.uint64)) % 2**32).astype(np.uint32),
        )
    )


def compile_ahead(
    kind: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, max_new_tokens: int, context: int
) -> None:
    """Begins to compile what `generate` runs first for such arguments, of a model whose weights are still being read.

    `kind`: their shapes, dtypes and layouts. Raises UserError as `generate` does. The step is compiled when the first token is
    there: sooner it would only be in that one's way.
    """
    read = read_prompts(kind.config, tokenizer, prompts, context)
    choice, slots, here = choices(sampling, len(read.length_B)), read.slots(max_new_tokens, context), read.placed()
    first_token.ahead(kind, slots, here, choice)


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    context: int,
    stops: Sequence[str] = (),
    emit: Callable[[int, str], None] = lambda prompt, text: None,
) -> list[Completion]:
    """Decodes all prompts as one batch; use it under `jax.set_mesh`. Prompt i draws with seed `sampling.seed` + i.

    Args:
        prompts: what is gone on with; of an encoder–decoder the sources.
        context: the most tokens that a prompt and what follows it may have together; of an encoder–decoder each of both.
        stops: texts that end a completion; they are not part of it.
        emit: called with a prompt's number and each new piece of its text.

    Raises UserError for a prompt that leaves no room in the context, or is no source that fits it.
    """
    if max_new_tokens < 1:
        raise UserError(f'max-new-tokens is {max_new_tokens}: it must be at least 1')
    read = read_prompts(model.config, tokenizer, prompts, context)
    choice = choices(sampling, len(read.length_B))
    completions = [Completion(prompt) for prompt in prompts]
    streams = [TextStream(tokenizer, stops, whole=model.config.encoder is not None) for _ in prompts]
    began = 0.0

    def take(token_B: jax.Array) -> bool:
        """Adds each row's next token and shows what is certain; whether any row goes on."""
        for number, token in enumerate(np.asarray(token_B)[: len(prompts)].tolist()):
            completion, stream = completions[number], streams[number]
            if completion.finish_reason:
                continue
            if token in tokenizer.ends:
                completion.finish_reason = 'stop'
                piece = stream.add(None)
            else:
                completion.tokens.append(token)
                full = (
                    len(completion.tokens) == max_new_tokens
                    or read.length_B[number] + len(completion.tokens) == context
                )
                piece = stream.add(token)
                if stream.stopped:
                    completion.finish_reason = 'stop'
                elif full:
                    completion.finish_reason = 'length'
                    piece += stream.add(None)
            completion.seconds = time.perf_counter() - began if began else 0.0
            completion.text += piece
            if piece:
                emit(number, piece)
        return any(completion.finish_reason is None for completion in completions)

    slots, here = read.slots(max_new_tokens, context), read.placed()
    most = min(
        max_new_tokens, context - int(read.length_B[: len(prompts)].min())
    )  # tokens of the row that may have most
    token_B, cache = first_token(model, slots, here, choice)
    if take(token_B):  # shown before the step, which may have to be compiled
        token_B, position_B, cache = next_token(model, cache, token_B, here.length_B, choice)
        jax.block_until_ready(token_B)
        began = time.perf_counter()
        for count in range(2, most + 1):
            # The next step is under way while the host reads this one's tokens.
            this_B = token_B
            if count < most:
                token_B, position_B, cache = next_token(model, cache, token_B, position_B, choice)
            if not take(this_B):
                break
    jax.block_until_ready(token_B)
    return completions
