"""Work that goes on beside a script's main thread, and that nobody waits for where the script ends by a mistake."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

_begun: list[Future[Any]] = []


def submit(executor: Executor, work: Callable[[], Any]) -> Future[Any]:
    """Has an executor do it; what went wrong comes with the result."""
    found = executor.submit(work)
    _begun[:] = [*(one for one in _begun if not one.done()), found]
    return found


def under_way() -> bool:
    """Whether any of it is not done: the interpreter would wait for it at its end."""
    return any(not one.done() for one in _begun)
