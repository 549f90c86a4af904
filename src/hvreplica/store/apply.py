"""Bring a VM's disks to the newest point that was received, in steps that may be cut anywhere and repeated.

    logs     point "spooled" -> undo parts durable -> commit their rows and "applying" -> counter
             -> disks flushed -> commit "complete" -> spool removed, or moved to logs/
    initial  transfer "receiving" -> commit "renaming" -> old disks become parts, commit -> counter
             -> .partial become the disks -> commit "complete"

An initial replication of disks that changed meanwhile ends as "base": the disks are there, but show no single
instant before the next logs were applied. One of disks that join the others adds no point: they belong to
the first point whose logs say so.

Until "applying" is committed the disks are whole on the point before; from there on that point is what its
undo parts and the disks make together, and if it is not kept, only the spool leads to a whole point. So the
spool is kept, and applying it again gives the same disks. The same holds for "renaming" and the .partial
files. All of it happens under the VM's exclusive lock.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hvreplica.disk import open_disk
from hvreplica.errors import ReplicaDiverged
from hvreplica.files import require_unused
from hvreplica.hrl import apply_log, verify_log
from hvreplica.store.check import file_length, require_sound
from hvreplica.store.counter import Counter
from hvreplica.store.failover import frozen_error, may_apply
from hvreplica.store.follow import begin_anew, holds, measure, pass_on_damage, put_in, take_out
from hvreplica.store.kept_logs import record_kept, settle_kept
from hvreplica.store.records import NIL, DiskRow, PointRow
from hvreplica.store.resize import fit_disk
from hvreplica.store.room import room
from hvreplica.store.undo import record, write_parts
from hvreplica.store.whole import keep_whole

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import LogSpec, TransferRow

POINTS_KEPT = 256  # superseded ones, to recognise a primary that has gone back in time
_WAITING = {"spooled", "applying"}


def is_unfinished(home: VmHome) -> bool:
    """Return whether something that was received whole has not reached the disks yet."""
    return bool(_renaming(home)) or bool(waiting_points(home))


def is_cut(home: VmHome) -> bool:
    """Return whether the disks may be between two points, if nobody holds the VM's exclusive lock."""
    return any(transfer.kind == "initial" for transfer in _renaming(home)) or any(
        point.state == "applying" for point in home.catalog.points(home.vm_id)
    )


def finish(home: VmHome, *, progress: ProgressCallback | None = None) -> list[uuid.UUID]:
    """Bring the disks to the newest point that was received; return the points that became complete.

    Repeatable after a cut anywhere. Raises: Locked while another process reads the disks, Fenced while the
    VM's disks are frozen, StoreFull, StoreError for missing files, ReplicaDiverged if someone else wrote to a
    disk, FormatError for a damaged log.
    """
    done = []
    if is_unfinished(home):
        with room(home.files, home.paths.folder), home.exclusive():
            require_changeable(home)
            done += finish_initial(home)
            done += [_apply_point(home, point, progress) for point in waiting_points(home)]
    return done


def require_changeable(home: VmHome) -> None:
    """Refuse to change disks that a failover needs as they are; under the exclusive lock. Raises: Fenced."""
    record = home.failover()
    if not may_apply(record):
        raise frozen_error(home.name, record)


def finish_initial(home: VmHome) -> list[uuid.UUID]:
    """Let the .partial disks of a whole initial replication take over; return its point if it is one."""
    if not _renaming(home):
        return []
    done = []
    with home.exclusive():
        require_changeable(home)
        for transfer in _renaming(home):
            # A whole copy needs no log that waits, and ends what waits for one that is lost.
            require_sound(home, logs=transfer.kind != "initial")
            if _rename_disks(home, transfer):
                done.append(transfer.point_id)
    return done


def _renaming(home: VmHome) -> list[TransferRow]:
    return [row for row in home.catalog.transfers(home.vm_id) if row.state == "renaming"]


def _rename_disks(home: VmHome, transfer: TransferRow) -> bool:
    """Put the received disks in their place; return whether they make a point that can be had."""
    catalog, vm_id = home.catalog, home.vm_id
    old_logs = [log for point in waiting_points(home) for log in catalog.logs(vm_id, point.id)]
    rows = [row for row in catalog.disks(vm_id) if row.spec.index in transfer.disks]
    if transfer.kind == "initial":
        keep_whole(home, transfer, rows)
    count_change(home)
    for row in rows:
        partial = home.paths.partial_disk(row.spec.index)
        if home.files.exists(partial):
            home.files.replace(partial, home.paths.disk(row.spec.index))
    home.files.sync_directory(home.paths.disks)
    states = [dataclasses.replace(look(home, row, NIL), base_id=transfer.point_id) for row in rows]
    digests, home.arrived_digests = home.arrived_digests, {}
    if transfer.kind == "join":
        with catalog.transaction():
            for state in states:
                catalog.set_disk_state(vm_id, state)
                begin_anew(home, state.spec.index, digests.get(state.spec.index))
            catalog.delete_transfers(vm_id, "join")
        return False
    with catalog.transaction():
        for point in waiting_points(home):
            catalog.delete_logs(vm_id, point.id)
        catalog.insert_point(vm_id, _initial_point(home, transfer, states))
        for state in states:
            begin_anew(home, state.spec.index, digests.get(state.spec.index))
        _complete(home, transfer.point_id, states, "complete" if transfer.consistent else "base")
        catalog.end_transfer(vm_id, "initial")
    remove_logs(home, old_logs)
    return transfer.consistent


def _initial_point(home: VmHome, transfer: TransferRow, states: list[DiskRow]) -> PointRow:
    now_s = home.clock.now_s()
    return PointRow(
        id=transfer.point_id,
        sequence=0,
        instant_s=transfer.instant_s,
        kind="initial",
        consistency=transfer.consistency if transfer.consistent else "none",
        state="complete" if transfer.consistent else "base",
        previous_id=None,
        bytes=sum(state.file_bytes or 0 for state in states),
        received_s=now_s,
        applied_s=now_s,
    )


def waiting_points(home: VmHome) -> list[PointRow]:
    """Return the points that were received whole and that the disks are not on yet, oldest first."""
    return [point for point in home.catalog.points(home.vm_id) if point.state in _WAITING]


def _apply_point(home: VmHome, point: PointRow, progress: ProgressCallback | None) -> uuid.UUID:
    catalog, vm_id = home.catalog, home.vm_id
    require_sound(home)
    logs = catalog.logs(vm_id, point.id)
    sizes = catalog.members(vm_id, point.id)
    _verify(home, logs, sizes)
    logged = {log.disk_index for log in logs}
    rows = [
        row
        for row in catalog.disks(vm_id)
        if row.spec.index in sizes
        and (row.spec.index in logged or row.spec.virtual_bytes != sizes[row.spec.index])
    ]
    if point.state == "spooled":
        for row in rows:
            _require_undisturbed(home, row)
            require_unused(home.files, home.paths.disk(row.spec.index))  # before anything changes
        _begin(home, point, rows, sizes, logs)
    count_change(home)
    states = [
        _apply_to_disk(
            home,
            row,
            sizes[row.spec.index],
            [log for log in logs if log.disk_index == row.spec.index],
            progress,
        )
        for row in rows
    ]
    touched = measure(home, rows, sizes, logs)
    with catalog.transaction():
        put_in(home, touched)
        _complete(home, point.id, states, "complete")
        pass_on_damage(home, point.id)
        catalog.delete_logs(vm_id, point.id)
        is_kept = record_kept(home, point, logs)
    if is_kept:
        home.verified_logs.difference_update(log.log_id for log in logs)
        settle_kept(home)
    else:
        remove_logs(home, logs)
    return point.id


def _begin(
    home: VmHome, point: PointRow, rows: list[DiskRow], sizes: dict[int, int], logs: list[LogSpec]
) -> None:
    """Write down what older points need, and begin the change; durable on return."""
    written = write_parts(home, point, rows, sizes, logs)
    is_begun = False
    try:
        while not is_begun:  # again where a scan has moved on meanwhile, which takes longer than this
            touched = measure(home, rows, sizes, logs, written)
            with home.catalog.transaction():
                if holds(home, touched):
                    record(home, written)
                    take_out(home, touched)
                    home.catalog.set_point_state(home.vm_id, point.id, "applying")
                    is_begun = True
        written.keeping.note(home)
    finally:
        written.keeping.release(home)


def count_change(home: VmHome) -> None:
    """Tell whoever reads the disks that what is in the catalog now must be looked at again."""
    with Counter(home.files, home.paths.counter, writable=True) as counter:
        counter.increment()


def _verify(home: VmHome, logs: list[LogSpec], sizes: dict[int, int]) -> None:
    """Check logs that another process received before the disk is touched: its memory of them is gone."""
    for log in logs:
        if log.log_id not in home.verified_logs:
            disk_bytes = sizes[log.disk_index]
            verify_log(home.files, home.paths.log(log.log_id), data=True, disk_bytes=disk_bytes)
            home.verified_logs.add(log.log_id)


def _apply_to_disk(
    home: VmHome,
    row: DiskRow,
    virtual_bytes: int,
    logs: list[LogSpec],
    progress: ProgressCallback | None,
) -> DiskRow:
    """Give the disk the size that it has at the point, then what the logs hold."""
    path = home.paths.disk(row.spec.index)
    with room(home.files, path, sum(log.log_bytes for log in logs)):
        fit_disk(home.files, path, virtual_bytes, clock=home.clock)
        if logs:
            _apply_logs(home, path, logs, progress)
    return look(home, row, logs[-1].log_id if logs else row.last_log_id)


def _apply_logs(home: VmHome, path: Path, logs: list[LogSpec], progress: ProgressCallback | None) -> None:
    disk = open_disk(home.files, path, writable=True, format="vhdx", clock=home.clock)
    try:
        for log in logs:
            apply_log(home.files, home.paths.log(log.log_id), disk, verify_data=False, progress=progress)
        disk.flush()
    except BaseException:
        disk.abandon()
        raise
    disk.close()


def look(home: VmHome, row: DiskRow, last_log_id: uuid.UUID) -> DiskRow:
    """Return the disk's row as its file is now."""
    path = home.paths.disk(row.spec.index)
    with open_disk(home.files, path, writable=False, format="vhdx", clock=home.clock) as disk:
        spec = dataclasses.replace(row.spec, virtual_bytes=disk.virtual_bytes)
        data_write_guid = disk.data_write_guid
    return DiskRow(
        spec, file_length(home.files, path), data_write_guid, last_log_id, row.base_id, row.removed_s
    )


def _require_undisturbed(home: VmHome, row: DiskRow) -> None:
    """Refuse to apply a log to a disk that somebody else has written to since the last point."""
    path = home.paths.disk(row.spec.index)
    with open_disk(home.files, path, writable=False, format="vhdx", clock=home.clock) as disk:
        actual = disk.data_write_guid
    if actual != row.data_write_guid:
        raise ReplicaDiverged(
            "another program has written to the replica's disk",
            path=path,
            field="DataWriteGuid",
            expected=row.data_write_guid,
            actual=actual,
            hint="replicate the VM from the start again; use exports to look into a replica",
        )


def _complete(home: VmHome, point_id: uuid.UUID, states: list[DiskRow], state: str) -> None:
    """Record that the disks are on a point, and which disks of the points before it no longer has."""
    catalog, vm_id, now_s = home.catalog, home.vm_id, home.clock.now_s()
    for row in states:
        catalog.set_disk_state(vm_id, row)
    points = catalog.points(vm_id, superseded=True)
    older = points[: [point.id for point in points].index(point_id)]
    before = {index for point in older for index in catalog.members(vm_id, point.id)}
    for disk_index in before - catalog.members(vm_id, point_id).keys():
        catalog.remove_disk(vm_id, disk_index, now_s)
    for point in older:
        if not point.is_kept:
            catalog.supersede_point(vm_id, point.id)
    catalog.complete_point(vm_id, point_id, state, now_s)
    catalog.prune_points(vm_id, POINTS_KEPT)


def remove_logs(home: VmHome, logs: list[LogSpec]) -> None:
    """Remove logs that no point needs; what a cut leaves behind is removed when the store starts."""
    for log in logs:
        home.files.unlink(home.paths.log(log.log_id))
        home.files.unlink(home.paths.times(log.log_id))
        home.verified_logs.discard(log.log_id)
    if logs:
        home.files.sync_directory(home.paths.spool)
