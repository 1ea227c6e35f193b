"""A run's figures for TensorBoard, written at once: no thread or queue stands between a figure and the disk.

An events file is a row of records: the length (8 bytes) and its checksum, then an `Event` (a protocol buffer) and its checksum.
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from weft.storage import files as disk
from weft.training.patient import Patient


class Board:
    """A new events file in `folder`, where steps after `step` are forgotten; `say` is told where the disk refuses."""

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]):
        disk.make_folder(folder)
        name = f'events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}'
        self.file = Patient(folder / name, say)
        self._write(Event(file_version='brain.Event:2'))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step, by the names under which TensorBoard shows them."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack('<Q', len(content))
        checks = [struct.pack('<I', masked_crc32c(part)) for part in (length, content)]
        self.file.write(length + checks[0] + content + checks[1])
