"""After a power cut at any moment a run is whole or made anew: all changes are recorded, each prefix of them played back."""

import json
import random
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.families import folders
from tests.families.cases import CASES
from tests.scripts.runs import workplace
from tests.storage.power import Change, Looked, Recorder, make, states
from tests.storage.test_cloud import trained
from weft.data import prepared
from weft.sharding.mesh import MeshConfig
from weft.storage import files as disk
from weft.storage.checkpoint import Checkpoints
from weft.storage.local_copy import LocalCopy
from weft.training import config as configs
from weft.training import metrics
from weft.training.exporting import read_import
from weft.training.importing import import_run
from weft.training.prepare_run import prepare_data

SMALL = 'mesh={}', 'model.mlp.dim=16', 'training.sequence_length=16', 'checkpoint.every=2', 'checkpoint.keep=1'


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp('power'))


@pytest.fixture(scope='module')
def changes(place) -> tuple[Path, list[Change], list[int]]:
    """A run that begins, saves, deletes, goes on, and begins afresh: the folder, all changes, how many each part had made."""
    root = place / 'runs'
    root.mkdir()
    recorder, ends = Recorder(root), []
    with disk.watched(recorder):
        for steps, fresh in ((4, False), (6, False), (2, True)):
            trained(place, root, *SMALL, f'training.steps={steps}', fresh=fresh)
            ends.append(len(recorder.changes))
    return root, recorder.changes, ends


def whole_steps(run: Path) -> list[int]:
    """The steps of a run, each of which must be whole."""
    checkpoints = Checkpoints(run)
    for step in checkpoints.steps():
        manifest = checkpoints._manifest(step)
        checkpoints._verify(step, manifest, set(manifest['arrays']))
    return checkpoints.steps()


def test_a_power_cut_while_training_leaves_a_run_that_goes_on_or_begins_anew(changes, tmp_path):
    root, recorded, _ = changes
    assert {'write', 'append', 'folder', 'rename', 'remove', 'sync', 'declare'} == {action for action, _, _ in recorded}
    steps_of = Looked(
        lambda run: (found := whole_steps(run), [Checkpoints(run).meta(step)['corpus'] for step in found]),
        tmp_path / 'a',
    )
    corpus_of = Looked(lambda run: (data := prepared.load(run, pytest.fail)) and data.facts['sha256'], tmp_path / 'b')
    rows_of = Looked(lambda run: metrics.read(run / 'metrics.jsonl'), tmp_path / 'c')
    config_of = Looked(lambda run: configs.load_config(run / 'config.yaml').name, tmp_path / 'd')

    newest, count = 0, 0
    for number, how, tree in states(root, recorded):
        told, most, count = f'after {number} changes, {how}', 0, count + 1
        for name, run in tree.items():
            if name.startswith('.'):
                continue
            part = lambda *names, run=run: {name: run[name] for name in names if name in run}
            # What is in `saving` is not for readers: most states differ in nothing else.
            published = {step: one for step, one in run.get('checkpoints', {}).items() if step != 'saving'}
            steps, corpora = steps_of({'checkpoints': published})
            most = max([most, *steps])
            corpus = corpus_of(part('data', 'tokenizer.model'))
            assert {*corpora} <= {corpus}, told
            rows, damaged = rows_of(part('metrics.jsonl'))
            assert damaged <= 1, told
            assert {row['step'] for row in rows} >= set(range(1, max(steps, default=0) + 1)), told
            if 'config.yaml' in run:
                assert config_of(part('config.yaml')) == 'tiny', told
        assert most >= newest, told
        if how.startswith('all is lost'):
            newest = most  # that is on the disk, and stays
    assert newest == 6
    assert set(tree) == {'tiny', 'tiny.old-1'}
    assert {*tree['tiny']} >= {'config.yaml', 'metrics.jsonl', 'tokenizer.model', 'data', 'checkpoints', 'loss.png'}
    assert count > len(recorded) > 100


def test_what_a_power_cut_leaves_is_made_ready_again(changes, place, tmp_path):
    """By the function that does it when a run is started, after a few of the moments."""
    root, recorded, ends = changes
    config = configs.load_config(
        place / 'tiny.yaml', [f'data.source={place / "text"}', *SMALL, 'model.layers=1', 'model.moe=null']
    )
    found = list(states(root, recorded[: ends[0]]))
    for number, how, tree in random.Random(1).sample(found, 6):
        run = make(tree.get('tiny', {}), tmp_path / 'tiny')
        _, dataset = prepare_data(config, LocalCopy(run), Console(quiet=True))
        assert len(dataset.train) > 0, f'after {number} changes, {how}'
        assert not list(run.glob('data.*'))
        shutil.rmtree(run)


def test_a_power_cut_while_importing_leaves_a_run_or_none(tmp_path):
    root = tmp_path / 'made'
    root.mkdir()
    source = folders.write(tmp_path / 'source', CASES['llama-grouped'], folders.named('llama-grouped'))
    recorder = Recorder(root)
    with disk.watched(recorder):
        import_run(source, root / 'run', MeshConfig(), say=str)
    look = Looked(
        lambda run: (
            whole_steps(run),
            read_import(run).family,
            json.loads((run / 'source' / 'config.json').read_bytes()),
        ),
        tmp_path / 'run',
    )
    there = 0
    for number, how, tree in states(root, recorder.changes):
        if 'run' in tree:
            there += 1
            assert look(tree['run']) == ([0], 'llama', CASES['llama-grouped']), f'after {number} changes, {how}'
    assert 1 <= there <= 4
