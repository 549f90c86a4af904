"""Run one function over many items in a few threads, results in order, never far ahead of who takes them."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from numpy.typing import NDArray

WORKER_COUNT = 2
COPY_WINDOW_BYTES = 4 * MIB  # what one copy holds in memory
_AHEAD_COUNT = 2 * WORKER_COUNT

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) for each of `items`, in their order; up to WORKER_COUNT run at once.

    `items` is walked by the caller's thread, at most a few items ahead. An exception in `function` comes out
    where its result would have; then, or when the caller stops taking results, what was started ends first
    and the rest never starts.
    """
    with ThreadPoolExecutor(WORKER_COUNT, thread_name_prefix="hvreplica-disk") as pool:
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) >= _AHEAD_COUNT:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


class Scratch(threading.local):
    """Memory that each thread keeps between items: fresh pages would cost more than the copy into them."""

    def __init__(self, length_max: int) -> None:
        self._octets = np.empty(length_max, np.uint8)

    def take(self, length: int) -> NDArray[np.uint8]:
        """Return `length` bytes of no certain content; the thread's next call gives the same memory again."""
        return self._octets[:length]
