"""Ends a process that waits for ever."""

import os
import sys
import threading
import time
from collections.abc import Callable


def leave(line: str) -> None:
    """One line on stderr and the end of the process, without the teardown that would wait for other ranks."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


class Watchdog:
    """Calls `give_up(line())` once no `beat` has come for `patience_s` seconds, from a thread of its own.

    A rank that hangs leaves the others inside a collective or in the queue of the GPU, where no exception reaches them.
    A context manager: it watches from entry to exit.
    """

    def __init__(self, patience_s: float, line: Callable[[], str], give_up: Callable[[str], None] = leave) -> None:
        self._patience_s, self._line, self._give_up = patience_s, line, give_up
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="niblick-watchdog")

    def beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._patience_s / 4)):
            if time.monotonic() - self._last > self._patience_s:
                self._give_up(self._line())
                return

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
