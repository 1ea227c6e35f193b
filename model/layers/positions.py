"""Fixed positions that are added to embeddings.

Letters: P positions, D model, J wavelengths.
"""

import numpy as np

from weft.model.config import ModelConfig


def sinusoids(c: ModelConfig) -> np.ndarray:
    """float64 [P, D]: sines of D / 2 wavelengths, then their cosines (arXiv:1706.03762, section 3.5, in Marian's order)."""
    P_, D = c.max_positions, c.model_dim
    assert P_ is not None, 'positions without a table'
    angle_PJ = np.arange(P_)[:, None] / np.power(10000, 2 * np.arange(D // 2) / D)[None]
    return np.concatenate([np.sin(angle_PJ), np.cos(angle_PJ)], 1)
