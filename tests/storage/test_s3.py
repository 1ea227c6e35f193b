"""The scripts with a run in s3://, against moto's S3 server on this machine: python -m pip install s3fs 'moto[server]'."""

import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.scripts.runs import run, start, start_together, workplace

pytest.importorskip('s3fs', reason="s3fs is not installed: pip install -e '.[s3]'")
server = pytest.importorskip('moto.server', reason="moto is not installed: pip install 'moto[server]'")

RUNS = '--runs', 's3://bucket/some/runs'
STEPS = 'training.steps=9'
SMALL = 'tiny.yaml', 'model.layers=1', 'model.moe.first_dense_layers=0', STEPS, 'metrics.validate_every=100'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A workplace, and a server with one empty bucket that the scripts find by the environment."""
    there = server.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    there.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = there.get_host_and_port()
        for name, value in {
            'AWS_ENDPOINT_URL': f'http://{host}:{port}',
            'AWS_ACCESS_KEY_ID': 'testing',
            'AWS_SECRET_ACCESS_KEY': 'testing',
            'AWS_DEFAULT_REGION': 'us-east-1',
        }.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir('bucket')
        yield workplace(tmp_path_factory.mktemp('s3'))
    there.stop()


@pytest.fixture(scope='module')
def local(place) -> Path:
    """The run that the others must equal."""
    run(place, 'train', *SMALL)
    return place


@functools.cache
def store():
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)


def rows(text: str) -> list[dict]:
    found = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if name != 'tokens_per_second'} for row in found]


def remote_rows(name: str) -> list[dict]:
    path = f'bucket/some/runs/{name}/metrics.jsonl'
    return rows(store().cat_file(path).decode()) if store().exists(path) else []


def local_rows(place: Path) -> list[dict]:
    return rows((place / 'runs/tiny/metrics.jsonl').read_text(encoding='utf-8'))


def test_train_stop_continue_decode_evaluate_score(local):
    with start(local, 'train', *SMALL, *RUNS, 'checkpoint.every=6', 'metrics.every=1') as process:
        deadline = time.time() + 200
        while process.poll() is None and time.time() < deadline:
            if store().exists('bucket/some/runs/tiny/checkpoints/6/manifest.json'):
                break
            time.sleep(0.02)
        process.kill()
        process.communicate()
    last = 'bucket/some/runs/tiny/checkpoints/9/manifest.json'
    if store().exists(last):
        store().rm(last)  # it was faster than the kill
    told = run(local, 'train', *SMALL, *RUNS).stdout
    assert 'continuing s3://bucket/some/runs/tiny after step 6' in told
    assert remote_rows('tiny') == local_rows(local)
    ids = np.random.default_rng(0).integers(0, 300, (2, 16)).astype(np.int32)
    np.save(local / 'ids.npy', ids)
    prompt = '--prompt', 'def f1', '--max-new-tokens', '5', '--json'
    found = {}
    for where in 'runs/tiny', 's3://bucket/some/runs/tiny':
        text = json.loads(run(local, 'decode', where, *prompt).stdout)['text']
        figures = json.loads(run(local, 'evaluate', where, '--json').stdout)
        run(local, 'score', where, '--tokens', 'ids.npy', '--logits', 'out.npy', '--mesh', 'tensor=2')
        found[where] = text, figures, np.load(local / 'out.npy', allow_pickle=False).tobytes()
    assert found['runs/tiny'] == found['s3://bucket/some/runs/tiny']


def test_two_processes(local):
    manifest = 'bucket/some/runs/pair/checkpoints/9/manifest.json'
    for begun in False, True:
        arguments = *SMALL, *RUNS, 'name=pair', 'checkpoint.every=3'
        pair = start_together(local, 2, *arguments)
        try:
            ended = [process.communicate(timeout=250) for process in pair]
        finally:
            for process in pair:
                process.kill()
        assert [process.returncode for process in pair] == [0, 0], ended
        assert ('continuing s3://bucket/some/runs/pair after step 6' in ended[0][0]) == begun
        assert store().exists(manifest)
        if not begun:
            store().rm(manifest)  # as if both had been killed just before
    tell = lambda found: [(row['tokens'], row['loss'], row['grad_norm']) for row in found]
    np.testing.assert_allclose(tell(remote_rows('pair')), tell(local_rows(local)), rtol=1e-5)
    # One process reads what two have written.
    figures = [json.loads(run(local, 'evaluate', where, '--json').stdout) for where in ('runs/tiny', f'{RUNS[1]}/pair')]
    assert figures[0]['nats_per_token'] == pytest.approx(figures[1]['nats_per_token'], rel=1e-5)


def test_fresh_moves_aside(local):
    run(local, 'train', *SMALL, *RUNS, 'name=again', 'training.steps=1')
    before = {path: store().cat_file(path) for path in store().find('bucket/some/runs/again')}
    told = run(local, 'train', *SMALL, *RUNS, 'name=again', 'training.steps=1', '--fresh').stdout
    assert f'moved the earlier {RUNS[1]}/again aside to {RUNS[1]}/again.old-1' in told
    after = {path: store().cat_file(path) for path in store().find('bucket/some/runs/again.old-1')}
    assert {path.replace('again.old-1', 'again'): content for path, content in after.items()} == before


@pytest.mark.parametrize(
    ('runs', 'variables', 'words'),
    [
        ('s3://nobody/runs', {}, ['s3://nobody/runs', "there is no bucket 'nobody'"]),
        ('s3://bucket/runs', {'AWS_ENDPOINT_URL': 'http://127.0.0.1:9'}, ['s3://bucket/runs', '127.0.0.1:9']),
        ('s3://bucket/runs', {'AWS_ACCESS_KEY_ID': '', 'AWS_EC2_METADATA_DISABLED': 'true'}, ['credentials']),
    ],
    ids=['no bucket', 'no server', 'no credentials'],
)
def test_what_cannot_be_reached_is_one_line(place, monkeypatch, runs, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not variables.get('AWS_ACCESS_KEY_ID', 'x'):
        monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
        monkeypatch.delenv('AWS_ACCESS_KEY_ID')
        monkeypatch.setenv('HOME', str(place))
    for script, arguments in ('train', [*SMALL, '--runs', runs]), ('decode', [f'{runs}/tiny', '--prompt', 'x']):
        (line,) = run(place, script, *arguments, code=2).stderr.strip().splitlines()
        assert line.startswith('error: ')
        assert all(word in line for word in words), line
