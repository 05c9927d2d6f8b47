"""An iterator run ahead of its consumer by one thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Yields what `items` yields, in order, computed up to `depth` items ahead in a daemon thread.

    An exception of `items` is raised again in the consumer, at its place in the order. `close` ends the thread; depth 0
    has none and computes in the consumer.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self._items = items
        self._closed = False
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
            self._thread = threading.Thread(target=self._fill, daemon=True, name="niblick-prefetch")
            self._thread.start()

    def _fill(self) -> None:
        try:
            for item in self._items:
                self._ready.put((item, None))
                if self._closed:
                    return
            self._ready.put((None, StopIteration()))
        except BaseException as error:
            self._ready.put((None, error))

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        if self._thread is None:
            return next(self._items)
        item, error = self._ready.get()
        if error is not None:
            self._closed = True
            raise error
        return item

    def close(self) -> None:
        """Ends the thread and drops what it had ready; the iterator is exhausted from here on."""
        self._closed = True
        while self._thread is not None and self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)  # a thread that waits for room sees `_closed` once it has some
            except queue.Empty:
                pass
