"""A file that grows while a disk may be full for a time: what it refuses waits in memory, and is written when there is room."""

from collections.abc import Callable
from pathlib import Path

from weft.runtime.errors import MachineError
from weft.storage import files as disk


class Patient:
    """`say` is told once when the disk begins to refuse, and that it was made up for."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.say = path, say
        self.waiting = bytearray()
        self.refused = False
        self._file = disk.Appended(path)

    def write(self, content: bytes) -> None:
        """Appends, now or when there is room."""
        self.waiting += content
        self._try(lambda: None)

    def sync(self) -> None:
        """Returns when all is on the disk that it takes; at once if it is closed."""
        if not self._file.closed:
            self._try(self._file.sync)

    def close(self) -> None:
        """Writes what waits, for the last time. Raises MachineError where the disk still refuses it."""
        try:
            self._append()
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Writes nothing more, what waits neither."""
        self._file.close()

    def _append(self) -> None:
        if self.waiting:
            self._file.write(bytes(self.waiting))
            self.waiting.clear()

    def _try(self, then: Callable[[], None]) -> None:
        try:
            self._append()
            then()
        except MachineError as error:
            if not self.refused:
                self.say(f'error: {error}; what is written to it waits in memory until there is room')
            self.refused = True
            return
        if self.refused:
            self.say(f'{self.path} has all of its rows again')
        self.refused = False
