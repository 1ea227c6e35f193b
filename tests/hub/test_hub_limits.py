"""Small folders that ask for much: refused in one line, before memory or time is taken for what they say."""

import errno
import itertools
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.families import cases, folders
from tests.gguf import written
from tests.hub.test_tokenizer_goldens import files_of
from weft.hub import chat, published_folder, published_tokenizer, tensor_files
from weft.hub import read as hub
from weft.hub.published_folder import INDEX, SINGLE
from weft.hub.tokenizers import marian, side_files
from weft.hub.tokenizers.byte_pairs import MERGES, VOCAB
from weft.hub.tokenizers.json_tokenizer import JSON
from weft.inference import embed
from weft.model.layer_groups import LayerSpec, group_layers
from weft.model.parts import numbers
from weft.model.parts.numbers import nearest_divisor
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.importing import import_run

SECONDS, BYTES = (
    5,
    600 * 2**20,
)  # what a case may take: a list of as many values as are allowed takes half of these bytes


@pytest.fixture(autouse=True)
def begun() -> None:
    """JAX has its eight devices before an import would begin it with as many as its own mesh has."""
    jax.devices()


def edit(folder: Path, **fields: Any) -> None:
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rehead(folder: Path, change: Callable[[dict], Any]) -> None:
    """Changes the header of the weights."""
    path = folder / SINGLE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], 'little')
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    with_header(path, json.dumps(entries).encode(), raw[8 + length :])


def with_header(path: Path, header: bytes, numbers: bytes = b'') -> None:
    path.write_bytes(len(header).to_bytes(8, 'little') + header + numbers)


def first(entries: dict) -> dict:
    return next(entry for name, entry in entries.items() if name != '__metadata__')


def renamed(entries: dict, name: str) -> None:
    entries[name] = entries.pop(next(one for one in entries if one != '__metadata__'))


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def indexed(folder: Path, where: dict[str, Any]) -> None:
    (folder / SINGLE).rename(folder / 'a.safetensors')
    (folder / INDEX).write_text(json.dumps({'weight_map': where}))


def add_nothing(entries: dict) -> None:
    """Tensors without numbers."""
    end = max(entry['data_offsets'][1] for name, entry in entries.items() if name != '__metadata__')
    for i in range(50_000):
        entries[f'model.layers.{i}.q'] = {'dtype': 'F32', 'shape': [0], 'data_offsets': [end, end]}


lists = lambda many: b'{"a":[' + b'[],' * many + b'[]]}'
MANY = {  # the case that is spoiled, how, and words of the refusal
    'experts': (
        'mixtral-plain',
        lambda f: edit(f, num_local_experts=10**9),
        ['num_local_experts is 1000000000', 'tensors'],
    ),
    'experts and layers': (
        'mixtral-plain',
        lambda f: edit(f, num_local_experts=10**6, num_hidden_layers=10**4),
        ['num_hidden_layers is 10000 and the files have 65 tensors'],
    ),
    'experts of a few layers': (
        'mixtral-plain',
        lambda f: edit(f, num_local_experts=40),
        ['num_local_experts is 40 in each of 2 layers, and the files have 65 tensors'],
    ),
    'layers': (
        'llama-grouped',
        lambda f: edit(f, num_hidden_layers=10**4),
        ['num_hidden_layers is 10000', '21 tensors'],
    ),
    'layers of an encoder': (
        't5-v1.1',
        lambda f: edit(f, num_layers=10**4),
        ['layers is 10000 and the files have 52 tensors'],
    ),
    'layers of no layers': ('llama-grouped', lambda f: edit(f, num_hidden_layers=10**9), ['from 1 to 10000']),
    'layers ahead': (
        'deepseek_v3-as-published',
        lambda f: edit(f, num_nextn_predict_layers=10**9),
        ['num_nextn_predict_layers is 1000000000'],
    ),
    'positions': ('marian-published', lambda f: edit(f, max_position_embeddings=2 * 10**9),
        ['max_position_embeddings is 2000000000: a table of sinusoidal', 'nearest that works: ']
    ),
    'sizes': (
        'llama-grouped',
        lambda f: edit(f, **dict.fromkeys(('hidden_size', 'vocab_size', 'num_key_value_heads'), 2**31 - 1), head_dim=16),
        ['num_key_value_heads is 2147483647 and num_attention_heads 4', 'nearest that works: 4'],
    ),
    'a large config': (
        'llama-grouped',
        lambda f: sparse(f / 'config.json', 2**23 + 1),
        [f'config.json: has {2**23 + 1} bytes: at most {2**23}'],
    ),
    'a config of lists': (
        'llama-grouped',
        lambda f: (f / 'config.json').write_bytes(lists(10**6)),
        ['config.json: has 2000003 lists', 'at most 524288'],
    ),
    'a field as long as it may be': (
        'llama-grouped',
        lambda f: edit(f, foo='A' * 8_000_000),
        ["foo is 'AAAA", 'does not know'],
    ),
    'an architecture as long as it may be': (
        'llama-grouped',
        lambda f: edit(f, architectures=['A' * 8_000_000]),
        ["architectures is ['AAAA", 'not supported'],
    ),
    'a header of lists': (
        'llama-grouped',
        lambda f: with_header(f / SINGLE, lists(30_000_000)),
        ['its header: has 60000003 lists', f'at most {2**22}'],
    ),
    'a header of nothing': (
        'llama-grouped',
        lambda f: ((f / SINGLE).write_bytes((10**8).to_bytes(8, 'little')), os.truncate(f / SINGLE, 2 * 10**8)),
        ['its header is not a JSON object'],
    ),
    'large dims': (
        'llama-grouped',
        lambda f: rehead(f, lambda h: first(h).update(shape=[2**62] * 400)),
        ['has 400 dims: at most 8 work'],
    ),
    'many dims': (
        'llama-grouped',
        lambda f: rehead(f, lambda h: first(h).update(shape=[2**62] * 300_000)),
        ['has 300000 dims: at most 8'],
    ),
    'a long name': (
        'llama-grouped',
        lambda f: rehead(f, lambda h: renamed(h, 'n' * 4_000_000)),
        ["tensor 'nnn", 'at most 256 letters'],
    ),
    'a name that a terminal obeys': (
        'llama-grouped',
        lambda f: rehead(f, lambda h: renamed(h, '\x1b[2J\nx')),
        [r"tensor '\x1b[2J\nx'"],
    ),
    'tensors of none': (
        'llama-grouped',
        lambda f: rehead(f, add_nothing),
        ['tensor model.layers.0.q [0] (and 49999 more) is none that'],
    ),
    'files of an index': (
        'llama-grouped',
        lambda f: indexed(f, {f'{i}': f'{i}.safetensors' for i in range(5000)}),
        ['names 5000 files: at most 4096 are read'],
    ),
    'a name in an index': (
        'llama-grouped',
        lambda f: indexed(f, {'q': '\x1b' * 300}),
        [r"'\x1b\x1b", 'is not the name of a file'],
    ),
    'half a name in an index': ('llama-grouped', lambda f: indexed(f, {'q': '\ud800.safetensors'}), ['lone surrogate']),
    'many files beside': (
        'llama-grouped',
        lambda f: [sparse(f / f'{i}.txt', 60_000_000) for i in range(200)],
        [f'more than {2**27} bytes, or 1024 files, beside the weights', 'move what the model does not need'],
    ),
    'small files beside': (
        'llama-grouped',
        lambda f: [(f / f'{i}.txt').touch() for i in range(1100)],
        ['or 1024 files, beside'],
    ),
    'a large file beside': (
        'llama-grouped',
        lambda f: sparse(f / 'vocab.json', 2**26 + 1),
        [f'vocab.json: has {2**26 + 1} bytes: at most {2**26} are read'],
    ),
    'code of its own': (
        'llama-grouped',
        lambda f: edit(f, auto_map={'AutoModel': 'x.y'}, architectures=5),
        ['architectures is 5: it must be a list of texts'],
    ),
    'a loop of links': (
        'llama-grouped',
        lambda f: ((f / 'config.json').unlink(), (f / 'config.json').symlink_to('config.json')),
        ['config.json: cannot be read'],
    ),
    'a folder as a tokenizer': (
        'llama-grouped',
        lambda f: (f / 'tokenizer.json').mkdir(),
        ['tokenizer.json: is a folder: it must be a file'],
    ),
    'merges that are nowhere, and no other tokenizer': (
        'llama-grouped',
        lambda f: (f / 'merges.txt').symlink_to('blobs'),
        ['merges.txt: is missing'],
    ),
    'a tokenizer that is nowhere': (
        'llama-grouped',
        lambda f: (f / 'tokenizer.json').symlink_to('blobs'),
        ['tokenizer.json: is missing'],
    ),
    'a pipe beside': (
        'llama-grouped',
        lambda f: os.mkfifo(f / 'tokenizer.json'),
        ['tokenizer.json: is a pipe: it must be a file'],
    ),
    'a pipe of weights': (
        'llama-grouped',
        lambda f: ((f / SINGLE).unlink(), os.mkfifo(f / SINGLE)),
        ['is a pipe'],
    ),
    'names that terminals obey': (
        'llama-grouped',
        lambda f: (f / SINGLE).rename(f / '\x1b[2J\nerror.bin'),
        [r'/\x1b[2J\nerror.bin: pickled weights can run any code'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', MANY)
def test_what_a_folder_asks_for_is_held_against_what_it_holds(name, tmp_path):
    case, change, words = MANY[name]
    folder = folders.write(tmp_path / 'source', cases.CASES[case], folders.named(case))
    change(folder)
    held, began = most_held(), time.monotonic()
    with pytest.raises(UserError) as error:
        import_run(folder, tmp_path / 'runs' / 'run', MeshConfig(), say=str)
    assert time.monotonic() - began < SECONDS
    assert most_held() - held < BYTES
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 600
    assert all(word in line for word in words), line
    assert not (tmp_path / 'runs').exists()


def most_held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_what_may_not_be_read_is_told(kind, tmp_path, monkeypatch):
    """As a folder or file without permission does to all but root."""
    folder = folders.write(tmp_path / 'source', cases.CASES['llama-grouped'], folders.named('llama-grouped'))
    (folder / '1_Pooling').mkdir()
    (folder / 'tokenizer.json').write_text('{}')
    refused = folder / ('1_Pooling' if kind == 'folder' else 'tokenizer.json')
    function = 'listdir' if kind == 'folder' else 'open'
    allowed = getattr(os, function)

    def refuse(path, *rest):
        if Path(path) == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return allowed(path, *rest)

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(UserError, match=f'/{refused.name}: cannot be read: Permission denied'):
        published_folder.side_files(folder)


def test_a_folder_of_licences_is_left_out(tmp_path):
    folder = folders.write(tmp_path / 'source', cases.CASES['llama-grouped'], folders.named('llama-grouped'))
    (folder / 'LICENSES').mkdir()
    (folder / 'LICENSE').write_text('free')
    assert sorted(published_folder.side_files(folder)) == ['LICENSE', 'config.json']


LEFT_OUT = {
    'merges.txt': (lambda path: path.symlink_to('blobs'), 'is missing'),
    'tokenizer.model': (lambda path: path.symlink_to('/etc/hostname'), 'is a link that leaves the folder'),
    'eval.json': (lambda path: path.mkdir(), 'is a folder: it must be a file'),
    'notes.txt': (os.mkfifo, 'is a pipe: it must be a file'),
    'trainer_state.json': (lambda path: sparse(path, 70_000_000), f'has 70000000 bytes: at most {2**26} are read'),
}


def test_what_a_model_does_not_need_and_cannot_be_read_is_left_out_and_said(tmp_path):
    folder = folders.write(tmp_path / 'source', cases.CASES['llama-grouped'], folders.named('llama-grouped'))
    for name, content in files_of('json_roberta').items():
        if name != 'config.json':
            (folder / name).write_bytes(content)
    for name, (make, _) in LEFT_OUT.items():
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
    (folder / 'LICENSE').write_text('free')
    lines: list[str] = []
    import_run(folder, tmp_path / 'runs' / 'run', MeshConfig(), say=lines.append)
    said = sorted(line for line in lines if line.startswith('left out: '))
    wanted = sorted(f'left out: {folder}/{name}: {why}' for name, (_, why) in LEFT_OUT.items())
    assert len(said) == len(wanted), said
    assert all(line.startswith(start) for line, start in zip(said, wanted, strict=True)), said
    kept = {path.name for path in (tmp_path / 'runs' / 'run' / 'source').iterdir()}
    assert {'config.json', 'tokenizer.json', 'LICENSE'} <= kept
    assert not kept & LEFT_OUT.keys()


def test_what_is_read_of_a_published_model_is_needed_of_its_folder():
    names = {
        *(side_files.CONFIG, side_files.MAP, side_files.ADDED, side_files.GENERATION, side_files.MODEL, JSON),
        *(chat.SINGLE, chat.OLD, f'{chat.MORE}x{chat.ENDING}', embed.MODULES, embed.POOLING),
    }
    assert [name for name in names if not published_folder.NEEDED.fullmatch(name)] == []
    others = {*published_tokenizer.MODELS, marian.SOURCE, marian.TARGET, marian.VOCAB, VOCAB, MERGES, 'x.tiktoken'}
    others |= {published_tokenizer.TEKKEN}
    assert [name for name in others if not published_folder.TOKENIZERS.fullmatch(name)] == []


CHANGES = {
    'cut off': lambda path: os.truncate(path, 5000),
    'gone': lambda path: path.unlink(),
    'longer': lambda path: os.truncate(path, 10**7),
    'another': lambda path: (
        path.rename(path.with_name('old')),
        path.write_bytes(path.with_name('old').read_bytes()),
        os.utime(path, ns=(0, 7)),
    ),
}


@pytest.mark.parametrize('form', ['a folder', 'a GGUF file'])
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('after', [3])  # tensors that were read before
def test_weights_that_change_during_an_import_leave_no_run(form, change, after, tmp_path, monkeypatch):
    found = folders.named('llama-grouped')
    if form == 'a folder':
        source = folders.write(tmp_path / 'source', cases.CASES['llama-grouped'], found)
        path = source / SINGLE
    else:
        source = path = written.write(tmp_path / 'x.gguf', *written.of_folder(cases.CASES['llama-grouped'], found))
    arrays = hub.Published.arrays

    def changing(self, mesh):
        for number, one in enumerate(arrays(self, mesh)):
            if number == after:
                CHANGES[change](path)
            yield one

    monkeypatch.setattr(hub.Published, 'arrays', changing)
    with pytest.raises(UserError) as error:
        import_run(source, tmp_path / 'runs' / 'run', MeshConfig(), say=str)
    said = 'cannot be read: No such file' if change == 'gone' else 'changed while it was read'
    assert str(error.value).startswith(f'{path}: {said}')
    assert not (tmp_path / 'runs').exists()


def test_a_file_that_changes_between_its_header_and_its_numbers_is_told(tmp_path, monkeypatch):
    folder = folders.write(tmp_path / 'source', cases.CASES['llama-grouped'], folders.named('llama-grouped'))
    (stored, *_) = hub.all_stored(folder).values()
    os.truncate(folder / SINGLE, stored.begin + stored.bytes // 2)
    with pytest.raises(UserError, match='changed while it was read'):
        stored.read()


def test_layers_of_any_kinds_are_grouped_at_once():
    kinds = [LayerSpec(experts, window, True) for experts, window in itertools.product((False, True), repeat=2)]
    draw = np.random.default_rng(0)
    began = time.monotonic()
    for pattern in ([0], [0, 1], [0] * 9999 + [1], [int(i) for i in draw.integers(4, size=10_000)]):
        row = tuple(kinds[pattern[i % len(pattern)]] for i in range(10_000))
        assert tuple(kind for run in group_layers(row) for _ in range(run.repeats) for kind in run.specs) == row
    assert [run.repeats for run in group_layers(tuple(kinds[i] for i in [0] * 9999 + [1]))] == [9999, 1]
    assert time.monotonic() - began < 20


def test_layers_are_grouped_as_short_as_can_be():
    kinds = [LayerSpec(experts, window, True) for experts, window in itertools.product((False, True), repeat=2)]

    def shortest(row: tuple) -> tuple[int, int]:
        """The fewest kinds and runs, by trying all."""
        best = [(0, 0)] * (len(row) + 1)
        for at in reversed(range(len(row))):
            best[at] = min(
                (best[to][0] + unit, best[to][1] + 1)
                for to in range(at + 1, len(row) + 1)
                for unit in range(1, to - at + 1)
                if (to - at) % unit == 0 and row[at:to] == row[at : at + unit] * ((to - at) // unit)
            )
        return best[0]

    draw = np.random.default_rng(1)
    for length in range(1, 15):
        for _ in range(20):
            row = tuple(kinds[i] for i in draw.integers(draw.integers(1, 4), size=length))
            runs = group_layers(row)
            assert (sum(len(run.specs) for run in runs), len(runs)) == shortest(row)
            assert tuple(kind for run in runs for _ in range(run.repeats) for kind in run.specs) == row


def test_the_nearest_divisor_of_any_number_is_found_at_once():
    for n, wanted in itertools.product(range(1, 60), range(1, 70)):
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        assert nearest_divisor(n, wanted) == min(divisors, key=lambda d: (abs(d - wanted), d))
    assert nearest_divisor(2**31 - 1, 7) == 1
    assert nearest_divisor(2**31, 30_000) == 2**15
    assert 2**60 % nearest_divisor(2**60, 12345) == 0
    assert numbers.MOST_TRIED <= 2**20
    assert tensor_files.MOST_DIMS == 8
