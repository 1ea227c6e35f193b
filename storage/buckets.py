"""Folders that are a prefix in an object store: gs://BUCKET/… and s3://BUCKET/…, read and written through fsspec.

An object store has no folders, no rename and no append: an object is there whole or not at all, and what belongs
together is vouched for by an object that is written last. Whoever reads right after that sees it (Google's store and
Amazon's are consistent).

Credentials and the endpoint are the clients' own matter (AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS …).
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from weft.runtime.errors import MachineError, UserError, shown

EXTRAS = {'gs': 'gcs', 's3': 's3'}  # what pyproject.toml calls the client of a protocol
CONNECTIONS = 16  # objects under way at once
# In the names of what clients raise for want of credentials, or for settings that cannot be.
OF_THE_USER = re.compile('Credential|Profile|SSO|TokenRetrieval|RefreshError|NoRegion|InvalidRegion|ParamValidation')
REFUSED = {400, 401, 403, '400', '401', '403'}  # codes of HTTP
A = TypeVar('A')
B = TypeVar('B')


def at(path: 'str | Path | Bucket') -> 'Path | Bucket':
    """The folder that a path or a URL names. Raises UserError for a URL of no known kind, and where its client is missing."""
    if isinstance(path, Bucket):
        return path
    if isinstance(path, Path) or '://' not in path:
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # the caller's matter
        except (OSError, ValueError) as error:  # a name that is too long, goes in circles or has a NUL in it
            raise UserError(f'{shown(path)}: {getattr(error, "strerror", None) or error}') from None
        return Path(path)
    protocol, _, rest = path.partition('://')
    key = '/'.join(part for part in rest.split('/') if part)
    if protocol not in EXTRAS or not key:
        raise UserError(f'{shown(path)}: a run folder is a local path, gs://BUCKET/… or s3://BUCKET/…')
    _store(protocol)  # a missing client is told before any work
    return Bucket(protocol, key)


@functools.cache
def _store(protocol: str) -> Any:
    try:
        import fsspec

        # Others write too: a listing is never kept.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError:
        raise UserError(f"{protocol}:// needs one more package: pip install -e '.[{EXTRAS[protocol]}]'") from None


@contextlib.contextmanager
def _reaching(url: 'Bucket') -> Iterator[None]:
    """What a client raises, each its own kinds, is one line; that something is not there is the caller's matter.

    UserError for what the user can mend (the bucket's name, credentials, rights), MachineError for all else: it may pass.
    """
    try:
        yield
    except FileNotFoundError as error:
        if 'bucket does not exist' in str(error):
            raise UserError(f'{url}: there is no bucket {url.key.split("/")[0]!r}') from None
        raise
    except (UserError, MachineError):
        raise
    except Exception as error:
        kind = type(error).__name__
        line = f'{url}: {shown(" ".join(str(error).split()) or kind, 400)} ({kind})'
        # A client was refused, or has nothing to say who asks: each says it by kinds, codes and words of its own.
        refused = getattr(error, 'code', None) in REFUSED or str(error).startswith('Forbidden')  # as gcsfs has it
        if isinstance(error, PermissionError) or OF_THE_USER.search(kind) or refused:
            raise UserError(f'{line}; is the bucket right, are there credentials, and may they do this?') from None
        raise MachineError(f'{line}; is the store there, and the network to it?') from None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A prefix of an object store, as a folder; or one object. What `pathlib.Path` has too means what it means there."""

    protocol: str
    key: str  # BUCKET/… without slashes at its ends
    # Called right before each change here or below: what it raises prevents that.
    before_change: Callable[[], None] = dataclasses.field(default=lambda: None, compare=False, repr=False)

    @property
    def store(self) -> Any:
        """The client."""
        return _store(self.protocol)

    def __str__(self) -> str:
        return f'{self.protocol}://{self.key}'

    def __truediv__(self, name: str) -> 'Bucket':
        return dataclasses.replace(self, key=f'{self.key}/{name}')

    @property
    def name(self) -> str:
        return self.key.rpartition('/')[2]

    @property
    def parent(self) -> 'Bucket':
        return dataclasses.replace(self, key=self.key.rpartition('/')[0] or self.key)

    def with_name(self, name: str) -> 'Bucket':
        return self.parent / name

    def exists(self) -> bool:
        """Whether an object of this name or below it is there. UserError where nobody can say."""
        return bool(self.names()) or self.is_file()

    def is_file(self) -> bool:
        with _reaching(self):
            return self.store.isfile(self.key)

    def names(self) -> list[str]:
        """What a listing shows directly below, sorted."""
        try:
            with _reaching(self):
                found = self.store.ls(self.key, detail=False)
        except FileNotFoundError:
            return []
        # Clients write a prefix with or without a slash at its end, and some list an object as its own content.
        names = {path.rstrip('/').rpartition('/')[2] for path in found if path.strip('/') != self.key}
        return sorted(names)

    def files(self) -> dict[str, int]:
        """Every object below, by its path from here, with its size."""
        with _reaching(self):
            found = self.store.find(self.key, detail=True)
        paths = {path.lstrip('/'): entry['size'] for path, entry in found.items() if not path.endswith('/')}
        start = f'{self.key}/'
        return dict(sorted((path[len(start) :], size) for path, size in paths.items() if path.startswith(start)))

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError where it is not there."""
        with _reaching(self):
            return self.store.cat_file(self.key)

    def write_bytes(self, content: bytes) -> None:
        """Whole or not at all."""
        with _reaching(self):
            self.before_change()
            try:
                self.store.pipe_file(self.key, content)
            except FileNotFoundError as error:
                raise UserError(f'{self}: cannot be written: {error}; is there such a bucket?') from None

    def create(self, content: bytes) -> bool:
        """Writes an object that is not there, in one step: False where one is. (Stores that cannot tell write in any case.)"""
        with _reaching(self):
            self.before_change()
            try:
                self.store.pipe_file(self.key, content, mode='create')
            except FileExistsError:
                return False
            except Exception:
                if self.store.isfile(self.key):  # some clients say in their own words that it is there
                    return False
                raise
        return True

    def upload(self, source: Path) -> None:
        """Writes one object from a file."""
        with _reaching(self):
            self.before_change()
            self.store.put_file(str(source), self.key)

    def download(self, target: Path, names: Iterable[str]) -> None:
        """Brings objects from below here into a local folder."""

        def bring(name: str) -> None:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with _reaching(self / name):
                self.store.get_file((self / name).key, str(path))

        at_once(bring, names)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects below here, in any order."""

        def remove(name: str) -> None:
            with _reaching(self / name), contextlib.suppress(FileNotFoundError):
                self.before_change()
                self.store.rm_file((self / name).key)

        at_once(remove, names)

    def copy(self, target: 'Bucket', names: Iterable[str]) -> None:
        """Copies objects below here, in any order, without bringing them here."""

        def copy(name: str) -> None:
            with _reaching(self / name):
                target.before_change()
                self.store.cp_file((self / name).key, (target / name).key)

        at_once(copy, names)


def at_once(work: Callable[[A], B], arguments: Iterable[A], workers: int = CONNECTIONS) -> list[B]:
    """`work` on each argument, some at a time; the first error, if any, when all have ended."""
    with ThreadPoolExecutor(workers, 'bucket') as pool:
        futures = [pool.submit(work, argument) for argument in arguments]
    return [future.result() for future in futures]
