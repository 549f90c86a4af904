"""Which bytes of a target have arrived: the proof that a transfer is whole.

A window is reserved before it is written, so that no two threads write the same bytes, and done afterwards.
Windows come in order but for what parallel connections shuffle, so the merged list stays short; its length is
bounded.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right

from hvreplica.errors import Overlap, ProtocolViolation, ResumeRefused

INTERVALS_MAX = 1 << 14  # apart from each other; an honest sender has as many as it has frames under way


class Coverage:
    """The windows of one target of `total_bytes`. Thread-safe."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._lock = threading.Lock()
        self._starts: list[int] = []  # of what is done; sorted, disjoint, never touching
        self._ends: list[int] = []
        self._reserved: dict[int, int] = {}  # start -> end of what is being written; one for each thread
        self._covered_bytes = 0

    @property
    def covered_bytes(self) -> int:
        """The bytes that are done, what was there at resume() included."""
        with self._lock:
            return self._covered_bytes

    @property
    def prefix_bytes(self) -> int:
        """The bytes from the start of the target that are done without a gap."""
        with self._lock:
            return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    def resume(self, position: int) -> None:
        """Take [0, position) as done. Raises: ResumeRefused once a window came."""
        with self._lock:
            if self._starts or self._reserved:
                raise ResumeRefused("a transfer can only be resumed before its first window")
            if position > 0:
                self._insert(0, position)

    def reserve(self, offset: int, length: int) -> None:
        """Begin a window; the caller has checked that it lies inside the target.

        Raises: Overlap if any of its bytes came before, ProtocolViolation if too many gaps are open.
        """
        end = offset + length
        with self._lock:
            index = bisect_right(self._starts, offset)
            hit = (index > 0 and self._ends[index - 1] > offset) or (
                index < len(self._starts) and self._starts[index] < end
            )
            if hit or any(start < end and offset < other_end for start, other_end in self._reserved.items()):
                raise Overlap(
                    "two windows of one transfer cover the same bytes", offset=offset, field="window_offset"
                )
            if len(self._starts) + len(self._reserved) >= INTERVALS_MAX:
                raise ProtocolViolation(
                    "the windows of a transfer leave too many gaps", expected=f"at most {INTERVALS_MAX}"
                )
            self._reserved[offset] = end

    def finish(self, offset: int, *, written: bool) -> None:
        """End the window reserved at `offset`; it counts if it was written, else it may come again."""
        with self._lock:
            end = self._reserved.pop(offset)
            if written:
                self._insert(offset, end)

    def first_gap(self) -> tuple[int, int] | None:
        """Return [start, end) of the first bytes that are missing; None where all came."""
        with self._lock:
            position = 0
            for start, end in zip(self._starts, self._ends, strict=True):
                if start > position:
                    return position, start
                position = end
            return None if position == self.total_bytes else (position, self.total_bytes)

    def _insert(self, start: int, end: int) -> None:
        self._covered_bytes += end - start
        low = bisect_left(self._ends, start)  # the first that ends at or behind our start
        high = bisect_right(self._starts, end)  # the first that starts behind our end
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
