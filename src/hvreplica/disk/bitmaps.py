"""Sector bitmaps: which sectors of a partially present block count, page by page, loaded when asked for.

Pages are kept as numpy arrays; clean ones are dropped when there are many. Changed ones stay until their
owner has taken them at a flush and says that they are written: until then the file has them as they were
before. Bit order and place in the file are the format's.

Thread rule: all calls lock themselves; mark() and clear() of disjoint ranges may come from any thread.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import Pieces, sector_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_CLEAN_PAGE_COUNT_MAX = 4096
_LOOKUP_SECTOR_COUNT = 1 << 18
_LOOKUP_PIECE_COUNT = 1 << 12
_SHORT_SECTOR_COUNT_MAX = 1 << 10  # longer runs are set by themselves


class SectorBitmaps:
    """The bitmaps of one disk.

    sector_bytes: of the guest's disk. page_sectors: sectors of one page; page p has sectors from p *
    page_sectors on. msb_first: the bit order inside of a byte (VHD), else least significant first (VHDX).
    load: returns a page's bytes, uint8 (page_bytes,), owned by the caller; raises FormatError.
    """

    def __init__(
        self,
        *,
        sector_bytes: int,
        page_sectors: int,
        msb_first: bool,
        load: Callable[[int], NDArray[np.uint8]],
    ) -> None:
        self.sector_bytes = sector_bytes
        self.page_sectors = page_sectors
        self._msb_first = msb_first
        self._load = load
        self._pages: dict[int, NDArray[np.uint8]] = {}
        self._dirty: dict[int, NDArray[np.uint8]] = {}
        self._taken: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    @property
    def dirty_count(self) -> int:
        """How many pages were changed and not taken."""
        return len(self._dirty)

    def split(self, pieces: Pieces) -> tuple[Pieces, NDArray[np.bool_]]:
        """Return `pieces` cut where the bit changes, and for each part whether its sectors count."""
        parts: list[Pieces] = []
        flags: list[NDArray[np.bool_]] = []
        first = 0
        sectors = (pieces.disk_offset + pieces.length - 1) // self.sector_bytes
        totals = np.cumsum(sectors - pieces.disk_offset // self.sector_bytes + 1)
        while first < len(totals):
            done = int(totals[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(totals, done + _LOOKUP_SECTOR_COUNT, "right")))
            last = min(last, first + _LOOKUP_PIECE_COUNT)  # each may need a page of its own
            window = Pieces(*(column[first:last] for column in pieces))
            cut, counts = sector_runs(window, self.sector_bytes, self.lookup)
            parts.append(cut)
            flags.append(counts)
            first = last
        if not parts:
            return pieces, np.empty(0, bool)
        return Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True))), np.concatenate(
            flags
        )

    def lookup(self, sectors: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return the bits of `sectors`."""
        numbers = sectors // self.page_sectors
        wanted, which = np.unique(numbers, return_inverse=True)
        with self._lock:
            pages = np.stack([self._page(number) for number in wanted.tolist()])
        inside = sectors - numbers * self.page_sectors
        shifts = (inside & 7).astype(np.uint8)
        if self._msb_first:
            shifts = np.uint8(7) - shifts
        bits: NDArray[np.bool_] = ((pages[which.reshape(-1), inside >> 3] >> shifts) & np.uint8(1)).astype(
            bool
        )
        return bits

    def all_set(self, first_sector: int, count: int) -> bool:
        """Return whether all of `count` sectors from `first_sector` on count."""
        return self._every(first_sector, count, 0xFF)

    def none_set(self, first_sector: int, count: int) -> bool:
        """Return whether none of `count` sectors from `first_sector` on counts."""
        return self._every(first_sector, count, 0)

    def _every(self, first_sector: int, count: int, octet: int) -> bool:
        with self._lock:
            for number, first, last in self._parts(first_sector, count):
                page = self._page(number)
                inner = page[-(-first // 8) : last // 8]
                if (inner != octet).any():
                    return False
                edges = [
                    *range(first, min(-(-first // 8) * 8, last)),
                    *range(max(last // 8 * 8, first), last),
                ]
                if any((int(page[bit >> 3]) & self._bit(bit) != 0) != bool(octet) for bit in edges):
                    return False
        return True

    def mark(self, first_sector: int, count: int) -> None:
        """Make `count` sectors from `first_sector` on count."""
        self._change(first_sector, count, value=True)

    def mark_all(self, first_sectors: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Make counts[i] sectors from first_sectors[i] on count, for each i."""
        whole = ((first_sectors | counts) & 7 == 0) & (counts <= _SHORT_SECTOR_COUNT_MAX)
        if self.page_sectors % 8:
            whole[:] = False
        for first, count in zip(first_sectors[~whole].tolist(), counts[~whole].tolist(), strict=True):
            self.mark(first, count)
        if whole.any():
            self._mark_octets(first_sectors[whole] // 8, counts[whole] // 8)

    def _mark_octets(self, first: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Set whole bytes, many short runs at once: what the small writes of a guest come to."""
        starts = np.cumsum(counts) - counts
        octets = np.repeat(first - starts, counts) + np.arange(int(counts.sum()))
        numbers = octets // (self.page_sectors // 8)
        within = octets - numbers * (self.page_sectors // 8)
        order = np.argsort(numbers, kind="stable")
        numbers, within = numbers[order], within[order]
        heads = np.concatenate(([0], np.flatnonzero(np.diff(numbers)) + 1))
        with self._lock:
            for number, inside in zip(numbers[heads].tolist(), np.split(within, heads[1:]), strict=True):
                page = self._dirty[number] = self._page(number)
                page[inside] = 0xFF

    def clear(self, first_sector: int, count: int) -> None:
        """Make `count` sectors from `first_sector` on not count."""
        self._change(first_sector, count, value=False)

    def _change(self, first_sector: int, count: int, *, value: bool) -> None:
        with self._lock:
            for number, first, last in self._parts(first_sector, count):
                page = self._page(number)
                self._dirty[number] = page
                inner_first, inner_last = -(-first // 8), last // 8
                if inner_first < inner_last:
                    page[inner_first:inner_last] = 0xFF if value else 0
                edges = [*range(first, min(inner_first * 8, last)), *range(max(inner_last * 8, first), last)]
                for bit in edges:
                    if value:
                        page[bit >> 3] |= self._bit(bit)
                    else:
                        page[bit >> 3] &= 0xFF ^ self._bit(bit)

    def take_dirty(self) -> list[tuple[int, NDArray[np.uint8]]]:
        """Return (page number, copy) of the changed pages, in order, to be written before written()."""
        with self._lock:
            taken = [(number, page.copy()) for number, page in sorted(self._dirty.items())]
            self._taken.update(self._dirty)
            self._dirty.clear()
        return taken

    def written(self) -> None:
        """Say that the file has what was taken, so that it may be loaded again."""
        with self._lock:
            self._taken.clear()
            self._drop_clean()

    def _parts(self, first_sector: int, count: int) -> list[tuple[int, int, int]]:
        """Return (page, first bit, end bit) of the range, a row for each page."""
        parts = []
        end = first_sector + count
        while first_sector < end:
            number, first = divmod(first_sector, self.page_sectors)
            last = min(self.page_sectors, first + end - first_sector)
            parts.append((number, first, last))
            first_sector += last - first
        return parts

    def _bit(self, bit: int) -> int:
        return 0x80 >> (bit & 7) if self._msb_first else 1 << (bit & 7)

    def _page(self, number: int) -> NDArray[np.uint8]:
        page = self._pages.get(number)
        if page is None:
            self._drop_clean()
            page = self._pages[number] = self._load(number)
        return page

    def _drop_clean(self) -> None:
        if len(self._pages) >= _CLEAN_PAGE_COUNT_MAX + len(self._dirty) + len(self._taken):
            self._pages = {**self._taken, **self._dirty}
