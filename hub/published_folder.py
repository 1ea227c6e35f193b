"""The files of a published folder: config.json, weights by their headers, and what stands beside them, within bounds.

Nothing in a folder is ever run or unpickled, and no name in it leads out of it.
"""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.hub import gguf, tensor_files
from weft.hub.tensor_files import Stored
from weft.runtime.errors import UserError, shown
from weft.storage.foreign import read_file, read_object, shown_path

CONFIG, SINGLE, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
PICKLED = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
FOREIGN = ('.msgpack', '.h5', '.onnx', '.npz')
# Files that are kept beside the weights.
SIDE = re.compile(r'[\w.-]+\.(json|jinja|txt|model|spm|tiktoken)|LICENSE[\w.-]*|NOTICE[\w.-]*')
POOLING = re.compile(r'\d_.*', re.DOTALL)  # folders of sentence-transformers with a config.json each
TEMPLATES = 'additional_chat_templates'  # the folder of those beside the first one
ON_HUB = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')  # as models are called there: Qwen/Qwen3-8B
# What is read of a model besides its weights: how texts become tokens, prompts are written, tokens drawn and vectors pooled.
NEEDED = re.compile(
    r'(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|generation_config|chat_template|modules)\.json'
    rf'|chat_template\.jinja|{TEMPLATES}/.*|\d_.*/config\.json',
    re.DOTALL,
)
TOKENIZER = 'tokenizer.json'
TOKENIZERS = re.compile(r'vocab\.json|merges\.txt|tekken\.json|.+\.(model|spm|tiktoken)')  # needed without TOKENIZER
LARGEST_CONFIG = 2**23  # bytes, of which known ones have some thousands
MOST_CONFIG_VALUES = 2**19
LARGEST_INDEX = 2**26  # bytes; of 90,000 tensors one has 9 million
MOST_INDEX_VALUES = 2**20  # tensors
MOST_FILES = 2**12  # of weights; the largest models have some 200
LARGEST_SIDE = 2**26  # bytes of one file beside the weights; tokenizers of 262,144 tokens have 33 million
LARGEST_SIDES = 2**27  # bytes of all of these
MOST_SIDES = 2**10


def config_of(folder: Path) -> dict[str, Any]:
    where = shown_path(folder)
    try:
        kind = stat.S_IFMT(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = 0
    except OSError as error:
        raise UserError(f'{where}: cannot be read: {error.strerror}') from None
    if kind not in (0, stat.S_IFDIR):
        raise UserError(
            f'{where}: is a file, and no GGUF file; a published model is such a file, or a folder with {CONFIG}'
        )
    if not kind:
        if ON_HUB.fullmatch(str(folder)):
            raise UserError(
                f'{folder}: there is no such folder; if it is a model of the Hugging Face hub, fetch it first: '
                f'hf download {folder} --local-dir {folder.name}, and import {folder.name}'
            )
        raise UserError(
            f'{where}: there is no such folder; a published model is a folder with {CONFIG} and *.safetensors, or a GGUF file'
        )
    if CONFIG not in names_in(folder):
        raise UserError(f'{where}: has no {CONFIG}: not a published model')
    path = inside(folder, CONFIG)
    return read_object(read_file(path, LARGEST_CONFIG), shown_path(path), MOST_CONFIG_VALUES)


def names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f'{shown_path(folder)}: cannot be read: {error.strerror}') from None


def inside(folder: Path, name: str, below: str = '') -> Path:
    """A file of a folder, or of one `below` it. Raises UserError where the name leads out of it, or nowhere.

    Links may lead within the folder, and from a snapshot of the hub's cache to the cache's own files.
    """
    path = folder / below / name
    try:
        plain = name not in ('', '.', '..') and not set(name) & set('/\\\0') and len(name.encode()) <= 255
    except UnicodeEncodeError:
        plain = False
    if not plain:
        raise UserError(
            f'{shown_path(folder)}: {shown(name, 100, quoted=True)} is not the name of a file in this folder'
        )
    try:
        real, root = path.resolve(strict=True), folder.resolve()
    except FileNotFoundError:
        raise UserError(f'{shown_path(path)}: is missing') from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        raise UserError(
            f'{shown_path(path)}: cannot be read: {getattr(error, "strerror", "a link to itself")}'
        ) from None
    rooms = [root]
    if root.parent.name == 'snapshots':
        rooms.append(root.parents[1] / 'blobs')
    if not any(real.is_relative_to(room) for room in rooms):
        raise UserError(
            f'{shown_path(path)}: is a link that leaves the folder, to {shown_path(real)}; put the file itself there'
        )
    return path


def all_stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's weights."""
    names = names_in(folder)
    if SINGLE in names:
        return tensor_files.header(inside(folder, SINGLE))
    if INDEX not in names:
        raise UserError(_no_weights(folder, names))
    index = shown_path(folder / INDEX)
    said = read_object(read_file(inside(folder, INDEX), LARGEST_INDEX), index, MOST_INDEX_VALUES)
    where = said.get('weight_map')
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()) or not where:
        raise UserError(f'{index}: must have a weight_map, of tensors to files')
    several = sorted(set(where.values()))
    if len(several) > MOST_FILES:
        raise UserError(f'{index}: names {len(several)} files: at most {MOST_FILES} are read')
    files = {name: tensor_files.header(inside(folder, name)) for name in several}
    found: dict[str, Stored] = {}
    for file, entries in files.items():
        for name, stored in entries.items():
            if name in found:
                raise UserError(
                    f'{shown_path(folder)}: tensor {name} is in both {shown(found[name].path.name, 60)} and {shown(file, 60)}'
                )
            if name not in where:
                raise UserError(f'{shown_path(folder / file)}: has tensor {name}, which {INDEX} does not list')
            found[name] = stored
    for name, file in where.items():
        if name not in found or found[name].path.name != file:
            raise UserError(
                f'{index}: says that tensor {shown(name, 100)} is in {shown(file, 100)}, which does not have it'
            )
    return found


def _no_weights(folder: Path, names: Sequence[str]) -> str:
    for name in names:
        where = shown_path(folder / name)
        if name.endswith(PICKLED):
            return (
                f'{where}: pickled weights can run any code, and are not read; take the revision that has '
                '*.safetensors, or load them in transformers where you trust them, and model.save_pretrained(FOLDER)'
            )
        if name.endswith(gguf.SUFFIX):
            return f'{where}: is a GGUF file, and the folder has no *.safetensors: import the file itself'
        if name.endswith(FOREIGN):
            return f'{where}: weights in this format are not read; take the revision that has *.safetensors'
    others = ', '.join([shown(name, 60) for name in names if name.endswith('.safetensors')][:3])
    return f'{shown_path(folder)}: has neither {SINGLE} nor {INDEX}' + (f'; it has {others}' if others else '')


def side_files(folder: Path, left_out: list[str] | None = None) -> dict[str, bytes]:
    """What stands beside the weights and is kept: configs, tokenizers, chat templates, licences. No code, no pickles.

    By its path: what sentence-transformers says of pooling stands in 1_Pooling/config.json, chat templates beside the first one
    in TEMPLATES. What nothing is read of and is no file, or too large, is not kept: `left_out` gets a line for each. Raises
    UserError where something is read of it, and for more than LARGEST_SIDES bytes before all are read.
    """
    paths = [folder / name for name in names_in(folder)]
    several = folder / TOKENIZER not in paths  # kinds of tokenizers that it may have
    pooling = [path for path in paths if POOLING.fullmatch(path.name) and os.path.isdir(path)]
    paths += [path / CONFIG for path in pooling if CONFIG in names_in(path)]
    if os.path.isdir(folder / TEMPLATES):
        paths += [folder / TEMPLATES / name for name in names_in(folder / TEMPLATES) if name.endswith('.jinja')]
    found: dict[str, bytes] = {}
    size = 0
    for path in sorted(paths):
        if not SIDE.fullmatch(path.name) or path.name.endswith('.index.json'):
            continue
        if path.name.startswith(('LICENSE', 'NOTICE')) and os.path.isdir(path):  # a folder of licences
            continue
        below = path.relative_to(folder)
        try:
            content = read_file(inside(folder, path.name, below.parent.name), LARGEST_SIDE)
        except UserError as error:
            if NEEDED.fullmatch(below.as_posix()) or (several and TOKENIZERS.fullmatch(below.as_posix())):
                raise
            if left_out is not None:
                left_out.append(f'left out: {error}')
            continue
        found[below.as_posix()] = content
        size += len(content)
        if size > LARGEST_SIDES or len(found) > MOST_SIDES:
            raise UserError(
                f'{shown_path(folder)}: has more than {LARGEST_SIDES} bytes, or {MOST_SIDES} files, beside the weights, the '
                f'most that is read, at {shown(below, 100)}; move what the model does not need out of the folder'
            )
    return found
