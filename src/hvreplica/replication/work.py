"""What the steps of one replicate call share:

the state and its folder, the disks, the tables, the running result.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.errors import FormatError, ProtocolViolation, TrackingLost
from hvreplica.replication.session import ReplicaSession
from hvreplica.replication.shape import indexes
from hvreplica.replication.ship import Shipment
from hvreplica.replication.state import NIL, cuts, logs_kept, previous_log_ids
from hvreplica.tracking.fingerprints import FingerprintTable
from hvreplica.transport import COMPRESSIONS, client_context, parse_address

if TYPE_CHECKING:
    import os
    import ssl
    import uuid
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from hvreplica.capture.machine import Machine
    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.formats import messages
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.progress import ProgressCallback
    from hvreplica.replication.fan import Fan
    from hvreplica.replication.origin import Origin
    from hvreplica.replication.results import GonePoint, ShippedLog
    from hvreplica.replication.sources import FrameSource
    from hvreplica.replication.state import PrimaryState, StateFolder, Transfer

CONNECTIONS_DEFAULT = 2
CONNECTIONS_MAX = 16
_RESYNC_HINT = (
    "run replicate with --resync: it rebuilds the table from the replica and sends only what differs"
)


@dataclass(frozen=True, slots=True)
class Link:
    """How to reach the replica.

    address: HOST:PORT. compression: auto, zstd, lz4 or none. connections: for data. tls: where the context
    is from.
    """

    address: str
    context: ssl.SSLContext = field(compare=False)
    compression: str
    connections: int
    tls: Path | None = None


def make_link(address: str, tls: str | os.PathLike[str], compression: str, connections: int) -> Link:
    """Return a link, checked. tls: the folder of the certificates.

    Raises: ValueError, AuthenticationFailed.
    """
    if compression not in COMPRESSIONS:
        message = f"compression is one of {', '.join(COMPRESSIONS)}, not {compression!r}"
        raise ValueError(message)
    if not 1 <= connections <= CONNECTIONS_MAX:
        message = f"connections must be 1 to {CONNECTIONS_MAX}"
        raise ValueError(message)
    parse_address(address)
    folder = Path(tls).absolute()
    return Link(address, client_context(folder), compression, connections, folder)


@dataclass(slots=True)
class Tally:
    """What one call did so far; it only grows, over reconnections too."""

    kind: str
    changed_bytes: list[int]
    wire_bytes: int = 0
    shipped: list[ShippedLog] = field(default_factory=list)
    gone: list[GonePoint] = field(default_factory=list)
    warning: str | None = None
    waits_for: str | None = None


@dataclass(slots=True)
class Work:
    """What replicate calls work on. One owner thread; beside it, cuts may come from others.

    machine: the live tracking of the disks, None where they are at rest and compared. lock: held to change
    the state in several steps that belong together; save() after each change. cutting: held while a cut is
    made, and to change what a cut uses: the set of open tables, files in logs/ that no state names. Whoever
    needs both takes `cutting` first. disks, tables: of those that the VM has now, in the order of `indexes`.
    points: what the replica shall keep of the VM's points, None for what it was told before.
    is_due: whether a cycle should begin now; an added disk's first copy makes room for it. within: where
    alone a disk may differ from its table at the next comparison, by index. origin: the recovery point that
    the disks are, where they are those of a store. fan: where the VM has several replicas; they share
    machine, disks and `cutting`, each has its own state and what it missed of cuts.
    """

    folder: StateFolder
    state: PrimaryState
    disks: Sequence[Disk]
    link: Link | None
    files: FileSystem
    clock: Clock
    on_progress: ProgressCallback
    tally: Tally
    machine: Machine | None = None
    points: PointPolicy | None = None
    fan: Fan | None = None
    is_due: Callable[[], bool] = lambda: False
    origin: Origin | None = None
    tables: list[FingerprintTable] = field(default_factory=list)
    within: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    cutting: threading.RLock = field(default_factory=threading.RLock)

    @property
    def indexes(self) -> list[int]:
        """The index of each disk."""
        return indexes(self.state)

    @property
    def members(self) -> list[int]:
        """The places, in `disks` and `tables`, of the disks that points of now have."""
        stages = [self.state.disks[index].stage for index in self.indexes]
        return [place for place, stage in enumerate(stages) if stage != "joining"]

    @property
    def instant_s(self) -> float:
        """The instant that the disks show: now, or that of the recovery point that they are."""
        return self.clock.now_s() if self.origin is None else self.origin.instant_s

    def save(self) -> None:
        """Make the state durable; from any thread."""
        with self.lock:
            self.folder.save(self.state)

    def append(self, transfer: Transfer) -> None:
        """Record a cut behind those that wait; durable on return, and not there after a failure."""
        with self.lock:
            self.state.pending.append(transfer)
            try:
                self.save()
            except BaseException:
                self.state.pending.remove(transfer)
                raise

    def next_transfer(self) -> Transfer | None:
        """Return the transfer that is on its way, or send the oldest cut that waits; None where none is."""
        with self.lock:
            if self.state.transfer is None and self.state.pending:
                self.state.transfer = self.state.pending.pop(0)
                self.save()
            return self.state.transfer

    def queue(self) -> list[Transfer]:
        """Return what was cut and is not yet in the tables, oldest first, as it is at one moment.

        With `cutting` held, nothing but the replica's own taking in of the first ones changes it afterwards.
        """
        with self.lock:
            return cuts(self.state)

    def previous_log_ids(self) -> list[uuid.UUID]:
        """Return for each disk the log that its next one follows; see queue()."""
        with self.lock:
            return previous_log_ids(self.state)

    def forget_logs(self, transfer: Transfer) -> None:
        """Give the files of acknowledged logs back to live tracking, or remove them."""
        if self.machine is None:
            self.folder.remove_logs(transfer.logs)
        elif self.fan is not None:
            self.fan.release(self.folder.log_path(log.log_id) for log in transfer.logs)
        else:
            self.machine.recycle(self.folder.log_path(log.log_id) for log in transfer.logs)

    def mark(self, disk_index: int, extents: npt.NDArray[np.int64]) -> None:
        """Have this replica's next cut carry ranges of a disk that is tracked live; durable on return."""
        assert self.machine is not None
        if self.fan is not None:
            self.fan.miss(self, {disk_index: extents})
        else:
            self.machine.mark(disk_index, extents)

    def sweep_logs(self) -> None:
        """Remove every file in logs/ that the state does not name."""
        with self.cutting:
            with self.lock:
                kept = logs_kept(self.state)
            self.folder.discard_logs(keep=kept)

    def known_tables(self) -> list[FingerprintTable] | None:
        """Return the tables if they say what the replica holds and no cut is on its way there.

        Called with `cutting` held.
        """
        if self.state.phase != "ready" or self.queue():
            return None
        try:
            self.open_tables()
            self.check_tables()
        except TrackingLost:
            return None
        return list(self.tables)

    def session(self) -> ReplicaSession:
        """Open a session; the caller closes it."""
        link = self.required_link
        return ReplicaSession(link.address, link.context)

    @property
    def required_link(self) -> Link:
        """The link of the call that runs."""
        assert self.link is not None
        return self.link

    def ship(self, session: ReplicaSession, source: FrameSource, transfer: Transfer, *, phase: str) -> bool:
        """Send a source to its end and have it committed; its positions are recorded on the way.

        Returns False where it had to give way to something that is due.
        """

        def record() -> None:
            transfer.positions = list(source.positions)
            self.save()

        shipment = Shipment(
            session,
            source,
            compression=self.required_link.compression,
            connections=self.required_link.connections,
            on_progress=self.on_progress,
            clock=self.clock,
        )
        return shipment.run(transfer.transfer_id, phase=phase, record=record)

    def resume(self, transfer: Transfer, positions: list[int]) -> None:
        """Go on from the positions that the replica answered;

        they never lie above those that we asked for.
        """
        known = transfer.positions
        if len(positions) != len(known) or any(
            at > asked for at, asked in zip(positions, known, strict=True)
        ):
            raise ProtocolViolation(
                "the replica answered with positions that were not asked for",
                path=self.required_link.address,
                expected=known,
                actual=positions,
            )
        if positions != known:
            transfer.positions = positions
            self.save()

    def create_tables(self) -> None:
        """Start with tables that say "all zero" and describe no point; durable on return."""
        with self.cutting:
            self.close_tables()
            for index, disk in zip(self.indexes, self.disks, strict=True):
                self.tables.append(self._create_table(index, disk))
            self.files.sync_directory(self.folder.fingerprints)

    def renew_table(self, disk_index: int) -> None:
        """Put a table that says "all zero" in the place of an open one; durable on return."""
        with self.cutting:
            place = self.indexes.index(disk_index)
            self.tables[place].close()
            self.tables[place] = self._create_table(disk_index, self.disks[place])
            self.files.sync_directory(self.folder.fingerprints)

    def _create_table(self, index: int, disk: Disk) -> FingerprintTable:
        path = self.folder.table_path(index)
        table = FingerprintTable.create(self.files, path, disk_index=index, virtual_bytes=disk.virtual_bytes)
        table.sync()
        return table

    def open_tables(self) -> None:
        """Open the tables that stand in the folder, where they are not open.

        Raises: TrackingLost for one that is damaged or missing.
        """
        with self.cutting:
            if self.tables:
                return
            try:
                self._open_tables()
            except BaseException:
                self.close_tables()
                raise

    def _open_tables(self) -> None:
        for index, disk in zip(self.indexes, self.disks, strict=True):
            table = self._open_table(index, disk)
            self.tables.append(table)
            # Only longer: a log that waits may be of the time before the disk became shorter.
            if table.header.virtual_bytes < disk.virtual_bytes:
                table.resize(disk.virtual_bytes)

    def _open_table(self, index: int, disk: Disk) -> FingerprintTable:
        path = self.folder.table_path(index)
        try:
            return FingerprintTable.open(self.files, path)
        except (FormatError, FileNotFoundError) as error:
            if self.state.disks[index].stage == "joining":
                with self.lock:
                    self.state.joining = None  # nothing tells what was sent: it begins anew
                    self.save()
                return self._create_table(index, disk)
            raise TrackingLost(
                f"the fingerprint table cannot be used: {error}", path=path, hint=_RESYNC_HINT
            ) from None

    def fit_tables(self, sizes: Sequence[messages.DiskSize]) -> None:
        """Let tables forget what the replica's disks, with these sizes, do not have any more."""
        held = {disk.index: disk.virtual_bytes for disk in sizes}
        for index, disk, table in zip(self.indexes, self.disks, self.tables, strict=True):
            size = table.header.virtual_bytes
            least = min(held.get(index, size), size)
            if least == size >= disk.virtual_bytes:
                continue
            with self.cutting:  # a cut reads it to the disk's end
                table.resize(least)
                if least < disk.virtual_bytes:
                    table.resize(disk.virtual_bytes)

    def check_tables(self) -> None:
        """Refuse tables that do not describe the point that the replica was on before a pending transfer.

        One that was acknowledged may have taken some of them further already. Raises: TrackingLost.
        """
        expected = {self.state.last_point or NIL}
        if self.state.transfer is not None and self.state.transfer.stage == "acknowledged":
            expected.add(self.state.transfer.point_id)
        for place in self.members:
            table, index = self.tables[place], self.indexes[place]
            if table.header.point_id not in expected:
                raise TrackingLost(
                    "the fingerprint table describes another point than the replica's",
                    path=self.folder.table_path(index),
                    field="point_id",
                    expected=self.state.last_point or NIL,
                    actual=table.header.point_id,
                    hint=_RESYNC_HINT,
                )

    def close_tables(self) -> None:
        """Close what is open."""
        with self.cutting:
            for table in self.tables:
                table.close()
            self.tables = []
