"""Weft's packages have plain names, which a folder of one's own may have too: `data`, `model`. What hides one is named."""

import importlib.util
import sys
from pathlib import Path

ROOMS = ('analysis', 'data', 'decoding', 'model', 'sharding', 'storage', 'training')


def check_rooms() -> None:
    """Raises ImportError where Python takes something else for one of Weft's packages."""
    root = Path(__file__).resolve().parents[1]
    for room in ROOMS:
        loaded, spec = sys.modules.get(room), None
        if loaded is None:
            spec = importlib.util.find_spec(room)
        where = getattr(loaded, '__file__', None) if loaded else getattr(spec, 'origin', None)
        if where is None or root != Path(where).resolve().parents[1]:
            folders = getattr(loaded, '__path__', None) or getattr(spec, 'submodule_search_locations', None)
            raise ImportError(
                f'{room} is {where or list(folders or [])}, which hides the {room} of Weft in {root}: start Python in another '
                f'folder, or with -P, with which it does not look into its own, or put {root} first on sys.path'
            )
