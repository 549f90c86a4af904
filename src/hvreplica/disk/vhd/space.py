"""Where the next block of a VHD goes: places that were given back, then the end of the file. Numbers, no I/O.

A place is a bitmap and the data behind it, put so that the data stands on 4 KiB, as Windows does. What lies
before the first block is never given away: writers keep things there that no specification names.

    free --take()--> used --release()--> released --begin_flush()--> in flight --end_flush()--> free

A place that was given back stays untouched until the flush that made its BAT entry's change durable has
ended: before that, a power cut would bring the old entry back, and with it the old bytes. Thread rule: all
calls under the owner's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk.extents import merge
from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.vhd_bat import ABSENT, VHD_BAT_ENTRY
from hvreplica.formats.vhd_footer import SECTOR_BYTES
from hvreplica.units import align_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.formats.vhd_bat import BlockGeometry

_DATA_ALIGNMENT_BYTES = 4096


class Taken(NamedTuple):
    """Places for new blocks, by where their bitmaps start. stale: those among them to be zeroed first."""

    offsets: NDArray[np.int64]
    stale: list[int]


def first_place(at: int, geometry: BlockGeometry) -> int:
    """Return the first place not before `at`: where its bitmap starts."""
    alignment = max(min(_DATA_ALIGNMENT_BYTES, geometry.block_bytes), SECTOR_BYTES)
    return align_up(at + geometry.bitmap_bytes, alignment) - geometry.bitmap_bytes


class Space:
    """The places of one file.

    end: behind the last of them, a multiple of 512; the footer stands there.
    """

    def __init__(
        self,
        geometry: BlockGeometry,
        *,
        bitmap_offsets: NDArray[np.int64],
        structures: NDArray[np.int64],
        end: int,
    ) -> None:
        """bitmap_offsets: sorted, of all blocks. structures: (file_offset, length) of what is no block."""
        self._geometry = geometry
        self.end = align_up(end, SECTOR_BYTES)
        self._clean: list[int] = []
        self._released: list[NDArray[np.int64]] = []
        self._gaps = self._find_gaps(bitmap_offsets, structures)
        self._cut_off = self._find_cut_off(bitmap_offsets, structures)

    def _find_cut_off(
        self, bitmap_offsets: NDArray[np.int64], structures: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the places that something else follows before their end: writers leave out what the last
        block has behind the end of the disk.
        """
        starts = np.sort(
            np.concatenate((bitmap_offsets, structures[:, 0], [self.end, np.iinfo(np.int64).max]))
        )
        following = starts[np.searchsorted(starts, bitmap_offsets, "right")]
        cut_off: NDArray[np.int64] = bitmap_offsets[following - bitmap_offsets < self._geometry.place_bytes]
        return cut_off

    def _find_gaps(self, bitmap_offsets: NDArray[np.int64], structures: NDArray[np.int64]) -> list[list[int]]:
        if not len(bitmap_offsets):
            return []
        places = np.full(len(bitmap_offsets), self._geometry.place_bytes, np.int64)
        busy = merge(np.concatenate((np.column_stack((bitmap_offsets, places)), structures)))
        starts, ends = busy[:, 0], busy.sum(axis=1)
        gaps = np.column_stack((ends, np.append(starts[1:], max(self.end, int(ends[-1])))))
        gaps = gaps[gaps[:, 0] > int(bitmap_offsets[0])]
        gaps = gaps[gaps[:, 1] - gaps[:, 0] >= self._geometry.place_bytes]
        # Taken from the end of the list: the first gap comes last.
        return [list(gap) for gap in gaps[::-1].tolist()]

    def take(self, count: int) -> Taken:
        """Return places for `count` blocks; the caller grows the file to hold a footer at `end` before it
        uses them.

        Raises: FieldOutOfRange where the BAT cannot name such a place.
        """
        offsets: list[int] = []
        stale: list[int] = []
        while len(offsets) < count and self._clean:
            offsets.append(self._clean.pop())
        while len(offsets) < count and self._gaps:
            gap = self._gaps[-1]
            place = first_place(gap[0], self._geometry)
            gap[0] = place + self._geometry.place_bytes
            if gap[0] > gap[1]:
                self._gaps.pop()
                continue
            offsets.append(place)
            stale.append(place)
        missing = count - len(offsets)
        if missing:
            first = first_place(self.end, self._geometry)
            step = first_place(first + self._geometry.place_bytes, self._geometry) - first
            last = first + (missing - 1) * step
            self._require_sector(last)
            offsets += range(first, last + 1, step)
            self.end = last + self._geometry.place_bytes
        return Taken(np.array(offsets, np.int64), stale)

    def _require_sector(self, file_offset: int) -> None:
        if file_offset // SECTOR_BYTES >= ABSENT:
            raise FieldOutOfRange(
                "the file is too long for its BAT to name another block",
                field="entry",
                expected=f"a sector below {ABSENT}",
                actual=file_offset // SECTOR_BYTES,
                spec=VHD_BAT_ENTRY.spec,
                hint="convert the disk into a new file, which leaves out the gaps",
            )

    def release(self, bitmap_offsets: NDArray[np.int64]) -> None:
        """Take back the places of blocks whose BAT entries were changed; usable after the next flush.

        One that is cut off has no room for a block, and what stands behind it is another's: it is left alone.
        """
        whole = bitmap_offsets[~np.isin(bitmap_offsets, self._cut_off)]
        if len(whole):
            self._released.append(whole)

    def begin_flush(self) -> NDArray[np.int64]:
        """Return the places whose BAT entries the flush makes durable, for end_flush()."""
        released, self._released = self._released, []
        return np.concatenate(released) if released else np.empty(0, np.int64)

    def end_flush(self, bitmap_offsets: NDArray[np.int64]) -> None:
        """Make places usable again; the caller has zeroed them."""
        self._clean.extend(np.sort(bitmap_offsets)[::-1].tolist())
