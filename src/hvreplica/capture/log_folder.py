"""Where logs grow, where closed ones go, and the old ones whose files are written over.

STATE/open/    the logs of the current epochs; worth nothing after a crash, the journal knows more
STATE/logs/    closed logs of cuts; <id>.hrt beside <id>.hrl says when its entries came
STATE/spare/   logs that were acknowledged: a file that has its blocks already is written several times faster
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.errors import FormatError
from hvreplica.formats.times import Times, pack_times
from hvreplica.hrl import LogWriter, times_path
from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from uuid import UUID

    import numpy.typing as npt

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.native.live import Moments

_LOG = logging.getLogger("hvreplica.capture")
_SPARE_COUNT_MAX = 8
_FREE_BYTES_MIN = 16 * MIB  # with less than this no file is kept for its blocks


def remove_loose_logs(files: FileSystem, state: Path) -> None:
    """Remove logs that nobody needs after a start: they may be what fills the file system of the state.

    What a crash left open is worth nothing, the journal knows more; spare files are only faster than new
    ones.
    """
    for folder in (state / "open", state / "spare"):
        for name in files.names(folder):
            files.unlink(folder / name)


class LogFolder:
    """The three folders of one VM. Any thread may call."""

    def __init__(self, files: FileSystem, state: Path, clock: Clock, *, spare_bytes_max: int) -> None:
        """Make the folders where absent. remove_loose_logs() comes before, while room may be short."""
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self.closed = state / "logs"
        self._open = state / "open"
        self._spare = state / "spare"
        self._spare_bytes_max = spare_bytes_max
        for folder in (self.closed, self._open, self._spare):
            files.make_directory(folder)

    def create(self, data_write_guid: UUID | None) -> LogWriter:
        """Return a new open log, in a spare file where there is one."""
        log_id = self._clock.guid()
        path = self._open / f"{log_id}.hrl"
        return LogWriter.create(
            self._files,
            path,
            log_id=log_id,
            previous_log_id=None,
            data_write_guid=data_write_guid,
            clock=self._clock,
            recycle=self._take_spare(path),
        )

    def keep(self, writer: LogWriter, moments: Moments | None) -> Path:
        """Move a closed log to the others, with its times file where one is wanted; durable after sync()."""
        path = self.closed / writer.path.name
        if moments is not None:
            self._write_times(times_path(path), writer.log_id, moments)
        self._files.replace(writer.path, path)
        return path

    def _write_times(self, path: Path, log_id: UUID, moments: Moments) -> None:
        times = Times(
            log_id=log_id,
            entry_count=moments.entry_count,
            slot_us=moments.slot_us,
            ended_us=moments.ended_us,
            ticks=_table(moments.ticks),
            flushes=_table(moments.flushes),
        )
        try:
            data = pack_times(times)
            file = self._files.open(path, create=True, exclusive=True)
            with contextlib.closing(file):
                file.write(data, 0)
                file.sync()
        except (OSError, FormatError) as error:
            # No cut fails for it: without this file points between cycles are of whole seconds.
            _LOG.warning("the times of a log are not kept: %s", error)
            with contextlib.suppress(OSError):
                self._files.unlink(path)

    def sync(self) -> None:
        """Make the names of closed logs durable."""
        self._files.sync_directory(self.closed)

    def recycle(self, paths: Iterable[Path]) -> None:
        """Take back logs that nobody needs any more, closed or not; too many, and too large ones, are
        removed.
        """
        with self._lock:
            spare = self._sizes()
            for path in paths:
                try:
                    self._recycle(path, spare)
                except OSError as error:
                    # It is in the way of nobody, and no cut may fail for it.
                    _LOG.warning("a log that nobody needs any more stays: %s", error)

    def _recycle(self, path: Path, spare: dict[str, int]) -> None:
        self._files.unlink(times_path(path))
        if not self._files.exists(path):
            return  # it was closed, and has another name now
        size_bytes = self._size(path)
        is_short = self._files.free_bytes(self._spare) < size_bytes + _FREE_BYTES_MIN
        if (
            is_short
            or len(spare) >= _SPARE_COUNT_MAX
            or sum(spare.values()) + size_bytes > self._spare_bytes_max
        ):
            self._files.unlink(path)
            return
        try:
            self._files.replace(path, self._spare / path.name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._files.unlink(path)  # of a replica whose state lies on another file system
        else:
            spare[path.name] = size_bytes

    def _take_spare(self, path: Path) -> bool:
        with self._lock:
            spare = self._sizes()
            if not spare:
                return False
            self._files.replace(self._spare / max(spare, key=spare.__getitem__), path)
            return True

    def _sizes(self) -> dict[str, int]:
        """Return the lengths of the spare logs; none where they cannot be looked at."""
        try:
            return {name: self._size(self._spare / name) for name in self._files.names(self._spare)}
        except OSError as error:
            _LOG.warning("the spare logs cannot be looked at: %s", error)
            return {}

    def _size(self, path: Path) -> int:
        with contextlib.closing(self._files.open(path)) as file:
            return file.size()


def _table(marks: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    return np.column_stack((marks["entries"], marks["time_us"])).astype(np.int64)
