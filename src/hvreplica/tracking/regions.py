"""Sets of regions as bitmaps, least significant bit first: windows of them, and back to extents. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import merge
from hvreplica.formats.journal import REGION_BYTES, regions_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Window(NamedTuple):
    """Regions as a part of a bitmap and its place there, in bytes. first, end: regions around all of them."""

    place: slice
    bits: NDArray[np.uint8]
    first: int
    end: int


def empty_bitmap(bitmap_bytes: int) -> NDArray[np.uint8]:
    """Return a bitmap without marks."""
    return np.zeros(bitmap_bytes, np.uint8)


def grown_bitmap(bitmap: NDArray[np.uint8], bitmap_bytes: int) -> NDArray[np.uint8]:
    """Return `bitmap` with at least so many bytes, new ones without marks."""
    return np.concatenate((bitmap, empty_bitmap(max(bitmap_bytes - len(bitmap), 0))))


def window_of(runs: NDArray[np.int64]) -> Window:
    """Return the regions of `runs`, int64 (n, 2) of (first, count), n > 0 and counts too."""
    runs = merge(runs)
    first, end = int(runs[0, 0]), int(runs[-1].sum())
    place = slice(first // 8, (end - 1) // 8 + 1)
    bits = empty_bitmap(place.stop - place.start)
    for region, count in runs.tolist():
        native.bitmap_set(bits, region - place.start * 8, count)
    return Window(place, bits, first, end)


def set_before(bitmap: NDArray[np.uint8], region: int, *, count_max: int) -> int:
    """Return how many regions right before `region` are set without a gap, at most `count_max`."""
    low = max(region - count_max, 0) // 8
    count = region - low * 8
    flags = np.unpackbits(bitmap[low : region // 8 + 1], bitorder="little")[:count]
    gaps = np.flatnonzero(flags == 0)
    return min(count - (int(gaps[-1]) + 1 if len(gaps) else 0), count_max)


def extents_of(bitmap: NDArray[np.uint8], virtual_bytes: int) -> NDArray[np.int64]:
    """Return what the set regions cover of a disk.

    int64 (n, 2) of (disk_offset, length), bytes; sorted, merged, clipped.
    """
    rows = native.bitmap_runs(bitmap, regions_of(virtual_bytes)) * REGION_BYTES
    if len(rows):
        rows[-1, 1] = min(int(rows[-1].sum()), virtual_bytes) - rows[-1, 0]
    return rows
