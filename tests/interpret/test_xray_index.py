"""The index of the texts that fire each cell most equals a search of all activations, however often it was interrupted."""

import json

import numpy as np
import pytest

from tests.models import filled, on
from weft.data.packing import pack
from weft.interpret.xray import index, programs
from weft.interpret.xray.patching import CELLS
from weft.model.config import model_of
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig

CONFIG = {'vocabulary': 40, 'layers': 3, 'model_dim': 16, 'attention.heads': 2, 'mlp.dim': 12}
CONFIG |= {'moe.experts': 2, 'moe.top_k': 1, 'moe.mlp_dim': 8, 'moe.pattern': (False, True, False)}
ABOUT = {'step': 3, 'layers': [0, 2], 'source': 'planted', 'digest': 'x'}


@pytest.fixture(scope='module')
def samples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 14, 60)
    return pack(rng.integers(0, 40, lengths.sum()).astype(np.uint16), lengths, 16, 1)


@pytest.fixture(scope='module', params=[MeshConfig(), MeshConfig(data=2, tensor=2)], ids=['one', 'four'])
def model(request):
    with on(request.param):
        yield filled(model_of(CONFIG), gain=2.0)


def test_it_equals_a_search_of_all(model, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, 'TOKENS', 64)  # four rows at once: several batches
    numbers = index.numbers_of(samples, 5, 16 * 14)
    assert len(set(numbers.tolist())) == 14
    batch = samples.take(numbers)
    hidden = programs.captured(model, [CELLS], programs.Padded(*batch[:1], *batch[2:4]))[CELLS]
    live = batch.segment_BT > 0
    size = np.where(live[None, :, :, None], np.abs(hidden), -1)
    best_MBF = size.max(2)
    order = np.argsort(-best_MBF, 1, kind='stable')[:, : index.TEXTS].transpose(0, 2, 1)
    found = index.build(model, samples, numbers, ABOUT, None)
    np.testing.assert_array_equal(found.row_MFk, order)
    column = size.argmax(2)
    for m, f, k in np.ndindex(found.row_MFk.shape):
        row = found.row_MFk[m, f, k]
        assert found.column_MFk[m, f, k] == column[m, row, f]
        assert found.activation_MFk[m, f, k] == pytest.approx(hidden[m, row, column[m, row, f], f], rel=1e-5, abs=1e-5)
    assert found.tokens == live.sum()

    index.build(model, samples, numbers[:6], ABOUT, tmp_path)
    told = []
    again = index.build(model, samples, numbers, ABOUT, tmp_path, lambda done, rows: told.append((done, rows)))
    assert told[0] == (min(6 + programs.rows_for(16), 14), 14)  # what was read is not read again
    assert told[-1] == (14, 14)
    for name, array in found.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name], err_msg=name)
    loaded = index.load(tmp_path)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.activation_MFk, found.activation_MFk)
    assert loaded.done == 14
    assert json.loads((tmp_path / 'xray' / 'index.json').read_text())['tokens'] == live.sum()
    other = index.build(model, samples, numbers[:4], {**ABOUT, 'step': 4}, tmp_path)  # other weights: begun anew
    assert other.done == 4


def test_a_damaged_index_is_told(tmp_path):
    assert index.load(tmp_path) is None
    nothing = np.zeros((1, 2, 3), np.float32)
    places = np.zeros((1, 2, 3), np.int32)
    found = index.Index(
        nothing, places, places, np.zeros((1, 4), np.int32), np.ones((1, 4), np.int16), {**ABOUT, 'layers': [0]}, 1
    )
    found.save(tmp_path)
    assert index.load(tmp_path) is not None
    found.row_MFk = places + 1  # past the rows
    found.save(tmp_path)
    with pytest.raises(UserError, match='is damaged; remove the folder'):
        index.load(tmp_path)
    found.row_MFk, found.about = places, {}
    found.save(tmp_path)
    with pytest.raises(UserError, match='is damaged; remove the folder'):
        index.load(tmp_path)
    with pytest.raises(UserError, match='all layers are mixtures'):
        index.check_cells([])
