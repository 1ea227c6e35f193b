"""What an imported run's published files say of its use: how many tokens a row may have, and whatever else is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weft.runtime.errors import UserError, shown
from weft.storage import files as disk
from weft.storage.buckets import Bucket
from weft.storage.foreign import read_object
from weft.training.config import RECORD, RunConfig

SOURCE = 'source'  # an imported run's folder of the published files
MOST = 2**28  # bytes of a published file beside the weights
POSITIONS = ('max_position_embeddings', 'n_positions', 'n_ctx')


def context(run: Path | Bucket, config: RunConfig) -> int:
    """The most tokens of a row: as a run was trained with, or of an imported one as its publisher says, whichever is more."""
    trained = config.training.sequence_length
    if not (run / RECORD).is_file():
        return trained
    return max(trained, context_of(published_config(run)) or 0)


def published_config(run: Path | Bucket) -> dict[str, Any]:
    """An imported run's config.json, as it was published."""
    return object_of(run / SOURCE / 'config.json')


def context_of(published: Mapping[str, Any]) -> int | None:
    """Tokens that a published model's row may have, where its config.json says it."""
    return next((published[field] for field in POSITIONS if type(published.get(field)) is int), None)


def object_of(path: Path | Bucket) -> dict[str, Any]:
    """The JSON object of a file that an import wrote. Raises UserError where it is missing or damaged."""
    mend = 'restore it from a copy, or import the model again'
    try:
        return read_object(content_of(path), shown(path))
    except FileNotFoundError:
        raise UserError(f'{shown(path)}: is missing; {mend}') from None
    except UserError as error:
        raise UserError(f'{error}; {mend}') from None


def content_of(path: Path | Bucket) -> bytes:
    return path.read_bytes() if isinstance(path, Bucket) else disk.read(path, MOST)


def published_files(run: Path | Bucket, wanted: Callable[[str], object] = bool) -> dict[str, bytes]:
    """An imported run's published files beside the weights, by path, that are `wanted`; none of another run."""
    if not (run / RECORD).is_file():
        return {}
    source = run / SOURCE
    if isinstance(source, Bucket):
        names = list(source.files())
    else:
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob('*')) if path.is_file()]
    return {name: content_of(source / name) for name in names if wanted(name)}
