"""JSON objects that carry their own hash, so that one changed by a disk or a hand is told from one that was written."""

import hashlib
import json
from typing import Any

DEEP = 'lists or objects stand within each other too deep'
MOST_VALUES = 2**22  # lists, objects and commas of a file: each value is an object of Python's


def sealed(fields: dict[str, Any]) -> bytes:
    """The content of a file of these fields and their hash."""
    return (json.dumps({**fields, 'sha256': _sha256(fields)}, indent=1) + '\n').encode()


def unsealed(content: bytes, needs_seal: bool = True) -> dict[str, Any]:
    """The fields of such a file. Raises ValueError, with what is wrong, for any other.

    Without `needs_seal` one that has no hash is taken as it is.
    """
    fields = read_object(content)
    if 'sha256' not in fields and not needs_seal:
        return fields
    if fields.pop('sha256', None) != _sha256(fields):
        raise ValueError('altered')
    return fields


def read_object(content: bytes) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError, with what is wrong, for what is none or would fill the memory."""
    if sum(map(content.count, (b',', b'[', b'{'))) > MOST_VALUES:
        raise ValueError(f'it has more than {MOST_VALUES} values')
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError(DEEP) from None
    if not isinstance(found, dict):
        raise ValueError('it is no JSON object')
    return found


def _sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
