"""The most anonymous memory that a block of code needs: what no file backs, sampled from the kernel (Linux)."""

import re
import threading
import time
from pathlib import Path


def anonymous() -> int:
    """Bytes of this process now."""
    return int(re.search(r'RssAnon:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024


class Peak:
    """Watches from `with` on; afterwards `bytes` is the most that was added to what there was before."""

    def __enter__(self) -> 'Peak':
        self.before = self.most = anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before
