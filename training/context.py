"""How many tokens a row of a run may have, where the run is imported too."""

import json
from collections.abc import Mapping
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
