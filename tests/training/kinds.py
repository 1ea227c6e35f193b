"""What may stand where a file or folder of a run is to be."""

import os
import shutil
from pathlib import Path


def put(path: Path, kind: str) -> None:
    """Something else in a file's or folder's place."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match kind:
        case 'folder':
            path.mkdir()
        case 'file':
            path.write_text('x')
        case 'fifo':
            os.mkfifo(path)
        case 'loop':
            path.symlink_to(path.name)
        case 'nowhere':
            path.symlink_to('nowhere')
        case 'device':
            path.symlink_to('/dev/zero')
