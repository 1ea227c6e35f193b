"""“Mapping high-dimensional vectors back to words in middle layers would destroy the complex abstract logic and cause
information loss”: what happens if the LM head is put in the middle?

Three things are measured on some English text. What the head reads after each layer (the logit lens, lens.py of the X-ray), and
how near that is to what the model says. Whether logits have lost anything: the head is a linear map with more outputs than
inputs, so that its inputs can be computed from them. And what is lost if the middle does go through words: at all places the
stream is replaced by the embedding of the word that the head reads there, as long as the stream was.

Letters: B texts, T tokens, D model, R rows of the stream, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from weft.inference.prompts import rows_of
from weft.inference.run import TrainedRun
from weft.interpret import intervals
from weft.interpret.claims.heads import Progress
from weft.interpret.claims.words import PASSAGE
from weft.interpret.passes import Change
from weft.interpret.xray import programs
from weft.model.decoder import Decoder
from weft.model.edits import Edit
from weft.model.forward import logits, place

ROWS = (0.25, 0.5, 0.75)  # parts of the depth at which the stream goes through words
SAMPLE = 64  # vectors that are computed back from their logits


@jax.jit
def _losses(model: Decoder, rows: programs.Padded, target_BT: jax.Array, edits: tuple[Edit, ...]) -> jax.Array:
    logit_BTV = logits(model, *rows, edits=edits)
    at_BTV = jnp.arange(logit_BTV.shape[-1])[None, None] == target_BT[..., None]
    return jax.nn.logsumexp(logit_BTV, -1) - jnp.where(at_BTV, logit_BTV, 0).sum(-1)


def lens(run: TrainedRun, seed: int, say: Progress) -> dict[str, Any]:
    """All figures by name; lists have a number for each row."""
    assert run.tokenizer is not None
    model, ids = run.model, rows_of(run.tokenizer, PASSAGE)
    T = max(map(len, ids))
    rows = programs.padded(model.config, ids, programs.columns_for(T))
    taps = programs.captured(model, ['embedding', 'residual.after_mlp'], rows)
    x_RBTD = np.concatenate([taps['embedding'][None], taps['residual.after_mlp']])
    target_BT = np.roll(rows.tokens_BT, -1, 1)
    counts_BT = (np.arange(rows.tokens_BT.shape[1]) > 0) & (np.roll(rows.segment_BT, -1, 1) > 0)
    counts_BT[:, -1] = False
    top, rank, nats = list[np.ndarray](), list[float](), list[float]()
    for row, x_BTD in enumerate(x_RBTD):
        say(f'logit lens: row {row} of {len(x_RBTD) - 1}')
        found = programs.read(model, x_BTD[counts_BT], target_BT[counts_BT])
        top.append(found.top_Nk[:, 0])
        rank.append(float(np.median(found.rank_N)))
        nats.append(float((found.log_sum_N - found.asked_N).mean()))
    same = [float((one == top[-1]).mean()) for one in top]
    arrays = place(rows), place(target_BT)
    losses = lambda edits: programs.host(_losses(model, *arrays, edits))[counts_BT]
    nothing_D = np.zeros((1, 1, 1, 1), np.float32)
    layers, count = model.config.layers, len(rows.tokens_BT)

    def through(row: int, value_BTD: np.ndarray, mask: bool = True) -> np.ndarray:
        """Nats of each token with other values in a row of the stream, at all tokens but the first."""
        later = (np.arange(layers) == row - 1)[:, None, None, None] & (np.arange(len(value_BTD[0])) > 0)[
            None, None, :, None
        ]
        return losses((Change('residual.after_mlp', later & mask, value_BTD[None]).edit(0, count, count),))

    whole = through(1, np.zeros_like(x_RBTD[0]) + nothing_D[0], mask=False)
    words = {}
    for part in ROWS:
        row = round(part * layers)
        say(f'through words: row {row}')
        read = programs.read(model, x_RBTD[row].reshape(-1, x_RBTD.shape[-1]), np.zeros(counts_BT.size, np.int32))
        word_BTD = embeddings(model, read.top_Nk[:, 0].reshape(counts_BT.shape))
        size = np.linalg.norm(x_RBTD[row], axis=-1, keepdims=True) / np.linalg.norm(word_BTD, axis=-1, keepdims=True)
        words[row] = intervals.mean(through(row, word_BTD * size) - whole)
    return {
        'tokens': int(counts_BT.sum()),
        'same_as_last': same,
        'median_rank': rank,
        'nats': nats,
        'loss': intervals.mean(whole),
        'through_words': {str(row): one for row, one in words.items()},
        'recovered': recovered(model, x_RBTD[layers // 2][counts_BT][:SAMPLE]),
    }


def embeddings(model: Decoder, token_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T, D]: what the model's first layer is given of these tokens."""
    rows = programs.padded(model.config, token_BT.tolist(), token_BT.shape[1])
    return programs.captured(model, ['embedding'], rows)['embedding'][: len(token_BT)]


def recovered(model: Decoder, x_ND: np.ndarray) -> dict[str, float]:
    """Vectors of the middle computed back from all their logits, by least squares: the largest relative error."""
    c = model.config
    assert c.vocabulary is not None
    head_VD = programs.head_vectors(model, np.arange(c.vocabulary)).astype(np.float64)
    x_ND = x_ND.astype(np.float64)
    gram_DD = head_VD.T @ head_VD
    # Logits as float32 has them.
    back_ND = np.linalg.solve(gram_DD, head_VD.T @ (x_ND @ head_VD.T).astype(np.float32).T).T
    error_N = np.linalg.norm(back_ND - x_ND, axis=-1) / np.linalg.norm(x_ND, axis=-1)
    value_D = np.sqrt(np.linalg.eigvalsh(gram_DD))
    return {'largest_error': float(error_N.max()), 'condition': float(value_D[-1] / value_D[0])}
