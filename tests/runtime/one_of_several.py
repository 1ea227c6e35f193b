"""A process among several that knows nothing of JAX: it starts quickly, and plays its part in how they end."""

import os
import signal
import subprocess
import threading
import time

from weft.runtime import rendezvous as peers


def play(number: int, count: int, box, action: str) -> None:
    """One of several processes that JAX knows nothing of; `box` carries what JAX would."""

    def exchange(message):
        if action == f'late {number}':
            time.sleep(2 * peers.LEAST)
        if number == 0:
            for _ in range(count - 1):
                box.put(message)
            return message
        return box.get(timeout=30)

    peers.join(number, count, exchange)
    assert peers.meet('begin', number * 10) == 0, 'all have the value of process 0'
    assert peers.at_first('work', lambda: [number, 'done']) == [0, 'done']
    match action.split():
        case ['leave']:
            time.sleep(0.2 * number)
            peers.leave()
            return
        case ['kill', who] if int(who) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        case ['fail', who] if int(who) == number:
            peers.fail(2, 'error: of its own')
        case ['stop', who] if int(who) == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        case ['busy', *then] if number == 0:  # in a library that keeps Python's lock: nothing here runs meanwhile
            with peers.busy():
                subprocess.Popen(
                    ['sh', '-c', f'kill -STOP {os.getpid()}; sleep {2 * peers.LEAST}; kill -CONT {os.getpid()}']
                )
                time.sleep(1.5 * peers.LEAST)
            if then:  # it stops once it is not busy any more
                os.kill(os.getpid(), signal.SIGSTOP)
            peers.fail(2, 'error: of its own')
        case ['late', _] if number == 0:
            peers.fail(2, 'error: of its own')
        case ['work', who] if (
            int(who) == number
        ):  # of Python, which gives the lock to others now and then, as tracing does
            until = time.monotonic() + 3 * peers.LEAST
            while time.monotonic() < until:
                sorted(range(10_000))
            peers.fail(2, 'error: of its own')
    peers.meet('never') if number else threading.Event().wait(60)
