"""Read what a cut's log does not have from the disk, as it was at the cut, while the guest writes on.

The grains to read are the bits of the ended epoch's `unlogged`, which C guards: a write to one of them waits
until preserve() has read it. Whoever reads a grain clears its bit, under one lock, so each is read once, and
nobody changes it before.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.errors import StateError, kept
from hvreplica.native.live import GRAIN_BYTES, REGION_BYTES, clear_grains
from hvreplica.tracking.compare import changes_of, clipped, gather, shifted
from hvreplica.tracking.window import runs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from hvreplica.disk import Disk
    from hvreplica.native.live import Epoch
    from hvreplica.tracking.compare import ChangeSink, KnownBlocks

_WINDOW_GRAINS = 16  # a guest's write waits for at most one window
_STEP_REGIONS = 4096
_GRAINS_PER_REGION = REGION_BYTES // GRAIN_BYTES
_RUN_BYTES = 4096
_YIELD_S = 0.0002
_ROWS_STEP = 1 << 16  # rows of a table that are looked at together: 1 MiB


class CutReader:
    """Reads one disk's part of one cut. run() by one thread; preserve() by any."""

    def __init__(
        self,
        disk: Disk,
        epoch: Epoch,
        sink: ChangeSink,
        known: KnownBlocks | None = None,
        *,
        stopping: threading.Event | None = None,
    ) -> None:
        """known: what the replica will hold before this cut; blocks equal to it are left out.

        stopping: set where run() is to fail soon.
        """
        self._disk = disk
        self._epoch = epoch
        self._sink = sink
        self._known = known
        self._stopping = stopping or threading.Event()
        self._lock = threading.Lock()
        self._buffer = np.empty(_WINDOW_GRAINS * GRAIN_BYTES, np.uint8)
        self._failure: BaseException | None = None
        self._waiting: dict[int, bool] = {}  # threads of guests
        self.changed_bytes = 0

    def preserve(self, disk_offset: int, length: int) -> None:
        """Read the guarded grains of a range now: a guest is about to change them.

        After a failure, which ends the cut, this returns at once: nothing is worth preserving for it.
        """
        first = disk_offset // GRAIN_BYTES
        end = -(-(disk_offset + length) // GRAIN_BYTES)
        self._waiting[threading.get_ident()] = True
        try:
            with self._lock:
                self._preserve(first, end)
        finally:
            del self._waiting[threading.get_ident()]

    def _preserve(self, first: int, end: int) -> None:
        if self._failure is None:
            try:
                self._read(first, end)
            except BaseException as error:
                self._failure = kept(error)
        if self._failure is not None:
            self._clear(first, end)

    def run(self) -> None:
        """Read all that is left.

        Raises: what reading or logging raised, here or in preserve(); StateError once it is to stop.
        """
        for first, end in self._spans():
            held = self._disk.extents(first * GRAIN_BYTES, min(end * GRAIN_BYTES, self._disk.virtual_bytes))
            for low, high, holds_data in _parts(held, first, end):
                while self._waiting:
                    threading.Event().wait(_YIELD_S)  # a lock alone would let a guest wait for many windows
                with self._lock:
                    if self._failure is None:
                        self._read_part(low, high, holds_data=holds_data)
                if self._failure is not None:
                    raise kept(self._failure)
                if self._stopping.is_set():
                    raise StateError(
                        "the cut was given up: the process is being stopped",
                        path=self._disk.path,
                        hint="what it held counts as changed; cut again when the process runs again",
                    )

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yield (first, end) of runs of unlogged grains, region by region where anything was touched."""
        for start, count in native.bitmap_runs(self._epoch.touched, 8 * len(self._epoch.touched)).tolist():
            for region in range(start, start + count, _STEP_REGIONS):
                stop = min(start + count, region + _STEP_REGIONS)
                base = region * _GRAINS_PER_REGION
                # A copy: threads clear bits meanwhile.
                words = self._epoch.unlogged[base // 8 : stop * _GRAINS_PER_REGION // 8].copy()
                for first, length in native.bitmap_runs(words, 8 * len(words)).tolist():
                    yield base + first, base + first + length

    def _read_part(self, first: int, end: int, *, holds_data: bool) -> None:
        try:
            if holds_data:
                self._read(first, end)
            else:
                # Nobody has written what is still guarded, so it is the hole that it was.
                for low, high, known in self._runs(first, end):
                    self._take_zeros(low, high, known)
        except BaseException as error:
            self._failure = kept(error)

    def _read(self, first: int, end: int) -> None:
        for low, high, known in self._runs(first, end):
            for start in range(low, high, _WINDOW_GRAINS):
                stop = min(high, start + _WINDOW_GRAINS)
                disk_offset = start * GRAIN_BYTES
                length = min(stop * GRAIN_BYTES, self._disk.virtual_bytes) - disk_offset
                window = self._buffer[:length]
                self._disk.read_into(window, disk_offset)
                self.changed_bytes += self._take(window, disk_offset, known)
                self._clear(start, stop)

    def _take(self, window: npt.NDArray[np.uint8], disk_offset: int, known: KnownBlocks | None) -> int:
        if known is not None:
            extents = np.array([[disk_offset, len(window)]], np.int64)
            return changes_of(window, extents, known, self._sink)
        data_runs = native.data_runs(window, _RUN_BYTES).astype(np.int64)
        if len(data_runs):
            self._sink.append(shifted(data_runs, disk_offset), gather(window, data_runs))
        zero = np.ones(-(-len(window) // _RUN_BYTES), np.bool_)
        for start, length in data_runs.tolist():
            zero[start // _RUN_BYTES : -(-(start + length) // _RUN_BYTES)] = False
        for start, length in clipped(runs_of(zero) * _RUN_BYTES, len(window)).tolist():
            self._sink.append_zeroes(disk_offset + start, length)
        return len(window)

    def _take_zeros(self, first: int, end: int, known: KnownBlocks | None) -> None:
        step = _STEP_REGIONS * _GRAINS_PER_REGION
        for start in range(first, end, step):
            low = start * GRAIN_BYTES
            high = min(min(end, start + step) * GRAIN_BYTES, self._disk.virtual_bytes)
            for offset, length in _not_known_as_zero(known, low, high):
                self._sink.append_zeroes(offset, length)
                self.changed_bytes += length
        self._clear(first, end)

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int, KnownBlocks | None]]:
        """Yield (first, end, table to leave out by) of what is still guarded between `first` and `end`.

        Where the log has an entry the replica will not hold what it is known to hold: nothing is left out.
        """
        for low, high in self._guarded(first, end):
            if self._known is None:
                yield low, high, None
                continue
            at = low
            for start, stop in _set_runs(self._epoch.logged, low, high):
                if start > at:
                    yield at, start, self._known
                yield start, stop, None
                at = stop
            if at < high:
                yield at, high, self._known

    def _guarded(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return (first, end) of runs of grains between `first` and `end` whose bits are still set."""
        return _set_runs(self._epoch.unlogged, first, end)

    def _clear(self, first: int, end: int) -> None:
        clear_grains(self._epoch.unlogged, first, end - first)


def _parts(held: npt.NDArray[np.int64], first: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, end, whether it may hold data) of parts of a run of grains, in windows and in order."""
    at = first
    for offset, length in held.tolist():
        low = max(offset // GRAIN_BYTES, at)
        high = min(-(-(offset + length) // GRAIN_BYTES), end)
        if low >= high:
            continue
        if low > at:
            yield at, low, False
        for start in range(low, high, _WINDOW_GRAINS):
            yield start, min(high, start + _WINDOW_GRAINS), True
        at = high
    if at < end:
        yield at, end, False


def _set_runs(bitmap: npt.NDArray[np.uint8], first: int, end: int) -> list[tuple[int, int]]:
    """Return (first, end) of the runs of set bits between `first` and `end`.

    Threads may clear some meanwhile.
    """
    base = first // 8 * 8
    words = bitmap[base // 8 : -(-end // 8)].copy()
    runs = native.bitmap_runs(words, 8 * len(words))
    lows = np.maximum(runs[:, 0] + base, first)
    highs = np.minimum(runs[:, 0] + runs[:, 1] + base, end)
    return [(low, high) for low, high in zip(lows.tolist(), highs.tolist(), strict=True) if low < high]


def _not_known_as_zero(known: KnownBlocks | None, start: int, end: int) -> list[tuple[int, int]]:
    """Return (disk_offset, length) of what the replica may hold data of."""
    if known is None:
        return [(start, end - start)]
    found: list[tuple[int, int]] = []
    for offset, length in known.extents(start, end).tolist():
        for low in range(offset, offset + length, _ROWS_STEP * known.block_bytes):
            high = min(low + _ROWS_STEP * known.block_bytes, offset + length)
            rows = known.read(low // known.block_bytes, -(-(high - low) // known.block_bytes))
            held = np.asarray(rows.any(axis=1))
            runs = clipped(runs_of(held) * known.block_bytes, high - low)
            found += [(low + first, count) for first, count in runs.tolist()]
    return found
