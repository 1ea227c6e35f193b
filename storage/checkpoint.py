"""Checkpoints that are whole or not there: written by Orbax beside training, hashed, and only then given their name.

    runs/NAME/checkpoints/
      40/                      the checkpoint of step 40: it gets this name by one rename, when all below is on the disk
        model/ optimizer/ …    the items, each a tree of arrays in Orbax' format, which any mesh can read
        meta.json              what the caller says of the step
        config.yaml …          the files given along
        manifest.json          every file's size and SHA-256, every array's shape and dtype; its own hash
      saving/                  what is being written or deleted, or was when the process was killed; not for readers

Of several processes each writes and reads its own arrays through Orbax; process 0 does all else, and none goes on before
it is done: nobody restores, or begins the next save, before the last one is published.

Reading is storage/checkpoint_reader.py's: it changes nothing. What was killed in the middle is cleared by the next save.

Object stores have no rename: storage/bucket_checkpoint.py does the same there, with the arrays as in storage/shards.py.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from weft.runtime import rendezvous as peers
from weft.runtime import streams
from weft.runtime.errors import MachineError, UserError, shown
from weft.storage import files as disk
from weft.storage import shards
from weft.storage.checkpoint_reader import Reader
from weft.storage.lock import Lock
from weft.storage.manifest import (
    MANIFEST,
    SHARDS,
    array_kinds,
    contents,
    files_below,
    fingerprint,
    kind_of,
    leaves_by_path,
)
from weft.storage.sealed import sealed

# In what Orbax says when the operating system refuses.
OF_THE_SYSTEM = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)")


class SaveFailed(MachineError):
    """A checkpoint could not be written; what was published before stands, and the next save may work."""


class Checkpoints(Reader):
    """The checkpoints of one run, to be saved and read. The newest `keep` are kept; `folder` need not exist yet.

    Whoever saves holds the run's `lock`; of several processes all call `save`, `wait`, `restore` and `close` alike. Nothing is
    created before the first save.
    """

    def __init__(self, folder: str | Path, keep: int = 2, lock: Lock | None = None):
        assert keep >= 1, keep
        super().__init__(folder)
        self.keep, self.lock = keep, lock
        self._orbax: Any = None  # an orbax.checkpoint.AsyncCheckpointer, from the first save on
        self._thread = ThreadPoolExecutor(1, 'checkpoint')
        self._last: Future[None] | None = None

    def save(
        self, step: int, items: Mapping[str, Any], meta: dict[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Begins to save, and returns when the arrays are copied off the devices: they may be donated right after.

        `items` are trees of jax arrays (dicts, optax states, modules, PRNG keys), none of size 0; `meta` is JSON;
        `files` are names with their contents. Waits for the save before, and raises its error if it failed.
        """
        import orbax.checkpoint as ocp  # here and below: it takes a while, and imported weights are not in its format

        self.wait()
        self.check_lock()
        files = contents(items, meta, files)
        if peers.first():
            disk.remove(self._saving)  # an earlier process was killed, or a save failed
            disk.make_folder(self._saving)
        peers.meet('a folder to save into')
        if self._orbax is None:
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)  # else errors come minutes late
            logging.getLogger('absl').addFilter(_is_news)
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        leaves = {item: leaves_by_path(tree) for item, tree in items.items()}
        # Orbax cannot save an item without arrays (the state of plain gradient descent); the manifest still lists it.
        saves = {item: ocp.args.StandardSave(arrays) for item, arrays in leaves.items() if arrays}
        with self._told(step):
            self._orbax.save(self._saving / str(step), ocp.args.Composite(**saves))
        self._last = self._thread.submit(self._publish, self._orbax, step, array_kinds(items), files)

    def save_weights(
        self,
        step: int,
        item: str,
        arrays: Iterable[tuple[str, jax.Array]],
        meta: dict[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        """Saves an item alone, array by array in the form of storage/shards.py: each is written before the next is asked for.

        For one process and a local folder; published when it returns.
        """
        path = self._saving / str(step)
        disk.remove(self._saving)
        disk.make_folder(path)
        array_kinds = {}
        for name, x in arrays:
            array_kinds[name] = kind_of(x)
            for shard, content in shards.written(f'{item}/{name}', x):
                disk.make_folder((path / shard).parent)
                disk.put(path / shard, content)
            del x, content  # before the next is made
        self._complete(step, {item: array_kinds}, contents({item: None}, meta, files), SHARDS)

    def wait(self) -> None:
        """Returns when the last save is published; raises its error if it failed."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def check(self) -> None:
        """Raises the last save's error as soon as it is known, and MachineError where another process has taken the run over.

        Costs nothing, for every step.
        """
        if self.lock is not None:
            self.lock.check()
        if self._last is not None and self._last.done():
            self.wait()

    def check_lock(self) -> None:
        """Raises MachineError where another process has taken the run over by now: it looks, unlike `check`."""
        if self.lock is not None:
            self.lock.check(look=True)

    def is_ours(self) -> bool:
        """Whether no other process has taken the run over by now."""
        try:
            self.check_lock()
        except MachineError:
            return False
        return True

    def close(self) -> None:
        """Waits for the last save, raises its error if it failed, and ends the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def _publish(self, orbax: Any, step: int, arrays: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Waits for Orbax in all processes, and publishes. Runs in a thread of its own."""
        with self._told(step):
            orbax.wait_until_finished()
            peers.meet('saved')
            if peers.first():
                disk.declare(self._saving)
                self._complete(step, arrays, files)
            peers.meet('published')

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """A save that fails leaves nothing, and what the disk says to it is one line."""
        try:
            yield
        except Exception as error:
            self._clear()
            said = OF_THE_SYSTEM.search(str(error))
            if isinstance(error, OSError | MachineError | UserError) or said:
                why = os.strerror(int(said[1] or said[2])) if said else getattr(error, 'strerror', None) or str(error)
                raise SaveFailed(f'{self.run}: checkpoint {step} could not be saved: {shown(why, 500)}') from error
            raise

    def _clear(self) -> None:
        """Removes what is half made, after a save that failed."""
        if peers.first() and self.is_ours():
            with contextlib.suppress(UserError, MachineError):  # the next save clears it, if this disk cannot
                disk.remove(self._saving)

    def _complete(
        self, step: int, arrays: dict[str, Any], files: Mapping[str, bytes], format: str | None = None
    ) -> None:
        """Completes the folder, gives it its name in the place of an earlier one of that step, deletes the oldest."""
        path, target = self._saving / str(step), self.folder / str(step)
        for name, content in files.items():
            disk.put(path / name, content)
        manifest = {'arrays': arrays, 'files': {name: fingerprint(path / name) for name in files_below(path)}}
        disk.put(path / MANIFEST, sealed(manifest | ({'format': format} if format else {})))
        # The rename may reach the disk before what it names, unless all of that is there already.
        disk.sync_tree(path)
        self.check_lock()  # now: what is before it may take minutes
        taken_again = os.path.lexists(target)  # a step from an earlier checkpoint: it stays until the new one is there
        if taken_again:
            disk.rename(target, self._doomed(step))
        try:
            disk.rename(path, target)
        except BaseException:
            if taken_again and not os.path.lexists(target):
                disk.rename(self._doomed(step), target)
            raise
        self._delete_old(step, self._doomed(step))

    def _delete_old(self, step: int, *replaced: Path) -> None:
        """Deletes what need not be kept, after `step` was published: that stands, whether the rest can be deleted or not."""
        try:
            for path in replaced:
                disk.remove(path)
            for old in self.steps()[: -self.keep]:
                self._delete(old)
        except (OSError, MachineError, UserError) as error:
            why = shown(getattr(error, 'strerror', None) or error, 500)
            streams.say(f'{self.run}: checkpoint {step} is saved, and older ones could not be removed: {why}')

    def _delete(self, step: int) -> None:
        """Takes away the name first: a kill in between leaves no half of a published checkpoint."""
        disk.rename(self.folder / str(step), self._doomed(step))
        disk.remove(self._doomed(step))

    def _doomed(self, step: int) -> Path:
        """The name of what is deleted: no reader looks there, and the next save clears it."""
        return self._saving / f'{step}.deleted'


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record says what is not said elsewhere: the errors of Orbax' threads are raised by `wait`, in one line."""
    return record.levelno < logging.ERROR or 'orbax' not in Path(record.pathname).parts
