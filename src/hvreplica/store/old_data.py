"""Read what a disk holds in many ranges and append it to an undo part, in the order of the disk.

Short ranges are read many at a time, ahead of the writer and in two threads. Long ones are asked first where
the disk holds data at all, so that terabytes of nothing cost entries and no reading. Memory is a few steps of
STEP_BYTES, whatever was touched. What is read is counted for the digest of the disk on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk.extents import batches, clipped, data_windows, spans_of
from hvreplica.disk.parallel import map_ordered
from hvreplica.native import PAGE_BYTES
from hvreplica.store.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.hrl import LogWriter
    from hvreplica.store.digest import Readable

STEP_BYTES = 1 << 20  # stays within a processor's own cache between the read and the write
_LONG_BYTES = 16 << 20  # from here on a look at the disk's own map is cheaper than reading zeros

_Step = tuple["NDArray[np.int64]", "NDArray[np.uint8]", "Digest | None"]


class OldPages(NamedTuple):
    """What was read for an undo part, of the pages before a given one. digest: None if they are not whole."""

    extents: NDArray[np.int64]
    digest: Digest | None


def append_old(
    writer: LogWriter, disk: Readable, extents: NDArray[np.int64], *, digest_end: int = 0
) -> OldPages:
    """Append what `disk` holds in `extents`, sorted and disjoint; beyond the end of the disk are zeros.

    digest_end: where a page begins; what is read before it is counted while it is in memory.
    """
    inside, behind = clipped(spans_of(extents), disk.virtual_bytes)
    rows = np.ascontiguousarray(inside[:, :2])
    appender = _Appender(writer, disk, digest_end)
    appender.run(rows)
    for disk_offset, length in behind[:, :2].tolist():
        writer.append_zeroes(disk_offset, length)
    return OldPages(_before(rows, digest_end), appender.digest)


def _before(rows: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    """Return the rows, sorted and disjoint, as far as they lie before `end`."""
    kept = rows[rows[:, 0] < end]
    return np.column_stack((kept[:, 0], np.minimum(kept[:, 1], end - kept[:, 0])))


class _Appender:
    def __init__(self, writer: LogWriter, disk: Readable, digest_end: int) -> None:
        self.digest: Digest | None = Digest()
        self._digest_end = digest_end
        self._writer = writer
        self._disk = disk
        self._free: list[NDArray[np.uint8]] = []  # steps that nobody uses now; lists take many threads

    def run(self, extents: NDArray[np.int64]) -> None:
        is_long = extents[:, 1] >= _LONG_BYTES
        first = 0
        for at in np.flatnonzero(is_long).tolist():
            self._append(extents[first:at])
            start, length = extents[at].tolist()
            self._append_long(start, start + length)
            first = at + 1
        self._append(extents[first:])

    def _append_long(self, start: int, end: int) -> None:
        done = start
        for _, _, rows in data_windows(self._disk, start, end):
            for disk_offset, length in rows.tolist():
                self._append_zeroes(done, disk_offset)
                self._append(np.array([[disk_offset, length]], np.int64))
                done = disk_offset + length
        self._append_zeroes(done, end)

    def _append_zeroes(self, start: int, end: int) -> None:
        if end > start:
            self._writer.append_zeroes(start, end - start)

    def _append(self, extents: NDArray[np.int64]) -> None:
        for rows, buffer, digest in self._read(extents):
            self.digest = None if digest is None or self.digest is None else self.digest + digest
            self._writer.append(rows, memoryview(buffer)[: int(rows[:, 1].sum())], holes=True)
            self._free.append(buffer)

    def _read(self, extents: NDArray[np.int64]) -> Iterator[_Step]:
        if not len(extents):
            return iter(())
        if int(extents[:, 1].sum()) <= STEP_BYTES:
            return iter((self._read_step(extents),))
        return map_ordered(self._read_step, batches(extents, STEP_BYTES))

    def _read_step(self, rows: NDArray[np.int64]) -> _Step:
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(STEP_BYTES, np.uint8)
        self._disk.read_extents(rows, buffer[: int(rows[:, 1].sum())])
        return rows, buffer, self._digest_of(rows, buffer)

    def _digest_of(self, rows: NDArray[np.int64], buffer: NDArray[np.uint8]) -> Digest | None:
        """Return the digest of the pages before the end; None where one is not read as a whole."""
        kept = _before(rows, self._digest_end)
        ends = kept.sum(axis=1)
        if (kept[:, 0] % PAGE_BYTES).any() or (ends % PAGE_BYTES).any():
            return None
        if not len(kept):
            return Digest()
        return Digest.of_extents(buffer[: int(kept[:, 1].sum())].data, kept)
