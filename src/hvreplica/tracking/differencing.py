"""Change by allocation: what a differencing disk holds is what changed on the disk below it.

    child   | data | parent | zeros | parent |      read, or known
    base    |       b e l o w   i t           |      never read, but to leave out what is equal

Above the base there may be one layer or several; a newer one hides what it covers. Zeros that a layer says it
has, and zeros met in its data, become zeros of the sink. Where a layer ends before the base does, its guest
saw zeros there, and so they are changes as well. What lies behind the end of the base is zeros in a base that
is grown: only data there is a change.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica import native
from hvreplica.disk.chain import parent_of, read_layers
from hvreplica.disk.extents import batches, data_windows, select_runs
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.tracking.compare import clipped, gather
from hvreplica.tracking.window import runs_of
from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from hvreplica.disk import Disk
    from hvreplica.tracking.compare import ChangeSink

_BATCH_BYTES = MIB
_GRAIN_BYTES = 4096  # the smallest run of zeros, or of what is equal, that is worth an entry of its own
_SECTOR_BYTES = 512  # the unit of a sink
_RANGE_COUNT = 256  # ranges of the child that are looked at together


class DifferencingDisk:
    """A ChangeSource for one differencing disk and a disk below it; both stay as they are meanwhile.

    What goes into the sink makes the base, grown to the child's size, read as the child; each place is told
    at most once. skip_equal: read the base too, and leave out the grains of 4 KiB in which both are equal.
    """

    def __init__(self, child: Disk, base: Disk, *, skip_equal: bool = False) -> None:
        """Take a child and one of its parents, as the child's chain has it open."""
        self._child = child
        self._base = base
        self._skip_equal = skip_equal
        self._new = Scratch(_BATCH_BYTES)
        self._old = Scratch(_BATCH_BYTES)

    def changes_into(self, sink: ChangeSink, *, on_read: Callable[[int], None]) -> int:
        def perform(work: _Work) -> tuple[int, int]:
            return int(work.rows[:, 1].sum()), self._perform(work, sink)

        changed = 0
        for looked_at, changed_bytes in map_ordered(perform, self._all_work()):
            changed += changed_bytes
            on_read(looked_at)
        return changed

    def _all_work(self) -> Iterator[_Work]:
        ranges = _own_ranges(self._child, self._base)
        while some := list(itertools.islice(ranges, _RANGE_COUNT)):
            for is_data in (True, False):
                rows = [[start, end - start] for start, end, holds in some if holds == is_data]
                if not rows:
                    continue
                found = np.array(rows, np.int64)
                if is_data:
                    yield from (_Work(batch, is_data=True) for batch in batches(found, _BATCH_BYTES))
                elif self._skip_equal:
                    yield from self._zeros_over_data(found)
                else:
                    yield _Work(found, is_data=False)

    def _zeros_over_data(self, rows: NDArray[np.int64]) -> Iterator[_Work]:
        """Yield the parts of `rows` for which the base may hold something else than zeros."""
        for start, length in rows.tolist():
            for _, _, held in data_windows(self._base, start, start + length):
                yield from (_Work(batch, is_data=False) for batch in batches(held, _BATCH_BYTES))

    def _perform(self, work: _Work, sink: ChangeSink) -> int:
        """Tell the sink of one piece of work; return the bytes told."""
        if not work.is_data:
            return self._zero(work.rows, sink)
        length = int(work.rows[:, 1].sum())
        new = self._new.take(length)
        self._child.read_extents(work.rows, new.data)
        runs = native.data_runs(new.data, _GRAIN_BYTES)
        holds = _grains(runs, length)
        changed = np.ones(len(holds), np.bool_)
        if self._skip_equal:
            old = self._read_base(work.rows)
            changed = _grains(native.changed_runs(new.data, old.data, _GRAIN_BYTES), length)
        data = clipped(runs_of(changed & holds) * _GRAIN_BYTES, length)
        if len(data):
            sink.append(select_runs(work.rows, data), gather(new, data))
        zeros = clipped(runs_of(changed & ~holds) * _GRAIN_BYTES, length)
        return int(data[:, 1].sum()) + _append_zeroes(sink, work.rows, zeros)

    def _zero(self, rows: NDArray[np.int64], sink: ChangeSink) -> int:
        length = int(rows[:, 1].sum())
        runs = np.array([[0, length]], np.int64)
        if self._skip_equal:
            runs = native.data_runs(self._read_base(rows).data, _GRAIN_BYTES)
        return _append_zeroes(sink, rows, runs)

    def _read_base(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        old = self._old.take(int(rows[:, 1].sum()))
        read_layers(self._base, rows, old.data)  # which has zeros behind its end
        return old


class _Work(NamedTuple):
    """Ranges, int64 (n, 2), in which the child holds data, or is zeros."""

    rows: NDArray[np.int64]
    is_data: bool


def _grains(runs: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    """Return which grains of `length` bytes lie in `runs`, rows (offset, length) of whole grains."""
    edges = np.zeros(-(-length // _GRAIN_BYTES) + 1, np.int8)
    edges[runs[:, 0] // _GRAIN_BYTES] += 1
    edges[-(-(runs[:, 0] + runs[:, 1]) // _GRAIN_BYTES)] -= 1
    inside: NDArray[np.bool_] = np.cumsum(edges[:-1], dtype=np.int8) > 0
    return inside


def _append_zeroes(sink: ChangeSink, rows: NDArray[np.int64], runs: NDArray[np.int64]) -> int:
    if not len(runs):
        return 0
    for start, length in select_runs(rows, runs).tolist():
        sink.append_zeroes(start, length)
    return int(runs[:, 1].sum())


def _own_ranges(child: Disk, base: Disk) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether it holds data) of all that the layers above the base do not leave to it.

    In whole sectors, in order, disjoint. Stretches end where the file's own blocks of data do, which need
    not be whole sectors.
    """
    position = 0
    for start, end, is_data in _layer_ranges(child, base, 0, child.virtual_bytes):
        if is_data:
            start, end = start // _SECTOR_BYTES * _SECTOR_BYTES, -(-end // _SECTOR_BYTES) * _SECTOR_BYTES
        else:
            start = -(-start // _SECTOR_BYTES) * _SECTOR_BYTES
            end = min(end, base.virtual_bytes) // _SECTOR_BYTES * _SECTOR_BYTES
        start = max(start, position)
        if start < end:
            yield start, end, is_data
            position = end


def _layer_ranges(layer: Disk, base: Disk, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether it holds data) of what `layer` and those between it and `base` say."""
    stop = max(start, min(end, layer.virtual_bytes))
    below = parent_of(layer)
    for stretch in layer.stretches(start, stop):
        stretch_end = stretch.start + stretch.length
        if stretch.kind != "parent":
            yield stretch.start, stretch_end, stretch.kind == "data"
        elif below is not base:
            yield from _layer_ranges(below, base, stretch.start, stretch_end)
    if stop < end:
        yield stop, end, False
