"""JSON objects that carry their own hash, so that one changed by a disk or a hand is told from one that was written."""

import hashlib
import json
from typing import Any

from weft.storage.foreign import read_own_object


def sealed(fields: dict[str, Any]) -> bytes:
    """The content of a file of these fields and their hash."""
    return (json.dumps({**fields, 'sha256': _sha256(fields)}, indent=1) + '\n').encode()


def unsealed(content: bytes, needs_seal: bool = True) -> dict[str, Any]:
    """The fields of such a file. Raises ValueError, with what is wrong, for any other.

    Without `needs_seal` one that has no hash is taken as it is.
    """
    fields = read_own_object(content)
    if 'sha256' not in fields and not needs_seal:
        return fields
    if fields.pop('sha256', None) != _sha256(fields):
        raise ValueError('its SHA-256 is not that of what it says')
    return fields


def _sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
