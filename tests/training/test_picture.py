"""loss.png: its label stands free, whatever shape the curves have."""

import itertools

import numpy as np
import pytest

from weft.training import picture

N = 200
x = np.arange(1, N + 1)
noise = np.random.default_rng(0).random(N)
CURVES = {
    'falling': 6 * x**-0.25 + 2 + 0.3 * noise,
    'rising': 2 + x / 50 + 0.3 * noise,
    'flat': 3 + noise,
    'constant': np.full(N, 3.0),
    'a spike at the end': np.where(x == N - 3, 20, 6 * x**-0.4),
    'up and down': 3 + 2 * np.sign(np.sin(x / 2)),
    'one step': np.array([5.0]),
    'two steps': np.array([5.0, 4.0]),
    'no number in between': np.where((x > 50) & (x < 60), np.nan, 6 * x**-0.3),
}


@pytest.mark.parametrize(('name', 'experts'), [*((name, 0) for name in CURVES), ('falling', 8)])
def test_the_last_value_is_written_where_no_curve_and_no_legend_is(tmp_path, monkeypatch, name, experts):
    closed = []
    monkeypatch.setattr(picture.plt, 'close', closed.append)
    rows = [{'step': step, 'loss': float(loss)} for step, loss in enumerate(CURVES[name], 1)]
    if experts:
        rows = [row | {'router.max_share': 0.3, 'experts': experts} for row in rows]
    for row in [*rows[39::40], rows[-1]]:
        row |= {'validation_loss': row['loss'] + 0.1, 'validation_bits_per_byte': 1.25}
    picture.draw(rows, tmp_path / 'loss.png', 'x')
    assert [path.name for path in tmp_path.iterdir()] == ['loss.png']
    (figure,) = closed
    axes = figure.axes[0]
    (note,) = [text for text in axes.texts if text.get_text()]
    assert note.get_text() == f'{CURVES[name][-1] + 0.1:.3f} nats = 1.250 bits/byte'
    box = note.get_window_extent()
    assert not box.overlaps(axes.get_legend().get_window_extent())
    assert axes.bbox.padded(1).count_contains(box.corners()) == 4
    for line in axes.lines:
        xy = axes.transData.transform(line.get_xydata())
        for a, b in itertools.pairwise(xy):
            between = np.linspace(a, b, 300)
            assert not box.count_contains(between[np.isfinite(between).all(axis=1)]), name
    monkeypatch.undo()
    picture.plt.close(figure)


def test_a_last_value_that_is_no_number_is_not_written(tmp_path):
    rows = [{'step': 1, 'loss': 2.0, 'validation_loss': float('nan'), 'validation_bits_per_byte': float('nan')}]
    picture.draw(rows, tmp_path / 'loss.png', 'x')
    assert (tmp_path / 'loss.png').stat().st_size > 1000
