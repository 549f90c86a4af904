"""Bring a VM's disks to the newest point that was received, in steps that may be cut anywhere and repeated.

    logs     point "spooled" -> commit "applying" -> disks flushed -> commit "complete" -> spool removed
    initial  transfer "receiving" -> commit "renaming" -> .partial become the disks -> commit "complete"

Until "applying" is committed the disks are whole on the point before, and that one is listed; from there on
only the spool leads to a whole point, so it is kept, and applying it again gives the same disks. The same
holds for "renaming" and the .partial files. All of it happens under the VM's exclusive lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk import open_disk
from hvreplica.errors import ReplicaDiverged
from hvreplica.hrl import apply_log, verify_log
from hvreplica.store.check import file_length, require_sound
from hvreplica.store.records import NIL, DiskRow, PointRow
from hvreplica.store.room import room

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import LogSpec, TransferRow

POINTS_KEPT = 256  # superseded ones, to recognise a primary that has gone back in time


def is_unfinished(home: VmHome) -> bool:
    """Return whether something that was received whole has not reached the disks yet."""
    transfer = home.catalog.transfer(home.vm_id)
    if transfer is not None and transfer.state == "renaming":
        return True
    return any(point.state != "complete" for point in home.catalog.points(home.vm_id))


def is_cut(home: VmHome) -> bool:
    """Return whether the disks may be between two points, if nobody holds the VM's exclusive lock."""
    transfer = home.catalog.transfer(home.vm_id)
    if transfer is not None and transfer.state == "renaming":
        return True
    return any(point.state == "applying" for point in home.catalog.points(home.vm_id))


def finish(home: VmHome, *, progress: ProgressCallback | None = None) -> list[uuid.UUID]:
    """Bring the disks to the newest point that was received; return the points that became complete.

    Repeatable after a cut anywhere. Raises: Locked while another process reads the disks, StoreFull,
    StoreError for missing files, ReplicaDiverged if someone else wrote to a disk, FormatError for a damaged
    log.
    """
    done = []
    if is_unfinished(home):
        with room(home.files, home.paths.folder), home.exclusive():
            done += finish_initial(home)
            done += [_apply_point(home, point, progress) for point in _waiting(home)]
    return done


def finish_initial(home: VmHome) -> list[uuid.UUID]:
    """Let the .partial disks of a whole initial replication take over; return its point if there was one."""
    transfer = home.catalog.transfer(home.vm_id)
    if transfer is None or transfer.state != "renaming":
        return []
    with home.exclusive():
        transfer = home.catalog.transfer(home.vm_id)
        if transfer is None or transfer.state != "renaming":
            return []
        require_sound(home)
        _rename_disks(home, transfer)
    return [transfer.point_id]


def _rename_disks(home: VmHome, transfer: TransferRow) -> None:
    catalog, vm_id = home.catalog, home.vm_id
    old_logs = [log for point in _waiting(home) for log in catalog.logs(vm_id, point.id)]
    rows = catalog.disks(vm_id)
    for row in rows:
        partial = home.paths.partial_disk(row.spec.index)
        if home.files.exists(partial):
            home.files.replace(partial, home.paths.disk(row.spec.index))
    home.files.sync_directory(home.paths.disks)
    states = [_look(home, row, NIL) for row in rows]
    with catalog.transaction():
        for point in _waiting(home):
            catalog.delete_logs(vm_id, point.id)
        now_s = home.clock.now_s()
        size = sum(state.file_bytes or 0 for state in states)
        catalog.insert_point(
            vm_id,
            PointRow(
                transfer.point_id,
                0,
                transfer.instant_s,
                "initial",
                "crash",
                "complete",
                None,
                size,
                now_s,
                now_s,
            ),
        )
        _complete(home, transfer.point_id, states)
        catalog.delete_transfer(vm_id)
    _remove_logs(home, old_logs)


def _waiting(home: VmHome) -> list[PointRow]:
    return [point for point in home.catalog.points(home.vm_id) if point.state in {"spooled", "applying"}]


def _apply_point(home: VmHome, point: PointRow, progress: ProgressCallback | None) -> uuid.UUID:
    catalog, vm_id = home.catalog, home.vm_id
    require_sound(home)
    logs = catalog.logs(vm_id, point.id)
    rows = {row.spec.index: row for row in catalog.disks(vm_id)}
    _verify(home, logs, rows)
    if point.state == "spooled":
        for disk_index in {log.disk_index for log in logs}:
            _require_undisturbed(home, rows[disk_index])
        with catalog.transaction():
            catalog.set_point_state(vm_id, point.id, "applying")
    states = [
        _apply_to_disk(home, row, [log for log in logs if log.disk_index == row.spec.index], progress)
        for row in rows.values()
        if any(log.disk_index == row.spec.index for log in logs)
    ]
    with catalog.transaction():
        _complete(home, point.id, states)
        catalog.delete_logs(vm_id, point.id)
    _remove_logs(home, logs)
    return point.id


def _verify(home: VmHome, logs: list[LogSpec], rows: dict[int, DiskRow]) -> None:
    """Check logs that another process received before the disk is touched: its memory of them is gone."""
    for log in logs:
        if log.log_id not in home.verified_logs:
            disk_bytes = rows[log.disk_index].spec.virtual_bytes
            verify_log(home.files, home.paths.log(log.log_id), data=True, disk_bytes=disk_bytes)
            home.verified_logs.add(log.log_id)


def _apply_to_disk(
    home: VmHome, row: DiskRow, logs: list[LogSpec], progress: ProgressCallback | None
) -> DiskRow:
    path = home.paths.disk(row.spec.index)
    with room(home.files, path, sum(log.log_bytes for log in logs)):
        disk = open_disk(home.files, path, writable=True, format="vhdx", clock=home.clock)
        try:
            for log in logs:
                apply_log(home.files, home.paths.log(log.log_id), disk, verify_data=False, progress=progress)
            disk.flush()
        except BaseException:
            disk.abandon()
            raise
        disk.close()
    return _look(home, row, logs[-1].log_id)


def _look(home: VmHome, row: DiskRow, last_log_id: uuid.UUID) -> DiskRow:
    path = home.paths.disk(row.spec.index)
    return DiskRow(row.spec, file_length(home.files, path), _data_write_guid(home, path), last_log_id)


def _data_write_guid(home: VmHome, path: Path) -> uuid.UUID | None:
    disk = open_disk(home.files, path, writable=False, format="vhdx", clock=home.clock)
    try:
        return disk.data_write_guid
    finally:
        disk.close()


def _require_undisturbed(home: VmHome, row: DiskRow) -> None:
    """Refuse to apply a log to a disk that somebody else has written to since the last point."""
    path = home.paths.disk(row.spec.index)
    actual = _data_write_guid(home, path)
    if actual != row.data_write_guid:
        raise ReplicaDiverged(
            "another program has written to the replica's disk",
            path=path,
            field="DataWriteGuid",
            expected=row.data_write_guid,
            actual=actual,
            hint="replicate the VM from the start again; use exports to look into a replica",
        )


def _complete(home: VmHome, point_id: uuid.UUID, states: list[DiskRow]) -> None:
    for state in states:
        home.catalog.set_disk_state(home.vm_id, state)
    home.catalog.complete_point(home.vm_id, point_id, home.clock.now_s())
    home.catalog.prune_points(home.vm_id, POINTS_KEPT)


def _remove_logs(home: VmHome, logs: list[LogSpec]) -> None:
    """Remove applied logs; what a cut leaves behind is removed when the store starts."""
    for log in logs:
        home.files.unlink(home.paths.log(log.log_id))
        home.verified_logs.discard(log.log_id)
    if logs:
        home.files.sync_directory(home.paths.spool)
