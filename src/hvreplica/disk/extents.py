"""Arithmetic on extents, vectorised: check, cut at block borders, merge, join, and walk a disk in windows.

Extents are int64 arrays of shape (n, 2) with rows (offset, length). Everything here is pure but
data_windows().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hvreplica.errors import FieldOutOfRange
from hvreplica.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.disk.disk import Disk

NO_EXTENTS = np.empty((0, 2), np.int64)
_WINDOW_BYTES_MIN = GIB
# Empty windows double up to here; more would let one dense window after a long hole hold too many extents.
_WINDOW_BYTES_MAX = 64 * GIB
_GRAIN_BYTES = 4096


class Pieces(NamedTuple):
    """Extents cut at block borders:

    Four int64 arrays of one length. data_offset: into the concatenated data.
    """

    disk_offset: NDArray[np.int64]
    length: NDArray[np.int64]
    data_offset: NDArray[np.int64]
    block: NDArray[np.int64]


def checked_rows(extents: NDArray[Any], *, virtual_bytes: int, path: Path) -> NDArray[np.int64]:
    """Return `extents` as a C-contiguous int64 array.

    Raises: FieldOutOfRange for one beyond the disk's end.
    """
    rows = np.asarray(extents)
    if rows.size == 0:
        return NO_EXTENTS
    if rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype.kind not in "iu" or rows.dtype.itemsize != 8:
        message = f"extents must be int64 or uint64 of shape (n, 2), not {rows.dtype} of shape {rows.shape}"
        raise TypeError(message)
    rows = np.ascontiguousarray(rows).view(np.int64)
    offsets, lengths = rows[:, 0], rows[:, 1]
    # Compared without a sum, which could wrap around.
    bad = (offsets < 0) | (lengths < 0) | (offsets > virtual_bytes) | (lengths > virtual_bytes - offsets)
    if bad.any():
        at = int(np.argmax(bad))
        raise beyond_end(int(offsets[at]), int(lengths[at]), virtual_bytes=virtual_bytes, path=path)
    return rows


def beyond_end(disk_offset: int, length: int, *, virtual_bytes: int, path: Path) -> FieldOutOfRange:
    """Return the error of a range that is not inside the disk."""
    return FieldOutOfRange(
        "a range lies beyond the end of the disk",
        path=path,
        field="extent",
        expected=f"within {virtual_bytes} bytes",
        actual=f"{length} bytes at disk offset {disk_offset}",
    )


def cut_at_blocks(rows: NDArray[np.int64], block_bytes: int) -> Pieces:
    """Return the parts of `rows` that lie in one block each, in order. Empty rows have no parts."""
    data_offsets = np.cumsum(rows[:, 1]) - rows[:, 1]
    chosen = rows[:, 1] > 0
    rows, data_offsets = rows[chosen], data_offsets[chosen]
    offsets, ends = rows[:, 0], rows[:, 0] + rows[:, 1]
    first = offsets // block_bytes
    counts = (ends - 1) // block_bytes - first + 1
    if (counts == 1).all():
        return Pieces(offsets, rows[:, 1], data_offsets, first)
    owner = np.repeat(np.arange(len(rows)), counts)
    block = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.maximum(offsets[owner], block * block_bytes)
    length = np.minimum(ends[owner], (block + 1) * block_bytes) - start
    return Pieces(start, length, data_offsets[owner] + start - offsets[owner], block)


def touched_blocks(rows: NDArray[np.int64], block_bytes: int) -> NDArray[np.int64]:
    """Return the blocks that `rows` touch, in order; a block may be named more than once."""
    first = rows[:, 0] // block_bytes
    last = (rows[:, 0] + np.maximum(rows[:, 1], 1) - 1) // block_bytes
    if (last - first <= 1).all():
        return first if np.array_equal(first, last) else np.concatenate((first, last))
    return cut_at_blocks(rows, block_bytes).block


def merge(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return sorted disjoint extents that cover the same bytes as `rows`."""
    rows = rows[rows[:, 1] > 0]
    if len(rows) < 2:
        return rows
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    starts = rows[:, 0]
    ends = np.maximum.accumulate(starts + rows[:, 1])
    heads = np.flatnonzero(np.concatenate(([True], starts[1:] > ends[:-1])))
    tails = np.concatenate((heads[1:] - 1, [len(rows) - 1]))
    return np.column_stack((starts[heads], ends[tails] - starts[heads]))


def union(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return sorted disjoint extents that cover what `a` or `b` covers."""
    return merge(np.concatenate((a, b)))


def widened(rows: NDArray[np.int64], *, start: int, end: int) -> NDArray[np.int64]:
    """Return `rows` grown to whole 4 KiB grains, clipped to start..end and merged."""
    if not len(rows):
        return rows
    starts = np.maximum(rows[:, 0] // _GRAIN_BYTES * _GRAIN_BYTES, start)
    ends = np.minimum(-(-(rows[:, 0] + rows[:, 1]) // _GRAIN_BYTES) * _GRAIN_BYTES, end)
    return merge(np.column_stack((starts, ends - starts)))


def split_to(rows: NDArray[np.int64], length_max: int) -> NDArray[np.int64]:
    """Return `rows` cut at multiples of `length_max`, so that none is longer."""
    pieces = cut_at_blocks(rows, length_max)
    return np.column_stack((pieces.disk_offset, pieces.length))


def batches(rows: NDArray[np.int64], batch_bytes: int) -> Iterator[NDArray[np.int64]]:
    """Yield `rows` in order, cut and grouped so that each group has at most `batch_bytes` bytes in all."""
    rows = split_to(rows, batch_bytes)
    totals = np.cumsum(rows[:, 1])
    first = 0
    while first < len(rows):
        done = int(totals[first - 1]) if first else 0
        last = int(np.searchsorted(totals, done + batch_bytes, "right"))
        yield rows[first:last]
        first = last


def select_runs(rows: NDArray[np.int64], runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the parts of `rows` whose place in the concatenated data lies in `runs`, in order.

    runs: rows (data_offset, length), sorted and disjoint, within the data.
    """
    ends = np.cumsum(rows[:, 1])
    run_ends = runs[:, 0] + runs[:, 1]
    edges = np.unique(np.concatenate((runs[:, 0], run_ends, ends)))
    edges = edges[:-1] if len(edges) and edges[-1] == ends[-1] else edges
    following = np.concatenate((edges[1:], ends[-1:]))
    owner = np.searchsorted(runs[:, 0], edges, "right") - 1
    inside = (owner >= 0) & (edges < run_ends[owner])
    starts, lengths = edges[inside], (following - edges)[inside]
    row = np.searchsorted(ends, starts, "right")
    return np.column_stack((rows[row, 0] + starts - (ends - rows[:, 1])[row], lengths))


def data_windows(disk: Disk, start: int, end: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Yield (start, end, extents) of windows that tile start..end.

    Windows without data grow, to cross holes fast.
    """
    window_bytes = _WINDOW_BYTES_MIN
    while start < end:
        stop = min(end, start + window_bytes)
        rows = disk.extents(start, stop)
        yield start, stop, rows
        window_bytes = _WINDOW_BYTES_MIN if len(rows) else min(window_bytes * 2, _WINDOW_BYTES_MAX)
        start = stop
