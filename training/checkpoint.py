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

A reader changes nothing. What was killed in the middle is cleared by the next save.

Object stores have no rename: training/bucket_checkpoint.py does the same there, with the arrays as in training/shards.py.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from sharding import peers
from sharding.buckets import CONNECTIONS, at_once
from sharding.errors import UserError
from training import shards

MANIFEST = 'manifest.json'
META = 'meta.json'
CHUNK = 2**20  # bytes that are read and hashed at once
SHARDS = 'shards'  # the manifest's format where the arrays are as in training/shards.py; where Orbax wrote it says none


class Checkpoints:
    """The checkpoints of one run: `folder`/checkpoints/STEP/. The newest `keep` are kept; `folder` need not exist yet.

    One run at a time may save; of several processes all call `save`, `wait`, `restore` and `close` alike. Nothing is
    created before the first save.
    """

    # Arrays that are read and hashed at once: one core is left to what is compiled meanwhile.
    readers = min(max(len(os.sched_getaffinity(0)) - 1, 1), CONNECTIONS) if hasattr(os, 'sched_getaffinity') else 4

    def __init__(self, folder: str | Path, keep: int = 2):
        assert keep >= 1, keep
        self.run = Path(folder)
        self.folder = self.run.absolute() / 'checkpoints'  # Orbax refuses a relative path, and late
        self.keep = keep
        self._saving = self.folder / 'saving'
        self._orbax: Any = None  # an orbax.checkpoint.AsyncCheckpointer, from the first save on
        self._thread = ThreadPoolExecutor(1, 'checkpoint')
        self._last: Future[None] | None = None

    def steps(self) -> list[int]:
        """The published steps, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isascii() and path.name.isdecimal())

    def newest(self) -> int:
        """The last published step. Raises UserError where there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(
                f'{self.run} has no checkpoint; a run has one after its first checkpoint.every steps and at its end'
            )
        return steps[-1]

    def save(self, step: int, items: Mapping[str, Any], meta: dict, files: Mapping[str, bytes] | None = None) -> None:
        """Begins to save, and returns when the arrays are copied off the devices: they may be donated right after.

        `items` are trees of jax arrays (dicts, optax states, modules, PRNG keys), none of size 0; `meta` is JSON;
        `files` are names with their contents. Waits for the save before, and raises its error if it failed.
        """
        import orbax.checkpoint as ocp  # here and below: it takes a while, and imported weights are not in its format

        self.wait()
        files = contents(items, meta, files)
        if peers.first():
            if self._saving.exists():
                shutil.rmtree(self._saving)  # an earlier process was killed, or a save failed
            self._saving.mkdir(parents=True)
        peers.meet('a folder to save into')
        if self._orbax is None:
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)  # else errors come minutes late
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        leaves = {item: named(tree) for item, tree in items.items()}
        # Orbax cannot save an item without arrays (the state of plain gradient descent); the manifest still lists it.
        saves = {item: ocp.args.StandardSave(arrays) for item, arrays in leaves.items() if arrays}
        self._orbax.save(self._saving / str(step), ocp.args.Composite(**saves))
        self._last = self._thread.submit(self._publish, self._orbax, step, kinds(items), files)

    def save_weights(
        self, step: int, item: str, arrays: Iterable[tuple[str, jax.Array]], meta: dict, files: Mapping[str, bytes]
    ) -> None:
        """Saves an item alone, array by array in the form of training/shards.py: each is written before the next is asked for.

        For one process and a local folder; published when it returns.
        """
        path = self._saving / str(step)
        shutil.rmtree(self._saving, ignore_errors=True)
        path.mkdir(parents=True)
        kinds = {}
        for name, x in arrays:
            kinds[name] = _kind(x)
            for shard, content in shards.written(f'{item}/{name}', x):
                (path / shard).parent.mkdir(parents=True, exist_ok=True)
                (path / shard).write_bytes(content)
            del x, content  # before the next is made
        self._complete(step, {item: kinds}, contents({item: None}, meta, files), SHARDS)

    def wait(self) -> None:
        """Returns when the last save is published; raises its error if it failed."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def check(self) -> None:
        """Raises the last save's error as soon as it is known to have failed."""
        if self._last is not None and self._last.done():
            self.wait()

    def close(self) -> None:
        """Waits for the last save, raises its error if it failed, and ends the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def meta(self, step: int) -> dict:
        """What `save` was told about the step. Raises UserError where it is not there or not whole."""
        self._verify(step, self._manifest(step), set())
        return json.loads(self.file(step, META))

    def file(self, step: int, name: str) -> bytes:
        """A file of a checkpoint."""
        return (self.folder / str(step) / name).read_bytes()

    def files(self, step: int) -> dict[str, bytes]:
        """The files of a checkpoint beside its arrays."""
        names = [name for name in self._manifest(step)['files'] if '/' not in name]
        return {name: self.file(step, name) for name in names}

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The named items of a checkpoint, bit for bit, in the layouts asked for: any mesh, whatever mesh saved them.

        `abstract` has a tree of `jax.ShapeDtypeStruct` with a sharding for each item wanted; no other item is read.
        Raises UserError where a file is missing, truncated, altered or extra, or where a name, shape or dtype differs (Orbax
        would cast in silence): before any array is read, but for a shard that was altered, which is hashed as it is read.
        """
        wanted = {item: named(tree) for item, tree in abstract.items()}
        manifest: dict = {}
        if peers.first():
            manifest = self._manifest(step)
            for item, arrays in wanted.items():
                self._compare(step, item, manifest['arrays'], arrays)
            self._verify(step, manifest, set(wanted))
        if peers.meet('verified', manifest.get('format')) == SHARDS:
            found = self._read_shards(step, manifest or self._manifest(step), wanted)
        else:
            found = self._read_orbax(step, wanted)
        return {
            item: jax.tree.unflatten(jax.tree.structure(tree), [found[item][name] for name in wanted[item]])
            for item, tree in abstract.items()
        }

    def _read_orbax(self, step: int, wanted: dict[str, dict[str, Any]]) -> Mapping[str, Any]:
        """Arrays by item and name."""
        import orbax.checkpoint as ocp

        reads = {item: ocp.args.StandardRestore(arrays) for item, arrays in wanted.items() if arrays}
        if not reads:
            return {}
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        with contextlib.closing(reader), self._on_disk(step) as path:
            return reader.restore(path, ocp.args.Composite(**reads))

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
        orbax.wait_until_finished()
        peers.meet('saved')
        if peers.first():
            self._complete(step, arrays, files)
        peers.meet('published')

    def _complete(self, step: int, arrays: dict, files: Mapping[str, bytes], format: str | None = None) -> None:
        """Completes the folder, gives it its name, deletes the oldest."""
        path, target = self._saving / str(step), self.folder / str(step)
        for name, content in files.items():
            (path / name).write_bytes(content)
        manifest: dict[str, Any] = {
            'arrays': arrays,
            'files': {name: _fingerprint(path / name) for name in _files(path)},
        }
        manifest |= {'format': format} if format else {}
        (path / MANIFEST).write_text(sealed(manifest), encoding='utf-8')
        # The rename may reach the disk before what it names, unless all of that is there already.
        for inner in [path, *path.rglob('*')]:
            _sync(inner)
        if target.exists():  # a step taken again, from an earlier checkpoint
            self._delete(step)
        path.rename(target)
        _sync(self.folder)
        for old in self.steps()[: -self.keep]:
            self._delete(old)

    def _delete(self, step: int) -> None:
        """Takes away the name first: a kill in between leaves no half of a published checkpoint."""
        doomed = self._saving / f'{step}.deleted'
        (self.folder / str(step)).rename(doomed)
        shutil.rmtree(doomed)

    def _manifest(self, step: int) -> dict:
        """The manifest of a published step, or UserError where it is not as it was written."""
        if step not in self.steps():
            published = ', '.join(map(str, self.steps()))
            raise UserError(
                f'{self.run} has no checkpoint of step {step}; '
                + (f'it has {published}' if published else 'it has none at all')
            )
        try:
            manifest = json.loads(self.file(step, MANIFEST))
        except FileNotFoundError:
            raise self._damaged(step, MANIFEST, 'is missing') from None
        except ValueError:
            raise self._damaged(step, MANIFEST, 'was altered or truncated (it is not JSON)') from None
        if not isinstance(manifest, dict) or manifest.pop('sha256', None) != _sha256(manifest):
            raise self._damaged(step, MANIFEST, 'was altered')
        return manifest

    def _verify(self, step: int, manifest: dict, wanted: set[str]) -> None:
        """That the wanted items, and all files beside the items, are byte for byte what was saved."""
        skipped = set(manifest['arrays']) - wanted
        known = {name: entry for name, entry in manifest['files'].items() if name.split('/')[0] not in skipped}
        sizes = {name: size for name, size in self._sizes(step).items() if name.split('/')[0] not in skipped}
        for name in sorted(set(sizes) - {MANIFEST} - set(known)):
            raise self._damaged(step, name, 'is not part of the checkpoint (the manifest does not list it)')
        for name, (size, sha256) in known.items():
            if name not in sizes:
                raise self._damaged(step, name, 'is missing')
            if sizes[name] < size:
                raise self._damaged(step, name, f'was truncated: it has {sizes[name]} bytes of {size}')
            if sizes[name] > size or self._digest(step, name, manifest) not in (sha256, None):
                raise self._altered(step, name)

    def _sizes(self, step: int) -> dict[str, int]:
        """Every file of a checkpoint, and its size in bytes."""
        path = self.folder / str(step)
        return {name: (path / name).stat().st_size for name in _files(path)}

    def _digest(self, step: int, name: str, manifest: dict) -> str | None:
        """A file's SHA-256; None for a shard: it is hashed when it is read, and need not come from the disk twice."""
        shard = manifest.get('format') == SHARDS and name.split('/')[0] in manifest['arrays']
        return None if shard else self._hashed(step, name)

    def _hashed(self, step: int, name: str) -> str:
        """A file's SHA-256."""
        return _fingerprint(self.folder / str(step) / name)[1]

    def _read(self, step: int, name: str, into: memoryview) -> str:
        """A file's first bytes, as many as there is room for, and the SHA-256 of what is there then."""
        digest = hashlib.sha256()
        with (self.folder / str(step) / name).open('rb', buffering=0) as file:
            for begin in range(0, len(into), CHUNK):
                chunk = into[begin : begin + CHUNK]  # hashed while the processor's cache still has it
                filled = 0
                while filled < len(chunk) and (
                    count := file.readinto(chunk[filled:])
                ):  # a network's disk may give less
                    filled += count
                digest.update(chunk[:filled])
        return digest.hexdigest()

    def _on_disk(self, step: int) -> contextlib.AbstractContextManager[Path]:
        """Where Orbax can read a checkpoint."""
        return contextlib.nullcontext(self.folder / str(step))

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
            has, wants = stored[item].get(name, 'absent'), _kind(wanted[name]) if name in wanted else 'none'
            if has != wants:
                raise UserError(
                    f'{item}/{name} is {has} in {where} and {wants} is wanted: use the config that made the checkpoint'
                )
            layout = wanted[name].sharding
            assert isinstance(layout, jax.sharding.Sharding), f'{name} has no layout'
            assert not isinstance(getattr(layout, 'mesh', None), jax.sharding.AbstractMesh), f'{name} is on no devices'


def contents(items: Mapping[str, Any], meta: dict, files: Mapping[str, bytes] | None) -> dict[str, bytes]:
    """The files of a checkpoint beside its items and its manifest."""
    files = {META: (json.dumps(meta, indent=1) + '\n').encode(), **(files or {})}
    taken = {MANIFEST, *items}
    assert all(name not in taken and Path(name).name == name for name in files), (list(files), taken)
    return files


def sealed(manifest: dict) -> str:
    """The content of manifest.json, with its own hash."""
    return json.dumps({**manifest, 'sha256': _sha256(manifest)}, indent=1) + '\n'


def named(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths, as in `blocks/0/up_DF`, in the tree's order."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator='/'): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert len(leaves) == len(jax.tree.leaves(tree)), 'two leaves of one path'
    return leaves


def kinds(items: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Dtype and shape of each array, by item and name."""
    return {item: {name: _kind(x) for name, x in named(tree).items()} for item, tree in items.items()}


def _kind(x: Any) -> str:
    """Dtype and shape, as in `float32[4, 8]`."""
    return f'{x.dtype}{list(x.shape)}'


def _files(path: Path) -> Iterable[str]:
    """Every file below a folder, by its path from there, sorted."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob('*') if not file.is_dir())


def _fingerprint(path: Path) -> list:
    """Size in bytes and SHA-256 of a file."""
    with path.open('rb') as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, 'sha256').hexdigest()]


def _sha256(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
