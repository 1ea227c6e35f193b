"""A line between the processes of a run, beside JAX's own: who is there, who waits where, who was lost, who failed.

Process 0 listens, each other process keeps one connection to it, and a thread of each reads what comes. Over it go
meetings (a barrier that hands everyone a value of process 0; without a time limit, because process 0 may prepare data
for an hour) and the end of any process: one that fails says so and all others end with its exit code; one that
disappears is lost, and all others say so in one line and end with 75, whatever they are doing: the run can be started again.
A connection that ends without a word, or a host whose kernel answers no longer (TCP's keepalive), is a loss.

A process may be there and do nothing: stopped, or stuck on a disk. So a thread of each sends a beat every second or so, and one
that has not been heard for `patience()` seconds is as good as lost. The thread needs Python's lock for a moment only, which
compilers, collectives and tracing give it. A library that keeps the lock, as sentencepiece does while it learns, is used within
`busy`. A process that finds that it stood still itself counts the others' silence anew: their last word, or the end of their
connection, comes at once if they have ended without it.

Nothing here knows JAX. In a process that has joined nobody, every function does its work alone and at once.
"""

import contextlib
import hmac
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from weft.runtime import streams
from weft.runtime.errors import UserError, shown

SILENCE = 30  # seconds without an answer of a host's kernel after which its process is lost
PATIENCE = 50.0  # seconds without a beat after which a process hangs: JAX aborts some 60 seconds after it has stopped
BUSY = 3600.0  # such seconds of one that has said that it is busy
LEAST, MOST = 2.0, 86_400.0  # that may be asked for
JOINING = 2 * SILENCE  # seconds that process 0 waits for a connection
VARIABLE = 'WEFT_PATIENCE'
LOSS = 75  # exit code after a loss: EX_TEMPFAIL, try again
WORD = 5  # seconds in which the loss that made a collective fail is known here too

_peers: '_Peers | None' = None


def patience() -> float:
    """Seconds for which a process may give no sign of life: WEFT_PATIENCE, or `PATIENCE`."""
    said = os.environ.get(VARIABLE)
    if not said:
        return PATIENCE
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not LEAST <= seconds <= MOST:
        raise UserError(
            f'{VARIABLE} is {shown(said, 40, quoted=True)}: it must be a number of seconds, at least {LEAST:g} and at most '
            f'{MOST:g}, for which a process may give no sign of life'
        )
    return seconds


def join(
    process: int,
    count: int,
    exchange: Callable[[dict[str, Any]], dict[str, Any]],
    goodbye: Callable[[], object] = lambda: None,
) -> None:
    """Ties this process, number `process` of `count`, to the others.

    `exchange` gives every process the dict that process 0 puts in; `goodbye` is called once all are at their ends.
    Raises OSError where process 0 cannot be reached.
    """
    global _peers
    assert _peers is None, 'this process has joined already'
    _peers = _Peers(process, count, exchange, goodbye)


def several() -> bool:
    """Whether this process has joined others."""
    return _peers is not None


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _peers is None or _peers.process == 0


def meet(name: str, value: Any = None) -> Any:
    """Returns when all processes are here, with the value (of plain JSON) that process 0 brought."""
    return value if _peers is None else _peers.meet(name, value)


def at_first(name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives process 0, on all processes: it alone does it. Where it raises there, all processes end."""
    return meet(name, work() if first() else None)


def leave() -> None:
    """Waits until all processes are here: from now on none is missed. An orderly end."""
    if _peers is not None:
        _peers.leave()


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Within the block this process may give no sign of life for `BUSY` seconds: a library may keep Python's lock."""
    if _peers is None:
        yield
        return
    _peers.send({'busy': True})
    try:
        yield
    finally:
        _peers.send({'busy': False})


def fail(code: int, line: str) -> NoReturn:
    """Ends this process with `code`, and all others too; `line` says why, where nobody sees what this process printed."""
    if _peers is not None:
        _peers.say_and_close({'end': code, 'line': f'{_peers.name}: {line}'})
    os._exit(code)


def give_word(seconds: float = WORD) -> None:
    """Waits a little: this process may have failed only because another did, whose word is on its way and ends us first."""
    if _peers is not None:
        time.sleep(seconds)


class _Peers:
    def __init__(self, process: int, count: int, exchange: Callable[..., Any], goodbye: Callable[[], object]):
        self.process, self.count, self.goodbye = process, count, goodbye
        self.name = f'process {process} (host {socket.gethostname()})'
        self.patience = patience()
        self.changed = threading.Condition()
        self.came: dict[str, set[int]] = {}  # process 0: who is at a meeting
        self.values: dict[str, Any] = {}  # other processes: what a meeting gave
        self.left: set[int] = set()  # who has said goodbye
        self.links: dict[int, _Link] = {}
        self.ending, self.told = threading.Lock(), threading.Lock()
        if process == 0:
            self._listen(exchange)
        else:
            self._connect(exchange)
        self.beaten = time.monotonic()  # when this process gave its last sign of life
        for number, link in self.links.items():
            # Process 0 speaks once all have connected.
            link.heard = self.beaten + (JOINING if process else 0)
            threading.Thread(target=self._read, args=(number, link), name=f'peer {number}', daemon=True).start()
        threading.Thread(target=self._beat, name='beat', daemon=True).start()

    def _listen(self, exchange: Callable[..., Any]) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        with socket.create_server(
            ('', 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=self.count
        ) as server:
            server.settimeout(JOINING)
            word = os.urandom(16).hex()  # so that nobody else joins
            exchange({'hosts': _addresses(), 'port': server.getsockname()[1], 'word': word, 'name': self.name})
            while len(self.links) < self.count - 1:
                link = _Link(server.accept()[0])
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger
                    link.socket.settimeout(SILENCE)
                    hello = link.receive() or {}
                    if hmac.compare_digest(hello['word'], word) and 0 < hello['process'] < self.count:
                        link.name = hello['name']
                        link.ready()
                        self.links[hello['process']] = link
                        continue
                link.socket.close()

    def _connect(self, exchange: Callable[..., Any]) -> None:
        found = exchange({})
        errors = []
        for host in found['hosts']:
            try:
                link = _Link(socket.create_connection((host, found['port']), timeout=SILENCE / 3))
            except OSError as error:
                errors.append(f'{host}:{found["port"]}: {error}')
                continue
            link.name = found['name']
            link.send({'word': found['word'], 'process': self.process, 'name': self.name})
            link.ready()
            self.links[0] = link
            return
        raise OSError(f'process {self.process} cannot reach {found["name"]}: {"; ".join(errors)}')

    def _read(self, number: int, link: '_Link') -> None:
        while True:
            try:
                message = link.receive()
            except (OSError, ValueError):
                message = None
            if message is None:
                if number not in self.left:
                    self._end(_loss(f'{link.name} was lost'))
                return
            link.heard = time.monotonic()
            if 'beat' in message:
                continue
            if 'busy' in message:
                link.busy = message['busy']
                continue
            if 'end' in message:
                self._end(message)
            with self.changed:
                if 'bye' in message:
                    self.left.add(number)
                elif self.process == 0:
                    self.came.setdefault(message['meet'], set()).add(number)
                else:
                    self.values[message['meet']] = message['value']
                self.changed.notify_all()

    def _beat(self) -> None:
        """Gives signs of life, and ends the process where another gives none."""
        while True:
            time.sleep(min(1.0, self.patience / 8))
            now = time.monotonic()
            if now - self.beaten > self.patience / 2:  # this one stood still: it has heard nobody meanwhile
                for link in self.links.values():
                    link.heard = max(link.heard, now)
            self.beaten = now
            self.send({'beat': self.process})
            for number, link in self.links.items():
                silence = now - link.heard
                if number not in self.left and silence > (max(BUSY, self.patience) if link.busy else self.patience):
                    seconds = f'has given no sign of life for {silence:.0f} seconds'
                    self._end(_loss(f'{link.name} hangs: it {seconds}'))

    def meet(self, name: str, value: Any) -> Any:
        if self.process:
            self.links[0].send({'meet': name})
            with self.changed:
                self.changed.wait_for(lambda: name in self.values)
                return self.values.pop(name)
        with self.changed:
            self.changed.wait_for(lambda: len(self.came.get(name, ())) == self.count - 1)
            self.came.pop(name, None)
        self.send({'meet': name, 'value': value})
        return value

    def leave(self) -> None:
        self.meet('the end', None)
        self.goodbye()
        self.send({'bye': self.process})

    def send(self, message: dict[str, Any]) -> None:
        for link in self.links.values():
            with contextlib.suppress(OSError):  # a broken connection is its reader's matter
                link.send(message)

    def _end(self, message: dict[str, Any]) -> NoReturn:
        """Ends this process because another did. The first reason is the one that is told."""
        if not self.told.acquire(blocking=False):
            threading.Event().wait()
        self.left.update(self.links)  # who ends because of this is not lost
        with contextlib.suppress(Exception):
            # What process 0 had to say it has said; any other's output may be on a machine that nobody looks at.
            streams.say(message['line'] if 'loss' in message or self.process == 0 else '')
            if self.process == 0:
                self.say_and_close(message)
        os._exit(message['end'])

    def say_and_close(self, message: dict[str, Any]) -> None:
        """The last word: returns when the others have heard it, or after two seconds."""
        if not self.ending.acquire(blocking=False):
            return time.sleep(2)  # another thread is at it, and ends the process
        self.left.update(self.links)  # who ends because of this word is not lost
        self.send(message)
        # A process that ends with something unread resets its connections, and its last word may be lost with them.
        until = time.monotonic() + 2
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
        alive = [thread for thread in threading.enumerate() if thread.name.startswith('peer ')]
        for thread in alive:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return None


class _Link:
    """Messages, one line of JSON each, over a connection."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.file = connection.makefile('rb')
        self.sending = threading.Lock()
        self.name = ''
        self.heard = 0.0  # when the other process last said something
        self.busy = False  # it has said that it may be silent

    def ready(self) -> None:
        """From now on it may be silent for as long as the other host's kernel answers."""
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {'TCP_KEEPIDLE': 10, 'TCP_KEEPALIVE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': (SILENCE - 10) // 5}
        for option, value in {**options, 'TCP_USER_TIMEOUT': SILENCE * 1000}.items():
            if hasattr(socket, option):
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        with self.sending:
            self.socket.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> dict[str, Any] | None:
        """The next message; None after the last."""
        line = self.file.readline(1 << 20)
        return json.loads(line) if line.endswith(b'\n') else None


def _loss(what: str) -> dict[str, Any]:
    """The message that ends all processes, each with its line, for want of one."""
    line = f'error: {what}; started again, the run goes on from its last checkpoint'
    return {'end': LOSS, 'line': line, 'loss': True}


def _addresses() -> list[str]:
    """Under which names other hosts may reach this one, the likeliest first."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(('10.255.255.255', 1))  # sends nothing: it asks the kernel which address it would use
        found.append(probe.getsockname()[0])
    return [*found, socket.gethostname(), 'localhost']
