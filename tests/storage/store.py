"""An object store for tests, in this process' memory: no rename, no append, whole objects only; it can fail and be killed."""

from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from weft.storage import buckets
from weft.storage.buckets import Bucket


class Killed(BaseException):
    """What no code catches: the process is gone."""


class Store(MemoryFileSystem):
    """Objects in memory. `before` is called with each change, 'write' or 'delete', and its key."""

    protocol = 'teststore'
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = ['']  # noqa: RUF012
    before: Callable[[str, str], None] = staticmethod(lambda change, key: None)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix('teststore://'))

    def pipe_file(self, path, value, mode='overwrite', **kwargs):
        type(self).before('write', path)
        super().pipe_file(path, value, mode, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        with open(lpath, 'rb') as file:
            self.pipe_file(rpath, file.read())

    def cp_file(self, path1, path2, **kwargs):
        self.pipe_file(path2, self.cat_file(path1))

    def rm_file(self, path):
        type(self).before('delete', path)
        super().rm_file(path)

    def mv(self, *arguments, **kwargs):
        raise AssertionError('an object store has no rename')

    def _open(self, path, mode='rb', **kwargs):
        assert mode in ('rb', 'wb', 'xb'), 'an object store has no append'
        return super()._open(path, mode, **kwargs)

    def mkdir(self, *arguments, **kwargs):
        raise AssertionError('an object store has no folders')

    makedirs = mkdir


def bucket(monkeypatch, name: str = 'runs') -> Bucket:
    """A new, empty folder in the store."""
    monkeypatch.setattr(Store, 'store', {})
    monkeypatch.setattr(Store, 'pseudo_dirs', [''])
    monkeypatch.setattr(Store, 'before', staticmethod(lambda change, key: None))
    monkeypatch.setitem(buckets.EXTRAS, 'teststore', 'test')
    fsspec.register_implementation('teststore', Store, clobber=True)
    buckets._store.cache_clear()
    found = buckets.at(f'teststore://bucket/{name}')
    assert isinstance(found, Bucket)
    return found


def everything() -> dict[str, bytes]:
    """All objects."""
    return {key: file.getvalue() for key, file in Store.store.items()}
