"""Reading checkpoints, which changes nothing and asks for no lock: what is read is what was saved, or is said not to be.

A checkpoint that the run deletes while it is read is told as `Gone`, and `read_newest` then reads the next.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from weft.runtime import rendezvous as peers
from weft.runtime.errors import UserError, nearest, shown
from weft.storage import files as disk
from weft.storage import shards
from weft.storage.buckets import CONNECTIONS, at_once
from weft.storage.manifest import (
    MANIFEST,
    META,
    SHARDS,
    files_below,
    fingerprint,
    is_manifest,
    is_step,
    kind_of,
    leaves_by_path,
    open_files,
    size_of,
)
from weft.storage.sealed import unsealed

CHUNK = 2**20  # bytes that are read and hashed at once
ALTERED = 'was altered: its SHA-256 is not the one in the manifest'
AGAIN = 100  # checkpoints that a reader tries one after another, each deleted while it was read
BETWEEN = 0.1  # seconds in which one that is replaced may not be there
T = TypeVar('T')


class Gone(UserError):
    """A checkpoint was deleted or replaced while it was read: the run goes on, and has a newer one."""


class Reader:
    """The checkpoints of one run, to be read: `folder`/checkpoints/STEP/. `folder` need not exist."""

    # Arrays that are read and hashed at once: one core is left to what is compiled meanwhile.
    readers = min(max(len(os.sched_getaffinity(0)) - 1, 1), CONNECTIONS) if hasattr(os, 'sched_getaffinity') else 4

    def __init__(self, folder: str | Path):
        self.run = Path(folder)
        self.folder = self.run.absolute() / 'checkpoints'  # Orbax refuses a relative path, and late
        self._saving = self.folder / 'saving'

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

    def meta(self, step: int) -> dict[str, Any]:
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
        return disk.read(self.folder / str(step) / name)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[dict[str, Any]]:
        """The manifest of a step. What goes wrong meanwhile is Gone where the checkpoint is not there any more as it was."""
        manifest: dict[str, Any] = {}
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

    def _check_there(self, step: int, manifest: dict[str, Any]) -> None:
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
        wanted = {item: leaves_by_path(tree) for item, tree in abstract.items()}
        others: contextlib.AbstractContextManager[dict[str, Any]] = contextlib.nullcontext({})
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
        import orbax.checkpoint as ocp

        reads = {item: ocp.args.StandardRestore(arrays) for item, arrays in wanted.items() if arrays}
        if not reads:
            return {}
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        with contextlib.closing(reader):
            return reader.restore(path, ocp.args.Composite(**reads))

    @contextlib.contextmanager
    def _pinned(self, step: int, manifest: dict[str, Any], wanted: set[str]) -> Iterator[Any]:
        """A folder of what is to be read of a checkpoint, which stays readable where the run deletes that meanwhile.

        It is made of links to open files, where the system has such links and allows so many, and somewhere to make them;
        else it is the checkpoint. Several processes read that: theirs is a run that they train, which nobody else deletes from.
        """
        path = self.folder / str(step)
        skipped = set(manifest.get('arrays', ())) - wanted
        with contextlib.ExitStack() as stack:
            folder = None
            if manifest and manifest.get('format') != SHARDS and not peers.several():
                names = [name for name in files_below(path) if name.split('/')[0] not in skipped]
                with contextlib.suppress(OSError):  # no room for them: what goes meanwhile is told then
                    folder = _links(stack, path, names) if len(names) <= open_files() else None
            yield folder or path

    def _read_shards(self, step: int, manifest: dict[str, Any], wanted: dict[str, dict[str, Any]]) -> Mapping[str, Any]:
        """Arrays by item and name; each shard is hashed as it is read."""
        paths: dict[str, list[str]] = {}
        for path in manifest['files']:
            paths.setdefault(path.rpartition('/')[0], []).append(path)

        def read(path: str, into: memoryview) -> None:
            size, sha256 = manifest['files'][path]
            if size != len(into) or self._read(step, path, into) != sha256:
                raise self._damaged(step, path, ALTERED)

        leaves = {f'{item}/{name}': x for item, arrays in wanted.items() for name, x in arrays.items()}

        def gather(name: str) -> Any:
            try:
                return shards.gather(name, leaves[name], paths.get(name, ()), read)
            except UserError:
                raise
            except ValueError as error:
                raise self._damaged(step, MANIFEST, f'was altered ({shown(error)})') from None

        parts = at_once(gather, leaves, self.readers)
        whole = {name: shards.place(x, part) for (name, x), part in zip(leaves.items(), parts, strict=True)}
        return {item: {name: whole[f'{item}/{name}'] for name in arrays} for item, arrays in wanted.items()}

    def _manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a published step. Raises Gone where there is none, UserError where it is not as it was written."""
        if step not in self.steps():
            published = ', '.join(map(str, self.steps())) or 'none at all'
            raise Gone(f'{self.run} has no checkpoint of step {step}; it has {published}')
        try:
            manifest = unsealed(self._content(step, MANIFEST))
        except FileNotFoundError:
            raise self._damaged(step, MANIFEST, 'is missing') from None
        except UserError:  # it could not be read at all
            raise
        except ValueError as error:
            raise self._damaged(step, MANIFEST, f'was altered or truncated ({shown(error)})') from None
        if not is_manifest(manifest):
            raise self._damaged(step, MANIFEST, 'was altered: it lists no arrays and files as a checkpoint has them')
        return manifest

    def _verify(self, step: int, manifest: dict[str, Any], wanted: set[str], path: Any = None) -> None:
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
            # A shard is hashed when it is read, and need not come from the disk twice.
            shard = manifest.get('format') == SHARDS and name.split('/')[0] in manifest['arrays']
            if found > size or not (shard or self._hashed(path / name) == sha256):
                raise self._damaged(step, name, ALTERED)

    def _sizes(self, path: Any) -> dict[str, int | None]:
        """Every file of a checkpoint, and its size in bytes; None for a link that leads nowhere, a FIFO and the like."""
        return {name: size_of(path / name) for name in files_below(path)}

    def _hashed(self, path: Any) -> str:
        return fingerprint(path)[1]

    def _read(self, step: int, name: str, into: memoryview) -> str:
        """A file's first bytes, as many as there is room for, and the SHA-256 of what is there then."""
        digest = hashlib.sha256()
        with disk.reading(self.folder / str(step) / name) as descriptor, open(descriptor, 'rb', closefd=False) as file:
            for begin in range(0, len(into), CHUNK):
                chunk = into[begin : begin + CHUNK]  # hashed while the processor's cache still has it
                digest.update(chunk[: file.readinto(chunk)])
        return digest.hexdigest()

    def _damaged(self, step: int, name: str, what: str) -> UserError:
        others = [other for other in self.steps() if other != step]
        folder = self.run / 'checkpoints' / str(step)
        way = (
            f'remove {folder} to go on from step {others[-1]}'
            if others
            else 'the run has no other checkpoint: restore the file, or train anew'
        )
        return UserError(f'{shown(folder / name, 1000)} {what}; {way}')

    def _compare(self, step: int, item: str, stored: dict[str, dict[str, str]], wanted: dict[str, Any]) -> None:
        """That an item holds exactly the arrays that are wanted: the first difference is a UserError."""
        where = self.run / 'checkpoints' / str(step)
        if item not in stored:
            raise UserError(f'{shown(where)} has no item {item!r}{nearest(item, stored)}')
        for name in [*wanted, *stored[item]]:
            has, wants = stored[item].get(name, 'absent'), kind_of(wanted[name]) if name in wanted else 'none'
            if has != wants:
                raise UserError(
                    f'{item}/{shown(name)} is {shown(has)} in {shown(where)} and {wants} is wanted: use the config that made '
                    'the checkpoint'
                )
            layout = wanted[name].sharding
            assert isinstance(layout, jax.sharding.Sharding), f'{name} has no layout'
            assert not isinstance(getattr(layout, 'mesh', None), jax.sharding.AbstractMesh), f'{name} is on no devices'


def _links(stack: contextlib.ExitStack, path: Path, names: Iterable[str]) -> Path:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='weft-')))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            if not os.path.lexists(path / name):
                raise
            (folder / name).symlink_to('nowhere')  # it cannot be opened, and is told of then
            continue
        stack.callback(os.close, descriptor)
        (folder / name).symlink_to(f'/proc/{os.getpid()}/fd/{descriptor}')
    return folder


def read_newest(checkpoints: Reader, read: Callable[[int], T], step: int | None = None, first: int | None = None) -> T:
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
