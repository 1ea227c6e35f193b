"""Who holds the lock of a run, as its file says it (storage/lock.py)."""

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from weft.runtime.errors import shown
from weft.storage.foreign import read_own_object

LONG = 4096  # bytes of a record


@dataclasses.dataclass(frozen=True)
class Record:
    """What a lock's file says of its holder; empty where it is being written."""

    token: str = ''  # of one holding
    beats: int = 0
    host: str = '?'
    boot: str = ''  # of the kernel
    process: int = 0
    space: str = ''  # in which the process has that number
    began: str = ''  # the process, in the kernel's ticks
    since: str = '?'
    command: str = '?'

    def __str__(self) -> str:
        if not self.token:
            return 'another process'
        return f'process {self.process} of host {shown(self.host, 80)} since {shown(self.since, 40)} ({shown(self.command)})'

    def written(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode().ljust(LONG)

    @property
    def is_dead(self) -> bool:
        """Whether this machine knows that the holder has ended."""
        own = own_record()
        if (self.boot, self.space) != (own.boot, own.space) or not self.token:
            return False
        return _began(self.process) != self.began


def own_record() -> Record:
    """What others are told of this process."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return Record(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        boot=_first_line(Path('/proc/sys/kernel/random/boot_id')) or socket.gethostname(),
        process=os.getpid(),
        space=_link('/proc/self/ns/pid'),
        began=_began(os.getpid()),
        since=time.strftime('%Y-%m-%d %H:%M:%S %z'),
        command=shown(command, 400),  # with a JSON of at most LONG bytes, whatever was written there
    )


def record_of(content: bytes) -> Record:
    """What a lock's file says; an empty record where it says nothing that can be read."""
    with contextlib.suppress(ValueError, TypeError):
        found: dict[str, Any] = read_own_object(content)
        if all(type(found[field.name]) is field.type for field in dataclasses.fields(Record)):
            return Record(**found)
    return Record()


def _began(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks; '' where there is none."""
    # What follows the command's name, which may hold anything, in parentheses: the 22nd field is the 20th of them.
    fields = _first_line(Path(f'/proc/{process}/stat')).rpartition(')')[2].split()
    return fields[19] if len(fields) > 19 else ''


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8', errors='replace').partition('\n')[0]
    except OSError:
        return ''


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ''
