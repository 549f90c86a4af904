"""Where an arriving transfer is written: windows from many threads, proof that all came, one commit.

A window fully defines its bytes: its data, and zeros between. What was flushed survives a power cut and its
length from the start of each target is recorded, so that the next session of the same transfer goes on from
there. A session that ends without commit() leaves the transfer unfinished; commit() is repeatable.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from hvreplica import native
from hvreplica.errors import FieldOutOfRange, FormatError, LogError, ResumeRefused, StoreError, kept
from hvreplica.hrl import verify_log
from hvreplica.store.apply import finish_initial
from hvreplica.store.arriving import ArrivingDigests
from hvreplica.store.coverage import Coverage
from hvreplica.store.gate import Gate
from hvreplica.store.kept_times import keep_times
from hvreplica.store.records import PointRow
from hvreplica.store.room import room
from hvreplica.store.window import gaps, validate_window, validated_extents

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk import Disk
    from hvreplica.files import BlockFile
    from hvreplica.progress import Progress
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import LogSpec, Owner, TransferRow


class Closable(Protocol):
    """What a target is written to."""

    def close(self) -> None:
        """Close without making anything durable."""
        ...


C = TypeVar("C", bound=Closable)


@dataclass(slots=True)
class Target(Generic[C]):
    """One disk or log of a transfer. grain_bytes: windows and extents come in multiples of it."""

    medium: C
    path: Path
    total_bytes: int
    grain_bytes: int
    coverage: Coverage = field(init=False)
    is_dirty: bool = False
    may_hold_other: bool = False  # bytes of an earlier session or of a failed write may stand there

    def __post_init__(self) -> None:
        self.coverage = Coverage(self.total_bytes)


class TransferSink(ABC, Generic[C]):
    """What both kinds of sink share. All calls may come from any thread; close() when the session ends."""

    def __init__(
        self,
        home: VmHome,
        owner: Owner,
        transfer: TransferRow,
        targets: dict[int, Target[C]],
        *,
        continued: bool,
    ) -> None:
        self.transfer_id = transfer.id
        self.continued = continued
        self._home = home
        self._owner = owner
        self._transfer = transfer
        self._targets = targets
        self._gate = Gate()
        self._flushing = threading.RLock()
        self._positions = dict(transfer.positions)
        self._failure: BaseException | None = None
        self._sealed = False
        for target in targets.values():
            target.may_hold_other = continued

    @property
    def targets(self) -> dict[int, int]:
        """The length in bytes of each target, by its number."""
        return {number: target.total_bytes for number, target in self._targets.items()}

    @property
    def covered_bytes(self) -> int:
        """The bytes of all targets that have arrived or were there at resume_from()."""
        return sum(target.coverage.covered_bytes for target in self._targets.values())

    def position(self, target: int) -> int:
        """Return how many bytes from the start of a target are durable without a gap."""
        self._target(target)
        return self._positions.get(target, 0)

    def resume_from(self, target: int, position: int) -> None:
        """Take the bytes of a target before `position` as received; the windows must tile the rest.

        What lies behind it will be written anew, so it no longer counts as received: a primary that was
        rolled back must not build on it. Durable on return. Raises: ResumeRefused if the bytes before
        `position` are not durable here, or once a window came; Fenced, StoreFull.
        """
        with self._gate, self._flushing:
            spot = self._target(target)
            if not 0 <= position <= self.position(target):
                raise ResumeRefused(
                    "the replica does not hold what the transfer wants to build on",
                    path=spot.path,
                    expected=f"a position of at most {self.position(target)}",
                    actual=position,
                    hint="send this target from its start",
                )
            spot.coverage.resume(position)
            if position < self.position(target):
                self._record({target: position})

    def write(
        self, target: int, window_offset: int, window_bytes: int, extents: NDArray[Any], data: Buffer
    ) -> None:
        """Write one window: `data` into `extents`, zeros into the rest. Nothing is durable until flush().

        extents: shape (n, 2), absolute (offset, length), sorted and disjoint; data: their bytes one after the
        other. Raises: FieldOutOfRange, Overlap for bytes that came before, StoreFull (the window may come
        again), Fenced.
        """
        with self._gate:
            if self._failure is not None:
                raise kept(self._failure)
            spot = self._target(target)
            validate_window(
                window_offset, window_bytes, total_bytes=spot.total_bytes, grain_bytes=spot.grain_bytes
            )
            window = {"window_offset": window_offset, "window_bytes": window_bytes}
            table = validated_extents(extents, data, **window, grain_bytes=spot.grain_bytes)
            spot.coverage.reserve(window_offset, window_bytes)
            written = False
            try:
                with room(self._home.files, spot.path, memoryview(data).nbytes):
                    if len(table):
                        self._put(spot, table, data)
                    if spot.may_hold_other:
                        self._clear(spot, gaps(table, **window))
                written = True
            finally:
                spot.may_hold_other |= not written
                spot.is_dirty = True
                spot.coverage.finish(window_offset, written=written)

    def flush(self) -> None:
        """Make every write that returned before this call durable, and record how far each target is.

        Raises: StoreFull, OSError; the sink then refuses to go on, and the transfer must be continued by a
        new one.
        """
        with self._gate, self._flushing:
            self._flush()

    @abstractmethod
    def commit(self) -> uuid.UUID:
        """Prove that everything came and keep it as a point; return the point's id. Repeatable."""

    def close(self, reason: Callable[[], Exception] | None = None) -> None:
        """End the session of this sink; the transfer stays as it is. Waits for calls that are inside."""
        self._gate.shut(reason or _ended)
        for target in self._targets.values():
            self._abandon(target)

    @abstractmethod
    def _put(self, target: Target[C], table: NDArray[np.int64], data: Buffer) -> None: ...

    @abstractmethod
    def _clear(self, target: Target[C], table: NDArray[np.int64]) -> None: ...

    @abstractmethod
    def _sync(self, target: Target[C]) -> None: ...

    @abstractmethod
    def _abandon(self, target: Target[C]) -> None: ...

    def _target(self, number: int) -> Target[C]:
        target = self._targets.get(number)
        if target is None:
            raise FieldOutOfRange(
                "the transfer has no such target",
                field="target",
                expected=f"one of {sorted(self._targets)}",
                actual=number,
            )
        return target

    def _flush(self) -> None:
        if self._failure is not None:
            raise kept(self._failure)
        positions = {number: target.coverage.prefix_bytes for number, target in self._targets.items()}
        try:
            for target in self._targets.values():
                dirty, target.is_dirty = target.is_dirty, False
                if dirty:
                    with room(self._home.files, target.path):
                        self._sync(target)
        except BaseException as error:
            self._failure = kept(error)
            raise
        moved = {number: done for number, done in positions.items() if done > self._positions.get(number, 0)}
        if moved:
            self._record(moved)

    def _record(self, positions: dict[int, int]) -> None:
        catalog = self._home.catalog
        with catalog.transaction():
            self._home.require_owner(self._owner)
            self._home.require_transfer(self.transfer_id)
            for number, done_bytes in positions.items():
                catalog.set_position(self._home.vm_id, self._transfer.kind, number, done_bytes)
        self._positions.update(positions)

    def _seal(self) -> None:
        """Prove that every byte came, make it durable and close the files."""
        if self._sealed:
            return
        for number, target in self._targets.items():
            gap = target.coverage.first_gap()
            if gap is not None:
                raise StoreError(
                    f"target {number} of the transfer is not whole",
                    path=target.path,
                    offset=gap[0],
                    expected=f"{target.total_bytes} bytes",
                    actual=f"{target.coverage.covered_bytes} bytes, first gap {gap[1] - gap[0]} bytes",
                    hint="send what is missing, then commit again",
                )
        self._flush()
        self._check_whole()
        for target in self._targets.values():
            target.medium.close()
        self._sealed = True

    def _check_whole(self) -> None:
        """Look at what came before it is taken for good."""


class InitialSink(TransferSink["Disk"]):
    """Builds disks/<index>.vhdx.partial; target numbers are disk indexes."""

    def __init__(
        self,
        home: VmHome,
        owner: Owner,
        transfer: TransferRow,
        targets: dict[int, Target[Disk]],
        *,
        continued: bool,
    ) -> None:
        super().__init__(home, owner, transfer, targets, continued=continued)
        self._digests = ArrivingDigests([] if continued else targets)

    def write(
        self, target: int, window_offset: int, window_bytes: int, extents: NDArray[Any], data: Buffer
    ) -> None:
        super().write(target, window_offset, window_bytes, extents, data)
        self._digests.add(target, extents, data)

    def commit(self) -> uuid.UUID:
        """Make the received disks the VM's disks, and the point complete if it is one; durable on return.

        Repeatable.
        Raises: StoreError where something is missing, Locked while another process reads the old disks
        (commit again later), Fenced.
        """
        home = self._home
        with self._gate, self._flushing, room(home.files, home.paths.folder):
            if self._is_there():
                return self._transfer.point_id
            self._seal()
            with home.exclusive():
                home.arrived_digests = self._digests.result()
                with home.catalog.transaction():
                    home.require_owner(self._owner)
                    home.require_transfer(self.transfer_id)
                    home.catalog.set_transfer_state(home.vm_id, self._transfer.kind, "renaming")
                finish_initial(home)
            return self._transfer.point_id

    def _is_there(self) -> bool:
        rows = self._home.catalog.disks(self._home.vm_id)
        return all(row.base_id == self._transfer.point_id for row in rows if row.spec.index in self._targets)

    def _put(self, target: Target[Disk], table: NDArray[np.int64], data: Buffer) -> None:
        target.medium.write_extents(table, data)

    def _clear(self, target: Target[Disk], table: NDArray[np.int64]) -> None:
        for disk_offset, length in table.tolist():
            target.medium.write_zeroes(disk_offset, length)

    def _sync(self, target: Target[Disk]) -> None:
        target.medium.flush()

    def _abandon(self, target: Target[Disk]) -> None:
        target.medium.abandon()


class LogSink(TransferSink["BlockFile"]):
    """Fills spool/<log id>.hrl.partial; target numbers are places in the list of logs."""

    def take_times(self, log_id: uuid.UUID, data: bytes) -> None:
        """Keep when the entries of a log came, where logs are kept; durable on return.

        What is damaged, or has no room, is told to the log of this process: without it nothing but the parts
        of seconds is lost. Raises: FieldOutOfRange for a log of another transfer.
        """
        with self._gate:
            if log_id not in {log.log_id for log in self._transfer.logs}:
                raise FieldOutOfRange("the transfer has no such log", field="log_id", actual=log_id)
            keep_times(self._home, log_id, data)

    def commit(self) -> uuid.UUID:
        """Verify the logs and keep them as a spooled point; then the primary may forget them. Repeatable.

        Raises: StoreError where something is missing, FormatError or LogError for logs that cannot be applied
        (the transfer is then dropped and must begin anew), Fenced.
        """
        with self._gate, self._flushing, room(self._home.files, self._home.paths.spool):
            if self._home.catalog.point(self._home.vm_id, self._transfer.point_id) is not None:
                return self._transfer.point_id
            self._seal()
            self._rename()
            self._acknowledge()
            return self._transfer.point_id

    def _put(self, target: Target[BlockFile], table: NDArray[np.int64], data: Buffer) -> None:
        native.write_extents(target.medium, None, table, data)

    def _clear(self, target: Target[BlockFile], table: NDArray[np.int64]) -> None:
        for log_offset, length in table.tolist():
            target.medium.zero(log_offset, length)

    def _sync(self, target: Target[BlockFile]) -> None:
        target.medium.sync()

    def _abandon(self, target: Target[BlockFile]) -> None:
        target.medium.close()

    def _check_whole(self) -> None:
        try:
            for number, log in enumerate(self._transfer.logs):
                self._verify(self._targets[number].path, log, self._transfer.disks[log.disk_index])
        except (FormatError, LogError) as error:
            self._failure = kept(error)
            self._drop()
            raise

    def _verify(self, path: Path, log: LogSpec, disk_bytes: int) -> None:
        report = verify_log(
            self._home.files, path, data=True, disk_bytes=disk_bytes, progress=self._check_gate
        )
        for name, expected, actual in (
            ("UniqueId", str(log.log_id), report.log_id),
            ("PreviousUniqueId", str(log.previous_log_id), report.previous_log_id),
            ("EOLLocation", log.log_bytes, report.log_bytes),
        ):
            if expected != actual:
                raise FieldOutOfRange(
                    "the log is not the one that was announced",
                    path=path,
                    field=name,
                    expected=expected,
                    actual=actual,
                    spec="[MS-HRL] 2.2",
                )

    def _check_gate(self, _progress: Progress) -> None:
        self._gate.check()

    def _drop(self) -> None:
        """Forget a transfer whose bytes are no good, so that the next one does not build on them."""
        with self._home.catalog.transaction():
            self._home.require_owner(self._owner)
            self._home.require_transfer(self.transfer_id)
            self._home.catalog.delete_transfers(self._home.vm_id, "logs")
        for target in self._targets.values():
            target.medium.close()
            self._home.files.unlink(target.path)
        for log in self._transfer.logs:
            self._home.files.unlink(self._home.paths.times(log.log_id))

    def _rename(self) -> None:
        paths, files = self._home.paths, self._home.files
        for log in self._transfer.logs:
            if files.exists(paths.partial_log(log.log_id)):
                files.replace(paths.partial_log(log.log_id), paths.log(log.log_id))
        files.sync_directory(paths.spool)

    def _acknowledge(self) -> None:
        home, transfer = self._home, self._transfer
        with home.catalog.transaction():
            home.require_owner(self._owner)
            home.require_transfer(self.transfer_id)
            size = sum(log.log_bytes for log in transfer.logs)
            now_s = home.clock.now_s()
            kinds = (transfer.point_kind, transfer.consistency)
            point = (transfer.point_id, 0, transfer.instant_s, *kinds, "spooled")
            home.catalog.insert_point(
                home.vm_id, PointRow(*point, transfer.previous_point_id, size, now_s, None)
            )
            home.catalog.end_transfer(home.vm_id, "logs")
        home.verified_logs.update(log.log_id for log in transfer.logs)


def _ended() -> Exception:
    return StoreError("this transfer's session has ended", hint="begin the transfer again; it continues")
