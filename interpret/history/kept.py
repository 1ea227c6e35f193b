"""Figures of pieces of work, kept with a hash of what they come from: a run that was killed goes on at its next piece."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from weft.proof.code_hash import code_hash
from weft.runtime.errors import UserError, shown
from weft.storage.files import make_folder, read, write

ROOT = Path(__file__).parents[2]
MOST = 2**26  # bytes of a piece's figures


@functools.cache
def hash_of(code: tuple[str, ...]) -> str:
    """Of files and folders of code as they are when it is first asked for: what this process runs does not change later."""
    return code_hash(ROOT / name for name in code)


class Kept:
    """A folder of figures, NAME.json each; those of another config or other code are not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, config: Any, code: tuple[str, ...]) -> str:
        """16 hex digits of what a piece is made from: plain values, and files and folders of code."""
        return hashlib.sha256(json.dumps([config, hash_of(code)], sort_keys=True).encode()).hexdigest()[:16]

    def find(self, name: str, key: str) -> dict[str, Any] | None:
        """A piece's figures where they are there and of this key. Raises UserError for a file that is no figures."""
        path = self.folder / f'{name}.json'
        try:
            content = read(path, MOST)
        except FileNotFoundError:
            return None
        try:
            found = json.loads(content)
            return found['figures'] if found['key'] == key else None
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f'{shown(path)}: no figures of a piece; take the file away, and they are computed anew'
            ) from None

    def put(self, name: str, key: str, figures: dict[str, Any]) -> dict[str, Any]:
        """Keeps a piece's figures, whole or not at all, and gives them as `find` will."""
        content = json.dumps({'key': key, 'figures': figures}, allow_nan=False)
        make_folder(self.folder)
        write(self.folder / f'{name}.json', content.encode())
        return dict(json.loads(content)['figures'])
