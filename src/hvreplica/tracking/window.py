"""Cut a disk into windows, and find the ones that need to be looked at.

Memory does not grow with the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    ExtentSource = Callable[[int, int], npt.NDArray[np.int64]]

WINDOW_BYTES = 2 << 20  # the largest piece that is read, hashed, encoded and sent as one
_STEP_WINDOWS = 16_384  # how many windows are planned at once: 32 GiB of disk


def windows_with_data(sources: Sequence[ExtentSource], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each window in which any of `sources` reports an extent, in ascending order.

    Windows are WINDOW_BYTES long and aligned, but for the first (it begins at `start`) and the last (it stops
    at `end`). Each source is asked for extents (offset, length) within one planning step at a time.
    """
    step_bytes = _STEP_WINDOWS * WINDOW_BYTES
    at = start
    while at < end:
        base = at // WINDOW_BYTES * WINDOW_BYTES
        step_end = min(base + step_bytes, end)
        for index in _windows_touched(sources, at, step_end, base):
            offset = max(base + int(index) * WINDOW_BYTES, at)
            yield offset, min(base + (int(index) + 1) * WINDOW_BYTES, step_end) - offset
        at = step_end


def _windows_touched(
    sources: Sequence[ExtentSource], start: int, end: int, base: int
) -> npt.NDArray[np.int64]:
    edges = np.zeros(_STEP_WINDOWS + 1, np.int64)
    for source in sources:
        extents = source(start, end)
        first = (extents[:, 0] - base) // WINDOW_BYTES
        last = (extents[:, 0] + extents[:, 1] - 1 - base) // WINDOW_BYTES
        np.add.at(edges, first, 1)
        np.add.at(edges, last + 1, -1)
    return np.flatnonzero(np.cumsum(edges[:-1]))


def runs_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the runs of True as rows (first index, count)."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return np.column_stack((edges[::2], edges[1::2] - edges[::2]))
