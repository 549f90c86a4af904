"""Make an older point the newest one, as one more change that can be undone; and take that back.

    revert    newest N, chosen P: logs that turn N into P, with a point M of kind manual; they are applied as
              any others, so that N stays a point, kept by what M's logs overwrote
    restore   those undo parts go back into the disks; N is the newest again, M and the parts are gone

The record of the failover names M and N before anything is made, so that each can be repeated: M is in the
catalog once its logs are durable, and while N's parts are there they hold all in which the disks may differ
from N. N must not be dropped meanwhile (failover.pinned_points()), or its parts would be another point's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from hvreplica.clock import iso_time
from hvreplica.disk import open_disk
from hvreplica.disk.extents import (
    NO_EXTENTS,
    batches,
    clipped,
    data_windows,
    merge,
    select_runs,
    spans_of,
    union,
)
from hvreplica.errors import FailoverRefused, FormatError, LogError, StoreError, kept
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.hrl import LogWriter, apply_log, verify_log
from hvreplica.store.apply import count_change, finish, look
from hvreplica.store.digest import Digest
from hvreplica.store.failover import DiskBefore, Reverted
from hvreplica.store.follow import begin_anew
from hvreplica.store.open_point import open_point
from hvreplica.store.part_files import PartFiles
from hvreplica.store.points_kept import chain, part_path, remove_parts, spoiled_points
from hvreplica.store.records import LogSpec, PointRow
from hvreplica.store.resize import fit_disk
from hvreplica.store.room import room
from hvreplica.store.transfers import last_logs, sweep
from hvreplica.store.undo import log_extents

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hvreplica.disk import Disk
    from hvreplica.progress import ProgressCallback
    from hvreplica.store.failover import Failover
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import DiskRow, UndoRow

_Damaged = tuple["UndoRow", Exception]
_STEP_BYTES = 4 << 20
_SECTOR_BYTES = 512  # what extents of a log are multiples of


def require_revertible(home: VmHome, newest: PointRow, chosen: PointRow) -> None:
    """Refuse a point with a disk that the newest one does not have. Raises: FailoverRefused."""
    members = home.catalog.members(home.vm_id, chosen.id)
    missing = members.keys() - home.catalog.members(home.vm_id, newest.id).keys()
    if not missing:
        return
    named = [
        f"{row.spec.index} ({row.spec.label}"
        + ("" if row.removed_s is None else f", removed {iso_time(row.removed_s)}")
        + ")"
        for row in home.catalog.disks(home.vm_id)
        if row.spec.index in missing
    ]
    raise FailoverRefused(
        f"point {chosen.id} of VM {home.name!r} has a disk that the VM does not have any more:"
        f" {', '.join(named)}",
        path=home.paths.folder,
        hint="choose a newer point; `failover test` runs a test VM from this one, and `point export` writes"
        " its disks, for a VM of its own",
    )


def revert_forward(
    home: VmHome, record: Failover, point_id: uuid.UUID, *, progress: ProgressCallback | None
) -> Failover:
    """Make a point equal to `point_id` the newest one; return the record that names it. Repeatable."""
    record = _recorded(home, record)
    reverted = record.reverted
    if reverted is not None and home.catalog.point(home.vm_id, reverted.id) is None:
        _insert(home, reverted, point_id)
    finish(home, progress=progress)
    return record


def take_back(
    home: VmHome, record: Failover, *, force: bool, progress: ProgressCallback | None
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Bring the disks back to the point that was the newest one, durably; repeatable.

    force: where its undo parts are damaged, stay on the manual point and mark that one damaged. Returns what
    changes the catalog, inside the transaction that ends this step, and what removes files after it. Raises:
    FailoverRefused for damaged parts, before anything is changed.
    """
    reverted = record.reverted
    if reverted is None:
        return _nothing, _nothing
    catalog, vm_id = home.catalog, home.vm_id
    made = catalog.point(vm_id, reverted.id)
    logs = catalog.logs(vm_id, reverted.id)
    parts = catalog.undo_rows(vm_id, point_id=reverted.from_point)
    kept = [row for row in catalog.kept_logs(vm_id) if row.point_id == reverted.id]
    states: list[DiskRow] = []
    if made is not None and made.state != "spooled":
        damaged = _damaged(home, parts)
        if damaged and not force:
            raise _cannot_return(home, reverted, damaged[0][1]) from damaged[0][1]
        if damaged:
            return _stay(home, reverted, damaged), _nothing
        _begin_return(home, record, reverted)
        members = catalog.members(vm_id, reverted.from_point)
        for disk in (each for each in reverted.disks if each.disk in members):
            own = [part for part in parts if part.disk_index == disk.disk]
            states.append(_put_back(home, disk, own, progress))

    def change_rows() -> None:
        for state in states:
            catalog.set_disk_state(vm_id, state)
            digest = next(disk.digest for disk in reverted.disks if disk.disk == state.spec.index)
            begin_anew(home, state.spec.index, None if digest is None else Digest.of_hex(digest))
        for disk in reverted.disks:
            catalog.set_removed(vm_id, disk.disk, disk.removed_s)
        for part in parts:
            catalog.delete_undo(vm_id, part.id)
        for row in kept:
            catalog.delete_kept_log(vm_id, row.log_id)
        catalog.delete_point(vm_id, reverted.id)

    def remove_files() -> None:
        remove_parts(home, parts)
        for log_id in {log.log_id for log in logs} | {row.log_id for row in kept}:
            for path in (
                home.paths.log(log_id),
                home.paths.times(log_id),
                home.paths.kept_log(log_id),
                home.paths.kept_times(log_id),
            ):
                home.files.unlink(path)

    return change_rows, remove_files


def _begin_return(home: VmHome, record: Failover, reverted: Reverted) -> None:
    """Let nobody have the manual point, nor anybody sum up its disks, while they change; durable."""
    with home.catalog.transaction():
        home.set_failover(replace(record, reverted=replace(reverted, returning=True)))
        home.catalog.set_point_state(home.vm_id, reverted.id, "applying")
        for disk in reverted.disks:
            home.catalog.delete_scan(home.vm_id, disk.disk)
    count_change(home)


def _nothing() -> None:
    """Change nothing."""


def _stay(home: VmHome, reverted: Reverted, damaged: list[_Damaged]) -> Callable[[], None]:
    """Return what gives up on the point that was the newest one; its primary then has to compare."""
    catalog, vm_id = home.catalog, home.vm_id
    rows = {row.spec.index: row for row in catalog.disks(vm_id)}
    states = [
        look(home, rows[index], rows[index].last_log_id) for index in catalog.members(vm_id, reverted.id)
    ]

    def change_rows() -> None:
        for state in states:
            catalog.set_disk_state(vm_id, state)
        for part, error in damaged:
            for point in spoiled_points(home, part):
                catalog.damage_point(vm_id, point.id, f"undo part {part.id} is damaged: {error}")
        if reverted.returning:  # the disks are between the two
            catalog.delete_logs(vm_id, reverted.id)
            for disk in reverted.disks:
                begin_anew(home, disk.disk, None)
            catalog.set_point_state(vm_id, reverted.id, "complete")
            catalog.damage_point(vm_id, reverted.id, "bringing the disks back after a failover was given up")

    return change_rows


def _cannot_return(home: VmHome, reverted: Reverted, error: Exception) -> FailoverRefused:
    return FailoverRefused(
        f"point {reverted.from_point} of VM {home.name!r}, which its primary knows, cannot be brought back:"
        f" {error}",
        path=home.paths.points,
        hint="with --force the replica stays on the point that it was failed over to, and the primary must"
        " compare the disks with `hvreplica replicate --resync`",
    )


def _recorded(home: VmHome, record: Failover) -> Failover:
    """Return the record with the id that the new point will have and how the disks are now; durable."""
    if record.reverted is not None:
        return record
    newest = [row for row in home.catalog.points(home.vm_id) if row.is_kept][-1]
    disks = [
        DiskBefore(row.spec.index, row.spec.virtual_bytes, row.last_log_id, row.removed_s, row.digest)
        for row in home.catalog.disks(home.vm_id)
    ]
    record = replace(record, reverted=Reverted(home.clock.guid(), newest.id, disks))
    with home.catalog.transaction():
        home.set_failover(record)
    return record


def _insert(home: VmHome, reverted: Reverted, point_id: uuid.UUID) -> None:
    """Write the logs that turn the disks into the chosen point, and let a point wait for them."""
    catalog, vm_id = home.catalog, home.vm_id
    sweep(home)  # logs of a call that was cut
    chosen = catalog.point(vm_id, point_id)
    if chosen is None:
        raise StoreError(f"point {point_id} of VM {home.name!r} is gone", path=home.paths.folder)
    members = catalog.members(vm_id, point_id)
    last = last_logs(home)
    home.files.make_directory(home.paths.spool)
    logs = []
    with open_point(home, point_id) as opened:
        for disk_index, point_disk in opened.disks.items():
            log = _write_log(home, point_id, disk_index, point_disk, last[disk_index])
            logs += [] if log is None else [log]
    home.files.sync_directory(home.paths.spool)
    now_s = home.clock.now_s()
    with catalog.transaction():
        catalog.insert_point(
            vm_id,
            PointRow(
                id=reverted.id,
                sequence=0,
                instant_s=chosen.instant_s,
                kind="manual",
                consistency=chosen.consistency,
                state="spooled",
                previous_id=reverted.from_point,
                bytes=sum(log.log_bytes for log in logs),
                received_s=now_s,
                applied_s=None,
            ),
        )
        catalog.set_members(vm_id, reverted.id, members)
        catalog.insert_logs(vm_id, reverted.id, logs)
    home.verified_logs.update(log.log_id for log in logs)


def _write_log(
    home: VmHome, point_id: uuid.UUID, disk_index: int, point_disk: Disk, previous_id: uuid.UUID
) -> LogSpec | None:
    """Write a log of what the disk does not hold as the point has it; None where there is no such thing."""
    log_id = home.clock.guid()
    partial, path = home.paths.partial_log(log_id), home.paths.log(log_id)
    with (
        room(home.files, partial),
        open_disk(home.files, home.paths.disk(disk_index), format="vhdx", clock=home.clock) as disk,
    ):
        extents = _may_differ(home, point_id, disk_index, point_disk, disk)
        writer = LogWriter.create(
            home.files,
            partial,
            log_id=log_id,
            previous_log_id=previous_id,
            data_write_guid=disk.data_write_guid,
            clock=home.clock,
        )
        with writer:
            for rows in batches(extents, _STEP_BYTES):
                _append_difference(writer, point_disk, disk, rows)
        summary = writer.close()
    if not summary.entries:
        home.files.unlink(partial)
        return None
    home.files.replace(partial, path)
    return LogSpec(disk_index, log_id, previous_id, summary.log_bytes)


def _may_differ(
    home: VmHome, point_id: uuid.UUID, disk_index: int, point_disk: Disk, disk: Disk
) -> NDArray[np.int64]:
    """Return a superset of where the point and the disk differ, within the point's size."""
    parts = chain(home, point_id, disk_index)
    if any(part.kind == "whole" for part in parts):
        # The disk is another copy: what either of the two holds.
        found = [NO_EXTENTS]
        for source in (point_disk, disk):
            found += [rows for _, _, rows in data_windows(source, 0, source.virtual_bytes)]
        rows = merge(np.concatenate(found))
    else:
        rows = NO_EXTENTS
        for part in parts:
            covered = log_extents(home, part_path(home, part), FILE_TYPE_UNDO)
            rows = union(rows, merge(np.concatenate([NO_EXTENTS, *covered])))
    inside, _ = clipped(spans_of(rows), point_disk.virtual_bytes)
    return np.ascontiguousarray(inside[:, :2])


def _append_difference(writer: LogWriter, point_disk: Disk, disk: Disk, rows: NDArray[np.int64]) -> None:
    """Log those sectors of `rows` that the two disks do not hold alike, as `point_disk` has them."""
    length = int(rows[:, 1].sum())
    wanted, held = np.empty(length, np.uint8), np.zeros(length, np.uint8)
    point_disk.read_extents(rows, wanted)
    inside, _ = clipped(spans_of(rows), disk.virtual_bytes)  # rows ascend: a head of the buffer
    disk.read_extents(inside[:, :2], held[: int(inside[:, 1].sum())])
    sectors = wanted.reshape(-1, _SECTOR_BYTES)
    differs = (sectors != held.reshape(-1, _SECTOR_BYTES)).any(axis=1)
    if not differs.any():
        return
    edges = np.flatnonzero(np.diff(np.concatenate(([False], differs, [False])).astype(np.int8)))
    runs = edges.reshape(-1, 2) * _SECTOR_BYTES
    runs[:, 1] -= runs[:, 0]
    writer.append(select_runs(rows, runs), sectors[differs].reshape(-1), holes=True)


def _put_back(
    home: VmHome, before: DiskBefore, parts: list[UndoRow], progress: ProgressCallback | None
) -> DiskRow:
    """Write undo parts into a disk, so that the first that covers a byte wins; return its row."""
    path = home.paths.disk(before.disk)
    row = next(row for row in home.catalog.disks(home.vm_id) if row.spec.index == before.disk)
    with room(home.files, path, sum(part.file_bytes for part in parts)):
        # A part may reach further than its point: what lies there belongs to an older and longer one.
        reach = max((_end(home, part) for part in parts), default=0)
        fit_disk(home.files, path, max(before.virtual_bytes, reach), clock=home.clock)
        with open_disk(home.files, path, writable=True, format="vhdx", clock=home.clock) as disk:
            for part in reversed(parts):
                apply_log(
                    PartFiles(home.files),
                    part_path(home, part),
                    disk,
                    verify_data=False,
                    progress=progress,
                    file_type=FILE_TYPE_UNDO,
                )
            disk.flush()
        fit_disk(home.files, path, before.virtual_bytes, clock=home.clock)
    return dataclasses.replace(look(home, row, before.last_log_id), removed_s=before.removed_s)


def _end(home: VmHome, part: UndoRow) -> int:
    tables = log_extents(home, part_path(home, part), FILE_TYPE_UNDO)
    return max((int(rows.sum(axis=1).max()) for rows in tables if len(rows)), default=0)


def _damaged(home: VmHome, parts: list[UndoRow]) -> list[_Damaged]:
    """Read what is to be put back from end to end, before the first byte of a disk changes."""
    found: list[_Damaged] = []
    for part in parts:
        try:
            verify_log(PartFiles(home.files), part_path(home, part), data=True, file_type=FILE_TYPE_UNDO)
        except (FormatError, LogError, FileNotFoundError) as error:
            found.append((part, kept(error)))
    return found
