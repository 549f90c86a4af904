"""What a transfer sends: the windows of the disks, or of a cycle's closed logs, each ready to become a frame.

A source hands out windows in ascending order of target and offset, numbered 0, 1, …; several threads take and
load them. When the replica says that every frame below a number is durable, confirm() moves the positions
from which a broken transfer goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.tracking.compare import clipped, gather, shifted
from hvreplica.tracking.window import WINDOW_BYTES, windows_with_data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from hvreplica.disk import Disk
    from hvreplica.files import BlockFile
    from hvreplica.tracking.fingerprints import FingerprintTable
    from hvreplica.tracking.window import ExtentSource

_GRAIN_BYTES = 4096  # zero runs shorter than this stay in the data: the codec takes them


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a target.

    holds_data: False where the whole of it is known to be zero and need not be read.
    """

    sequence: int
    target: int
    offset: int
    length: int
    holds_data: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """A window's content.

    runs: int64 (n, 2) of (offset in the target, length); data: the runs' bytes, in order.
    """

    runs: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]


NOTHING = Loaded(np.empty((0, 2), np.int64), np.empty(0, np.uint8))


class FrameSource:
    """Numbers the windows of a plan and follows what the replica confirms. Safe from many threads.

    is_due: whether something else comes first from now on. is_whole: whether every window was handed out.
    """

    def __init__(self, targets: Sequence[tuple[ExtentSource, int]], positions: Sequence[int]) -> None:
        self.positions = list(positions)
        self.total_bytes = sum(size_bytes for _, size_bytes in targets)
        self._targets = targets
        self._plan = self._windows()
        self._lock = threading.Lock()
        self._pending: deque[Window] = deque()
        self._count = 0
        self.is_due: Callable[[], bool] = lambda: False
        self.is_whole = False

    @property
    def count(self) -> int:
        """How many windows were handed out."""
        return self._count

    def next_window(self) -> Window | None:
        """Return the next window; None after the last one, and once is_due() says that this must wait."""
        with self._lock:
            if self.is_due():
                return None
            row = next(self._plan, None)
            if row is None:
                self.is_whole = True
                return None
            window = Window(self._count, *row)
            self._count += 1
            self._pending.append(window)
            return window

    def confirm(self, watermark: int) -> None:
        """Take note that the frames of all windows below `watermark` are durable at the replica."""
        with self._lock:
            while self._pending and self._pending[0].sequence < watermark:
                window = self._pending.popleft()
                self.positions[window.target] = window.offset + window.length

    def load(self, window: Window, buffer: npt.NDArray[np.uint8]) -> Loaded:
        """Return the content of `window`.

        buffer: WINDOW_BYTES long, one for each thread; the content may lie in it until the next call with it.
        """
        raise NotImplementedError

    def sync(self) -> None:
        """Make durable what the positions rely on, before they are recorded."""

    def _windows(self) -> Iterator[tuple[int, int, int, bool]]:
        for target, (extents, size_bytes) in enumerate(self._targets):
            at = self.positions[target]
            for offset, length in windows_with_data((extents,), at, size_bytes):
                if offset > at:
                    yield target, at, offset - at, False
                yield target, offset, length, True
                at = offset + length
            if at < size_bytes:
                yield target, at, size_bytes - at, False


class DiskSource(FrameSource):
    """The whole of each disk from its position on, holes as single windows; fills the fingerprint tables."""

    def __init__(
        self, disks: Sequence[Disk], tables: Sequence[FingerprintTable], positions: Sequence[int]
    ) -> None:
        self._disks = disks
        self._tables = tables
        self.data_bytes = [0] * len(disks)
        super().__init__([(disk.extents, disk.virtual_bytes) for disk in disks], positions)

    def load(self, window: Window, buffer: npt.NDArray[np.uint8]) -> Loaded:
        table = self._tables[window.target]
        first_block = window.offset // table.block_bytes
        if not window.holds_data:
            table.clear(first_block, -(-window.length // table.block_bytes))
            return NOTHING
        content = buffer[: window.length]
        self._disks[window.target].read_into(content, window.offset)
        rows = native.fingerprints(content, table.block_bytes)
        table.write(first_block, rows)
        # A fingerprint of zeros says that its block is zero: the runs of data follow without another look at
        # it.
        scale = table.block_bytes // rows.shape[1]
        runs = clipped(native.data_runs(rows, rows.shape[1]).astype(np.int64) * scale, window.length)
        if not len(runs):
            return NOTHING
        data = gather(content, runs)
        with self._lock:
            self.data_bytes[window.target] += len(data)
        return Loaded(shifted(runs, window.offset), data)

    def sync(self) -> None:
        for table in self._tables:
            table.sync()


class LogSource(FrameSource):
    """The bytes of each closed log from its position on; what its file holds behind the log is not sent.

    logs: (open file, log_bytes).
    """

    def __init__(self, logs: Sequence[tuple[BlockFile, int]], positions: Sequence[int]) -> None:
        self._logs = [log for log, _ in logs]
        super().__init__([(_file_extents(log), log_bytes) for log, log_bytes in logs], positions)

    def load(self, window: Window, buffer: npt.NDArray[np.uint8]) -> Loaded:
        if not window.holds_data:
            return NOTHING
        content = buffer[: window.length]
        self._logs[window.target].read_into(content, window.offset)
        runs = native.data_runs(content, _GRAIN_BYTES).astype(np.int64)
        if not len(runs):
            return NOTHING
        return Loaded(shifted(runs, window.offset), gather(content, runs))


def new_buffer() -> npt.NDArray[np.uint8]:
    """Return a buffer that holds any window; one for each thread."""
    return np.empty(WINDOW_BYTES, np.uint8)


def unchanged_until(disk: Disk, table: FingerprintTable, position: int) -> int:
    """Return where, below `position`, the disk is no longer what the table says; else `position`.

    A transfer that goes on after a break must not leave older content in what it has already sent.
    """
    buffer = new_buffer()
    for offset, length in windows_with_data((disk.extents, table.extents), 0, position):
        content = buffer[:length]
        disk.read_into(content, offset)
        rows = native.fingerprints(content, table.block_bytes)
        if not np.array_equal(rows, table.read(offset // table.block_bytes, len(rows))):
            return offset
    return position


def _file_extents(file: BlockFile) -> ExtentSource:
    def extents(start: int, end: int) -> npt.NDArray[np.int64]:
        return np.array(list(file.data_extents(start, end)), np.int64).reshape(-1, 2)

    return extents
