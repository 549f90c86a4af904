"""Where the next block of a VHDX goes: gaps first, then the end of the file. Numbers only, no I/O.

    free --take()--> used --release()--> released --begin_flush()--> in flight --end_flush()--> free

A place that was given back stays untouched until the flush that made its BAT entry's change durable has
ended: before that, a power cut would bring the old entry back, and with it the old bytes. Thread rule: all
calls under the owner's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk.extents import merge
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Taken(NamedTuple):
    """Places for new blocks.

    stale: those among them that must be zeroed first. is_new: whether all lie behind the end of before, where
    they read as zeros whatever a power cut keeps.
    """

    offsets: NDArray[np.int64]
    stale: list[int]
    is_new: bool


class Space:
    """The places of one file.

    Used: int64 (n, 2) of (file_offset, length) of everything that holds its place.
    """

    def __init__(
        self, *, block_bytes: int, used: NDArray[np.int64], file_bytes: int, keep_tail: bool
    ) -> None:
        """keep_tail:

        The file must not become shorter (a fixed disk), so what lies behind the last use is a gap.
        """
        self._block_bytes = block_bytes
        busy = merge(used)
        ends = busy.sum(axis=1)
        self.end = align_up(int(ends[-1]), MIB)
        gaps = np.column_stack((ends[:-1], busy[1:, 0]))
        if keep_tail and file_bytes > self.end:
            gaps = np.concatenate((gaps, [[self.end, file_bytes // MIB * MIB]]))
            self.end = align_up(file_bytes, MIB)
        gaps[:, 0] = -(-gaps[:, 0] // MIB) * MIB
        # Taken from the end of the list: the first gap comes last.
        self._gaps = gaps[gaps[:, 1] - gaps[:, 0] >= block_bytes][::-1].tolist()
        self._clean: list[int] = []
        self._released: list[NDArray[np.int64]] = []

    def take(self, count: int) -> Taken:
        """Return places for `count` blocks; the caller grows the file to `end` before it uses them."""
        offsets: list[int] = []
        stale: list[int] = []
        while len(offsets) < count and self._clean:
            offsets.append(self._clean.pop())
        while len(offsets) < count and self._gaps:
            gap = self._gaps[-1]
            offsets.append(gap[0])
            stale.append(gap[0])
            gap[0] += self._block_bytes
            if gap[1] - gap[0] < self._block_bytes:
                self._gaps.pop()
        missing = count - len(offsets)
        is_new = not offsets
        appended = self.end + np.arange(missing, dtype=np.int64) * self._block_bytes
        self.end += missing * self._block_bytes
        return Taken(np.concatenate((np.array(offsets, np.int64), appended)), stale, is_new)

    def release(self, offsets: NDArray[np.int64]) -> None:
        """Take back the places of blocks whose BAT entries were changed; usable after the next flush."""
        if len(offsets):
            self._released.append(offsets)

    def begin_flush(self) -> NDArray[np.int64]:
        """Return the places whose BAT entries the flush makes durable, for end_flush()."""
        released, self._released = self._released, []
        return np.concatenate(released) if released else np.empty(0, np.int64)

    def ranges(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the file ranges of the blocks at `offsets`, merged, as int64 (n, 2)."""
        return merge(np.column_stack((offsets, np.full(len(offsets), self._block_bytes, np.int64))))

    def end_flush(self, offsets: NDArray[np.int64]) -> None:
        """Make places usable again; the caller has zeroed them."""
        self._clean.extend(np.sort(offsets)[::-1].tolist())
