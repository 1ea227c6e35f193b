"""Checkpoints in an object store, which has no rename: a checkpoint is there from the moment its manifest is, written last.

    gs://BUCKET/runs/NAME/checkpoints/
      40/model/ optimizer/ …   the items, each array as its shards (see storage/shards.py): every process writes its own
      40/meta.json …           as in a local folder
      40/manifest.json         last; a folder without it is no checkpoint: what a kill left, which the next save clears

Orbax is not used here: it has no s3://, and where it writes gs:// it wants one more set of credentials and publishes by
a marker of its own. A local folder reads this form too, and a bucket Orbax' form: a run may be copied either way.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from weft.runtime import rendezvous as peers
from weft.storage import shards
from weft.storage.buckets import CONNECTIONS, Bucket, at_once
from weft.storage.checkpoint import Checkpoints
from weft.storage.lock import Lock
from weft.storage.manifest import MANIFEST, SHARDS, array_kinds, contents, is_step, leaves_by_path
from weft.storage.sealed import sealed


def checkpoints_of(folder: Path | Bucket, keep: int = 2, lock: Lock | None = None) -> Checkpoints:
    """The checkpoints of a run, wherever it is."""
    return BucketCheckpoints(folder, keep, lock) if isinstance(folder, Bucket) else Checkpoints(folder, keep, lock)


class BucketCheckpoints(Checkpoints):
    """The checkpoints of one run in an object store; of use like the others."""

    run: Any
    folder: Any
    readers = CONNECTIONS  # most of their time they wait

    def __init__(self, folder: Bucket, keep: int = 2, lock: Lock | None = None):
        assert keep >= 1, keep
        self.run, self.folder, self.keep, self.lock = folder, folder / 'checkpoints', keep, lock
        self._orbax = None
        self._thread = ThreadPoolExecutor(1, 'checkpoint')
        self._last: Future[None] | None = None

    def steps(self) -> list[int]:
        """The published steps, ascending."""
        return [step for step in self._folders() if (self.folder / str(step) / MANIFEST).is_file()]

    def save(
        self, step: int, items: Mapping[str, Any], meta: dict[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Begins to save, and returns when the arrays are in this process' memory: they may be donated right after.

        Arguments and errors are those of `Checkpoints.save`. A step that is taken again is not there until it is published
        again: a bucket has no rename.
        """
        self.wait()
        self.check_lock()
        files = contents(items, meta, files)
        with self._told(step):
            if peers.first():
                published = self.steps()
                for other in self._folders():
                    if other == step or other not in published:
                        self._delete(other)
            peers.meet('a folder to save into')
        leaves = {item: leaves_by_path(tree) for item, tree in items.items()}
        for x in jax.tree.leaves(leaves):
            if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                x.copy_to_host_async()
        mine: dict[str, bytes] = {}
        for item, arrays in leaves.items():
            for name, x in arrays.items():
                mine.update(shards.written(f'{item}/{name}', x))
        self._last = self._thread.submit(self._publish_shards, step, array_kinds(items), mine, files)

    def _content(self, step: int, name: str) -> bytes:
        return (self.folder / str(step) / name).read_bytes()

    def _may_come(self) -> bool:
        return False

    def _publish_shards(
        self, step: int, arrays: dict[str, Any], mine: dict[str, bytes], files: Mapping[str, bytes]
    ) -> None:
        """Writes this process' shards, and process 0 the rest when all have. Runs in a thread of its own."""
        path = self.folder / str(step)
        with self._told(step):
            digests = write_all(path, mine)
            if not peers.first():
                (path / 'digests' / f'{jax.process_index()}.json').write_bytes(json.dumps(digests).encode())
            peers.meet('saved')
            if peers.first():
                others = [f'digests/{process}.json' for process in range(1, jax.process_count())]
                for other in others:
                    digests |= json.loads((path / other).read_bytes())
                path.delete(others)
                digests |= write_all(path, files)
                manifest = {'format': SHARDS, 'arrays': arrays, 'files': dict(sorted(digests.items()))}
                (path / MANIFEST).write_bytes(sealed(manifest))
                self._delete_old(step)
            peers.meet('published')

    def _clear(self) -> None:
        """The next save does it: a bucket that fails now is not asked for more."""

    def _folders(self) -> list[int]:
        """The steps of which there is anything, ascending."""
        return sorted(int(name) for name in self.folder.names() if is_step(name))

    def _delete(self, step: int) -> None:
        """Its manifest first: from then on it is no checkpoint."""
        path = self.folder / str(step)
        path.delete([MANIFEST])
        path.delete(path.files())

    def _sizes(self, path: Any) -> dict[str, int | None]:
        return dict(path.files()) if isinstance(path, Bucket) else super()._sizes(path)

    def _hashed(self, path: Any) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _read(self, step: int, name: str, into: memoryview) -> str:
        content = self._content(step, name)[: len(into)]
        into[: len(content)] = content
        return hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def _pinned(self, step: int, manifest: dict[str, Any], wanted: set[str]) -> Iterator[Any]:
        """A copy of what is to be read, where Orbax is to read it."""
        source = self.folder / str(step)
        if not manifest or manifest.get('format') == SHARDS:
            yield source
            return
        with tempfile.TemporaryDirectory(prefix='weft-') as folder:
            skipped = set(manifest['arrays']) - wanted
            source.download(Path(folder), [name for name in source.files() if name.split('/')[0] not in skipped])
            yield Path(folder)


def write_all(path: Bucket, files: Mapping[str, bytes]) -> dict[str, list[Any]]:
    """Writes objects below `path`; size in bytes and SHA-256 of each."""
    at_once(lambda name: (path / name).write_bytes(files[name]), files)
    return {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in files.items()}
