"""Pruning of single weights: by magnitude, by Wanda's score (arXiv:2306.11695), any share of them or 2 of every 4 inputs."""

from collections.abc import Callable

import numpy as np

from weft.compress.methods.base import Compressed, Options, register
from weft.compress.numerics import bits
from weft.compress.numerics.pruning import magnitude, n_of_m, wanda, wanda_score
from weft.compress.weights import Target
from weft.model.parts.linear_forms import PrunedConfig
from weft.runtime.errors import UserError


def fit_of(by_inputs: bool, of_four: bool) -> Callable[[Target, float, Options], Compressed]:
    """The method."""

    def fit(target: Target, budget: float, options: Options) -> Compressed:
        w_IO = target.w_IO if target.experts else target.w_IO[None]
        norms = [None] * len(w_IO)  # type: list[np.ndarray | None]
        if by_inputs:
            assert target.gram is not None, 'the method measures'
            grams = target.gram if target.experts else target.gram[None]
            norms = [np.sqrt(np.maximum(np.diagonal(gram), 0)) for gram in grams]
        if of_four:
            scores = [abs(w) if norm is None else wanda_score(w, norm) for w, norm in zip(w_IO, norms, strict=True)]
            mask = np.stack([n_of_m(score) for score in scores])
            taken = sum(bits.sparse_n_of_m(w.shape) for w in w_IO)
        else:
            room = (budget - target.w.size) / 32  # beside a bit a weight
            if room < 1:
                least = (target.w.size + 32) / target.bits
                raise UserError(f'{target.name}: {budget / target.bits:.3f} of its bits: a bitmap takes {least:.3f}')
            share = min(room / target.w.size, 1.0)
            # As many of each matrix, or of each output, and no more than fit.
            of = w_IO.shape[1] if by_inputs else w_IO[0].size
            share = max(int(share * of), 1) / of
            both = zip(w_IO, norms, strict=True)
            mask = np.stack([magnitude(w, share) if norm is None else wanda(w, norm, share) for w, norm in both])
            taken = bits.sparse(target.w.shape, int(mask.sum()))
        kept = np.where(mask, w_IO, 0)
        kept = kept.swapaxes(-1, -2) if target.weight.out_first else kept
        kept = kept if target.experts else kept[0]
        return Compressed(PrunedConfig(), {'w': kept.astype(np.float32)}, taken, kept)

    return fit


register('magnitude', 'zeros where weights are small; bits are a bitmap and the rest')(fit_of(False, False))
register('wanda', 'zeros where weight × input is small, for each output (Wanda)', measures=True)(fit_of(True, False))
register('magnitude-2:4', '2 of every 4 inputs of an output', fixed=True)(fit_of(False, True))
register('wanda-2:4', "2 of every 4 inputs, by Wanda's score", fixed=True, measures=True)(fit_of(True, True))
