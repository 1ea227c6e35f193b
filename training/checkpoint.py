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

A reader changes nothing, and asks for no lock: a checkpoint that is deleted while it is read is told as `Gone`, and
`read_newest` then reads the next. What was killed in the middle is cleared by the next save.

Object stores have no rename: training/bucket_checkpoint.py does the same there, with the arrays as in training/shards.py.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax

from sharding import peers
from sharding.buckets import CONNECTIONS, at_once
from sharding.errors import MachineError, UserError, shown
from storage import files as disk
from storage.lock import Lock
from storage.sealed import sealed, unsealed
from training import shards
from training.manifest import (
    MANIFEST,
    META,
    SHARDS,
    contents,
    files_below,
    fingerprint,
    is_manifest,
    is_step,
    kind_of,
    kinds,
    named,
    open_files,
    pinned,
    size_of,
)

CHUNK = 2**20  # bytes that are read and hashed at once
AGAIN = 100  # checkpoints that a reader tries one after another, each deleted while it was read
BETWEEN = 0.1  # seconds in which one that is replaced may not be there
OF_THE_SYSTEM = re.compile(
    r"os_error_code='(\d+)'|\[OS error (\d+)"
)  # in what Orbax says when the operating system refuses
T = TypeVar('T')


class SaveFailed(MachineError):
    """A checkpoint could not be written; what was published before stands, and the next save may work."""


class Gone(UserError):
    """A checkpoint was deleted or replaced while it was read: the run goes on, and has a newer one."""


def read_newest(
    checkpoints: 'Checkpoints', read: Callable[[int], T], step: int | None = None, first: int | None = None
) -> T:
    """What `read` gives of the newest checkpoint, and of the next where that is deleted meanwhile.

    Args:
        step: the one to read instead, and no other.
        first: the one to read unless it is deleted.

    Raises UserError where there is none, or the one that was asked for goes away.
    """
    if step is not None:
        try:
            return read(step)
        except Gone as gone:
            raise UserError(f'--step {step}: {gone}') from None
    for _ in range(AGAIN):
        try:
            return read(checkpoints.newest() if first is None else first)
        except Gone as gone:
            first = None
            print(f'{gone}: reading the newest', file=sys.stderr, flush=True)
    raise UserError(
        f'{checkpoints.run}: {AGAIN} checkpoints in a row were deleted while they were read: train with a larger '
        'checkpoint.keep or checkpoint.every, so that one lasts as long as it takes to read it'
    )


class Checkpoints:
    """The checkpoints of one run: `folder`/checkpoints/STEP/. The newest `keep` are kept; `folder` need not exist yet.

    Whoever saves holds the run's `lock`; of several processes all call `save`, `wait`, `restore` and `close` alike. Nothing is
    created before the first save.
    """

    # Arrays that are read and hashed at once: one core is left to what is compiled meanwhile.
    readers = min(max(len(os.sched_getaffinity(0)) - 1, 1), CONNECTIONS) if hasattr(os, 'sched_getaffinity') else 4

    def __init__(self, folder: str | Path, keep: int = 2, lock: Lock | None = None):
        assert keep >= 1, keep
        self.run = Path(folder)
        self.folder = self.run.absolute() / 'checkpoints'  # Orbax refuses a relative path, and late
        self.keep, self.lock = keep, lock
        self._saving = self.folder / 'saving'
        self._orbax: Any = None  # an orbax.checkpoint.AsyncCheckpointer, from the first save on
        self._thread = ThreadPoolExecutor(1, 'checkpoint')
        self._last: Future[None] | None = None

    def steps(self) -> list[int]:
        """The published steps, ascending. Raises UserError where no folder has the folder's name."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            if self.folder.is_symlink():
                raise UserError(f'{self.run / "checkpoints"}: is a link that leads nowhere; move it away') from None
            return []
        except OSError as error:
            raise UserError(f'{self.run / "checkpoints"}: {error.strerror}') from None
        return sorted(int(name) for name in names if is_step(name))

    def newest(self) -> int:
        """The last published step. Raises UserError where there is none."""
        steps = self.steps()
        if not steps and self._may_come():
            time.sleep(BETWEEN)
            steps = self.steps()
        if not steps:
            raise UserError(
                f'{self.run} has no checkpoint; a run has one after its first checkpoint.every steps and at its end'
            )
        return steps[-1]

    def _may_come(self) -> bool:
        """Whether the only checkpoint may be about to be replaced."""
        return self._saving.is_dir()

    def save(self, step: int, items: Mapping[str, Any], meta: dict, files: Mapping[str, bytes] | None = None) -> None:
        """Begins to save, and returns when the arrays are copied off the devices: they may be donated right after.

        `items` are trees of jax arrays (dicts, optax states, modules, PRNG keys), none of size 0; `meta` is JSON;
        `files` are names with their contents. Waits for the save before, and raises its error if it failed.
        """
        import orbax.checkpoint as ocp  # here and below: it takes a while, and imported weights are not in its format

        self.wait()
        self._check_lock()
        files = contents(items, meta, files)
        if peers.first():
            disk.remove(self._saving)  # an earlier process was killed, or a save failed
            disk.make_folder(self._saving)
        peers.meet('a folder to save into')
        if self._orbax is None:
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)  # else errors come minutes late
            logging.getLogger('absl').addFilter(_is_news)
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        leaves = {item: named(tree) for item, tree in items.items()}
        # Orbax cannot save an item without arrays (the state of plain gradient descent); the manifest still lists it.
        saves = {item: ocp.args.StandardSave(arrays) for item, arrays in leaves.items() if arrays}
        with self._told(step):
            self._orbax.save(self._saving / str(step), ocp.args.Composite(**saves))
        self._last = self._thread.submit(self._publish, self._orbax, step, kinds(items), files)

    def save_weights(
        self, step: int, item: str, arrays: Iterable[tuple[str, jax.Array]], meta: dict, files: Mapping[str, bytes]
    ) -> None:
        """Saves an item alone, array by array in the form of training/shards.py: each is written before the next is asked for.

        For one process and a local folder; published when it returns.
        """
        path = self._saving / str(step)
        disk.remove(self._saving)
        disk.make_folder(path)
        kinds = {}
        for name, x in arrays:
            kinds[name] = kind_of(x)
            for shard, content in shards.written(f'{item}/{name}', x):
                disk.make_folder((path / shard).parent)
                disk.put(path / shard, content)
            del x, content  # before the next is made
        self._complete(step, {item: kinds}, contents({item: None}, meta, files), SHARDS)

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

    def _check_lock(self) -> None:
        """Raises MachineError where another process has taken the run over by now."""
        if self.lock is not None:
            self.lock.check(look=True)

    def close(self) -> None:
        """Waits for the last save, raises its error if it failed, and ends the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def meta(self, step: int) -> dict:
        """What `save` was told about the step. Raises UserError where it is not whole, Gone where it is not there."""
        with self._reading(step) as manifest:
            self._verify(step, manifest, set())
            try:
                found = json.loads(self.file(step, META))
            except (ValueError, RecursionError):
                raise self._damaged(step, META, 'is no JSON') from None
            if not isinstance(found, dict):
                raise self._damaged(step, META, 'is no JSON object')
            return found

    def file(self, step: int, name: str) -> bytes:
        """A file of a checkpoint. Raises UserError where it is not there."""
        try:
            return self._content(step, name)
        except FileNotFoundError:
            raise self._damaged(step, name, 'is missing') from None

    def files(self, step: int) -> dict[str, bytes]:
        """The files of a checkpoint beside its arrays."""
        with self._reading(step) as manifest:
            return {name: self.file(step, name) for name in manifest['files'] if '/' not in name}

    def _content(self, step: int, name: str) -> bytes:
        """Of a file that may be missing."""
        return disk.read(self.folder / str(step) / name)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[dict]:
        """The manifest of a step. What goes wrong meanwhile is Gone where the checkpoint is not there any more as it was."""
        manifest: dict = {}
        try:
            manifest = self._manifest(step)
            yield manifest
        except Gone:
            raise
        except Exception as error:
            self._check_there(step, manifest)
            if isinstance(error, OSError):
                raise disk.fault(error.filename or self.folder / str(step), error) from error
            raise

    def _check_there(self, step: int, manifest: dict) -> None:
        """Raises Gone where a step that was published is not now, or is another."""
        try:
            now = self._manifest(step)
        except Gone:
            raise
        except UserError:  # damaged, unless it went just now
            if step in self.steps():
                return
            now = {}
        if now != manifest or not now:
            raise Gone(f'{self.run} has deleted or replaced its checkpoint of step {step} while it was read')

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The named items of a checkpoint, bit for bit, in the layouts asked for: any mesh, whatever mesh saved them.

        `abstract` has a tree of `jax.ShapeDtypeStruct` with a sharding for each item wanted; no other item is read.
        Raises UserError where a file is missing, truncated, altered or extra, or where a name, shape or dtype differs (Orbax
        would cast in silence): before any array is read, but for a shard that was altered, which is hashed as it is read.
        Raises Gone where the run deletes or replaces the checkpoint meanwhile.
        """
        wanted = {item: named(tree) for item, tree in abstract.items()}
        others: contextlib.AbstractContextManager[dict] = contextlib.nullcontext({})
        with self._reading(step) if peers.first() else others as manifest:
            if peers.first():
                for item, arrays in wanted.items():
                    self._compare(step, item, manifest['arrays'], arrays)
            with self._pinned(step, manifest, set(wanted)) as path:
                if peers.first():
                    self._verify(step, manifest, set(wanted), path)
                if peers.meet('verified', manifest.get('format')) == SHARDS:
                    found = self._read_shards(step, manifest or self._manifest(step), wanted)
                else:
                    found = self._read_orbax(path, wanted)
                    if path == self.folder / str(step) and manifest:
                        # Where files went after they were hashed, a reader may have taken them for zeros.
                        self._check_there(step, manifest)
        return {
            item: jax.tree.unflatten(jax.tree.structure(tree), [found[item][name] for name in wanted[item]])
            for item, tree in abstract.items()
        }

    def _read_orbax(self, path: Any, wanted: dict[str, dict[str, Any]]) -> Mapping[str, Any]:
        """Arrays by item and name."""
        import orbax.checkpoint as ocp

        reads = {item: ocp.args.StandardRestore(arrays) for item, arrays in wanted.items() if arrays}
        if not reads:
            return {}
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        with contextlib.closing(reader):
            return reader.restore(path, ocp.args.Composite(**reads))

    @contextlib.contextmanager
    def _pinned(self, step: int, manifest: dict, wanted: set[str]) -> Iterator[Any]:
        """A folder of what is to be read of a checkpoint, which stays readable where the run deletes that meanwhile.

        It is made of links to open files, where the system has such links and allows so many; else it is the checkpoint.
        """
        path = self.folder / str(step)
        if not manifest or manifest.get('format') == SHARDS or not (most := open_files()):
            yield path
            return
        skipped = set(manifest['arrays']) - wanted
        names = [name for name in files_below(path) if name.split('/')[0] not in skipped]
        if len(names) > most:
            yield path
            return
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='weft-')))
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(stack.enter_context(pinned(path / name)))
            yield folder

    def _read_shards(self, step: int, manifest: dict, wanted: dict[str, dict[str, Any]]) -> Mapping[str, Any]:
        """Arrays by item and name; each shard is hashed as it is read."""
        paths: dict[str, list[str]] = {}
        for path in manifest['files']:
            paths.setdefault(path.rpartition('/')[0], []).append(path)

        def read(path: str, into: memoryview) -> None:
            size, sha256 = manifest['files'][path]
            if size != len(into) or self._read(step, path, into) != sha256:
                raise self._altered(step, path)

        leaves = {f'{item}/{name}': x for item, arrays in wanted.items() for name, x in arrays.items()}
        parts = at_once(lambda name: shards.gather(name, leaves[name], paths[name], read), leaves, self.readers)
        whole = {name: shards.place(x, part) for (name, x), part in zip(leaves.items(), parts, strict=True)}
        return {item: {name: whole[f'{item}/{name}'] for name in arrays} for item, arrays in wanted.items()}

    def _publish(self, orbax: Any, step: int, arrays: dict, files: Mapping[str, bytes]) -> None:
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
        if peers.first() and not (self.lock is not None and self.lock.lost):
            with contextlib.suppress(UserError, MachineError):  # the next save clears it, if this disk cannot
                disk.remove(self._saving)

    def _complete(self, step: int, arrays: dict, files: Mapping[str, bytes], format: str | None = None) -> None:
        """Completes the folder, gives it its name, deletes the oldest."""
        path, target = self._saving / str(step), self.folder / str(step)
        for name, content in files.items():
            disk.put(path / name, content)
        manifest: dict[str, Any] = {
            'arrays': arrays,
            'files': {name: fingerprint(path / name) for name in files_below(path)},
        }
        manifest |= {'format': format} if format else {}
        disk.put(path / MANIFEST, sealed(manifest))
        self._check_lock()
        # The rename may reach the disk before what it names, unless all of that is there already.
        disk.sync_tree(path)
        if os.path.lexists(target):  # a step taken again, from an earlier checkpoint
            self._delete(step)
        disk.rename(path, target)
        for old in self.steps()[: -self.keep]:
            self._delete(old)

    def _delete(self, step: int) -> None:
        """Takes away the name first: a kill in between leaves no half of a published checkpoint."""
        doomed = self._saving / f'{step}.deleted'
        disk.rename(self.folder / str(step), doomed)
        disk.remove(doomed)

    def _manifest(self, step: int) -> dict:
        """The manifest of a published step. Raises Gone where there is none, UserError where it is not as it was written."""
        if step not in self.steps():
            published = ', '.join(map(str, self.steps()))
            raise Gone(
                f'{self.run} has no checkpoint of step {step}; '
                + (f'it has {published}' if published else 'it has none at all')
            )
        try:
            manifest = unsealed(self._content(step, MANIFEST))
        except FileNotFoundError:
            raise self._damaged(step, MANIFEST, 'is missing') from None
        except json.JSONDecodeError:
            raise self._damaged(step, MANIFEST, 'was altered or truncated (it is not JSON)') from None
        except ValueError as error:
            raise self._damaged(step, MANIFEST, f'was altered ({error})') from None
        if not is_manifest(manifest):
            raise self._damaged(step, MANIFEST, 'was altered: it lists no arrays and files as a checkpoint has them')
        return manifest

    def _verify(self, step: int, manifest: dict, wanted: set[str], path: Any = None) -> None:
        """That the wanted items, and all files beside the items, are byte for byte what was saved; at `path` if it is given."""
        path = path or self.folder / str(step)
        skipped = set(manifest['arrays']) - wanted
        known = {name: entry for name, entry in manifest['files'].items() if name.split('/')[0] not in skipped}
        sizes = {name: size for name, size in self._sizes(path).items() if name.split('/')[0] not in skipped}
        for name in sorted(set(sizes) - {MANIFEST} - set(known)):
            raise self._damaged(step, name, 'is not part of the checkpoint (the manifest does not list it)')
        for name, (size, sha256) in known.items():
            if name not in sizes:
                raise self._damaged(step, name, 'is missing')
            found = sizes[name]
            if found is None:
                raise self._damaged(step, name, 'is no regular file')
            if found < size:
                raise self._damaged(step, name, f'was truncated: it has {found} bytes of {size}')
            if found > size or self._digest(path, name, manifest) not in (sha256, None):
                raise self._altered(step, name)

    def _sizes(self, path: Any) -> dict[str, int | None]:
        """Every file of a checkpoint, and its size in bytes; None for a link that leads nowhere, a FIFO and the like."""
        return {name: size_of(path / name) for name in files_below(path)}

    def _digest(self, path: Any, name: str, manifest: dict) -> str | None:
        """A file's SHA-256; None for a shard: it is hashed when it is read, and need not come from the disk twice."""
        shard = manifest.get('format') == SHARDS and name.split('/')[0] in manifest['arrays']
        return None if shard else self._hashed(path / name)

    def _hashed(self, path: Any) -> str:
        """A file's SHA-256."""
        return fingerprint(path)[1]

    def _read(self, step: int, name: str, into: memoryview) -> str:
        """A file's first bytes, as many as there is room for, and the SHA-256 of what is there then."""
        digest = hashlib.sha256()
        with disk.reading(self.folder / str(step) / name) as descriptor:
            for begin in range(0, len(into), CHUNK):
                chunk = into[begin : begin + CHUNK]  # hashed while the processor's cache still has it
                filled = 0
                # A network's disk may give less.
                while filled < len(chunk) and (count := os.readv(descriptor, [chunk[filled:]])):
                    filled += count
                digest.update(chunk[:filled])
        return digest.hexdigest()

    def _altered(self, step: int, name: str) -> UserError:
        return self._damaged(step, name, 'was altered: its SHA-256 is not the one in the manifest')

    def _damaged(self, step: int, name: str, what: str) -> UserError:
        others = [other for other in self.steps() if other != step]
        folder = self.run / 'checkpoints' / str(step)
        way = (
            f'remove {folder} to go on from step {others[-1]}'
            if others
            else 'the run has no other checkpoint: restore the file, or train anew'
        )
        return UserError(f'{folder / name} {what}; {way}')

    def _compare(self, step: int, item: str, stored: dict[str, dict[str, str]], wanted: dict[str, Any]) -> None:
        """That an item holds exactly the arrays that are wanted: the first difference is a UserError."""
        where = self.run / 'checkpoints' / str(step)
        if item not in stored:
            raise UserError(f'{where} has no item {item!r}; it has {", ".join(stored)}')
        for name in [*wanted, *stored[item]]:
            has, wants = stored[item].get(name, 'absent'), kind_of(wanted[name]) if name in wanted else 'none'
            if has != wants:
                raise UserError(
                    f'{item}/{name} is {has} in {where} and {wants} is wanted: use the config that made the checkpoint'
                )
            layout = wanted[name].sharding
            assert isinstance(layout, jax.sharding.Sharding), f'{name} has no layout'
            assert not isinstance(getattr(layout, 'mesh', None), jax.sharding.AbstractMesh), f'{name} is on no devices'


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record says what is not said elsewhere: the errors of Orbax' threads are raised by `wait`, in one line."""
    return record.levelno < logging.ERROR or 'orbax' not in Path(record.pathname).parts
