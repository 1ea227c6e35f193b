"""The whole report of weights written by hand: its form, what it says, and that no number of it is missing."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.interpret import planted_circuits as planted
from tests.interpret.planted_circuits import DUPLICATE, FIRST, INDUCTION, PREVIOUS, Letters
from tests.models import on
from weft.inference.run import TrainedRun
from weft.interpret.xray.encode import decoded, numbers
from weft.interpret.xray.index import Index
from weft.interpret.xray.induction import induction_test
from weft.interpret.xray.patching import ATTENTION, HEADS, Change, Patches, unit
from weft.interpret.xray.report import Made, report
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.config import parse

TEXT = 'nbecjdifgkpbecjdifgk'  # after k came p
OTHER = 'nbecjdifgkobecjdifgk'  # and here o
CONFIG = """
name: planted
model: {layers: 2, model_dim: 8, attention: {heads: 2}, mlp: {dim: 4}}
data: {source: text, vocabulary: 320}
training: {steps: 1, batch: 1, sequence_length: 40}
"""


def told(what: str, count: int) -> Any:
    """Nobody is told how far it is."""
    assert what
    return lambda done: done <= count or pytest.fail(f'{what}: {done} of {count}')


def run_of(folder: Path, experts: bool) -> TrainedRun:
    """The planted model as an opened run."""
    config = parse(CONFIG, 'planted.yaml')
    object.__setattr__(config, 'model', planted.config(experts))
    reading: Future[Any] = Future()
    model = planted.model(experts)
    reading.set_result((model, 7))
    return TrainedRun(folder, config, jax.sharding.get_mesh(), Letters(), model, reading, planted.T)  # type: ignore[arg-type]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """Reports of the dense model on two texts, and of the mixture on one, as they come out of JSON."""
    made = Made('xray', '0', 'runs/planted', 'Planted')
    with on(MeshConfig()):
        folder = tmp_path_factory.mktemp('planted')
        reports = {
            'dense': report(run_of(folder, False), TEXT, OTHER, made, told, [(1, planted.CELL), (0, 3)]),
            'mixture': report(run_of(folder, True), TEXT, None, made, told),
        }
    return json.loads(json.dumps(reports, allow_nan=False))


def test_the_form(found):
    shapes = {'dense': (2, len(TEXT)), 'mixture': (1, len(TEXT))}
    for name, (texts, T) in shapes.items():
        one = found[name]
        assert set(one) >= {
            'version',
            'title',
            'made',
            'model',
            'strings',
            'texts',
            'compare',
            'patch',
            'cells',
            'index',
        }
        assert one['made']['step'] == 7
        assert len(one['texts']) == texts
        for text in one['texts']:
            assert {len(text[key]) for key in ('ids', 'tokens')} == {T}
            assert [one['strings'][s] for s in text['tokens']] == list(text['text'])
            assert decoded(text['attention']['pattern']).shape == (2, 2, T, T)
            assert decoded(text['attention']['top']['weight']).shape == (2, 2, T, 3)
            assert decoded(text['lens']['top']).shape == (3, T, 5)
            assert decoded(text['heads']['promotes']).shape == (2, 2, T, 3)
            assert decoded(text['layers']['residual_norm']).shape == (3, T)
            assert text['next']['actual']['rank'][-1] is None
            assert len(text['next']['actual']['rank']) == T
            assert decoded(text['ablation']['heads']).shape == (2, 2)
    assert found['dense']['model']['kinds'] == ['dense', 'dense']
    assert found['mixture']['model']['kinds'] == ['dense', 'experts']
    assert found['dense']['texts'][0]['experts'] is None
    assert found['mixture']['compare'] is None
    assert decoded(found['mixture']['texts'][0]['ablation']['experts']).shape == (1, planted.E)


def test_it_says_what_is_planted(found):
    one, strings = found['dense']['texts'][0], found['dense']['strings']
    assert one['heads']['role'] == [['previous', 'first'], ['duplicate', 'induction']]
    assert strings[one['next']['top'][-1][0]] == 'p'
    assert strings[one['ablation']['answer']] == 'p'
    assert one['next']['actual']['rank'][11:19] == [1] * 8  # the second time each token is foreseen
    change = decoded(one['ablation']['heads'])
    assert change[INDUCTION] < -1
    assert change[PREVIOUS] < -1  # on which the induction head rests
    assert max(abs(change[FIRST]), abs(change[DUPLICATE])) < 1e-5
    assert one['lens']['decided'][-1] == 2
    named = one['ablation']['cells']
    assert [(cell['layer'], cell['cell']) for cell in named] == [(1, planted.CELL), (0, 3)]
    assert max(abs(cell['change']) for cell in named) < 1e-5  # it fires at no token of this text
    assert strings[found['dense']['cells'][f'1:{planted.CELL}']['promotes'][0][0]] == chr(97 + planted.VALUE)
    promotes = decoded(one['heads']['promotes'])
    assert strings[promotes[(*INDUCTION, -1, 0)]] == 'p'
    answer = decoded(one['heads']['answer'])
    total = sum(decoded(one['layers'][f'{part}_answer']).sum(0) for part in ('attention', 'feed_forward'))
    logit = total + decoded(one['layers']['embedding_answer']) + decoded(one['layers']['constant_answer'])
    np.testing.assert_allclose(answer[INDUCTION][-1], logit[-1], atol=1e-5)  # nothing else says it
    pattern, top = decoded(one['attention']['pattern']), decoded(one['attention']['top']['key'])
    assert pattern[(*PREVIOUS, 5, 4)] == 255
    assert top[(*PREVIOUS, 5, 0)] == 4


def test_patching_brings_the_answer_back_where_it_stands(found):
    patch, compare = found['dense']['patch'], found['dense']['compare']
    strings = found['dense']['strings']
    T, at = len(TEXT), TEXT.index('p')
    assert compare['alignment'] == [[place, place] for place in range(T)]
    assert compare['parted'][at] is None  # another token
    assert compare['parted'][T - 1] == 2  # the induction head parts them
    assert [strings[s] for s in patch['answers']] == ['p', 'o']
    assert patch['clean'] > 1 > -1 > patch['corrupted']
    assert patch['positions'] == [at, at + 1, T - 1]
    # The token that the induction head reads, until it has read it; then the last token.
    np.testing.assert_allclose(decoded(patch['residual']), [[1, 0, 0], [0, 0, 1]], atol=1e-4)
    np.testing.assert_allclose(decoded(patch['attention']), [[0, 0, 0], [0, 0, 1]], atol=1e-4)
    np.testing.assert_allclose(decoded(patch['feed_forward']), np.zeros((2, 3)), atol=1e-4)
    np.testing.assert_allclose(decoded(patch['heads']), [[0, 0], [0, 1]], atol=1e-4)


def test_experts_are_told_by_kind_and_while_decoding(found):
    experts = found['mixture']['texts'][0]['experts']
    ids = np.array(found['mixture']['texts'][0]['ids'])
    np.testing.assert_array_equal(decoded(experts['chosen'])[0, :, 0], ids % planted.E)
    assert experts['layers'] == [1]
    new = np.array(experts['decode']['ids'])
    assert len(new) == 16
    np.testing.assert_array_equal(decoded(experts['decode']['chosen'])[0, :, 0], new % planted.E)
    assert [found['mixture']['strings'][i] for i in experts['decode']['tokens']] == [chr(97 + token) for token in new]
    load = decoded(experts['load_by_kind']['word'])
    np.testing.assert_allclose(load[0], np.bincount(ids % planted.E, minlength=planted.E) / len(ids))


def test_mistakes(tmp_path):
    made = Made('xray', '0', 'runs/planted', 'Planted')
    with on(MeshConfig()):
        run = run_of(tmp_path, False)
        for text, line in {
            '': 'is empty',
            'a' * 41: 'at most 40 work, for the context is 40',
            'a': 'at least 2',
        }.items():
            with pytest.raises(UserError, match=line):
                report(run, text, None, made, told)
            with pytest.raises(UserError, match=f'--against.*{line}'):
                report(run, 'ab', text, made, told)


def test_what_is_not_there_cannot_be_changed(tmp_path):
    made = Made('xray', '0', 'runs/planted', 'Planted')
    with on(MeshConfig()):
        with pytest.raises(UserError, match=r'--cell 1:0: layer 1 is a mixture .*those of layers 0 can be named'):
            report(run_of(tmp_path, True), TEXT, None, made, told, [(1, 0)])
        model = planted.model()
        patches = Patches(model, [1, 2], {HEADS: np.zeros((2, 1, 2, planted.H), np.float32)})
        with pytest.raises(UserError, match='head, cell or expert 2: there is no such one; they are 0 to 1'):
            unit(2, 2)
        with pytest.raises(UserError, match='layer 2: there is no such one; they are 0 to 1'):
            patches.log_probabilities([Change(HEADS, 2, unit(0, 2))])
        with pytest.raises(UserError, match=r"'attention\.output': no values are given for it"):
            patches.log_probabilities([Change(ATTENTION, 0, unit(0, 2))])


def test_induction_heads_are_confirmed_by_ablation():
    with on(MeshConfig()):
        model = planted.model()
        found = induction_test(model, (), planted.T, draws=3, least=0.5, texts=4, length=30)
        assert found.heads == [INDUCTION]
        assert found.without - found.loss > 1
        assert max(abs(one - found.loss) for one in found.random) < 1e-5  # the other head of its layer writes nothing
        assert found.ratio > 1e4
        with pytest.raises(UserError, match=r'--least 1\.5: no head'):
            induction_test(model, (), planted.T, draws=3, least=1.5)


def test_texts_of_a_cell_stay_within_their_document():
    tokens = np.array([[5, 6, 7, 8, 9, 10]], np.int32)
    segment = np.array([[1, 1, 2, 2, 2, 0]], np.int16)
    one = np.array([[[3.0, 0.0]]], np.float32)
    places = np.array([[[0, -1]]], np.int32)
    found = Index(one, places, np.array([[[3, 0]]], np.int32), tokens, segment, {'layers': [4]}, 1)
    assert found.texts(4, 0) == [([7], 8, [9], 3.0)]
    assert numbers([[1.23456789, 2]]) == [[1.23457, 2.0]]
