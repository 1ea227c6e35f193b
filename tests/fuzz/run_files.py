"""Run folders of which one file was damaged: what reads a run reads what was written, or says in one line why not."""

import contextlib
import functools
import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from tests.families import folders
from tests.families.cases import CASES
from tests.fuzz import Case, note, rng
from tests.hub.test_tokenizer_goldens import files_of
from weft.data import prepared
from weft.inference import run as opening
from weft.inference.run import open_run
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage.checkpoint import Checkpoints
from weft.storage.checkpoint_reader import read_newest
from weft.storage.local_copy import LocalCopy
from weft.storage.manifest import MANIFEST, META, fingerprint
from weft.storage.sealed import sealed, unsealed
from weft.training import config as configs
from weft.training import state
from weft.training.exporting import read_import
from weft.training.importing import import_run
from weft.training.loop import Run, train
from weft.training.metrics import Metrics
from weft.training.prepare_run import prepare_data
from weft.training.state import restore, saved_config

NAME, COUNT, QUICK, SECONDS, IN_PROCESS = 'run_files', 1500, 100, 10.0, True
GROWTH = 2**30  # bytes by which a case may raise what the process has held in memory
LONGEST = 1000  # characters of a message, without the run's own name
STEPS = 4
CONFIG = """
name: run
model: {layers: 1, model_dim: 16, attention: {heads: 2, kv_heads: 1}, mlp: {dim: 16}}
data: {source: SOURCE, vocabulary: 300}
training: {steps: 4, batch: 2, sequence_length: 16}
optimizer: {warmup_steps: 1}
checkpoint: {every: 2}
metrics: {every: 1, validate_every: 100, validation_rows: 2}
"""
# What stands in a run folder or may, beside the files that are there.
PLACES = (
    'checkpoints',
    'data',
    'saving',
    'data.partial',
    'data.old',
    'tensorboard',
    'loss.png',
    'metrics.jsonl',
    'source',
)
PLACES += (
    'checkpoints/saving',
    'checkpoints/7',
    'checkpoints/0009',
    'checkpoints/4',
    'checkpoints/4/model',
    'checkpoints/x',
)
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**70,
    1e999,
    1.5,
    '',
    '../../outside',
    'x' * 3000,
    '\x1b[2J\n',
    [],
    [[]],
    {},
    {'a': 1},
)


def cases(seed: int, count: int) -> Iterator[Case]:
    """A run, and the way in which it is damaged."""
    for number in range(count):
        draw = rng(seed, number, NAME)
        base, way = draw.choice(['trained', 'trained', 'imported']), draw.choices(list(WAYS), list(WAYS.values()))[0]
        yield Case(number, f'{base}: {way.__name__.strip("_").replace("_", " ")}', (base, way, seed))


def check(case: Case, scratch: Path) -> str | None:
    base, way, seed = case.content
    run, outside = scratch / 'run', scratch / 'outside'
    shutil.copytree(scratch.parent / 'runs' / base, run, symlinks=True)
    outside.mkdir()
    (outside / 'file').write_text('{"theirs": 1}\n')
    what, held = way(run, rng(seed, case.number, way.__name__)), _held()
    if what is None:
        return None  # there was nothing to damage
    came = []
    for read in (opened, exported, continued) if base == 'trained' else (opened, exported):
        try:
            read(run, scratch.parent)
            came.append('read')
        except UserError as error:
            if fault := wrong_with(str(error), run):
                return f'{what}, {read.__name__}: {fault}'
            came.append('refused')
        except BaseException as error:
            error.add_note(f'{what}, {read.__name__}')
            raise
        # A link to a folder for TensorBoard is followed: what is written there replaces nothing.
        there = {one.name: one.read_bytes() for one in outside.iterdir() if 'tfevents' not in one.name}
        if there != {'file': b'{"theirs": 1}\n'}:
            return f'{what}, {read.__name__}: a file outside the run was changed'
        if left := [path.name for path in run.rglob('*.partial') if path.name != 'data.partial']:
            return f'{what}, {read.__name__}: {left} left'
    if (grown := _held() - held) > GROWTH:
        return f'{what}: {came} with {grown >> 20} MiB more memory'
    note('refused' if 'refused' in came else 'read')
    return None


# What reads a run ----------------------------------------------------------------------------------------------------------


def opened(run: Path, place: Path) -> None:
    """As decode, evaluate, score and chat do."""
    found = open_run(run, needs_text=False, stacked=True)
    assert numbers(found.model) in known(place), 'other weights than were saved'


def exported(run: Path, place: Path) -> None:
    """What an export reads beside the weights."""
    checkpoints = Checkpoints(run)
    read_newest(checkpoints, lambda step: (saved_config(checkpoints, step), checkpoints.files(step)))
    read_import(run)


def continued(run: Path, place: Path) -> None:
    """As train.py does before its first step."""
    with contextlib.closing(LocalCopy(run)) as local_copy:
        config, dataset = prepare_data(config_of(place), local_copy, Console(quiet=True))
        rows = [dataset.train.take(range(len(dataset.train))), dataset.validation.take(range(len(dataset.validation)))]
        digest = hashlib.sha256(b''.join(x.tobytes() for part in rows for x in part[:4])).hexdigest()
        assert digest == rows_of(place), 'other rows than were prepared'
        with jax.set_mesh(make_mesh(MeshConfig())):
            run_ = Run(config, local_copy, dataset, Console(quiet=True))
            if step := max(run_.checkpoints.steps(), default=0):
                assert numbers(restore(run_.checkpoints, step, config).model) in known(place), 'other weights'
        metrics = Metrics(run, step, str)
        metrics.rows = []  # of which a picture would be drawn, which takes longer than all else
        metrics.close()


def numbers(model: Any) -> str:
    """Of all weights."""
    return hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(model))).hexdigest()


@functools.cache
def known(place: Path) -> frozenset[str]:
    """The weights of all checkpoints."""
    return frozenset(json.loads((place / 'known.json').read_text())['weights'])


@functools.cache
def rows_of(place: Path) -> str:
    return json.loads((place / 'known.json').read_text())['rows']


def _cached_on_each_mesh(make: Callable[[configs.RunConfig], Any]) -> Callable[[configs.RunConfig], Any]:
    """`make`, which looks at the current mesh, with what it gave kept."""
    kept = functools.cache(lambda config, mesh: make(config))
    return lambda config: kept(config, jax.sharding.get_mesh())


@functools.cache
def config_of(place: Path) -> configs.RunConfig:
    return configs.parse(CONFIG.replace('SOURCE', str(place / 'text.txt')), 'run.yaml')


def prepare(place: Path) -> None:
    """Trains a run of a few steps, and imports another, once."""
    # What a model is made of takes longer to find than to read it, and is the same in all cases.
    opening.abstract_model = _cached_on_each_mesh(state.abstract_model)
    state.abstract_state = _cached_on_each_mesh(state.abstract_state)
    if (place / 'known.json').exists():
        return
    shutil.rmtree(place / 'runs', ignore_errors=True)
    lines = [f'Line {line} of the story has {line * line} words.\n' for line in range(300)]
    (place / 'text.txt').write_text(''.join(lines))
    train(config_of(place), place / 'runs', console=Console(quiet=True))
    (place / 'runs' / 'run').rename(place / 'runs' / 'trained')
    source = folders.write(place / 'source', CASES['llama-grouped'], folders.named('llama-grouped'))
    for file, content in files_of('json_template_PreTrainedTokenizerFast_True').items():
        if file != 'config.json':
            (source / file).write_bytes(content)
    import_run(source, place / 'runs' / 'imported', MeshConfig(), say=str)
    weights = []
    for name in 'trained', 'imported':
        for step in Checkpoints(place / 'runs' / name).steps():
            weights.append(numbers(open_run(place / 'runs' / name, needs_text=False, stacked=True, step=step).model))
    found = prepared.load(place / 'runs' / 'trained', str)
    assert found is not None
    rows = [part.take(range(len(part))) for part in (found.train, found.validation)]
    digest = hashlib.sha256(b''.join(x.tobytes() for part in rows for x in part[:4])).hexdigest()
    (place / 'known.json').write_text(json.dumps({'weights': weights, 'rows': digest}))


def wrong_with(message: str, run: Path) -> str | None:
    """What is wrong with a message."""
    message = message.replace(str(run.parent), 'F')
    if not message.isprintable():
        return f'what troubles a terminal: {message[:300]!r}'
    if not 5 < len(message) <= LONGEST:
        return f'a message of {len(message)} characters: {message[:LONGEST]!r}'
    return None


def _held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Ways to damage it ---------------------------------------------------------------------------------------------------------


def some_file(run: Path, draw: random.Random, *ends: str) -> Path | None:
    """A file of the run; those of the newest checkpoint, the data and the folder itself are the likeliest."""
    files = [path for path in sorted(run.rglob('*')) if path.is_file() and (not ends or path.name.endswith(ends))]
    files = [path for path in files if '/tensorboard/' not in str(path)]
    return draw.choice(files) if files else None


def bytes_change(run: Path, draw: random.Random) -> str | None:
    path = some_file(run, draw)
    assert path is not None
    raw = path.read_bytes()
    at = draw.randrange(len(raw) + 1)
    how = draw.choice(['cut', 'longer', 'bit', 'empty', 'zeros', 'no UTF-8', 'twice', 'large', 'same length'])
    match how:
        case 'cut':
            raw = raw[:at]
        case 'longer':
            raw += draw.randbytes(draw.choice([1, 7, 5000]))
        case 'bit':
            raw = raw[:at] + bytes(x ^ 1 << draw.randrange(8) for x in raw[at : at + 1]) + raw[at + 1 :]
        case 'empty':
            raw = b''
        case 'zeros':
            raw = raw[:at] + bytes(len(raw) - at)
        case 'no UTF-8':
            raw = raw[:at] + b'\xff\xfe\x80' + raw[at:]
        case 'twice':
            raw += raw
        case 'same length':
            raw = draw.randbytes(len(raw))
    path.write_bytes(raw)
    if how == 'large':
        os.truncate(path, 2**36)  # of which nothing is on the disk
    return f'{path.relative_to(run)} {how}'


def another_kind(run: Path, draw: random.Random) -> str | None:
    places = [run / place for place in PLACES if (run / place).parent.is_dir()]
    path = draw.choice([some_file(run, draw) or run / 'x', draw.choice(places)])
    return _kind(run, path, draw)


def _kind(run: Path, path: Path, draw: random.Random) -> str:
    kind = draw.choice(['folder', 'file', 'fifo', 'loop', 'nowhere', 'outside', 'outside file', 'gone', 'own copy'])
    copy = path.read_bytes() if path.is_file() else b'x'
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    match kind:
        case 'folder':
            path.mkdir()
            (path / 'x').write_text('x')
        case 'file':
            path.write_bytes(b'{}')
        case 'fifo':
            os.mkfifo(path)
        case 'loop':
            path.symlink_to(path.name)
        case 'nowhere':
            path.symlink_to('nowhere')
        case 'outside':
            path.symlink_to(run.parent / 'outside')
        case 'outside file':
            path.symlink_to(run.parent / 'outside' / 'file')
        case 'own copy':
            (run.parent / 'copy').write_bytes(copy)
            path.symlink_to(run.parent / 'copy')
    return f'{path.relative_to(run)} is {kind}'


def swapped(run: Path, draw: random.Random) -> str | None:
    one, other = some_file(run, draw), some_file(run, draw)
    assert one is not None
    assert other is not None
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f'{one.relative_to(run)} and {other.relative_to(run)} swapped'


def values(run: Path, draw: random.Random) -> str | None:
    """A value of a JSON file, as whoever wrote it might have: its own hashes are right."""
    path = some_file(run, draw, '.json', '.jsonl')
    if path is None:
        return None
    lines = path.read_bytes().splitlines(keepends=True) if path.suffix == '.jsonl' else [path.read_bytes()]
    number = draw.randrange(len(lines))
    tree = json.loads(lines[number])
    where = changed(tree, draw)
    lines[number] = json.dumps(tree).encode() + b'\n' * (path.suffix == '.jsonl')
    path.write_bytes(b''.join(lines))
    if draw.random() < 0.8:
        resealed(run, path)
    return f'{path.relative_to(run)} {where}'


def changed(tree: Any, draw: random.Random) -> str:
    """Changes a value somewhere in a tree; says where."""
    spots: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        for key in list(one) if isinstance(one, dict) else range(len(one)):
            spots.append((one, key))
            if isinstance(one[key], (dict, list)) and one[key]:
                walk(one[key])

    walk(tree)
    # Fields near the top are the likeliest: a manifest lists many files.
    inside, key = draw.choice(spots if draw.random() < 0.5 else [spot for spot in spots if spot[0] is tree] or spots)
    if draw.random() < 0.25 and isinstance(inside, dict):
        del inside[key]
        return f'{str(key)[:80]} left out'
    if draw.random() < 0.1 and isinstance(inside, dict):
        inside[
            draw.choice(['../../outside/file', '/etc/passwd', '', '\x1b[2J', 'x' * 3000, 'model/../../../outside'])
        ] = inside.pop(key)
        return f'{str(key)[:80]} renamed'
    inside[key] = draw.choice(ODD)
    return f'{str(key)[:80]} is {str(inside[key])[:40]!r}'


def resealed(run: Path, path: Path) -> None:
    """Makes the hashes over a file right again."""
    parts = path.relative_to(run).parts
    if parts[0] == 'checkpoints' and len(parts) > 2 and path.name != MANIFEST:
        manifest = run / parts[0] / parts[1] / MANIFEST
        fields = unsealed(manifest.read_bytes())
        fields['files']['/'.join(parts[2:])] = fingerprint(path)
        manifest.write_bytes(sealed(fields))
    elif path.name in (MANIFEST, 'data.json'):
        fields = json.loads(path.read_bytes())
        if isinstance(fields, dict):
            fields.pop('sha256', None)
            path.write_bytes(sealed(fields))


def deep(run: Path, draw: random.Random) -> str | None:
    path = some_file(run, draw, '.json', '.jsonl', '.yaml')
    assert path is not None
    how = draw.choice(['[', '{"a":', '"', '[],', '{"a":1},', '9'])
    path.write_text(f'[{how * 30_000}0]\n' if how.endswith(',') else f'{how * 200_000}\n')
    if draw.random() < 0.5 and path.name == META:
        resealed(run, path)
    return f'{path.relative_to(run)} is {how} many times'


def rows_damaged(run: Path, draw: random.Random) -> str | None:
    path = run / 'metrics.jsonl'
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [
        b'\xff\xfe\n',
        bytes(4096) + b'\n',
        b'{"a": 1}\n',
        b'{"step": 1, "lo',
        b'[]\n',
        b'\n',
        b'{"step": "x", "loss": 1}\n',
    ]
    odd += [
        b'{"step": 2, "loss": null}\n',
        b'{"step": 3, "loss": 1, "validation_loss": 2}\n',
        b'NaN\n',
        b'{"step": 1e999}\n',
    ]
    odd += [
        b'{"step": 2, "loss": 1, "router.load": 5, "router.max_share": 1}\n',
        b'{"step": 2, "loss": [[]]}\n',
        b'[' * 100_000 + b'\n',
    ]
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(odd))
    path.write_bytes(b''.join(lines))
    return 'metrics.jsonl has an odd row'


def added(run: Path, draw: random.Random) -> str | None:
    folder = draw.choice([run, run / 'data', run / 'checkpoints' / '4', run / 'checkpoints', run / 'checkpoints' / '0'])
    if not folder.is_dir():
        return None
    names = [
        'extra',
        'data.old',
        'data.partial',
        'saving',
        '9',
        '99999999999999999999',
        '-1',
        '٣',
        'model',
        'é' * 100,
        '\udcff',
        'a\nb',
    ]
    path = folder / draw.choice(names)
    if path.exists():
        return None
    return _kind(run, path, draw)


WAYS: dict[Callable[[Path, random.Random], str | None], int] = {
    bytes_change: 6,
    another_kind: 6,
    values: 8,
    swapped: 2,
    deep: 2,
    rows_damaged: 2,
    added: 3,
}
