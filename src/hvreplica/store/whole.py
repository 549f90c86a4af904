"""Keep the disks that an initial replication replaces, where older points still need them.

    points/<part id>.vhdx, a second name of disks/0.vhdx, folder synced -> commit the rows
    -> 0.vhdx.partial -> disks/0.vhdx

The part's id follows from the transfer, so that a cut between the name and the row is met by the next call:
the file is there and only its row is made. At each moment an older point is read from the disk under its old
name or as a part. Where the file system knows no second names, the disk is renamed: then it is missing for as
long as its row is made.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from hvreplica.disk import open_disk
from hvreplica.errors import HvReplicaError
from hvreplica.store.check import file_length
from hvreplica.store.points_kept import chain, kept_points
from hvreplica.store.records import UndoRow
from hvreplica.store.retention import Candidate
from hvreplica.store.undo import choose_keeping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import DiskRow, PointRow, TransferRow
    from hvreplica.store.undo import Keeping

_SEQUENCE_LAST = 1 << 62  # of a point that has no row yet


def keep_whole(home: VmHome, transfer: TransferRow, rows: Sequence[DiskRow]) -> None:
    """Make the disks of `rows` parts of the newest kept point, where .partial files are to replace them.

    Durable on return, and repeatable. A point that is not to be kept is superseded by it. A disk that is
    missing, or that somebody else has written to, spoils the points that need it: they become damaged.
    """
    keeping = choose_keeping(home, _coming(transfer))
    try:
        _keep_whole(home, keeping, transfer, rows)
    finally:
        keeping.release(home)


def _keep_whole(home: VmHome, keeping: Keeping, transfer: TransferRow, rows: Sequence[DiskRow]) -> None:
    catalog, vm_id = home.catalog, home.vm_id
    parts: list[UndoRow] = []
    spoiled: dict[int, str] = {}
    for row in rows:
        if keeping.keeper is not None and _is_needed(home, keeping.keeper, row):
            part_id = whole_id(transfer, row.spec.index)
            if _move(home, row, part_id):
                parts.append(_part(home, keeping.keeper, row, part_id))
            sentence = _doubt(home, row, part_id)
            if sentence is not None:
                spoiled[row.spec.index] = sentence
    with catalog.transaction():
        if keeping.leaving is not None:
            catalog.supersede_point(vm_id, keeping.leaving.id)
        for disk_index, sentence in spoiled.items():
            for point in _on_the_disk(home, disk_index):
                catalog.damage_point(vm_id, point.id, sentence)
        for part in parts:
            catalog.add_undo(vm_id, part)
    keeping.note(home)


def _coming(transfer: TransferRow) -> Candidate | None:
    """Return the point that takes the newest one's place; a copy of no single instant is none."""
    if not transfer.consistent:
        return None
    return Candidate(
        transfer.point_id,
        _SEQUENCE_LAST,
        transfer.instant_s,
        kind="initial",
        consistency=transfer.consistency,
    )


def whole_id(transfer: TransferRow, disk_index: int) -> uuid.UUID:
    """Return the id of the part that a disk becomes when this transfer replaces it."""
    return uuid.uuid5(transfer.id, f"whole {disk_index}")


def _is_needed(home: VmHome, keeper: PointRow, row: DiskRow) -> bool:
    """Return whether a disk is still there, or under its new name, and kept points are read from it."""
    index = row.spec.index
    return index in home.catalog.members(home.vm_id, keeper.id) and not _has_whole(home, keeper, index)


def _has_whole(home: VmHome, point: PointRow, disk_index: int) -> bool:
    return any(part.kind == "whole" for part in chain(home, point.id, disk_index))


def _on_the_disk(home: VmHome, disk_index: int) -> list[PointRow]:
    return [
        point
        for point in kept_points(home)
        if disk_index in home.catalog.members(home.vm_id, point.id)
        and not _has_whole(home, point, disk_index)
    ]


def _move(home: VmHome, row: DiskRow, part_id: uuid.UUID) -> bool:
    """Give the old disk its name as a part; return whether it has it."""
    files, paths = home.files, home.paths
    disk, whole = paths.disk(row.spec.index), paths.whole(part_id)
    if files.exists(whole):
        return True
    if not files.exists(disk) or not files.exists(paths.partial_disk(row.spec.index)):
        return False
    files.make_directory(paths.points)
    if not files.link(disk, whole):
        files.replace(disk, whole)
        files.sync_directory(paths.disks)
    files.sync_directory(paths.points)
    return True


def _part(home: VmHome, keeper: PointRow, row: DiskRow, part_id: uuid.UUID) -> UndoRow:
    return UndoRow(
        point_id=keeper.id,
        disk_index=row.spec.index,
        id=part_id,
        kind="whole",
        file_bytes=file_length(home.files, home.paths.whole(part_id)),
        covered_bytes=row.spec.virtual_bytes,
        digest_change=row.digest,
    )


def _doubt(home: VmHome, row: DiskRow, part_id: uuid.UUID) -> str | None:
    """Return why what older points are read from is not what they were; None where it is."""
    path = home.paths.whole(part_id)
    if not home.files.exists(path):
        return f"disk {row.spec.index} was gone when an initial replication replaced it"
    if any(point.state == "applying" for point in home.catalog.points(home.vm_id)):
        return None  # a log had begun to change it; undo parts hold what it changes
    try:
        with open_disk(home.files, path, writable=False, format="vhdx", clock=home.clock) as disk:
            actual = disk.data_write_guid
    except (HvReplicaError, OSError) as error:
        return f"disk {row.spec.index} could not be read when an initial replication replaced it: {error}"
    if actual != row.data_write_guid:
        return f"another program had written to disk {row.spec.index} when it was replaced"
    return None
