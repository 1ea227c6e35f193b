"""What an imported run's published files say of its use: how many tokens a row may have, and whatever else is asked for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sharding.buckets import Bucket
from training.config import RECORD, RunConfig

SOURCE = 'source'  # an imported run's folder of the published files
POSITIONS = ('max_position_embeddings', 'n_positions', 'n_ctx')


def context(run: Path | Bucket, config: RunConfig) -> int:
    """The most tokens of a row: as a run was trained with, or of an imported one as its publisher says, whichever is more."""
    trained = config.training.sequence_length
    if not (run / RECORD).is_file():
        return trained
    return max(trained, context_of(json.loads((run / SOURCE / 'config.json').read_bytes())) or 0)


def context_of(published: Mapping[str, Any]) -> int | None:
    """Tokens that a published model's row may have, where its config.json says it."""
    return next((published[field] for field in POSITIONS if isinstance(published.get(field), int)), None)


def published_files(run: Path | Bucket, wanted: Callable[[str], object] = bool) -> dict[str, bytes]:
    """The published files beside the weights, as an imported run keeps them, by their paths in the folder; none of another.

    `wanted` says of such a path whether it is.
    """
    if not (run / RECORD).is_file():
        return {}
    source = run / SOURCE
    if isinstance(source, Bucket):
        names = list(source.files())
    else:
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob('*')) if path.is_file()]
    return {name: (source / name).read_bytes() for name in names if wanted(name)}
