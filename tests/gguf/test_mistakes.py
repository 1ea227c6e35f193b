"""GGUF files that are cut off, lie, or are of a kind that is not read: one clear line, and work within the file's size."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.families import cases, folders
from tests.gguf import written
from tests.gguf.written import Typed
from weft.hub import gguf
from weft.hub import read as hub
from weft.hub.gguf import file as gguf_file
from weft.hub.gguf import header
from weft.hub.gguf.tokenizer import tokenizer_files
from weft.hub.published_tokenizer import published_tokenizer
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.importing import import_run

ROOT = Path(__file__).parents[2]
LLAMA = cases.CASES['llama-llama3-scaling'] | {'vocab_size': 8}
TOKENS = ['<unk>', '<s>', 'a', 'b', 'ab', 'Ġ', '<|end|>', 'Ġab']
TOKENIZER: dict[str, Any] = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'llama-bpe',
    'tokenizer.ggml.tokens': TOKENS,
    'tokenizer.ggml.token_type': [Typed('i32', kind) for kind in (3, 3, 1, 1, 1, 1, 4, 1)],
    'tokenizer.ggml.merges': ['a b', 'Ġ ab'],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 6,
    'tokenizer.ggml.add_bos_token': True,
    'tokenizer.chat_template': '{{ messages }}<|end|>',
}


def whole() -> tuple[dict[str, Any], dict[str, Any]]:
    """A small file with everything in it: keys of all types, numbers and blocks."""
    found = {name: np.array(x) for name, x in folders.named('llama-llama3-scaling').items()}
    for name in ('model.embed_tokens.weight', 'lm_head.weight'):
        found[name] = found[name][: len(TOKENS)]
    keys, tensors = written.of_folder(LLAMA, found)
    blocks = np.random.default_rng(0).integers(0, 256, (96, 2, 18), np.uint8)
    blocks[..., :2] = np.float16(0.01).reshape(1).view(np.uint8)
    tensors['blk.0.ffn_gate.weight'] = written.Packed(blocks.reshape(96, -1), 2, 32, 18)
    others = {f'general.{kind}': Typed(kind, 1) for kind in written.LETTERS} | {
        'general.tags': ['a', 'b'],
        'general.none': [],
    }
    return keys | others | TOKENIZER, tensors


@pytest.fixture(autouse=True)
def begun() -> None:
    """JAX has its eight devices before an import would begin it with as many as its own mesh has."""
    jax.devices()


def test_a_whole_file_becomes_a_run(tmp_path):
    said: list[str] = []
    path = written.write(tmp_path / 'a.gguf', *whole())
    import_run(path, tmp_path / 'run', MeshConfig(), say=said.append)
    assert said[1] == 'read from blocks of Q4_0, whose numbers are float32; --dtype bfloat16 halves them'
    assert json.loads((tmp_path / 'run' / 'tokenizer.special.json').read_text()) == {
        'bos': 1,
        'eos': 6,
        'prefix': [1],
        'ends': [6],
    }
    values = gguf_file.read(path).values
    assert values['general.u64'] == values['general.i8'] == 1
    assert values['general.bool'] is True
    assert values['general.f64'] == 1.0
    assert values['general.tags'] == ['a', 'b']
    assert values['llama.attention.layer_norm_rms_epsilon'] == 1e-5
    assert sorted(path.name for path in (tmp_path / 'run' / 'source').iterdir()) == [
        'config.json',
        'generation_config.json',
        'tokenizer.json',
        'tokenizer_config.json',
    ]


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def key(name: str, value: Any) -> Change:
    return lambda keys, tensors: keys.update({name: value})


def without(name: str) -> Change:
    return lambda keys, tensors: (keys.pop(name, None), tensors.pop(name, None))


def tensor(name: str, x: Any) -> Change:
    return lambda keys, tensors: tensors.update({name: x})


ZEROS = np.zeros((4, 4), np.float32)
# What is wrong, and what is said of it.
WRONG: list[tuple[Change, str]] = [
    (key('general.type', 'mmproj'), r"general\.type is 'mmproj': only files of whole models are read"),
    (key('general.type', 'adapter'), r"general\.type is 'adapter': only files of whole models are read"),
    (
        key('general.architecture', 'qwen'),
        r"general\.architecture is 'qwen', which is not supported; did you mean 'qwen3'\?",
    ),
    (key('general.architecture', 3), r'general\.architecture is 3, which is not supported'),
    (lambda keys, tensors: tensors.clear(), r'has no tensors: it is a vocabulary alone'),
    (key('general.alignment', 24), r'general\.alignment is 24: it must be a power of 2'),
    (without('llama.block_count'), r'key llama\.block_count is missing'),
    (key('llama.block_count', 0), r'key llama\.block_count is 0: it must be a whole number from 1'),
    (key('llama.block_count', 10**9), r'key llama\.block_count is 1000000000, and the file has tensors of 2 blocks'),
    (key('llama.block_count', 3), r'key llama\.block_count is 3, and the file has tensors of 2 blocks'),
    (
        key('llama.block_count', 1),
        r'key llama\.block_count is 1, and the file has tensors of 2 blocks',
    ),
    (key('llama.attention.head_count', 'x'), r"key llama\.attention\.head_count is 'x': it must be a whole number"),
    (
        key('llama.attention.head_count', 5),
        r'tensor blk\.0\.attn_q\.weight has 64 rows, which are no pairs in each of 5 heads',
    ),
    (key('llama.attention.head_count_kv', [1, 2]), r'head_count_kv has 2 values, which differ from layer to layer'),
    (
        key('llama.feed_forward_length', 95),
        r'tensor blk\.0\.ffn_gate\.weight stands for \[96, 64\] numbers and by the keys',
    ),
    (key('llama.rope.scaling.type', 'yarn'), r"has both rope_freqs\.weight and llama\.rope\.scaling\.type 'yarn'"),
    (tensor('rope_freqs.weight', ZEROS), r'tensor rope_freqs\.weight is \[4, 4\] and by the keys must be \[8\]'),
    (
        tensor('rope_freqs.weight', np.arange(1, 9, dtype=np.float32)),
        r'factors that are not those of Llama 3’s scaling',
    ),
    (key('llama.residual_scale', 2.0), r'llama\.residual_scale is 2\.0: this family does not know the field'),
    (without('token_embd.weight'), r'tensor token_embd\.weight is missing'),
    (without('blk.1.ffn_norm.weight'), r'tensor blk\.1\.ffn_norm\.weight is missing: by its keys'),
    (
        tensor('blk.1.ffn_odd.weight', ZEROS),
        r'tensor blk\.1\.ffn_odd\.weight \[4, 4\] is none that a model of architecture llama',
    ),
    (tensor('x' * 257, ZEROS), r'the name of a tensor is a text of 257 bytes: at most 256'),
    (tensor('x\ny', ZEROS), r"the name of a tensor is 'x\\ny': names have letters, digits and signs alone"),
    (key('general.a b', 1), r"the name of a key is 'general.a b': names have letters"),
    (key('general.tags', [['a']]), r"key 'general\.tags' is an array of arrays, which is not read"),
    (key('general.name', b'\xff'), r"key 'general\.name' is not UTF-8 at its byte 0"),
    (key('general.tags', ['a', b'a\xff']), r"key 'general\.tags', text 1 is not UTF-8 at its byte 1"),
    (key('tokenizer.ggml.model', 'bert'), r"tokenizer\.ggml\.model is 'bert', which is not supported; supported: gpt2"),
    (
        key('tokenizer.ggml.pre', 'qwen'),
        r"tokenizer\.ggml\.pre is 'qwen', which is not supported; did you mean 'qwen2'",
    ),
    (without('tokenizer.ggml.pre'), r'tokenizer\.ggml\.pre is missing'),
    (without('tokenizer.ggml.tokens'), r"tokenizer\.ggml\.tokens is missing: a tokenizer of 'gpt2' has it"),
    (key('tokenizer.ggml.tokens', [*TOKENS[:7], 'ab']), r"tokenizer\.ggml\.tokens has 'ab' twice"),
    (key('tokenizer.ggml.token_type', [1, 2]), r'token_type must be an array of a number for each of 8 tokens'),
    (key('tokenizer.ggml.token_type', [9] * 8), r'token_type has a 9: types go from 1 to 6'),
    (key('tokenizer.ggml.merges', ['a c']), r"tokenizer\.ggml\.merges has 'a c': two tokens that together are one"),
    (
        key('tokenizer.ggml.eos_token_id', 8),
        r'eos_token_id is 8: it must be a whole number from 0 to 7|at most 7 works',
    ),
    (without('tokenizer.ggml.bos_token_id'), r'add_bos_token is true and tokenizer\.ggml\.bos_token_id is missing'),
    (key('tokenizer.ggml.add_bos_token', 1), r'add_bos_token is 1: it must be true or false'),
    (key('tokenizer.chat_template', 1), r'tokenizer\.chat_template is 1: it must be a text'),
]


@pytest.mark.parametrize(('change', 'said'), WRONG, ids=[said[:60] for _, said in WRONG])
def test_what_is_wrong_is_said_in_one_line(change, said, tmp_path):
    keys, tensors = whole()
    change(keys, tensors)
    refused(tmp_path, written.content(keys, tensors), said)


@pytest.mark.parametrize('name', ['mixtral-plain', 'deepseek_v3-as-published', 'gpt_oss-as-published'])
def test_experts_that_are_not_there_are_not_counted(name, tmp_path):
    """A model of so many would take minutes to lay out, and a file of them takes as many bytes."""
    config = cases.CASES[name] | ({'swiglu_limit': 7.0} if name.startswith('gpt_oss') else {})
    keys, tensors = written.of_folder(config, folders.named(name))
    count = f'{keys["general.architecture"]}.expert_count'
    refused(
        tmp_path, written.content(keys | {count: 10**9}, tensors), r'1000000000 experts: at most 131072 in all layers'
    )
    refused(tmp_path, written.content(keys | {count: 9}, tensors), r'is of 8 experts and by the keys must be of 9')
    bare = {tensor: x for tensor, x in tensors.items() if '_exps.' not in tensor}
    refused(tmp_path, written.content(keys, bare), r'its keys say that it has 8 experts, and its tensors are of 0')


def refused(folder: Path, content: bytes, said: str) -> None:
    path = folder / 'a.gguf'
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        import_run(path, folder / 'run', MeshConfig())
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
    assert sorted(one.name for one in folder.iterdir()) == ['a.gguf']


def head(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b'GGUF' + struct.pack('<IQQ', version, tensors, keys)


def entry(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return written.text(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


BYTES: list[tuple[bytes, str]] = [
    (b'GGUF', r'has 4 bytes: not a GGUF file'),
    (b'PK\x03\x04' + bytes(40), r'begins with .*: not a GGUF file'),
    (head(1) + bytes(8), r'is of GGUF version 1; supported: 2 and 3; convert the model again'),
    (head(4), r'is of GGUF version 4; supported: 2 and 3'),
    (b'GGUF' + struct.pack('>IQQ', 3, 0, 0), r'is big-endian'),
    (head(tensors=2**60), r'the header has 1152921504606846976 tensors: at most 1048576'),
    (head(keys=1000), r'the header has 1000 keys, and only 0 bytes follow'),
    (
        head(keys=1) + struct.pack('<Q', 2**40) + bytes(16),
        r'the name of a key is a text of 1099511627776 bytes: at most 256',
    ),
    (head(keys=1) + written.text('a') + struct.pack('<I', 13) + bytes(16), r"key 'a' has a value of type 13"),
    (
        head(keys=1) + written.text('a') + struct.pack('<IQ', 8, 2**50),
        r"key 'a' is a text of \d+ bytes: at most 16777216",
    ),
    (head(keys=1) + written.text('a') + struct.pack('<IQ', 8, 99), r"ends within its header, at key 'a'"),
    (
        head(keys=1) + written.text('a') + struct.pack('<IIQ', 9, 8, 2**33),
        r"key 'a' has 8589934592 texts: at most 4194304",
    ),
    (
        head(keys=1) + written.text('a') + struct.pack('<IIQ', 9, 8, 2**20),
        r"key 'a' has 1048576 texts, and only 0 bytes follow",
    ),
    (
        head(keys=1) + written.text('a') + struct.pack('<IIQ', 9, 4, 2**20),
        r"key 'a' has 1048576 values, and only 0 bytes",
    ),
    (
        head(keys=1) + written.text('a') + struct.pack('<IIQQ', 9, 8, 1, 77),
        r"ends within its header, at key 'a', text 0",
    ),
    (head(keys=1) + written.text('a') + struct.pack('<IIQ', 9, 9, 1) + bytes(16), r"key 'a' is an array of arrays"),
    (
        head(keys=1) + written.text('a') + struct.pack('<IB', 7, 2) + bytes(16),
        r"key 'a' is true or false, and has the byte 2",
    ),
    (head(keys=2) + 2 * (written.text('a') + struct.pack('<II', 4, 1)), r"key 'a' is there twice"),
    (head(tensors=1) + entry(b'x', (1,) * 5, 0, 0), r"tensor 'x' has 5 dims: from 1 to 4 work"),
    (head(tensors=1) + entry(b'x', (2**40, 2**40), 0, 0), r"tensor 'x' has dims \[1099511627776, 1099511627776\]"),
    (head(tensors=1) + entry(b'x', (0,), 0, 0), r"tensor 'x' has dims \[0\]: each must be at least 1"),
    (
        head(tensors=1) + entry(b'x', (33,), 2, 0) + bytes(99),
        r"tensor 'x' has rows of 33 numbers, and Q4_0 has them in blocks",
    ),
    (head(tensors=1) + entry(b'x', (8,), 0, 8) + bytes(99), r"tensor 'x' begins at 8, which is no multiple of 32"),
    (head(tensors=1) + entry(b'x', (8,), 0, 64) + bytes(199), r"tensor 'x' leaves 64 bytes before it unused"),
    (head(tensors=1) + entry(b'x', (64,), 0, 0) + bytes(99), r"tensor 'x' ends at \d+: it was cut off; fetch it again"),
    (head(tensors=2) + 2 * entry(b'x', (8,), 0, 0) + bytes(99), r"tensor 'x' is there twice"),
    (
        head(tensors=2) + entry(b'x', (8,), 0, 0) + entry(b'y', (8,), 0, 0) + bytes(99),
        r"tensor '[xy]' overlaps another",
    ),
]


@pytest.mark.parametrize(('content', 'said'), BYTES, ids=[said[:60] for _, said in BYTES])
def test_what_cannot_be_a_file_is_said_in_one_line(content, said, tmp_path):
    refused(tmp_path, content, said)


def test_a_header_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(header, 'LONGEST_HEADER', 500)
    refused(
        tmp_path, written.content(*whole()), r'its header has more than 500 bytes, the most that is read of one, at'
    )


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(UserError, match=r'x\.gguf: cannot be read: No such file'):
        hub.read(tmp_path / 'x.gguf')
    os.mkfifo(tmp_path / 'pipe.gguf')
    with pytest.raises(UserError, match=r'pipe\.gguf: is a pipe: it must be a file'):
        hub.read(tmp_path / 'pipe.gguf')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'config.json').write_text(json.dumps(LLAMA))
    written.write(tmp_path / 'folder' / 'a.gguf', *whole())
    with pytest.raises(
        UserError, match=r'a\.gguf: is a GGUF file, and the folder has no \*\.safetensors: import the file itself'
    ):
        hub.read(tmp_path / 'folder')


def parts(folder: Path, count: int = 3) -> list[Path]:
    """A file split as gguf-split does: the first has the keys, tensors are in turns."""
    keys, tensors = whole()
    paths = []
    for i in range(count):
        mine = {'split.no': Typed('u16', i), 'split.count': Typed('u16', count)}
        mine['split.tensors.count'] = Typed('i32', len(tensors))
        names = list(tensors)[i::count]
        path = folder / f'm-{i + 1:05}-of-{count:05}.gguf'
        paths.append(written.write(path, (keys if i == 0 else {}) | mine, {name: tensors[name] for name in names}))
    return paths


def test_a_model_in_several_files_is_one(tmp_path):
    first, second, third = parts(tmp_path)
    one = gguf.read(written.write(tmp_path / 'whole.gguf', *whole()))
    split = gguf.read(first)
    assert split.stored.keys() == one.stored.keys()
    for name, x in one.stored.items():
        assert split.stored[name].read().tobytes() == x.read().tobytes(), name
    with pytest.raises(
        UserError, match=r'm-00002-of-00003\.gguf: is not the first of the 3 files .*: name .*m-00001-of-00003'
    ):
        gguf.read(second)
    third.rename(tmp_path / 'x.gguf')
    with pytest.raises(UserError, match=r'm-00003-of-00003\.gguf: is missing: m-00001-of-00003\.gguf says'):
        gguf.read(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(
        UserError, match=r'm-00003-of-00003\.gguf: says that it is file 1 of 3, counted from 0, and by its name'
    ):
        gguf.read(first)
    first.rename(tmp_path / 'renamed.gguf')
    with pytest.raises(
        UserError, match=r'renamed\.gguf: is one of 3 files of a model, which are named NAME-00001-of-00003'
    ):
        gguf.read(tmp_path / 'renamed.gguf')


# Mutants -----------------------------------------------------------------------------------------------------------------

MUTANTS, SEED = 2000, 0
LARGE = (0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def mutant(content: bytes, end: int, draw: np.random.Generator) -> bytes:
    """A file with something changed in its header, which ends there."""
    raw, at = bytearray(content), int(draw.integers(4, end))
    match draw.integers(6):
        case 0:
            return content[:at]
        case 1:
            raw[at] ^= 1 << int(draw.integers(8))
        case 2:
            raw[at : at + 8] = struct.pack('<Q', LARGE[draw.integers(len(LARGE))])
        case 3:
            raw[at : at + 4] = struct.pack('<I', int(draw.integers(0, 300)))
        case 4:
            length = int(draw.integers(1, 64))
            raw[at:at] = raw[at - min(at, length) : at]  # a piece twice
        case 5:
            del raw[at : at + int(draw.integers(1, 64))]
    return bytes(raw)


def read_all(path: Path, through: bool) -> None:
    """All that an import reads of a file, its tensors' numbers too; with the model of its config if `through`."""
    found = gguf.read(path)
    for x in found.stored.values():
        x.read((slice(0, 1),))
    published_tokenizer(tokenizer_files(found.contents.values, path), str(path))
    if through:
        hub.read(path)


def mutants(folder: Path) -> dict[str, int]:
    """How many are refused, and how many can still be read; anything else fails."""
    keys, tensors = whole()
    content = written.content(keys, tensors)
    end = len(content) - sum(-(-len(bytes_of(x)) // 32) * 32 for x in tensors.values())
    draw, counts = np.random.default_rng(SEED), {'refused': 0, 'read': 0}
    path = folder / 'a.gguf'
    for number in range(MUTANTS):
        path.write_bytes(mutant(content, end, draw))
        try:
            read_all(path, through=number % 50 == 0)
            counts['read'] += 1
        except UserError as error:
            said = str(error)
            assert '\n' not in said, (number, said)
            assert len(said) < 1000, (number, said)
            assert path.name in said, (number, said)
            counts['refused'] += 1
    return counts


VALUES = [
    '',
    'x' * 10**5,
    'a\nb',
    ['a', 'b'],
    [],
    [0.0, float('nan')],
    [1, 2],
    True,
    0,
    -1.5,
    1e38,
    1e-38,
    float('nan'),
    2**31,
]
ODD = ['llama-llama3-scaling', 'gemma3-as-published', 'deepseek_v3-as-published', 'phi3-longrope-long']


@pytest.mark.parametrize('name', ODD)
def test_values_of_any_kind_are_refused_or_read(name, tmp_path):
    """Each key in turn has a value of another kind, or an odd one."""
    config = cases.CASES[name] | ({'query_pre_attn_scalar': 16} if name.startswith('gemma') else {})
    keys, tensors = written.of_folder(config, folders.named(name))
    if name.startswith('llama'):
        keys |= TOKENIZER | {'split.count': 1, 'split.no': 0, 'general.alignment': 32}
    path, made = tmp_path / 'a.gguf', written.entries(tensors)
    for changed in keys:
        for number, value in enumerate(VALUES):
            path.write_bytes(written.content(keys | {changed: value}, tensors, made))
            try:
                found = gguf.read(path)
                if changed.startswith('tokenizer.'):
                    published_tokenizer(tokenizer_files(found.contents.values, path), str(path))
                elif number in (8, 10):
                    hub.read(path)
            except UserError as error:
                said = str(error)
                assert '\n' not in said, (changed, value, said)
                assert len(said) < 1000, (changed, value, said[:1000])
                assert path.name in said, (changed, value, said)


def bytes_of(x: Any) -> bytes:
    return (x.raw if isinstance(x, written.Packed) else x).tobytes()


def test_mutants_are_refused_or_read_within_limits(tmp_path):
    code = (
        'import resource as r; r.setrlimit(r.RLIMIT_AS, (2**31,) * 2); r.setrlimit(r.RLIMIT_CPU, (60, 60)); import sys; '
        'from pathlib import Path; from tests.gguf.test_mistakes import mutants; print(mutants(Path(sys.argv[1])))'
    )
    given = [sys.executable, '-c', code, str(tmp_path)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts: Mapping[str, int] = json.loads(done.stdout.replace("'", '"'))
    assert counts['refused'] > MUTANTS // 2, counts
    assert counts['read'] > MUTANTS // 40, counts
