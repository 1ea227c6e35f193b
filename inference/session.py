"""One sequence that goes on: a conversation's keys and values stay in the cache, and only what is new is read.

Letters: B rows (the first is the sequence, others only fill up the mesh), T tokens, S slots of the cache.
"""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from weft.data.tokenizer import Tokenizer
from weft.inference.generate import Completion, TextStream, choices, first_token, follow, next_token
from weft.inference.prompts import BUCKET, Prompts
from weft.inference.sampling import Beside, RowSampling, Sampling, describe
from weft.inference.step import empty_cache, extend, grown, jit_step
from weft.model.decoder import Decoder
from weft.model.forward import place, row_ways
from weft.model.kv_cache import KVCache

CHUNKS = (256, BUCKET)  # tokens that are read at once: of each size a program is compiled
MOST_SCORES = 2**22  # of a head, that exist at once: a long text is read in small chunks
SLOTS = 512  # of a new cache; it doubles when it is full
BY_LENGTH = ('dynamic', 'longrope')  # kinds of rope that turn all of a row's tokens by its length


@functools.partial(jit_step, donate_argnums=(1, 6))
def read_more(
    model: Decoder,
    cache: KVCache,
    tokens_BT: jax.Array,
    begin_B: jax.Array,
    length_B: jax.Array,
    choice: RowSampling | None,
    seen_BV: jax.Array | None,
) -> tuple[jax.Array, jax.Array, KVCache, Beside]:
    """Reads a chunk of text after what is in the cache: the token that follows, its position, the cache, and `describe`."""
    logit_BV, cache = extend(model, cache, tokens_BT, begin_B, length_B)
    token_B, beside = describe(logit_BV, begin_B + length_B - 1, choice, seen_BV, 0)
    return token_B, begin_B + length_B, cache, beside


longer = jit_step(grown, static_argnums=1)


class Session:
    """Answers to texts of which each mostly begins as the one before, under `jax.set_mesh`; not for encoder–decoders.

    The cache has the fewest slots that hold the text, doubled from SLOTS on, so that few programs are compiled.
    """

    def __init__(
        self, kind: Decoder, tokenizer: Tokenizer, context: int, weights: Callable[[], Decoder] | None = None
    ) -> None:
        """`kind` is the model; or where `weights` gives it, once it has been read, what says its shapes and layouts."""
        self.kind, self.tokenizer, self.context = kind, tokenizer, context
        self.weights = weights or (lambda: kind)
        self.rows = row_ways()
        self.cache: KVCache | None = None
        self.slots = 0
        self.kept: list[int] = []  # the tokens that are in the cache
        self.written = 0  # positions of it that were written to, those of tokens that are kept no longer too
        scaling = kind.config.rope_scaling
        # A longer row would turn what is in the cache otherwise: such a model reads each text anew.
        self.keeps = scaling is None or scaling.kind not in BY_LENGTH

    def prepare(self, sampling: Sampling) -> None:
        """Begins to compile what reads a first short text, while the weights are read and that text is written."""
        if not self.keeps:
            return
        choice, seen_BV = self._choice(sampling, [])
        tokens_BT, begin_B = place((np.zeros((self.rows, CHUNKS[-1]), np.int32), np.zeros(self.rows, np.int32)))
        read_more.ahead(self.kind, self._room(1), tokens_BT, begin_B, begin_B, choice, place(seen_BV))

    def _choice(self, sampling: Sampling, ids: Sequence[int]) -> tuple[RowSampling | None, np.ndarray | None]:
        """How the next token is chosen and, where a penalty asks for it, which tokens a text has: bool [B, V]."""
        choice = choices([sampling], self.rows)
        if choice is None or choice.penalty_B is None:
            return choice, None
        assert self.kind.config.vocabulary is not None, 'the tokenizer has decided'
        seen_BV = np.zeros((self.rows, self.kind.config.vocabulary), bool)
        seen_BV[0, list(ids)] = True
        return choice, seen_BV

    def answer(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stops: Sequence[str] = (),
        emit: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """What follows a text shorter than the context: `emit` gets each piece, until `stop` (finish_reason 'stopped')."""
        assert 0 < len(ids) < self.context, 'the text leaves room for an answer'
        choice, seen_BV = self._choice(sampling, ids)
        token_B, position_B, beside = self._read(ids, choice, seen_BV)
        completion, stream = Completion(''), TextStream(self.tokenizer, stops, whole=True)
        room = min(max_new_tokens, self.context - len(ids))
        began = time.perf_counter()
        while not completion.finish_reason:
            token = int(np.asarray(token_B)[0])
            piece = follow(completion, stream, token, self.tokenizer.ends, room)
            if not completion.finish_reason and stop():
                completion.finish_reason = 'stopped'
                rest = stream.add(None)
                completion.text, piece = completion.text + rest, piece + rest
            completion.seconds = time.perf_counter() - began
            if piece:
                emit(piece)
            if not completion.finish_reason:
                cache = self._room(len(self.kept) + 1)
                self.kept.append(token)
                self.written = max(self.written, len(self.kept))
                token_B, position_B, self.cache, beside = next_token(
                    self.weights(), cache, token_B, position_B, choice, beside.seen_BV
                )
        return completion

    def _read(
        self, ids: Sequence[int], choice: RowSampling | None, seen_BV: np.ndarray | None
    ) -> tuple[jax.Array, jax.Array, Beside]:
        """Has the cache hold these tokens: the token that follows, its position, and `describe`'s."""
        if not self.keeps:
            return self._read_anew(ids, choice, seen_BV)
        # The last token is read again where all are known: its logits are not.
        differs = (n for n, (old, new) in enumerate(zip(self.kept, ids, strict=False)) if old != new)
        known = min(next(differs, len(self.kept)), len(ids) - 1)
        if not (known and self.cache and self.cache.can_rewind(self.written, known)):
            known = 0  # a window's tokens before it are gone: all is read again
        self.kept, self.written = self.kept[:known], self.written if known else 0
        cache = self._room(len(ids))
        while True:
            begin = len(self.kept)
            fitting = (size for size in CHUNKS if size <= len(ids) - begin and size * self.slots <= MOST_SCORES)
            size = next(fitting, CHUNKS[-1])
            chunk = list(ids[begin : begin + size])
            tokens_BT = np.zeros((self.rows, size), np.int32)
            tokens_BT[0, : len(chunk)] = chunk
            begin_B, length_B = np.full(self.rows, begin, np.int32), np.full(self.rows, len(chunk), np.int32)
            token_B, position_B, cache, beside = read_more(
                self.weights(), cache, *place((tokens_BT, begin_B, length_B)), choice, place(seen_BV)
            )
            self.cache, self.kept = cache, [*self.kept, *chunk]
            self.written = max(self.written, len(self.kept))
            if len(self.kept) == len(ids):
                return token_B, position_B, beside

    def _read_anew(
        self, ids: Sequence[int], choice: RowSampling | None, seen_BV: np.ndarray | None
    ) -> tuple[jax.Array, jax.Array, Beside]:
        self.cache, self.slots, self.kept = None, _doubled(len(ids), SLOTS), list(ids)
        tokens_BT = np.zeros((self.rows, _doubled(len(ids), BUCKET)), np.int32)
        tokens_BT[0, : len(ids)] = ids
        prompts = Prompts(tokens_BT, np.full(self.rows, len(ids), np.int32)).placed()
        token_B, self.cache, beside = first_token(self.weights(), self.slots, prompts, choice, place(seen_BV))
        return token_B, prompts.length_B, beside

    def _room(self, tokens: int) -> KVCache:
        """The cache, which holds so many tokens at least from here on."""
        if tokens > self.slots or self.cache is None:
            most = -(-self.context // BUCKET) * BUCKET
            self.slots = max(min(_doubled(tokens, SLOTS), most), tokens)
            if self.cache is None:
                self.cache = jax.jit(lambda: empty_cache(self.kind, self.rows, self.slots, chunk=max(CHUNKS)))()
            else:
                self.cache = longer(self.cache, self.slots)
        return self.cache


def _doubled(tokens: int, least: int) -> int:
    """The smallest of `least`, 2 · least, 4 · least … that is not less."""
    return least << max(-(-tokens // least) - 1, 0).bit_length()
