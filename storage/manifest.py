"""What stands in a checkpoint's manifest.json: each file with its size and SHA-256, each array with its dtype and shape."""

import hashlib
import json
import os
import resource
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from weft.storage import files as disk

MANIFEST = 'manifest.json'
META = 'meta.json'
SHARDS = 'shards'  # the manifest's format where the arrays are as in storage/shards.py; where Orbax wrote it says none


def contents(items: Mapping[str, Any], meta: dict[str, Any], files: Mapping[str, bytes] | None) -> dict[str, bytes]:
    """The files of a checkpoint beside its items and its manifest."""
    files = {META: (json.dumps(meta, indent=1) + '\n').encode(), **(files or {})}
    taken = {MANIFEST, *items}
    assert all(name not in taken and Path(name).name == name for name in files), (list(files), taken)
    return files


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths, as in `groups/0/mlp/up/w_IO`, in the tree's order."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator='/'): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert len(leaves) == len(jax.tree.leaves(tree)), 'two leaves of one path'
    return leaves


def array_kinds(items: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Dtype and shape of each array, by item and name."""
    return {item: {name: kind_of(x) for name, x in leaves_by_path(tree).items()} for item, tree in items.items()}


def kind_of(x: Any) -> str:
    """Dtype and shape, as in `float32[4, 8]`."""
    return f'{x.dtype}{list(x.shape)}'


def is_step(name: str) -> bool:
    """Whether a checkpoint may have this name."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def files_below(path: Path) -> list[str]:
    """Everything below a folder that is no folder, by its path from there, sorted."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob('*') if not file.is_dir())


def size_of(path: Path) -> int | None:
    """Of a regular file, or of one that a link leads to."""
    try:
        found = path.stat()
    except (OSError, RuntimeError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise  # it went meanwhile
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def open_files() -> int:
    """How many files of a checkpoint may be open at once; 0 where open files have no names."""
    if not Path('/proc/self/fd').is_dir():
        return 0
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def fingerprint(path: Path) -> list[Any]:
    """Size in bytes and SHA-256 of a file."""
    with disk.reading(path) as descriptor, os.fdopen(os.dup(descriptor), 'rb') as file:
        return [os.fstat(descriptor).st_size, hashlib.file_digest(file, 'sha256').hexdigest()]


def is_manifest(fields: dict[str, Any]) -> bool:
    """Whether a manifest has what is read of it: dtype and shape of arrays, size and hash of files in the folder."""
    arrays, files, form = fields.get('arrays'), fields.get('files'), fields.get('format')
    return (
        (form is None or form == SHARDS)
        and isinstance(arrays, dict)
        and all(
            isinstance(item, dict) and all(isinstance(kind, str) for kind in item.values()) for item in arrays.values()
        )
        and isinstance(files, dict)
        and META in files
        and all(
            not Path(name).is_absolute()
            and not {'', '.', '..'} & set(name.split('/'))
            and isinstance(entry, list)
            and [type(value) for value in entry] == [int, str]
            for name, entry in files.items()
        )
        # What Orbax has written it cannot read without this file.
        and (form == SHARDS or all(f'{item}/_METADATA' in files for item, found in arrays.items() if found))
    )
