"""loss.png: the last value stands above the curves."""

import pytest

from weft.training import picture


@pytest.mark.parametrize('experts', [0, 8])
def test_the_last_value_is_written_where_no_curve_and_no_legend_is(tmp_path, monkeypatch, experts):
    closed = []
    monkeypatch.setattr(picture.plt, 'close', closed.append)
    rows = [{'step': step, 'loss': 6 * step**-0.25 + 2} for step in range(1, 201)]
    if experts:
        rows = [row | {'router.max_share': 0.3, 'experts': experts} for row in rows]
    for row in rows[39::40]:
        row |= {'validation_loss': row['loss'] + 0.1, 'validation_bits_per_byte': 1.25}
    picture.draw(rows, tmp_path / 'loss.png', 'a run')
    assert [path.name for path in tmp_path.iterdir()] == ['loss.png']
    (figure,) = closed
    axes = figure.axes[0]
    last = rows[-1]['validation_loss']
    assert axes.get_title() == f'a run\nvalidation: {last:.3f} nats = 1.250 bits/byte'
    box = axes.title.get_window_extent()
    assert box.y0 >= axes.bbox.y1
    assert figure.bbox.count_contains(box.corners()) == 4
    assert axes.bbox.count_contains(axes.get_legend().get_window_extent().corners()) == 4
    monkeypatch.undo()
    picture.plt.close(figure)


def test_a_last_value_that_is_no_number_is_not_written(tmp_path):
    rows = [{'step': 1, 'loss': 2.0, 'validation_loss': float('nan'), 'validation_bits_per_byte': float('nan')}]
    picture.draw(rows, tmp_path / 'loss.png', 'x')
    assert (tmp_path / 'loss.png').stat().st_size > 1000
