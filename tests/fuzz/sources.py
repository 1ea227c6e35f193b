"""Odd texts, folders and configs: each is read as what it is, or one line says why not.

A text comes out of a file exactly, whatever the file is called and however it is packed; what was spoiled is refused, or read
where nothing tells that it was. A folder's files are each read once, whatever links there are. A config that is read is the
same after it was written and read again.
"""

import bz2
import gzip
import json
import lzma
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import zstandard

from tests.fuzz import Case, rng
from weft.data.pairs import Pair, read_pairs
from weft.data.sources import texts
from weft.data.walk import LeftOut
from weft.inference.questions import read_prompts_file
from weft.runtime.errors import UserError
from weft.training.config import RunConfig, dump, parse
from weft.training.overrides import keys

NAME, COUNT, QUICK, SECONDS, IN_PROCESS = 'sources', 300, 200, 10.0, True
LONGEST = 700  # characters of a message, without the folder's own name


def cases(seed: int, count: int) -> Iterator[Case]:
    for number in range(count):
        draw = rng(seed, number, NAME)
        way = draw.choices([_texts, _pairs, _prompts, _folder, _config, _overrides], [8, 2, 2, 2, 4, 2])[0]
        yield Case(number, way.__name__.strip('_'), (way, draw))


def check(case: Case, scratch: Path) -> str | None:
    way, draw = case.content
    try:
        return way(random.Random(draw.getrandbits(64)), scratch)
    except UserError as error:
        return _wrong_with(str(error), scratch)


def _wrong_with(message: str, scratch: Path) -> str | None:
    plain = message.replace(str(scratch), '')
    if not message.isprintable():
        return f'a message of several lines, or with control characters: {message!r}'
    if len(plain) > LONGEST:
        return f'a message of {len(plain)} characters: {message[:200]}…'
    return None


# What texts are made of.
PIECES = [
    *(
        'a',
        'word ',
        ' ',
        '\n',
        '\r\n',
        '\r',
        '\t',
        'é',
        '文字',
        '😀',
        '\u2028',
        '\x85',
        '\0',
        '\x1b[2J',
        '\ufeff',
        '\ufffe',
    ),
    *('{', '[', '"', '\\', '}', ']', 'PAR1', 'BZh9', '%PDF', '# x\n', '<|endoftext|>', '</s>', 'x' * 500, '1' * 50),
]
PACKINGS = {
    '': bytes, 'gz': gzip.compress, 'zst': zstandard.compress, 'xz': lambda data: lzma.compress(data, preset=0),
    'bz2': lambda data: bz2.compress(data, 1),
}  # fmt: skip
ENDINGS = {
    '': [''],
    'gz': ['.gz', '.GZ', ''],
    'zst': ['.zst', '.zstd', '.ZST', ''],
    'xz': ['.xz', ''],
    'bz2': ['.bz2', ''],
}
MARK = b'\xef\xbb\xbf'


def _text(draw: random.Random, most: int = 30) -> str:
    return ''.join(draw.choice(PIECES) for _ in range(draw.randint(1, most)))


def _packed(draw: random.Random, path: Path, data: bytes) -> tuple[Path, bytes]:
    """The bytes, some of them packed, and a name that may or may not say so."""
    kind = draw.choice(list(PACKINGS))
    parts = [data]
    if kind and draw.random() < 0.3:
        at = draw.randint(0, len(data))
        parts = [data[:at], data[at:]]
    return path.with_name(path.name + draw.choice(ENDINGS[kind])), b''.join(map(PACKINGS[kind], parts))


def _spoiled(draw: random.Random, data: bytes) -> bytes:
    """The bytes after something has gone wrong with them."""
    at, way = draw.randrange(len(data) + 1), draw.randrange(8)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + draw.randbytes(draw.randint(1, 40)) + data[at:]
    if way == 2:
        return data[:at] + draw.randbytes(min(8, len(data) - at)) + data[at + 8 :]
    if way == 3:
        return gzip.compress(data)
    if way == 4:
        return data.decode('utf-8', 'replace').encode(
            draw.choice(['utf-16', 'utf-16-le', 'utf-32', 'latin-1']), 'replace'
        )
    if way == 5:
        return data + draw.choice(
            [b'\0' * 100, b'[' * 50_000, b'{"a":' * 20_000, b'9' * 6000, b'\xff', b',', b']', b'"']
        )
    if way == 6:
        return (
            draw.choice([b'[' * 50_000, b'PAR1', b'PK\x03\x04', b'\x93NUMPY', b'\xff\xfe', b'\x1f\x8b', b'BZh91AY&SY'])
            + data
        )
    return draw.choice(list(PACKINGS.values()))(bytes(draw.choice([1 << 12, 1 << 24])))


def _texts(draw: random.Random, scratch: Path) -> str | None:
    """Documents in one file, plain or of JSON."""
    wanted = [_text(draw) for _ in range(draw.randint(1, 8))]
    shape = draw.choice(['plain', 'lines', 'lines', 'array'])
    objects = [{draw.choice('nmk'): draw.choice([1, None, [], {'text': 7}, -1e9]), 'text': text} for text in wanted]
    if shape == 'plain':
        wanted, ending = wanted[:1], draw.choice(['.txt', '.md', '.py', '.TXT', '.csv', '.x'])
        data = wanted[0].encode()
    elif shape == 'lines':
        ending = draw.choice(['.jsonl', '.JSONL', '.ndjson', '.jsonlines', '.jl', '.json', ''])
        between = draw.choice(['\n', '\r\n', '\n\n', '\n \n'])
        data = between.join(json.dumps(one, ensure_ascii=draw.random() < 0.5) for one in objects).encode()
    else:
        ending = draw.choice(['.json', '.JSON'])
        data = json.dumps(objects, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1])).encode()
    marked = draw.random() < 0.2
    data = MARK + data if marked else data
    spoiled = draw.random() < 0.5
    if spoiled and draw.random() < 0.5:
        data = _spoiled(draw, data)
    path, data = _packed(draw, scratch / f'a{ending}', data)
    if spoiled and draw.random() < 0.5:
        data = _spoiled(draw, data)
    path.write_bytes(data)
    try:
        found = [text for _, text in texts([str(path)])]
    except UserError as error:
        if fault := _wrong_with(str(error), scratch):
            return fault
        # Plain text may begin as another file does, or look like another encoding.
        may = (
            spoiled
            or (shape == 'plain' and wanted[0].startswith(('PAR1', 'BZh9', '%PDF', '\ufeff')))
            or '\0' in wanted[0]
        )
        return None if may else f'{path.name}: refused: {error}'
    if shape == 'plain' and not marked:
        wanted = [wanted[0].removeprefix('\ufeff')]
    return (
        None
        if spoiled or found == [text for text in wanted if text]
        else f'{path.name}: {found!r:.200} for {wanted!r:.200}'
    )


def _pairs(draw: random.Random, scratch: Path) -> str | None:
    """Pairs for an encoder–decoder."""
    letters = ['a', 'é', ' ', '\r', '文', '"', '\u2028']
    word = lambda: 'x' + ''.join(draw.choice(letters) for _ in range(draw.randint(0, 9))) + 'x'
    wanted = [Pair(word(), word()) for _ in range(draw.randint(1, 20))]
    if draw.random() < 0.5:
        data, ending = '\n'.join('\t'.join(pair) for pair in wanted), draw.choice(['.tsv', '.TSV', ''])
    else:
        data, ending = '\n'.join(json.dumps(pair._asdict()) for pair in wanted), draw.choice(['.jsonl', '.json', ''])
    content = data.replace('\n', draw.choice(['\n', '\r\n', '\n\n'])).encode()
    spoiled = draw.random() < 0.5
    path, content = _packed(draw, scratch / f'a{ending}', _spoiled(draw, content) if spoiled else content)
    path.write_bytes(content)
    try:
        found = list(read_pairs([str(path)], '--data'))
    except UserError as error:
        return _wrong_with(str(error), scratch) or (None if spoiled else f'{path.name}: refused: {error}')
    return None if spoiled or found == wanted else f'{path.name}: {found!r:.200} for {wanted!r:.200}'


def _prompts(draw: random.Random, scratch: Path) -> str | None:
    """A file of prompts."""
    wanted = ['x' + _text(draw, 6) for _ in range(draw.randint(1, 6))]
    if draw.random() < 0.5:
        wanted = [prompt.replace('\n', ' ').rstrip('\r') for prompt in wanted]
        data, ending = '\n'.join(wanted), '.txt'
    else:
        data, ending = (
            '\n'.join(json.dumps({'prompt': prompt, 'id': 3}) for prompt in wanted),
            draw.choice(['.jsonl', '.json', '']),
        )
    spoiled = draw.random() < 0.5
    path = scratch / f'a{ending}'
    path.write_bytes(_spoiled(draw, data.encode()) if spoiled else data.encode())
    try:
        found = [question.prompt for question in read_prompts_file(str(path))]
    except UserError as error:
        may = spoiled or '\0' in data
        return _wrong_with(str(error), scratch) or (None if may else f'{path.name}: refused: {error}')
    return None if spoiled or found == wanted else f'{path.name}: {found!r:.200} for {wanted!r:.200}'


def _folder(draw: random.Random, scratch: Path) -> str | None:
    """A tree of folders with links, pipes, sockets and names of any bytes."""
    root = os.fsencode(scratch) + b'/tree'
    os.mkdir(root)
    folders = [root]
    for number in range(draw.randint(3, 25)):
        name = (
            draw.choice([b'a', b'b c', b'\xff', '文'.encode(), b'.h', b'[x]', b'*', b'n\nl', b'-x', b'\x1b[2J'])
            + b'%d' % number
        )
        place, way = draw.choice(folders) + b'/' + name, draw.randrange(9)
        if way < 3:
            with open(place, 'wb') as file:
                file.write(b'text %d' % number if way else b'')
        elif way < 5:
            os.mkdir(place)
            folders.append(place)
        elif way < 7:
            os.symlink(draw.choice([*folders, b'nowhere', name, b'..', b'.']), place)
        elif way == 7:
            os.mkfifo(place)
        else:
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                os.chdir(os.path.dirname(place))
                try:
                    server.bind(name)
                finally:
                    os.chdir(here)
    wanted = _reachable(root, root)
    left_out: list[LeftOut] = []
    asked = draw.choice(['tree', 'tree', 'tree/**', 'tree/**/*'])
    try:
        found = [text for _, text in texts([f'{scratch}/{asked}'], skipped=left_out)]
    except UserError as error:
        return _wrong_with(str(error), scratch) or (f'refused: {error}' if wanted else None)
    return None if sorted(found) == sorted(wanted) else f'{asked}: {sorted(found)} for {sorted(wanted)}'


def _reachable(root: bytes, top: bytes) -> list[str]:
    """The texts of all files that are reached without a hidden name, each once."""
    seen, queue, found = set[bytes](), [top], dict[bytes, str]()
    while queue:
        folder = queue.pop()
        if (here := os.path.realpath(folder)) in seen:
            continue
        seen.add(here)
        for name in os.listdir(folder):
            path = folder + b'/' + name
            if name.startswith(b'.'):
                continue
            if os.path.isdir(path):
                queue.append(path)
            elif os.path.isfile(path) and (content := Path(os.fsdecode(path)).read_text()):
                found[os.path.realpath(path)] = content
    return list(found.values())


BASE = """name: tiny
seed: 3
model: {layers: 2, model_dim: 64, attention: {heads: 4}, mlp: {dim: 128}}
data:
  source: [a.txt, 'b*.txt']
  vocabulary: 400
training:
  steps: 2
  batch: 4
  sequence_length: 64
optimizer:
  learning_rate: 1e-3
"""
SIGNS = [
    *(
        '&a ',
        '*a',
        '!!int ',
        '!x ',
        '[',
        ']',
        '{',
        '}',
        ': ',
        ', ',
        '- ',
        '? ',
        '# ',
        '|\n',
        '>\n',
        '---\n',
        '...\n',
        '%YAML 1.2\n',
    ),
    *(
        "'",
        '"',
        '\t',
        '\n',
        '  ',
        '\0',
        '\x1b',
        '\ufeff',
        '\x85',
        '\u2028',
        '~',
        'é',
        '\\ud800',
        '@',
        '`',
        '=',
        '<<: ',
        'yes',
    ),
    *(
        '010',
        '1:30',
        '2020-13-45',
        '0x_',
        '9' * 5000,
        '.nan',
        '1e999',
        'name: x\n',
        'training: {}\n',
        '[' * 3000,
        '{a: ' * 500,
    ),
]


def _config(draw: random.Random, scratch: Path) -> str | None:
    """The text of a config with other signs in it."""
    text = draw.choice([BASE, BASE, '', dump(parse(BASE, 'base'))])
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(text) + 1)
        end = at + draw.choice([0, 0, 0, 1, 5, 30])
        text = text[:at] + draw.choice(SIGNS) + text[end:]
    content: str | bytes = text
    if draw.random() < 0.3:
        content = _spoiled(draw, text.encode())[: 1 << 20]
    config = parse(content, f'{scratch}/a.yaml')
    return (
        None if parse(dump(config), 'again') == config else f'not the same when written and read again: {text!r:.300}'
    )


def _overrides(draw: random.Random, scratch: Path) -> str | None:
    """Overrides of any key by any value: text is kept as it is."""
    known = list(keys(RunConfig))
    values = [
        *SIGNS,
        '1',
        '0',
        '-1',
        '1.5',
        'true',
        'null',
        '',
        'a b',
        '*.txt',
        '[a, b]',
        '{}',
        '\udcff',
        str(2**70),
        'x' * 10_000,
    ]
    overrides = []
    for _ in range(draw.randint(1, 4)):
        key = draw.choice(known)
        key = draw.choice([key, key, key[:-1], key + 's', key.replace('.', '..'), key + '.x', '', '\x1b', 'a' * 5000])
        overrides.append(key + draw.choice(['=', '=', '=', '', '==']) + draw.choice(values))
    if draw.random() < 0.4:
        text = draw.choice(
            [value for value in values if value and value != 'null' and not value.startswith('[') and value != '\udcff']
        )
        found = parse(BASE, 'a.yaml', [f'data.source={text}'])
        again = parse(dump(found), 'again')
        return (
            None
            if found.data.source == again.data.source == text
            else f'data.source={text!r:.100} became {found.data.source!r:.100}'
        )
    config = parse(BASE, f'{scratch}/a.yaml', overrides)
    return (
        None
        if parse(dump(config), 'again') == config
        else f'not the same when written and read again: {overrides!r:.300}'
    )
