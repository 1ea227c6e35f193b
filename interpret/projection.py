"""Vectors as points of a plane: principal components, and UMAP where it is installed.

Letters: N vectors, D model, A axes of the projection.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np

from weft.runtime.errors import UserError, shown

LEAST = 3  # vectors: fewer lie on a line whatever they are
NEIGHBOURS = 15  # of UMAP, its own default
SEED = 0  # of UMAP: the same picture each time


class Projection(NamedTuple):
    """Where each vector lies, float64 [N, A], and the share of the variance on each axis; None where there is none."""

    at_NA: np.ndarray
    share_A: np.ndarray | None


def principal_axes(x_ND: np.ndarray, axes: int = 2) -> Projection:
    """Principal component analysis (Pearson 1901) by a singular value decomposition of the centred vectors, in float64.

    An axis has no sign of its own: here the largest entry of its direction, in absolute value, is positive, so that the same
    vectors give the same picture. Raises UserError for fewer than three vectors, and for vectors that are all equal.
    """
    check_enough(len(x_ND))
    centred_ND = np.asarray(x_ND, np.float64) - np.asarray(x_ND, np.float64).mean(0)
    _, size_A, direction_AD = np.linalg.svd(centred_ND, full_matrices=False)
    total = (size_A**2).sum()
    if total == 0:
        raise UserError(f'the {len(x_ND)} vectors are all equal: there is nothing to tell apart')
    direction_AD = direction_AD[:axes]
    largest_A = np.abs(direction_AD).argmax(1)
    direction_AD = direction_AD * np.where(direction_AD[np.arange(len(direction_AD)), largest_A] < 0, -1, 1)[:, None]
    at_NA, share_A = centred_ND @ direction_AD.T, size_A[:axes] ** 2 / total
    missing = axes - at_NA.shape[1]  # of fewer dims than axes the others have no extent
    return Projection(np.pad(at_NA, ((0, 0), (0, missing))), np.pad(share_A, (0, missing)))


def umap_plane(x_ND: np.ndarray) -> Projection:
    """UMAP (McInnes et al. 2018, arXiv:1802.03426) by cosine, of umap-learn, with its own defaults and a fixed seed.

    Distances between groups mean little in it, and its axes nothing. Raises UserError where umap-learn is not installed, and
    for fewer than three vectors.
    """
    check_enough(len(x_ND))
    umap = umap_package()
    count = len(x_ND)
    # Its spectral start needs more vectors than axes and one; few ones begin at random places.
    how = 'spectral' if count > 4 else 'random'
    found = umap.UMAP(
        n_neighbors=min(NEIGHBOURS, count - 1), metric='cosine', random_state=SEED, n_jobs=1, init=how
    ).fit_transform(np.asarray(x_ND, np.float32))
    return Projection(np.asarray(found, np.float64), None)


def umap_package() -> Any:
    """The package of umap-learn. Raises UserError where it is not installed, or lacks what it needs."""
    try:
        return importlib.import_module('umap')
    except ImportError as error:
        why = 'is not installed' if error.name == 'umap' else f'cannot be imported ({shown(error)})'
        rule = "it is an extra: pip install 'weft[umap]', or umap-learn by itself; --projection pca needs nothing more"
        raise UserError(f'--projection umap: umap-learn {why}; {rule}') from None


def check_enough(count: int) -> None:
    """Raises UserError for too few vectors to make a picture of."""
    if count < LEAST:
        raise UserError(f'{count} words: a picture needs at least {LEAST}')
