"""The digest of what a disk holds: one number for all of it, that follows each change of a part.

    digest(disk) = the sum, in two words of 64 bits, of mix(XXH3-128 of a page, its number) over all pages

A sum knows no order: a disk can be read in any pieces, and what a change does to the digest is the sum of the
new pages it touched less that of the old ones. A page has 4 KiB. Pages of zeros count nothing and a short
last page counts as if zeros followed, so the digest does not depend on the size of the disk. It finds damage;
it does not prove anything against someone who chooses what to write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import batches, widened
from hvreplica.disk.parallel import map_ordered
from hvreplica.errors import FieldOutOfRange
from hvreplica.native import PAGE_BYTES
from hvreplica.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray
    from typing_extensions import Buffer

_WORD = 1 << 64
_TEXT = re.compile("[0-9a-f]{32}")
_WINDOW_BYTES = 4 << 20  # read at a time
_LONG_BYTES = 16 << 20  # from here on a look at where data is costs less than reading zeros
_SEARCH_BYTES = 4 << 30  # of the disk, for each look at where data is


@dataclass(frozen=True, slots=True)
class Digest:
    """A sum over pages, or the difference of two. Digest() is that of zeros."""

    low: int = 0
    high: int = 0

    def __add__(self, other: Digest) -> Digest:
        return Digest((self.low + other.low) % _WORD, (self.high + other.high) % _WORD)

    def __sub__(self, other: Digest) -> Digest:
        return Digest((self.low - other.low) % _WORD, (self.high - other.high) % _WORD)

    def __neg__(self) -> Digest:
        return Digest() - self

    def __bool__(self) -> bool:
        return bool(self.low or self.high)

    def hex(self) -> str:
        """Return 32 hexadecimal digits, the high word first."""
        return f"{self.high:016x}{self.low:016x}"

    @classmethod
    def of_hex(cls, text: str) -> Digest:
        """Return what hex() gave. Raises: FieldOutOfRange."""
        if not _TEXT.fullmatch(text):
            raise FieldOutOfRange(
                "this is no digest", field="digest", expected="32 hexadecimal digits", actual=text[:64]
            )
        return cls(int(text[16:], 16), int(text[:16], 16))

    @classmethod
    def of_extents(cls, data: Buffer, extents: NDArray[Any]) -> Digest:
        """Return that of extents whose bytes are in `data`, one after another; each begins with a page."""
        return cls(*native.extents_digest(data, extents))


NO_DIGEST = Digest()  # of zeros, and of no pages


class Readable(Protocol):
    """What is needed of a disk here."""

    @property
    def virtual_bytes(self) -> int:
        """The guest's size of the disk."""
        ...

    def read_extents(self, extents: NDArray[Any], out: Buffer) -> None:
        """Fill `out` with the extents' bytes, one after the other."""
        ...

    def extents(self, start: int, end: int) -> NDArray[Any]:
        """Return the ranges that may hold data, sorted and disjoint."""
        ...


class DigestReader:
    """Reads parts of one disk for their digest, two windows at a time. One owner.

    on_read: told how many bytes were read, after each window.
    """

    def __init__(self, disk: Readable, *, on_read: Callable[[int], None] = lambda _: None) -> None:
        self._disk = disk
        self._on_read = on_read
        self._free: list[NDArray[np.uint8]] = []  # windows that nobody uses now; lists take many threads

    def of_extents(self, extents: NDArray[Any]) -> Digest:
        """Return that of all pages that the extents touch, each counted once.

        extents: (disk_offset, length), sorted and disjoint; what lies beyond the end of the disk counts as
        zeros.
        """
        rows = pages_of(extents, self._disk.virtual_bytes)
        is_long = rows[:, 1] >= _LONG_BYTES
        total = self._sum(rows[~is_long])
        for start, length in rows[is_long].tolist():
            total += self.of_range(start, start + length)
        return total

    def of_range(self, start: int, end: int) -> Digest:
        """Return that of the pages that [start, end) touches; reads only where data may be."""
        total = Digest()
        stop = min(align_up(end, PAGE_BYTES), self._disk.virtual_bytes)
        position = align_down(start, PAGE_BYTES)
        while position < stop:
            piece_end = min(position + _SEARCH_BYTES, stop)
            total += self._sum(self._pages_with_data(position, piece_end))
            position = piece_end
        return total

    def of_some(self, start: int, bytes_max: int) -> tuple[Digest, int, int]:
        """Return the digest of some pages from `start` on, where they end, and how many bytes were read.

        start: of a page. Reads up to `bytes_max`, at least a window, or to the end of the disk; holes are
        passed for nothing.
        """
        total, done_bytes, position = Digest(), 0, start
        while position < self._disk.virtual_bytes:
            end = min(position + _SEARCH_BYTES, self._disk.virtual_bytes)
            for part in batches(self._pages_with_data(position, end), _WINDOW_BYTES):
                total += self._read(part)
                done_bytes += int(part[:, 1].sum())
                if done_bytes >= bytes_max:
                    return total, int(part[-1].sum()), done_bytes
            position = end
        return total, position, done_bytes

    def _pages_with_data(self, start: int, end: int) -> NDArray[np.int64]:
        """Return the pages of [start, end), where a page begins, that may hold data."""
        return pages_of(self._disk.extents(start, end), end)

    def _sum(self, extents: NDArray[np.int64]) -> Digest:
        total = Digest()
        if not len(extents):
            return total
        for digest, length in map_ordered(self._read_counted, batches(extents, _WINDOW_BYTES)):
            total += digest
            self._on_read(length)
        return total

    def _read_counted(self, extents: NDArray[np.int64]) -> tuple[Digest, int]:
        length = int(extents[:, 1].sum())
        try:
            window = self._free.pop()
        except IndexError:
            window = np.empty(_WINDOW_BYTES, np.uint8)
        self._disk.read_extents(extents, window[:length].data)
        digest = Digest.of_extents(window[:length].data, extents)
        self._free.append(window)
        return digest, length

    def _read(self, extents: NDArray[np.int64]) -> Digest:
        digest, length = self._read_counted(extents)
        self._on_read(length)
        return digest


def digest_of(disk: Readable, *, on_read: Callable[[int], None] = lambda _: None) -> Digest:
    """Return the digest of a whole disk; reads all of it that may hold data."""
    return DigestReader(disk, on_read=on_read).of_range(0, disk.virtual_bytes)


def pages_of(extents: NDArray[Any], disk_bytes: int) -> NDArray[np.int64]:
    """Return sorted extents made whole pages, joined where they touch, and cut where the disk ends.

    By their pages: a range that a shorter disk no longer has may begin in a page that it has.
    """
    return widened(np.asarray(extents).astype(np.int64).reshape(-1, 2), start=0, end=disk_bytes)
