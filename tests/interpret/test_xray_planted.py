"""Instruments on planted_circuits.py: what is planted is found, and ablation destroys exactly that."""

import jax
import numpy as np
import pytest

from tests.interpret import planted_circuits as planted
from tests.interpret.planted_circuits import DUPLICATE, FIRST, INDUCTION, PREVIOUS
from tests.models import on
from weft.interpret.xray import attention, cells, experts, programs
from weft.interpret.xray.patching import CELLS, EXPERTS, HEADS, Change, Patches, unit
from weft.model.decoder import Decoder
from weft.sharding.mesh import MeshConfig

REPEATED = [
    13,
    1,
    4,
    2,
    9,
    3,
    8,
    5,
    6,
    10,
    0,
    1,
    4,
    2,
    9,
    3,
    8,
    5,
    6,
    10,
]  # the first token has none before it: it looks at itself
TAPS = ['attention.pattern', HEADS]


def observed(model: Decoder, ids: list[int], *names: str) -> dict[str, np.ndarray]:
    """Activations of one text."""
    found = programs.captured(model, names, programs.padded(model.config, [ids], programs.columns_for(len(ids))))
    return {name: a[:, 0, : len(ids)] for name, a in found.items()}


@pytest.fixture(scope='module')
def dense():
    with on(MeshConfig()):
        yield planted.model()


@pytest.fixture(scope='module')
def mixture():
    with on(MeshConfig()):
        yield planted.model(experts=True)


def test_each_head_has_its_role_and_no_other(dense):
    pattern = observed(dense, REPEATED, *TAPS)['attention.pattern'][..., : len(REPEATED)].swapaxes(1, 2)
    scores = attention.scores(pattern, REPEATED)
    roles = attention.roles(scores)
    planned = {PREVIOUS: 'previous', FIRST: 'first', DUPLICATE: 'duplicate', INDUCTION: 'induction'}
    for (layer, head), role in planned.items():
        assert roles[layer][head] == role
        assert scores[role][layer, head] > 0.99, role
        others = [scores[role][one] for one in planned if one != (layer, head)]
        assert max(others) < 0.35, f'{role}: {others}'


def test_ablating_the_induction_head_destroys_the_repetition_and_the_heads_that_do_not_serve_it_nothing(dense):
    taps = observed(dense, REPEATED, *TAPS)
    patches = Patches(dense, REPEATED, {HEADS: np.zeros_like(taps[HEADS][:, :1])})
    heads = [PREVIOUS, FIRST, DUPLICATE, INDUCTION]
    log_CV = patches.log_probabilities([None, *(Change(HEADS, layer, unit(head, 2)) for layer, head in heads)])
    answer = 0  # what followed 10
    assert log_CV[0].argmax() == answer
    lost = dict(zip(heads, log_CV[0, answer] - log_CV[1:, answer], strict=True))
    assert lost[INDUCTION] > 2
    assert lost[PREVIOUS] > 2  # on which the induction head rests
    assert abs(lost[FIRST]) < 1e-5
    assert abs(lost[DUPLICATE]) < 1e-5


def test_the_cell_is_found_named_and_destroyed_by_its_ablation_alone(dense):
    ids = [1, 4, 2, 9, 3, 8, 5, planted.KEY]
    hidden = observed(dense, ids, CELLS)[CELLS]
    found = cells.top_cells(dense, hidden, 3)
    assert found.cell_LTk[1, -1, 0] == planted.CELL
    assert found.share_LTk[1, -1, 0] == pytest.approx(1)
    assert (found.share_LTk[1, :-1] == 0).all()
    (told,) = cells.promoted(dense, [(1, planted.CELL)], planted.F)
    assert told.promotes[0][0] == planted.VALUE
    assert told.norm == pytest.approx(10)
    assert told.promotes[0][1] == pytest.approx(10)  # the head's vectors and the final norm's scale are 1
    patches = Patches(dense, ids, {CELLS: np.zeros_like(hidden[:, :1])})
    changes = [Change(CELLS, layer, unit(cell, planted.F)) for layer in range(2) for cell in range(planted.F)]
    log_CV = patches.log_probabilities([None, *changes])
    assert log_CV[0].argmax() == planted.VALUE
    lost = (log_CV[0] - log_CV[1:])[:, planted.VALUE].reshape(2, planted.F)
    assert lost[1, planted.CELL] > 2
    lost[1, planted.CELL] = 0
    assert np.abs(lost).max() < 1e-5


def test_the_router_sends_each_token_as_it_is_written_and_without_its_expert_only_its_answer_goes(mixture):
    ids = [1, 4, 2, 9, 3, 8, 5, 6]
    taps = observed(mixture, ids, *experts.TAPS)
    paths = experts.paths(*(taps[name] for name in experts.TAPS))
    np.testing.assert_array_equal(paths.chosen_MTK[0, :, 0], np.array(ids) % planted.E)
    assert paths.entropy_MT.max() < 0.1
    patches = Patches(mixture, ids, {EXPERTS: np.zeros((2, 1, planted.E, 1), np.float32)})
    log_CV = patches.log_probabilities([None, *(Change(EXPERTS, 1, unit(e, planted.E)) for e in range(planted.E))])
    answer = planted.SAYS + ids[-1] % planted.E
    assert log_CV[0].argmax() == answer
    lost = log_CV[0, answer] - log_CV[1:, answer]
    assert lost[ids[-1] % planted.E] > 2
    assert np.abs(np.delete(lost, ids[-1] % planted.E)).max() < 1e-5


def test_what_is_generated_takes_the_paths_that_are_written(mixture):
    new, paths = experts.greedy(mixture, [1, 4, 2], 3, planted.T)
    assert paths is not None
    np.testing.assert_array_equal(paths.chosen_MTK[0, :, 0], np.array(new) % planted.E)
    assert new[0] == planted.SAYS + 2


def test_the_kinds_of_tokens():
    kinds = {
        ' word': 'word',
        '42': 'number',
        ',': 'punctuation',
        ' ': 'space',
        '\n': 'space',
        '\x00': 'other',
        '': 'other',
    }
    assert {text: experts.kind_of(text) for text in kinds} == kinds
    chosen = np.array([[[0], [1], [1], [2]]])
    load = experts.load_by_kind(chosen, ['a', 'b', 'c', '1'], 4)
    np.testing.assert_allclose(load['word'], [[1 / 3, 2 / 3, 0, 0]])
    np.testing.assert_allclose(load['number'], [[0, 0, 1, 0]])
    assert set(load) == {'word', 'number'}
    assert jax.default_backend()
