"""Arithmetic on extents, vectorised: check, cut at block borders, merge, join, and walk a disk in windows.

Extents are int64 arrays of shape (n, 2) with rows (offset, length). Everything here is pure but
data_windows().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from hvreplica.errors import FieldOutOfRange
from hvreplica.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

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
    # Read as unsigned, a negative number is too large as well; and where the difference wraps around, the
    # offset has been found bad already.
    offsets, lengths = rows.view(np.uint64).T
    bad = (offsets > virtual_bytes) | (lengths > virtual_bytes - offsets)
    if np.count_nonzero(bad):
        offset, length = rows[int(np.argmax(bad))].tolist()
        raise beyond_end(offset, length, virtual_bytes=virtual_bytes, path=path)
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


def spans_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `rows` with their place in the concatenated data: (disk_offset, length, data_offset)."""
    return np.column_stack((rows, np.cumsum(rows[:, 1]) - rows[:, 1]))


def cut_at_blocks(rows: NDArray[np.int64], block_bytes: int) -> Pieces:
    """Return the parts of `rows` that lie in one block each, in order. Empty rows have no parts."""
    return cut_spans(spans_of(rows), block_bytes)


def cut_spans(spans: NDArray[np.int64], block_bytes: int) -> Pieces:
    """Return as cut_at_blocks(), for rows that have their place in the data with them."""
    spans = spans[spans[:, 1] > 0]
    rows, data_offsets = spans[:, :2], spans[:, 2]
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


def sector_runs(
    pieces: Pieces, sector_bytes: int, lookup: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
) -> tuple[Pieces, NDArray[np.bool_]]:
    """Cut `pieces` where the answer of `lookup` to the numbers of their sectors changes.

    Returns the parts, in order, and the answer for each. Memory grows with the number of sectors.
    """
    first = pieces.disk_offset // sector_bytes
    counts = (pieces.disk_offset + pieces.length - 1) // sector_bytes - first + 1
    owner = np.repeat(np.arange(len(counts)), counts)
    sectors = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    flags = lookup(sectors)
    breaks = (np.diff(owner) != 0) | (flags[1:] != flags[:-1])
    heads = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    tails = np.concatenate((heads[1:], [len(owner)])) - 1
    owner = owner[heads]
    starts = np.maximum(sectors[heads] * sector_bytes, pieces.disk_offset[owner])
    ends = np.minimum((sectors[tails] + 1) * sector_bytes, (pieces.disk_offset + pieces.length)[owner])
    data_offsets = pieces.data_offset[owner] + starts - pieces.disk_offset[owner]
    return Pieces(starts, ends - starts, data_offsets, pieces.block[owner]), flags[heads]


def clipped(spans: NDArray[np.int64], end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the parts of `spans` before `end` and those behind it."""
    if not len(spans) or int((spans[:, 0] + spans[:, 1]).max()) <= end:
        return spans, spans[:0]
    inside = np.clip(end - spans[:, 0], 0, spans[:, 1])
    before = np.column_stack((spans[:, 0], inside, spans[:, 2]))
    behind = np.column_stack((spans[:, 0] + inside, spans[:, 1] - inside, spans[:, 2] + inside))
    return before[before[:, 1] > 0], behind[behind[:, 1] > 0]


def intersection(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sorted disjoint extents that both `a` and `b`, each sorted and disjoint, cover."""
    if not len(a) or not len(b):
        return NO_EXTENTS
    edges = np.unique(np.concatenate((a[:, 0], a.sum(axis=1), b[:, 0], b.sum(axis=1))))
    starts = edges[:-1]
    both = _covers(a, starts) & _covers(b, starts)
    return merge(np.column_stack((starts, np.diff(edges)))[both])


def difference(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sorted disjoint extents that `a` covers and `b` does not; each is sorted and disjoint."""
    if not len(a) or not len(b):
        return a
    edges = np.unique(np.concatenate((a[:, 0], a.sum(axis=1), b[:, 0], b.sum(axis=1))))
    starts = edges[:-1]
    left = _covers(a, starts) & ~_covers(b, starts)
    return merge(np.column_stack((starts, np.diff(edges)))[left])


def _covers(rows: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    owner = np.searchsorted(rows[:, 0], starts, "right") - 1
    covered: NDArray[np.bool_] = (owner >= 0) & (starts < rows.sum(axis=1)[owner])
    return covered


def runs_of(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the runs of consecutive numbers."""
    if not len(numbers):
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    heads = numbers[np.concatenate(([0], breaks + 1))]
    tails = numbers[np.concatenate((breaks, [len(numbers) - 1]))] + 1
    yield from zip(heads.tolist(), tails.tolist(), strict=True)


def true_runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def touched_blocks(rows: NDArray[np.int64], block_bytes: int) -> NDArray[np.int64]:
    """Return the blocks that `rows` touch, in order; a block may be named more than once."""
    if not rows[:, 1].all():
        rows = rows[rows[:, 1] > 0]  # one without bytes may stand behind the last block
    first = rows[:, 0] // block_bytes
    last = (rows[:, 0] + rows[:, 1] - 1) // block_bytes
    if not np.count_nonzero(first != last):
        return first
    if (last - first <= 1).all():
        return np.concatenate((first, last))
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


class Mapped(Protocol):
    """What data_windows() needs of a disk."""

    def extents(self, start: int, end: int) -> NDArray[Any]:
        """Return the ranges that may hold data, sorted and disjoint."""
        ...


def data_windows(disk: Mapped, start: int, end: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
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
