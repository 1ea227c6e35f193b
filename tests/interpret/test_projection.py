"""Projections against linear algebra on planted planes; pictures whose labels do not overlap.

Letters: N words, D model, A axes.
"""

import sys
import types

import numpy as np
import pytest

from weft.interpret.projection import SEED, principal_axes, umap_plane
from weft.interpret.word_picture import POINT, draw_words, place_labels
from weft.runtime.errors import UserError


def plane(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """60 points of a plane in 7 dims, wider one way than the other, far from the origin; and where they lie on it."""
    r = np.random.default_rng(0)
    direction_2D = np.linalg.qr(r.standard_normal((7, 2)))[0].T
    at_N2 = r.standard_normal((60, 2)) * [5, 2]
    return at_N2 @ direction_2D + 100 + noise * r.standard_normal((60, 7)), at_N2


def test_principal_axes_are_the_eigenvectors_of_the_covariance():
    x_ND, _ = plane(noise=0.1)
    value_D, vector_DA = np.linalg.eigh(np.cov(x_ND.T))
    found = principal_axes(x_ND)
    np.testing.assert_allclose(found.share_A, value_D[::-1][:2] / value_D.sum(), rtol=1e-9)
    expected_NA = (x_ND - x_ND.mean(0)) @ vector_DA[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(found.at_NA), np.abs(expected_NA), rtol=1e-6, atol=1e-9)
    assert principal_axes(x_ND, 4).at_NA.shape == (60, 4)


def test_a_planted_plane_is_found_whole_and_the_same_each_time():
    x_ND, at_N2 = plane(noise=0)
    found = principal_axes(x_ND)
    assert found.share_A.sum() == pytest.approx(1)
    apart = lambda at: np.linalg.norm(at[:, None] - at[None], axis=-1)
    np.testing.assert_allclose(apart(found.at_NA), apart(at_N2), atol=1e-9)
    order = np.random.default_rng(1).permutation(60)
    np.testing.assert_allclose(principal_axes(x_ND[order]).at_NA, found.at_NA[order], atol=1e-9)
    # The sign is that of the direction's largest entry, whatever the decomposition gives.
    line = np.array([[0.0, 0], [1, -3], [2, -6]])
    np.testing.assert_allclose(principal_axes(line).at_NA[:, 0], np.sqrt(10) * np.array([1, 0, -1]), atol=1e-12)
    np.testing.assert_allclose(principal_axes(-line).at_NA[:, 0], np.sqrt(10) * np.array([-1, 0, 1]), atol=1e-12)
    narrow = principal_axes(line[:, :1])
    assert narrow.at_NA.shape == (3, 2)
    assert narrow.share_A.tolist() == [1, 0]


def test_what_has_no_axes_is_refused():
    with pytest.raises(UserError, match='2 words: a picture needs at least 3'):
        principal_axes(np.eye(2))
    with pytest.raises(UserError, match='the 4 vectors are all equal'):
        principal_axes(np.ones((4, 3)))


def test_umap_is_told_when_it_is_missing_and_asked_for_a_picture_that_repeats(monkeypatch):
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(UserError, match=r"umap-learn is not installed; it is an extra: pip install 'weft\[umap\]'"):
        umap_plane(np.eye(5))
    asked = []

    class Umap:
        def __init__(self, **how):
            asked.append(how)

        def fit_transform(self, x_ND):
            return x_ND[:, :2]

    monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=Umap))
    found = umap_plane(np.eye(5))
    assert found.share_A is None
    np.testing.assert_array_equal(found.at_NA, np.eye(5)[:, :2])
    assert asked == [{'n_neighbors': 4, 'metric': 'cosine', 'random_state': SEED, 'n_jobs': 1, 'init': 'spectral'}]


def test_labels_stand_inside_beside_their_points_and_on_nothing():
    r = np.random.default_rng(0)
    point_N2, size_N2 = r.uniform(0, 500, (60, 2)), np.stack([r.uniform(20, 60, 60), np.full(60, 11.0)], 1)
    places = place_labels(point_N2, size_N2, np.array([0, 0, 500, 500]))
    placed = [box for box in places if box is not None]
    assert len(placed) >= 55
    points = np.concatenate([point_N2 - POINT, point_N2 + POINT], 1)
    apart = lambda a, b: (a[:2] >= b[2:]).any() or (a[2:] <= b[:2]).any()
    for number, box in enumerate(placed):
        assert (box[:2] >= 0).all()
        assert (box[2:] <= 500).all()
        assert all(apart(box, other) for other in [*placed[:number], *points])
    for box, point_2, size_2 in zip(places, point_N2, size_N2, strict=True):
        if box is not None:
            np.testing.assert_allclose(box[2:] - box[:2], size_2)
            assert np.linalg.norm(np.clip(point_2, box[:2], box[2:]) - point_2) < 60
    # One alone stands on the right; where that is outside, on the left.
    (first,) = place_labels(np.array([[50.0, 50]]), np.array([[30.0, 10]]), np.array([0, 0, 100, 100]))
    assert first[0] > 50
    assert first[1] < 50 < first[3]
    (second,) = place_labels(np.array([[90.0, 50]]), np.array([[30.0, 10]]), np.array([0, 0, 100, 100]))
    assert second[2] < 90
    assert place_labels(np.array([[50.0, 50]]), np.array([[300.0, 10]]), np.array([0, 0, 100, 100])) == [None]


def test_a_picture_has_words_as_they_are(recwarn):
    words = ['$x^{', r'\frac', 'a_b', *(f'same{i}' for i in range(40))]
    at_N2 = np.array([[0, 0], [1, 0], [0, 1], *([[0.5, 0.5]] * 40)])
    groups = ['$y^{'] * 3 + ['more'] * 40
    png, unlabelled = draw_words(at_N2, words, '$t_{', ('$a', 'b$'), groups)
    assert png[:4] == b'\x89PNG'
    assert set(unlabelled) < set(words[3:]), 'forty labels do not fit beside one point'
    assert len(unlabelled) < 40
    assert not recwarn.list
