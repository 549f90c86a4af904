"""The statistics of a VM while it is replicated, kept in STATE/statistics.json.

They help people and decide nothing, so they are saved at most every five seconds and at the end; a file that
is damaged is begun anew.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import msgspec

from hvreplica.errors import (
    AuthenticationFailed,
    AuthorizationRefused,
    ChainBroken,
    Fenced,
    NoSuchPoint,
    ReplicaDiverged,
    StateError,
    TrackingLost,
    TransportError,
)
from hvreplica.files import write_durably
from hvreplica.replication import statistics
from hvreplica.replication.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.replication.results import ReplicateResult

FILE_NAME = "statistics.json"
FATAL = (
    AuthenticationFailed,
    AuthorizationRefused,
    ChainBroken,
    Fenced,
    NoSuchPoint,
    ReplicaDiverged,
    StateError,
    TrackingLost,
)
_SAVE_EVERY_S = 5.0
_FILE_BYTES_MAX = 1 << 20
_LOG = logging.getLogger("hvreplica.replicate")


class Bookkeeper:
    """Counts what happens. Any thread may call; save() once more at the end."""

    def __init__(self, files: FileSystem, folder: Path, *, clock: Clock) -> None:
        self._files = files
        self._path = folder / FILE_NAME
        self._clock = clock
        self._lock = threading.Lock()
        self._record = load_statistics(files, folder) or Statistics(clock.now_s())
        self._saved_s = float("-inf")

    @property
    def record(self) -> Statistics:
        """The record of the interval now."""
        with self._lock:
            self._roll()
            return self._record

    def succeeded(self, result: ReplicateResult) -> None:
        """Count a cycle that ended well now. A first copy is no measure of what cycles take."""
        is_measure = result.kind != "initial"
        size_bytes = sum(disk.changed_bytes for disk in result.disks) if is_measure else 0
        latency_s = result.seconds if is_measure else 0.0
        synchronized_s = self._clock.now_s() - latency_s
        self._change(
            lambda record: statistics.succeeded(
                record,
                size_bytes=size_bytes,
                latency_s=latency_s,
                synchronized_s=synchronized_s,
                waits_for=result.waits_for,
            )
        )

    def failed(self, error: BaseException) -> None:
        """Count a cycle that ended with `error` now."""
        self._change(
            lambda record: statistics.failed(
                record,
                kind=type(error).__name__,
                message=str(error),
                now_s=self._clock.now_s(),
                is_network=isinstance(error, TransportError),
                is_fatal=isinstance(error, FATAL),
            )
        )

    def missed(self, count: int) -> None:
        """Count cycles that could not begin when they were due."""
        if count:
            self._change(lambda record: statistics.missed(record, count))

    def freeze_failed(self) -> None:
        """Count a cut that could not be made application-consistent."""
        self._change(statistics.freeze_failed)

    def reset(self) -> None:
        """Begin a new interval; durable on return."""
        with self._lock:
            self._record = statistics.reset(self._record, self._clock.now_s())
            self._save()

    def save(self) -> None:
        """Make the record durable."""
        with self._lock:
            self._save()

    def _change(self, change: Callable[[Statistics], Statistics]) -> None:
        with self._lock:
            self._roll()
            self._record = change(self._record)
            if self._clock.monotonic_s() - self._saved_s >= _SAVE_EVERY_S:
                self._save()

    def _roll(self) -> None:
        now_s = self._clock.now_s()
        if statistics.is_over(self._record, now_s):
            ended = self._record
            _LOG.info(
                "replication statistics of the interval: %d cycles, %d missed, %d failed, %d bytes",
                ended.replication_success_count,
                ended.replication_miss_count,
                ended.replication_failure_count,
                ended.replication_size_sum,
            )
            self._record = statistics.reset(ended, now_s)

    def _save(self) -> None:
        self._saved_s = self._clock.monotonic_s()
        try:
            write_durably(self._files, self._path, msgspec.json.encode(self._record), clock=self._clock)
        except OSError as error:
            _LOG.warning("the statistics cannot be saved: %s", error)


def load_statistics(files: FileSystem, folder: Path) -> Statistics | None:
    """Return what was saved in a state folder; None where nothing was, or where it is damaged."""
    path = folder / FILE_NAME
    if not files.exists(path):
        return None
    file = files.open(path)
    try:
        data = file.read(0, min(file.size(), _FILE_BYTES_MAX))
    finally:
        file.close()
    try:
        record = msgspec.json.decode(data, type=Statistics)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _LOG.warning("%s is damaged and begun anew: %s", path, error)
        return None
    return record if record.version == statistics.VERSION else None
