"""Make a replica of the disks of an old primary, whose VM runs at another site now.

    new VM     the catalog knows the VM and its disks, without a point
               disks/<i>.vhdx: the primary's own files under their new names, or converted copies
               the point: what the disks hold, all that this site wrote included
    was here   what the active disks hold becomes one more log on disks/<i>.vhdx, applied with undo;
               then the active disks go. So the points from before the failover stay.

What was written after the last cut that the other site has stands beside the disks (store/adopted.py) before
any of it begins. Every step may be done twice: a call that was cut off is repeated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from hvreplica.disk import convert_disk, open_disk
from hvreplica.errors import InvalidTransition, StoreError
from hvreplica.files import write_durably
from hvreplica.hrl import LogWriter
from hvreplica.store.adopted import AdoptedFiles, AdoptedRecord
from hvreplica.store.apply import finish
from hvreplica.store.check import file_length
from hvreplica.store.failover import Intent, advance, begin
from hvreplica.store.records import NIL, DiskRow, DiskSpec, LogSpec, Owner, PointRow
from hvreplica.store.room import room
from hvreplica.store.since import base_of
from hvreplica.tracking.differencing import DifferencingDisk

if TYPE_CHECKING:
    import uuid
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome

MOVED_SUFFIX = ".moved.txt"
OLD_SUFFIX = ".old"


@dataclass(frozen=True, slots=True)
class AdoptedDisk:
    """One disk of the old primary. path: its file. ranges: what was written since the known points."""

    spec: DiskSpec
    path: Path
    last_log_id: uuid.UUID
    ranges: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Adoption:
    """What is adopted. id: of this call, the same when it is repeated after a cut.

    owner: the relationship and generation of the old primary. known: points of the other site from which the
    ranges count, the last acknowledged one first; empty where nobody knows (is_known False).
    """

    id: uuid.UUID
    owner: Owner
    disks: list[AdoptedDisk]
    known: list[uuid.UUID]
    is_known: bool


class AdoptReport(msgspec.Struct, frozen=True):
    """What became of an old primary. point: what its disks hold. changed_bytes: written there alone, at most.

    disks: the files of the replica. known: whether what was written is known; else all will be compared.
    """

    vm: str
    store: str
    point: str
    known: bool
    changed_bytes: int
    disks: list[str]


def adopt(home: VmHome, adoption: Adoption, *, progress: ProgressCallback | None = None) -> AdoptReport:
    """Make the replica, or the rest of it; durable on return.

    home: of the VM, registered in its store. Raises: InvalidTransition where the store has a replica of this
    VM at work; StoreError, StoreFull, Locked, FormatError, OSError.
    """
    with home.exclusive(), room(home.files, home.paths.folder):
        record = AdoptedFiles(home).read()
        if record is None or record.adoption != adoption.id:
            _require_place(home)
            record = _begin(home, adoption)
        if home.failover().mode == "Primary":
            _return(home, adoption, record, progress)
        elif home.catalog.point(home.vm_id, record.point) is None:
            _take(home, adoption, record, progress)
        return _report(home, adoption, record)


def require_adoptable(home: VmHome, disks: Mapping[int, Path]) -> None:
    """Refuse what adopt() would refuse, for a caller that has noted nothing of it yet. disks: by index.

    Raises: InvalidTransition, StoreError.
    """
    _require_place(home)
    failover = home.failover()
    if failover.mode == "Primary" and failover.intent is None:
        held = {row.spec.index for row in home.catalog.disks(home.vm_id) if row.is_held}
        for index, path in disks.items():
            _require_active(home, index, path, is_held=index in held)


def _require_place(home: VmHome) -> None:
    """Refuse to put an old primary in the place of a replica that is in use. Raises: InvalidTransition."""
    failover = home.failover()
    was_here = failover.mode == "Primary" and failover.intent is None
    if not was_here and home.catalog.points(home.vm_id):
        raise InvalidTransition(
            f"the store has a replica of VM {home.name!r} already, and this site is not its primary",
            path=home.paths.folder,
            expected="no point, or a VM that was reversed",
            actual=f"{failover.state} as {failover.mode}",
            hint="take the disks into another store, or under another name",
        )


def _begin(home: VmHome, adoption: Adoption) -> AdoptedRecord:
    """Write down what the other site will ask for, before any disk leaves its place."""
    is_same = adoption.is_known and not any(len(disk.ranges) for disk in adoption.disks)
    last = adoption.known[0] if adoption.known else None
    # Disks that nobody wrote to are that very point; else they are one of their own, with all of it in it.
    is_last = is_same and last is not None and home.catalog.point(home.vm_id, last) is None
    record = AdoptedRecord(
        version=1,
        adoption=adoption.id,
        point=last if is_last and last is not None else home.clock.guid(),
        known=adoption.known,
        is_known=adoption.is_known,
    )
    ranges = {disk.spec.index: (disk.ranges, disk.spec.virtual_bytes) for disk in adoption.disks}
    AdoptedFiles(home).write(record, ranges)
    return record


# ---- a VM that this store did not have


def _take(home: VmHome, adoption: Adoption, record: AdoptedRecord, progress: ProgressCallback | None) -> None:
    home.files.make_directory(home.paths.disks)
    for disk in adoption.disks:
        _place(home, disk, progress)
    home.files.sync_directory(home.paths.disks)
    rows = [_row(home, disk, record.point) for disk in adoption.disks]
    catalog, vm_id, now_s = home.catalog, home.vm_id, home.clock.now_s()
    with catalog.transaction():
        for row in rows:
            catalog.set_disk_state(vm_id, row)
        catalog.insert_point(vm_id, _point(home, record, sum(row.file_bytes or 0 for row in rows)))
        sizes = {row.spec.index: row.spec.virtual_bytes for row in rows}
        catalog.set_members(vm_id, record.point, sizes)
        catalog.complete_point(vm_id, record.point, "complete", now_s)


def _place(home: VmHome, disk: AdoptedDisk, progress: ProgressCallback | None) -> None:
    """Put one disk where the replica's stands; its old name leads to nothing that could be started."""
    target = home.paths.disk(disk.spec.index)
    old = disk.path.with_name(disk.path.name + OLD_SUFFIX)
    is_here = home.files.exists(disk.path)
    if home.files.exists(target):
        if is_here and not _is_device(home, disk.path):
            raise StoreError(
                "the disk has been taken in, and another file stands under its old name",
                path=disk.path,
                hint=f"it is {target} now; move the other file away, then call this again",
            )
    elif is_here and _may_move(home, disk):
        home.files.replace(disk.path, target)
        home.files.sync_directory(target.parent)
        home.files.sync_directory(disk.path.parent)
    else:
        partial = home.paths.partial_disk(disk.spec.index)
        source = disk.path if is_here else old  # where a call was cut before the copy got its name
        convert_disk(home.files, source, partial, clock=home.clock, progress=progress, overwrite=True)
        if is_here and not _is_device(home, disk.path):  # a block device keeps its name
            home.files.replace(disk.path, old)
            home.files.sync_directory(disk.path.parent)
        home.files.replace(partial, target)
        home.files.sync_directory(target.parent)
    note = f"This disk of VM {home.name!r} became a replica: {target}\nSee docs/failback.md of hvreplica.\n"
    moved = disk.path.with_name(disk.path.name + MOVED_SUFFIX)
    if not home.files.exists(moved) and not home.files.exists(disk.path):
        write_durably(home.files, moved, note.encode(), clock=home.clock)


def _is_device(home: VmHome, path: Path) -> bool:
    """Return whether a block device has this name, which is not to be renamed."""
    return home.files.identity(path).inode == 0  # as a disk's identity has it, for the name says nothing


def _may_move(home: VmHome, disk: AdoptedDisk) -> bool:
    """Return whether the file itself can be the replica's; nobody else may have it open. Raises: Locked."""
    with open_disk(home.files, disk.path, writable=True, clock=home.clock) as opened:
        fits = opened.format == "vhdx" and opened.parent is None
        opened.flush()
    device = home.files.identity(disk.path).device
    return fits and device == home.files.identity(home.paths.lock).device


def _row(home: VmHome, disk: AdoptedDisk, point_id: uuid.UUID) -> DiskRow:
    path = home.paths.disk(disk.spec.index)
    with open_disk(home.files, path, format="vhdx", clock=home.clock) as opened:
        spec = dataclasses.replace(disk.spec, virtual_bytes=opened.virtual_bytes)
        guid = opened.data_write_guid
    return DiskRow(spec, file_length(home.files, path), guid, disk.last_log_id, point_id)


def _point(
    home: VmHome, record: AdoptedRecord, held_bytes: int, previous: uuid.UUID | None = None
) -> PointRow:
    now_s = home.clock.now_s()
    return PointRow(
        id=record.point,
        sequence=0,
        instant_s=now_s,
        kind="manual",
        consistency="crash",
        state="spooled",
        previous_id=previous,
        bytes=held_bytes,
        received_s=now_s,
        applied_s=None,
    )


# ---- a VM that was failed over to this store, and goes back


def _return(
    home: VmHome, adoption: Adoption, record: AdoptedRecord, progress: ProgressCallback | None
) -> None:
    if home.failover().intent is None:
        _spool_active(home, adoption, record)
    finish(home, progress=progress)
    if home.catalog.point(home.vm_id, record.point) is None:
        raise StoreError(f"point {record.point} of VM {home.name!r} is lost", path=home.paths.folder)
    while (failover := home.failover()).intent is not None:
        assert failover.intent is not None
        if failover.intent.step == "remove":
            _remove_active(home)
            failover = msgspec.structs.replace(failover, active=[])
        with home.catalog.transaction():
            home.set_failover(advance(failover))


def _spool_active(home: VmHome, adoption: Adoption, record: AdoptedRecord) -> None:
    """Write what the active disks hold as logs, and record them together with the way that is left."""
    catalog, vm_id = home.catalog, home.vm_id
    held = {row.spec.index: row for row in catalog.disks(vm_id) if row.is_held}
    home.files.make_directory(home.paths.spool)
    logs, sizes = [], {}
    for disk in adoption.disks:
        index = disk.spec.index
        _require_active(home, index, disk.path, is_held=index in held)
        sizes[index] = disk.spec.virtual_bytes
        logs.append(_log(home, disk, held[index]))
    home.files.sync_directory(home.paths.spool)
    newest = catalog.points(vm_id)[-1].id
    with catalog.transaction():
        point = _point(home, record, sum(log.log_bytes for log in logs), newest)
        catalog.insert_point(vm_id, point)
        catalog.set_members(vm_id, record.point, sizes)
        catalog.insert_logs(vm_id, record.point, logs)
        catalog.set_owner(vm_id, adoption.owner, home.clock.now_s())
        home.set_failover(begin(home.name, home.failover(), "adopt", intent=Intent("adopt", "finish")))


def _require_active(home: VmHome, index: int, path: Path, *, is_held: bool) -> None:
    """Refuse a disk that the failover to this store has not made. Raises: StoreError."""
    if not is_held or path != home.paths.active(index):
        raise StoreError(
            f"disk {index} of VM {home.name!r} is not the one that its failover made",
            path=path,
            expected=home.paths.active(index),
            hint="copy what the VM runs on into that file, or adopt the VM into another store",
        )


def _log(home: VmHome, disk: AdoptedDisk, row: DiskRow) -> LogSpec:
    index, log_id = disk.spec.index, home.clock.guid()
    path, base_path = home.paths.log(log_id), home.paths.disk(index)
    with open_disk(home.files, disk.path, shared=True, clock=home.clock) as child:
        base = base_of(child, base_path)
        writer = LogWriter.create(
            home.files,
            path,
            log_id=log_id,
            previous_log_id=row.last_log_id,
            data_write_guid=child.data_write_guid or NIL,
            clock=home.clock,
        )
        with writer:
            DifferencingDisk(child, base, skip_equal=True).changes_into(writer, on_read=lambda _: None)
            summary = writer.close()
    return LogSpec(index, log_id, row.last_log_id, summary.log_bytes)


def _remove_active(home: VmHome) -> None:
    folder = home.paths.active(0).parent
    names = [name for name in home.files.names(folder) if name.endswith(".vhdx")]
    for name in names:
        home.files.unlink(folder / name)
    if names:
        home.files.sync_directory(folder)


def _report(home: VmHome, adoption: Adoption, record: AdoptedRecord) -> AdoptReport:
    return AdoptReport(
        vm=home.name,
        store=str(home.parts.root),
        point=str(record.point),
        known=record.is_known,
        changed_bytes=sum(AdoptedFiles(home).changed_bytes(disk.spec.index) for disk in adoption.disks),
        disks=[str(home.paths.disk(disk.spec.index)) for disk in adoption.disks],
    )
