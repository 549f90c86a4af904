"""Which parts of a disk's blocks its file holds, and which are holes in it.

A file system that is asked where data ends walks on to that end, wherever the block ends that is meant. So
blocks are asked for in the order of the file, neighbours together, and never one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import merge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.files import BlockFile


_GAP_BYTES = 4096  # between the blocks of a VHD stand their bitmaps


def held_parts(file: BlockFile, ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the parts of `ranges` that are no holes in `file`, as rows of the same kind in file order.

    ranges: int64 (n, 3) with rows (disk_offset, length, file_offset).
    """
    ranges = ranges[np.argsort(ranges[:, 2], kind="stable")]
    asked = merge(ranges[:, [2, 1]] + np.array([0, _GAP_BYTES])).tolist()
    found = [row for start, length in asked for row in file.data_extents(start, start + length)]
    if not found:
        return ranges[:0]
    held = np.array(found, np.int64)
    held_ends = held[:, 0] + held[:, 1]
    starts, ends = ranges[:, 2], ranges[:, 2] + ranges[:, 1]
    first = np.searchsorted(held_ends, starts, "right")
    counts = np.searchsorted(held[:, 0], ends, "left") - first
    owner = np.repeat(np.arange(len(ranges)), counts)
    index = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    low = np.maximum(starts[owner], held[index, 0])
    high = np.minimum(ends[owner], held_ends[index])
    return np.column_stack((ranges[owner, 0] + low - starts[owner], high - low, low))
