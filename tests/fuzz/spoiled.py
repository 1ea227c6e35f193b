"""What a stranger may do to a published folder: fields, counts, bytes, tokenizers, headers, indices, kinds and names of files.

Each way changes a folder in place, by randomness alone that it is given, and returns in a few words what it did.
"""

import contextlib
import copy
import json
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weft.hub import published_folder

TEMPLATE = '{% for m in messages %}{{ m.content }}{% endfor %}'
ESCAPES = '\x1b[2J\x1b]0;x\x07\nerror: all is well\r\u202e\x00'
VALUES: list[Any] = [
    0, -1, 1, 2, 3, -5, 2**31 - 1, 2**31, 10**9, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, 1e-320,
    float('nan'), float('inf'), -float('inf'), True, False, None, '', 'x', '\ud800', ESCAPES, '\0', [], {}, [[]], [1],
    ['x'], {'a': 1}, [None], '9' * 50, [2**62] * 400, [0.5], [True], {'rope_type': 'yarn'}, {'type': 3},
    'LlamaForCausalLM', {'content': None}, {'content': '</s>'}, ['</s>'], 'y' * 3_000_000, {ESCAPES: 1}, [ESCAPES],
    {'type': 'Replace'}, '<0xZZ>', {'type': 'Sequence', 'decoders': None}, [[[1]]], list(range(3000)),
]  # fmt: skip
FIELDS = (
    'auto_map', 'quantization_config', 'ends', 'rope_scaling', 'architectures', 'x', '__metadata__', 'bos_token',
    'eos_token', 'eos_token_id', 'add_bos_token', 'layer_types', 'decoder', 'chat_template', 'added_tokens_decoder',
    'extra_ids', 'tokenizer_class', 'normalizer', 'post_processor', 'mlp_only_layers', ESCAPES, '\ud800',
)  # fmt: skip
COUNTS = re.compile(r'"(\w+)": (\d+)')
CHARSMAPS = ('AAAA', '/////w==', 'BAAAAP////8A', 'BAAAAAAAAIAA', 3)
SIZES = (0, 7, 300, 4096, 9999, 10**4, 10**6, 10**9, 2**31 - 1)


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 6)):
            yield from _paths(value[i], (*path, i))


def _get(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    _get(value, path[:-1])[path[-1]] = new
    return value


def _other(value: Any, draw: random.Random) -> Any:
    """JSON with a few values changed, taken out, moved, nested or added."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        paths = list(_paths(value))
        # Near the root as often as far below it, where a vocabulary's hundreds of tokens are.
        deep = draw.choice([len(path) for path in paths])
        path = draw.choice([path for path in paths if len(path) == min(deep, draw.randrange(5))] or paths)
        here, how = _get(value, path), draw.random()
        if how < 0.55:
            value = _put(value, path, copy.deepcopy(draw.choice(VALUES)))
        elif how < 0.7 and path:
            del _get(value, path[:-1])[path[-1]]
        elif how < 0.78:
            value = _put(value, path, copy.deepcopy(_get(value, draw.choice(paths))))
        elif how < 0.92:
            if isinstance(here, dict):
                here[draw.choice(FIELDS)] = copy.deepcopy(draw.choice(VALUES))
            elif isinstance(here, list):
                here.append(copy.deepcopy(draw.choice(VALUES)))
            elif isinstance(here, int) and not isinstance(here, bool):
                value = _put(
                    value,
                    path,
                    draw.choice(
                        (here * 2, here + 1, here - 1, -here, here * 10**6, here / 2.5 if abs(here) < 2**60 else 0.5)
                    ),
                )
            elif isinstance(here, str):
                value = _put(value, path, here + draw.choice(('x', ESCAPES, '\ud800', '\0')))
        else:
            for _ in range(draw.choice((5, 60, 400))):
                here = [here] if draw.random() < 0.5 else {'a': here}
            value = _put(value, path, here)
    return value


def _text(value: Any, draw: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=draw.random() < 0.5).encode('utf-8', 'surrogatepass')


def _spoiled(content: bytes, draw: random.Random) -> bytes:
    """Bytes with a few turned, left out, put in, doubled, or cut off."""
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not raw:
            break
        how, i = draw.random(), draw.randrange(len(raw))
        if how < 0.4:
            raw[i] ^= 1 << draw.randrange(8)
        elif how < 0.55:
            del raw[i : i + draw.choice((1, 2, 16, 500))]
        elif how < 0.7:
            more = (
                b'\0',
                b'"',
                b'{',
                b'[',
                b'}',
                b'\xff',
                b'NaN',
                b'-',
                b'e999',
                b'9' * 5000,
                b'\\ud800',
                b'\x1b[31m',
                b'\xef\xbb\xbf',
            )
            raw[i:i] = draw.choice(more)
        elif how < 0.85:
            del raw[i:]
        else:
            j = draw.randrange(len(raw))
            raw[i:i] = raw[j : j + draw.choice((4, 40, 400))]
    return bytes(raw)


def files_of(folder: Path, *endings: str) -> list[Path]:
    """Files of a folder by the ends of their names, in order."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(endings))


def _weights(folder: Path, draw: random.Random) -> tuple[Path, bytes, bytes]:
    """A file of weights, its header and its numbers."""
    path = draw.choice(files_of(folder, '.safetensors'))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], 'little')
    return path, raw[8 : 8 + length], raw[8 + length :]


def _write_weights(path: Path, header: bytes, numbers: bytes) -> str:
    path.write_bytes(len(header).to_bytes(8, 'little') + header + numbers)
    return path.name


def a_field(folder: Path, draw: random.Random) -> str:
    path = draw.choice(files_of(folder, '.json'))
    path.write_bytes(_text(_other(json.loads(path.read_bytes()), draw), draw))
    return path.name


def a_field_of_config(folder: Path, draw: random.Random) -> str:
    path = folder / 'config.json'
    path.write_bytes(_text(_other(json.loads(path.read_bytes()), draw), draw))
    return path.name


def a_count(folder: Path, draw: random.Random) -> str:
    """Sizes in config.json that nothing in the files stands for."""
    path = folder / 'config.json'
    text = path.read_text()
    for _ in range(draw.choice((1, 1, 2))):
        found = draw.choice(list(COUNTS.finditer(text)))
        text = f'{text[: found.start(2)]}{draw.choice(SIZES)}{text[found.end(2) :]}'
    path.write_text(text)
    return found[1]


def bytes_of_a_file(folder: Path, draw: random.Random) -> str:
    path = draw.choice([path for path in folder.iterdir() if path.suffix != '.safetensors'])
    path.write_bytes(_spoiled(path.read_bytes(), draw))
    return path.name


def a_tokenizer(folder: Path, draw: random.Random) -> str:
    """A part of a tokenizer that the library would take, or choke on."""
    path = folder / 'tokenizer.json'
    if not path.exists():
        return a_model_of_sentencepiece(folder, draw)
    said = json.loads(path.read_bytes())
    replace = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'a' * 10}
    text, odd = {'Sequence': {'id': 'A', 'type_id': 0}}, {'SpecialToken': {'id': ESCAPES, 'type_id': 0}}
    template = {'type': 'TemplateProcessing', 'pair': [text], 'special_tokens': {}}
    split = {'type': 'Split', 'behavior': 'Isolated', 'invert': False}
    unigram = draw.choice(([], [['', 0.0]], [['a', 0.0], ['b', -1e308]]))
    pieces = {'continuing_subword_prefix': '##', 'max_input_chars_per_word': 3}
    padding = {'strategy': {'Fixed': 10**9}, 'direction': 'Right', 'pad_id': 0, 'pad_type_id': 0, 'pad_token': 'x'}
    field, value = draw.choice((
        ('normalizer', {'type': 'Sequence', 'normalizers': [replace] * 10}),
        ('normalizer', replace | {'pattern': {'Regex': ''}, 'content': 'b' * 200}),
        ('normalizer', {'type': 'Precompiled', 'precompiled_charsmap': draw.choice(CHARSMAPS)}),
        ('pre_tokenizer', split | {'pattern': {'Regex': draw.choice(('(', '(a+)+$', ''))}}),
        ('model', {'type': 'Unigram', 'vocab': unigram, 'unk_id': draw.choice((0, None, 7))}),
        ('model', {'type': 'WordLevel', 'vocab': {'<s>': 1, 'x': 0}, 'unk_token': 'nope'}),
        ('model', {'type': 'WordPiece', 'vocab': {'<s>': 1, '</s>': 0}, 'unk_token': 'nope'} | pieces),
        ('post_processor', template | {'single': [text, text]}),
        ('post_processor', template | {'single': [odd]}),
        ('decoder', draw.choice((None, {'type': 'Fuse'}, {}, {'type': 'WordPiece'}))),
        ('decoder', {'type': 'Sequence', 'decoders': [{}]}),
        ('truncation', {'direction': 'Right', 'max_length': 0, 'strategy': 'LongestFirst', 'stride': 5}),
        ('padding', padding | {'pad_to_multiple_of': 0}),
        ('added_tokens', [{'id': 0, 'content': draw.choice((ESCAPES, '', '\ud800', 'q' * 2_000_000))}]),
        ('added_tokens', draw.choice((None, {}, [None], [{}], [{'id': 10**9, 'content': 'x', 'special': True}]))),
    ))  # fmt: skip
    said[field] = value
    if draw.random() < 0.3 and isinstance(said.get('model', {}).get('vocab'), dict):
        said['model']['vocab'][draw.choice(('<0xZZ>', ESCAPES, '', 'far'))] = draw.choice(
            (len(said['model']['vocab']), 4_000_000, 2**33, -1)
        )
    path.write_bytes(_text(said, draw))
    return f'{field} {str(value)[:60]}'


def a_model_of_sentencepiece(folder: Path, draw: random.Random) -> str:
    """More pieces, or others, in a file that is no JSON; the lengths in it are right."""
    files = files_of(folder, '.model', '.spm')
    if not files:
        return bytes_of_a_file(folder, draw)
    path = draw.choice(files)
    field = lambda number, content: bytes([number << 3 | 2]) + _varint(len(content)) + content
    text = draw.choice(
        (b'', b'a' * 300, b'a' * 3_000_000, b'\xff', ESCAPES.encode(), b'<0xZZ>', b'</s>', b'\xe2\x96\x81')
    )
    piece = field(1, field(1, text))
    more = draw.choice(
        (piece, piece * 2, field(1, b'') * 500_000, field(3, field(2, b'\4\0\0\0')), field(2, b'\x18\7'))
    )
    path.write_bytes(path.read_bytes() + more)
    return f'{path.name} {text[:20]!r} {len(more)}'


def _varint(number: int) -> bytes:
    found = b''
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def a_header(folder: Path, draw: random.Random) -> str:
    path, header, numbers = _weights(folder, draw)
    return _write_weights(path, _text(_other(json.loads(header), draw), draw), numbers)


def a_shape(folder: Path, draw: random.Random) -> str:
    """A tensor's entry in the header that says what cannot be."""
    path, header, numbers = _weights(folder, draw)
    entries = json.loads(header)
    name = draw.choice([name for name in entries if name != '__metadata__'])
    shape = draw.choice(
        ([2**62] * 400, [2**62] * 100_000, [0, 2**62], [1] * 65 + entries[name]['shape'], [0], [], [2**63], [1] * 40)
    )
    entries[name]['shape'] = shape
    if draw.random() < 0.3:
        entries[draw.choice((ESCAPES, 'n' * 3_000_000, '../x', ''))] = entries.pop(name)
    return _write_weights(path, json.dumps(entries).encode(), numbers)


def bytes_of_a_header(folder: Path, draw: random.Random) -> str:
    path, header, numbers = _weights(folder, draw)
    path.write_bytes(_spoiled(len(header).to_bytes(8, 'little') + header, draw) + numbers)
    return path.name


def the_length_of_a_header(folder: Path, draw: random.Random) -> str:
    path = draw.choice(files_of(folder, '.safetensors'))
    raw = path.read_bytes()
    length = draw.choice((0, 1, 7, 8, 2**31, 2**63, 2**64 - 1, len(raw), len(raw) - 8, 10**8, 10**8 + 1))
    path.write_bytes(length.to_bytes(8, 'little') + raw[8:])
    return f'{path.name} {length}'


def the_length_of_weights(folder: Path, draw: random.Random) -> str:
    path = draw.choice(files_of(folder, '.safetensors'))
    size = path.stat().st_size
    os.truncate(path, draw.choice((draw.randrange(size), size - 1, size + 1, 2**33)))
    return f'{path.name} {size} as {path.stat().st_size}'


def a_number(folder: Path, draw: random.Random) -> str:
    """Other weights: they are what the file now says."""
    path, header, numbers = _weights(folder, draw)
    raw = bytearray(numbers)
    for _ in range(9):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return _write_weights(path, header, bytes(raw))


def an_index(folder: Path, draw: random.Random) -> str:
    names = [path.name for path in files_of(folder, '.safetensors')]
    index = folder / published_folder.INDEX
    if index.exists():
        said = json.loads(index.read_text())['weight_map']
    else:
        names = ['a.safetensors']
        (folder / published_folder.SINGLE).rename(folder / 'a.safetensors')
        _, header, _ = _weights(folder, draw)
        said = {name: 'a.safetensors' for name in json.loads(header) if name != '__metadata__'}
    tensor = draw.choice(list(said))
    lie = draw.choice((
        '../llama/model.safetensors', '/etc/passwd', 'a\0b', '\ud800.safetensors', ESCAPES, '', '.', '..', 'x' * 300,
        'config.json', 'x' * 3_000_000, 'none.safetensors', 5, None, [], names[0], 'a\\b',
    ))  # fmt: skip
    how = draw.randrange(4)
    if how == 0:
        said = dict.fromkeys(said, lie)
    elif how == 1:
        said[tensor] = lie
    elif how == 2:
        said[draw.choice((ESCAPES, 'more', 'm' * 1_000_000))] = said.pop(tensor)
    else:
        said |= {f'tensor {i}': f'{i}.safetensors' for i in range(20_000)}
    index.write_text(json.dumps({'weight_map': said}))
    return f'{how} {str(lie)[:40]!r}'


def the_kind_of_a_file(folder: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(folder.iterdir()))
    how = draw.choice(('folder', 'pipe', 'zero', 'null', 'outside', 'loop', 'nowhere', 'socket', 'empty', 'gone'))
    path.unlink()
    if how == 'folder':
        path.mkdir()
    elif how == 'pipe':
        os.mkfifo(path)
    elif how == 'socket':
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as one, contextlib.chdir(folder):
            one.bind(path.name)
    elif how == 'empty':
        path.touch()
    elif how != 'gone':
        to = {'zero': '/dev/zero', 'null': '/dev/null', 'outside': '/etc/passwd', 'loop': path.name, 'nowhere': 'none'}
        path.symlink_to(to[how])
    return f'{path.name} as {how}'


def a_large_file(folder: Path, draw: random.Random) -> str:
    """Files without blocks on the disk, or few bytes of JSON that take many in memory."""
    name = draw.choice((*[path.name for path in sorted(folder.iterdir())], 'more.txt', 'LICENSE', 'vocab.json'))
    path, how = folder / name, draw.randrange(5)
    if how == 0:
        os.truncate(path, 120_000_000) if path.exists() else path.touch()
    elif how == 1:
        for i in range(200):
            path = folder / f'more{i}.txt'
            path.touch()
            os.truncate(path, 120_000_000)
    else:
        many = draw.choice((3_000_000, 20_000_000))
        content = b'{"a":[' + (b'[],', b'1,', b'{},')[how - 2] * many + b'0]}'
        if path.suffix == '.safetensors':
            content = len(content).to_bytes(8, 'little') + content
        path.write_bytes(content)
    return f'{name} {how}'


def a_deep_or_double_file(folder: Path, draw: random.Random) -> str:
    path = draw.choice(files_of(folder, '.json'))
    text = path.read_text()
    deep = draw.choice((60, 900, 100_000))
    first = next(iter(json.loads(text)), 'x')
    path.write_text(draw.choice((
        '[' * deep, '{"a":' * deep + '1' + '}' * deep, '[' * deep + ']' * deep,
        f'{{{json.dumps(first)}: 3,{text.lstrip()[1:]}', text.replace('{', '{"_x": ' + '9' * 5000 + ', ', 1),
        text.replace('{', '{"_y": ' + '[' * deep + ']' * deep + ',', 1),
        '\ufeff' + text, 'null', '[]', '"x"', '3', '', '{}', text + text, 'NaN',
    )))  # fmt: skip
    return path.name


def a_name(folder: Path, draw: random.Random) -> str:
    """A file whose name troubles a terminal, with nothing else to read instead of it."""
    name = draw.choice((b'\x1b[2J\nerror', b'\xff\xfe', b'\xe2\x80\xae')) + draw.choice(
        (b'.txt', b'.json', b'.bin', b'.safetensors', b'.jinja')
    )
    if draw.random() < 0.7:
        for path in files_of(folder, '.safetensors', '.index.json'):
            path.unlink()
    with open(os.fsencode(folder) + b'/' + name, 'wb') as file:
        file.write(b'{')
    if draw.random() < 0.3:
        more = folder / published_folder.TEMPLATES
        more.mkdir()
        (more / f'{draw.choice(("tool", ESCAPES[:-1], "ü" * 100))}.jinja').write_text(TEMPLATE)
    return repr(name)


WAYS: dict[Callable[[Path, random.Random], str], int] = {
    a_field: 24,
    a_field_of_config: 12,
    a_count: 8,
    bytes_of_a_file: 9,
    a_tokenizer: 11,
    a_header: 8,
    a_shape: 4,
    bytes_of_a_header: 6,
    the_length_of_a_header: 2,
    the_length_of_weights: 3,
    a_number: 3,
    an_index: 5,
    the_kind_of_a_file: 8,
    a_large_file: 2,
    a_deep_or_double_file: 6,
    a_name: 2,
}
