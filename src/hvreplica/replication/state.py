"""The primary's state folder: what is replicated, what the replica acknowledged, and what is on its way.

    state.json          PrimaryState, replaced as a whole
    lock                held while a verb works on the folder
    fingerprints/0.fp   what the replica holds of disk 0 (tracking/fingerprints.py)
    journal/0.ij        what live tracking knows of disk 0 (capture/machine.py)
    logs/<id>.hrl       cut, not yet acknowledged: of the transfer on its way, and of those behind it
    logs/<id>.hrt       when its entries came, where that is known (formats/times.py)

Every verb writes its intention here before it acts, so that it can be killed anywhere and called again.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from hvreplica.errors import FormatError, HvReplicaError, Locked, UnsupportedVersion
from hvreplica.files import write_durably
from hvreplica.formats import messages
from hvreplica.hrl import times_path
from hvreplica.transport.local import Owner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem

VERSION = 4
SOCKET_NAME = "control.sock"  # of the process that owns the folder
MISSED_NAME = "missed.json"  # of cuts that another replica of the VM has: replication/missed.py
NIL = uuid.UUID(int=0)
PENDING_MAX = 256  # cuts that wait to be shipped; more only cost room that one later cut would not
_STATE_BYTES_MAX = 16 << 20  # twice what that many cuts of 64 disks take
# 1 had no cuts that wait, 2 no kinds of points and no way back, 3 no points of a store that are shipped on.
_VERSIONS_READ = (1, 2, 3, VERSION)


class TrackedDisk(msgspec.Struct, forbid_unknown_fields=True):
    """One protected disk; its place in the state is its index, for good.

    last_log_id: the newest acknowledged log, which the next one must follow. virtual_disk_id: of a VHDX, to
    know it by when it was moved. stage: "protected"; "joining" while the replica has no whole copy of a disk
    that was added; "joined" once it has one that no point has yet; "leaving" for one that was removed and
    that the replica's last point has; "removed". replica_bytes: its size in the last acknowledged point, None
    where that is virtual_bytes.
    """

    path: str
    virtual_bytes: Annotated[int, Meta(ge=512, le=messages.DISK_BYTES_MAX)]
    logical_sector_bytes: messages.SectorBytes
    physical_sector_bytes: messages.SectorBytes
    block_bytes: Annotated[int, Meta(ge=0, le=256 << 20)]
    last_log_id: uuid.UUID = NIL
    virtual_disk_id: uuid.UUID | None = None
    stage: Annotated[str, Meta(pattern="^(protected|joining|joined|leaving|removed)$")] = "protected"
    replica_bytes: messages.DiskBytes | None = None

    @property
    def is_here(self) -> bool:
        """Whether the VM has the disk now."""
        return self.stage not in {"leaving", "removed"}


class CutLog(msgspec.Struct, forbid_unknown_fields=True):
    """One log of a cycle, in logs/<log_id>.hrl. is_ordered: see messages.LogShape."""

    disk_index: messages.DiskIndex
    log_id: uuid.UUID
    previous_log_id: uuid.UUID
    log_bytes: messages.ByteCount
    changed_bytes: messages.ByteCount
    is_ordered: bool = False


class Transfer(msgspec.Struct, forbid_unknown_fields=True):
    """What is on its way. positions: for each disk or log, the bytes that the replica said are durable there.

    kind: "initial" or "logs". stage of logs: "cutting" until they are closed and durable, then "cut", then
    "acknowledged" once the replica has them durably; the fingerprints follow from there. tracked: whether
    every write since an initial transfer began is known to live tracking. disks: those that the point of the
    logs has, with their sizes at the cut; the one that joins. point_kind, consistency: of that point.
    source_point: the point of a store that it shows, None for a primary's disks.
    """

    kind: Annotated[str, Meta(pattern="^(initial|join|logs)$")]
    stage: Annotated[str, Meta(pattern="^(cutting|cut|acknowledged)$")]
    transfer_id: uuid.UUID
    point_id: uuid.UUID
    instant_s: messages.Instant
    positions: list[messages.ByteCount]
    logs: list[CutLog] = []
    tracked: bool = False
    disks: list[messages.DiskSize] = []
    point_kind: messages.PointKind = "standard"
    consistency: messages.Consistency = "crash"
    source_point: uuid.UUID | None = None


class Stopped(msgspec.Struct, forbid_unknown_fields=True):
    """Why this folder's VM must not run here, nor be replicated from here.

    kind: "prepared" for a planned failover; "adopting" while its disks become a replica in a store, and
    "adopted" then; "reversing" until the first cycle of a VM that was failed over to this site can begin.
    point: of "prepared" the one that the replica was told of, or had when it refused, None before that; else
    which call of `store adopt` it is. store: where the replica stands that the disks become.
    """

    kind: Annotated[str, Meta(pattern="^(prepared|adopting|adopted|reversing)$")]
    since_s: messages.Instant
    point: uuid.UUID | None = None
    store: str = ""


class PrimaryState(msgspec.Struct, forbid_unknown_fields=True):
    """state.json.

    phase: "new" before the first byte, "initial" until the replica has a whole copy, then "ready". transfer:
    the one on its way. pending: the cuts behind it, oldest first. mixed: the replica's copy is of several
    instants until the next logs are applied. paused: no cycle runs until it is resumed. joining: the copy of
    an added disk that is on its way beside them. stopped: None as long as the VM may run here. store: of an
    extended replication, the store whose points are shipped on, else empty. source_point: the one of them
    that last_point shows; None where nobody knows.
    """

    version: int
    vm: messages.VmName
    relationship_id: uuid.UUID
    generation: messages.Generation
    phase: Annotated[str, Meta(pattern="^(new|initial|ready)$")]
    disks: Annotated[list[TrackedDisk], Meta(min_length=1, max_length=messages.DISKS_MAX)]
    last_point: uuid.UUID | None = None
    transfer: Transfer | None = None
    pending: Annotated[list[Transfer], Meta(max_length=PENDING_MAX)] = []
    mixed: bool = False
    paused: bool = False
    joining: Transfer | None = None
    stopped: Stopped | None = None
    store: str = ""
    source_point: uuid.UUID | None = None


class StateFolder:
    """The folder, locked. One owner; release() when done."""

    def __init__(self, files: FileSystem, folder: Path, *, clock: Clock) -> None:
        self._files = files
        self.folder = folder
        self._clock = clock
        for path in (folder, self.fingerprints, self.logs):
            files.make_directory(path)
        try:
            self._lock = files.lock(folder / "lock")
        except Locked as error:
            raise _in_use(folder, error) from None

    @property
    def fingerprints(self) -> Path:
        """The folder of the fingerprint tables."""
        return self.folder / "fingerprints"

    @property
    def logs(self) -> Path:
        """The folder of the logs that are cut and not yet acknowledged."""
        return self.folder / "logs"

    def table_path(self, disk_index: int) -> Path:
        """Return where the fingerprint table of a disk stands."""
        return self.fingerprints / f"{disk_index}.fp"

    def log_path(self, log_id: uuid.UUID) -> Path:
        """Return where a log stands until it is acknowledged."""
        return self.logs / f"{log_id}.hrl"

    def load(self) -> PrimaryState | None:
        """Return the state, or None for a new folder. Raises: FormatError where it is damaged or too new."""
        return load_state(self._files, self.folder)

    def save(self, state: PrimaryState) -> None:
        """Make `state` the durable state, as a whole."""
        data = msgspec.json.format(msgspec.json.encode(state), indent=1)
        write_durably(self._files, self.folder / "state.json", data, clock=self._clock)

    def remove_logs(self, logs: Sequence[CutLog]) -> None:
        """Remove the files of `logs`."""
        for log in logs:
            self._files.unlink(self.log_path(log.log_id))
            self._files.unlink(times_path(self.log_path(log.log_id)))
        if logs:
            self._files.sync_directory(self.logs)

    def discard_logs(self, keep: Sequence[CutLog] = ()) -> None:
        """Remove every file in logs/ but those of `keep`."""
        paths = [self.log_path(log.log_id) for log in keep]
        kept = {path.name for log in paths for path in (log, times_path(log))}
        stale = [name for name in self._files.names(self.logs) if name not in kept]
        for name in stale:
            self._files.unlink(self.logs / name)
        if stale:
            self._files.sync_directory(self.logs)

    def remove_journals(self) -> None:
        """Remove what live tracking knew when it ended, durably: its next start takes all for changed."""
        if self._files.exists(self.folder / MISSED_NAME):
            self._files.unlink(self.folder / MISSED_NAME)
            self._files.sync_directory(self.folder)
        folder = self.folder / "journal"
        names = self._files.names(folder)
        for name in names:
            self._files.unlink(folder / name)
        if names:
            self._files.sync_directory(folder)

    def release(self) -> None:
        """Give the folder back."""
        self._lock.release()


def _in_use(folder: Path, error: Locked) -> Locked:
    """Return the error of a folder that another process owns, with its verb and number where known."""
    verb = None
    with contextlib.suppress(HvReplicaError, OSError):
        owner = Owner.find(folder / SOCKET_NAME)
        verb = None if owner is None else owner.ask("status")["running"]
    number = re.search(r"pid \d+", error.message)
    who = f"{f'`{verb}`' if verb else 'another verb'} runs{f' ({number[0]})' if number else ''}"
    hint = "stop it first, or wait for it"
    if verb is not None:
        hint = "ask it for a cycle with `replicate --once`, or for a cut with `cut`; else stop it first"
    return Locked(f"{who} and owns this state folder", path=folder, hint=hint)


def load_state(files: FileSystem, folder: Path) -> PrimaryState | None:
    """Return the state in `folder`, or None where there is none; it may be another process's.

    Raises: FormatError where it is damaged or too new.
    """
    path = folder / "state.json"
    if not files.exists(path):
        return None
    file = files.open(path)
    try:
        data = file.read(0, min(file.size(), _STATE_BYTES_MAX))
    finally:
        file.close()
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version not in _VERSIONS_READ:
            raise UnsupportedVersion(
                "unknown version of the primary's state",
                path=path,
                field="version",
                expected=VERSION,
                actual=version,
                hint="use the hvreplica that wrote it",
            )
        state = msgspec.json.decode(data, type=PrimaryState)
        state.version = VERSION
        return state
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(
            f"the primary's state is damaged: {error}",
            path=path,
            hint="restore the file, or move the folder away and run replicate with --takeover",
        ) from None


class _Version(msgspec.Struct):
    version: int


def track(vm: str, disks: Sequence[Disk], *, clock: Clock) -> PrimaryState:
    """Return the state of a relationship that begins now, with a new identity."""
    return PrimaryState(VERSION, vm, clock.guid(), 0, "new", [tracked_disk(disk) for disk in disks])


def cuts(state: PrimaryState) -> list[Transfer]:
    """Return what was cut and is not yet in the fingerprints, oldest first."""
    first = [] if state.transfer is None or state.transfer.kind != "logs" else [state.transfer]
    return [*first, *state.pending]


def logs_kept(state: PrimaryState) -> list[CutLog]:
    """Return the logs that must stay in the folder."""
    return [log for transfer in cuts(state) for log in transfer.logs]


def previous_log_ids(state: PrimaryState) -> list[uuid.UUID]:
    """Return for each disk the log that its next one follows: the last that was cut, shipped or not."""
    last = [disk.last_log_id for disk in state.disks]
    for log in logs_kept(state):
        last[log.disk_index] = log.log_id
    return last


def shapes(state: PrimaryState) -> list[messages.DiskShape]:
    """Return what the replica must know of the disks, also of those that its points still have."""
    return [
        messages.DiskShape(
            index=index,
            virtual_bytes=disk.virtual_bytes,
            logical_sector_bytes=disk.logical_sector_bytes,
            physical_sector_bytes=disk.physical_sector_bytes,
            block_bytes=disk.block_bytes,
            label=disk.path.rsplit("/", 1)[-1][:255],
            virtual_disk_id=disk.virtual_disk_id,
        )
        for index, disk in enumerate(state.disks)
        if disk.stage != "removed"
    ]


def tracked_disk(disk: Disk) -> TrackedDisk:
    """Return what is remembered of a disk."""
    return TrackedDisk(
        str(disk.path),
        disk.virtual_bytes,
        disk.logical_sector_bytes,
        disk.physical_sector_bytes,
        # The replica is a VHDX, which cannot have all the blocks of a VHD.
        disk.block_bytes if disk.format == "vhdx" else 0,
        virtual_disk_id=disk.virtual_disk_id,
    )
