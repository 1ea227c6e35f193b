"""Standard input, output and error as a script needs them, whatever its shell has made of them.

What a stream's encoding lacks is written as an escape. A descriptor that is closed from the start is taken by the null device,
so that no file or socket gets its number. What cannot be written to standard error is dropped: nobody could be told. Standard
output fails with an OSError that names it; of a script whose results are files (`lasting`) it is dropped, too: a training
outlives its terminal, and whoever reads what it says.
"""

import errno
import io
import os
import select
import sys
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, which may have room again: others are gone for good
OUTPUT = 'standard output'
AT_ONCE = select.PIPE_BUF  # bytes that a pipe takes without waiting, where it takes any
MOMENT = 300  # milliseconds in which a reader makes room for what a process says at its end
# Whether something is being written: an exception between that and its being known would have it written once more.
writing = False


class Output(io.RawIOBase):
    """A descriptor to write to. Once writing has failed (`failed`), all else is dropped, and nothing fails again."""

    def __init__(self, descriptor: int, name: str, lasting: bool) -> None:
        self.descriptor, self.called, self.lasting = descriptor, name, lasting
        self.failed: OSError | None = None
        self.ready = select.poll()
        if descriptor >= 0:
            self.ready.register(descriptor, select.POLLOUT)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return self.descriptor >= 0 and os.isatty(self.descriptor)

    def write(self, data: Any, /) -> int:
        global writing
        bytes_ = memoryview(data).cast('B')
        size = bytes_.nbytes
        while self.failed is None:
            try:
                if self.descriptor >= 0:
                    self.ready.poll()  # here a reader that reads nothing is waited for, and a signal may end that
                writing = True
                return os.write(self.descriptor, bytes_[:AT_ONCE])
            except BlockingIOError:  # whoever shares the descriptor has asked for that, and took the room
                continue
            except OSError as error:
                reason = 'it is closed' if error.errno == errno.EBADF else error.strerror
                found = OSError(error.errno, reason, self.called)
                if not self.lasting:
                    self.failed = found
                    raise found from None
                if error.errno in FULL:
                    return size
                self.failed = found
            finally:
                writing = False
        return size


class Unbuffered(io.BufferedWriter):
    """Writes all of what it is given at once, as PYTHONUNBUFFERED asks."""

    def write(self, data: Any, /) -> int:
        size = super().write(data)
        self.flush()
        return size


def set_up_streams(lasting: bool) -> None:
    """Puts this process' streams in order. Streams that another program has put in their place are left alone."""
    occupy()
    absent = _absent()
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding='utf-8', closefd=False)
    if sys.stdout is sys.__stdout__:
        descriptor = -1 if absent[1] and not lasting else 1  # to write to -1 fails, as it is to
        sys.stdout = opened(Output(descriptor, OUTPUT, lasting), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = opened(Output(2, 'standard error', lasting=True), sys.stderr)


def occupy() -> None:
    """Has the null device take each descriptor that was closed from the start: before anything else here opens one."""
    for number in (number for number, closed in enumerate(_absent()) if closed):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)


def _absent() -> list[bool]:
    """Of standard input, output and error: whether it was closed when Python began."""
    return [stream is None for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__)]


def opened(output: Output, like: IO[str] | None) -> IO[str]:
    """A text stream to it, with the encoding and the buffers of another."""
    if like is not None:
        like.flush()
    through = getattr(like, 'write_through', False)
    return io.TextIOWrapper(
        Unbuffered(output) if through else io.BufferedWriter(output),
        encoding=getattr(like, 'encoding', None) or 'utf-8',
        errors='backslashreplace',
        line_buffering=getattr(like, 'line_buffering', output.called != OUTPUT),
        write_through=through,
    )


def moved(stream: IO[str], descriptor: int) -> IO[str]:
    """A text stream to a descriptor that does what another stream does: its encoding, its buffers, whether it lasts."""
    output = _output_of(stream)
    return opened(Output(descriptor, OUTPUT, output is not None and output.lasting), stream)


def _output_of(stream: IO[str]) -> Output | None:
    raw = getattr(getattr(stream, 'buffer', None), 'raw', None)
    return raw if isinstance(raw, Output) else None


def finish() -> OSError | None:
    """Writes what is pending. Returns why standard output has lost something, if it has."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if _output_of(stream) is None:
                return error
    return lost()


def lost() -> OSError | None:
    """Why standard output has lost something that counts, if it has: whoever wrote it may have taken no notice."""
    output = _output_of(sys.stdout)
    return output.failed if output is not None and not output.lasting else None


def say(text: str) -> None:
    """Writes to standard error past Python's buffers, which another thread may hold. Where nobody reads, it is dropped."""
    try:
        if sys.stdout.isatty():
            _put(sys.stdout.fileno(), b'\x1b[?25h\n')  # a progress bar hid the cursor
        if text:
            _put(2, f'{text}\n'.encode(errors='backslashreplace'))
    except (OSError, ValueError):
        return


def _put(descriptor: int, text: bytes) -> None:
    """Writes to a descriptor for as long as there is room within `MOMENT`."""
    ready = select.poll()
    ready.register(descriptor, select.POLLOUT)
    while text and ready.poll(MOMENT):
        text = text[os.write(descriptor, text[:AT_ONCE]) :]
