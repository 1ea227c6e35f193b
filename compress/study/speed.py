"""Decoding as it really runs, of a compressed model beside the one that it was made of, in turns on the same machine."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from weft.inference.generate import generate
from weft.inference.run import TrainedRun, open_run
from weft.inference.sampling import Sampling
from weft.interpret.intervals import mean

PROMPT = 'class Queue:\n    def __init__(self'
TOKENS = 96  # of each turn
TURNS = 7


def compare_decoding(original: Path, compressed: Path) -> dict[str, Any]:
    """Tokens a second at batch 1 of both, in turns, and their ratio: means of turns with 95 % intervals (bootstrap).

    What else the machine does hits both alike. Bytes read a token are counted: all weights that are held, of a mixture those
    of the experts that a token visits; the cache of keys and values is not among them.
    """
    runs = [open_run(folder, 'data=1') for folder in (original, compressed)]
    for run in runs:
        tokens_per_second(run)  # compiles
    rates = np.array([[tokens_per_second(run) for run in runs] for _ in range(TURNS)])
    before, after, ratio = (mean(a)._asdict() for a in (rates[:, 0], rates[:, 1], rates[:, 1] / rates[:, 0]))
    bytes_before, bytes_after = (bytes_read(run) for run in runs)
    return {
        'tokens_per_second_before': before,
        'tokens_per_second': after,
        'ratio': ratio,
        'bytes_read_before': bytes_before,
        'bytes_read': bytes_after,
    }


def tokens_per_second(run: TrainedRun) -> float:
    """Of one row that goes on with PROMPT."""
    assert run.tokenizer is not None, 'the models of the study have one'
    with jax.set_mesh(run.mesh):
        (answer,) = generate(run.model, run.tokenizer, [PROMPT], Sampling(temperature=0.8), TOKENS, run.context)
    return answer.tokens_per_second


def bytes_read(run: TrainedRun) -> int:
    """Of weights, for one token."""
    c, total = run.config.model, 0.0
    for path, w in jax.tree_util.tree_leaves_with_path(run.model):
        name = jax.tree_util.keystr(path)
        of_experts = c.moe is not None and '.mlp.' in name and '.router' not in name and '.shared' not in name
        total += w.nbytes * (c.moe.top_k / c.moe.experts if of_experts and c.moe else 1)
    return int(total)
