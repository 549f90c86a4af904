"""Begin a transfer, or continue the one that an earlier session left: decide what it may be, open its sink.

What is durable before what: files of an earlier transfer lose their catalog row before they are removed; new
files and their names are durable before the row that speaks of them. So a row in the catalog means that its
files are there, and a file without a row is worth nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import ChainBroken, FormatError, InvalidTransition, ReplicaDiverged, StoreError
from hvreplica.store.apply import finish_initial
from hvreplica.store.check import require_sound
from hvreplica.store.layout import PARTIAL_SUFFIX
from hvreplica.store.records import NIL, AlreadyHave, validate_instant, validate_logs
from hvreplica.store.resize import fit_disk
from hvreplica.store.room import require_room, room
from hvreplica.store.sinks import InitialSink, LogSink, Target

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from hvreplica.disk import Disk
    from hvreplica.files import BlockFile, FileSystem
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import DiskRow, DiskSpec, LogSpec, Owner, PointRow, TransferRow


# A whole copy makes all else pointless. Disks that join arrive beside the logs of the others, in turns.
_REPLACED_BY = {
    "initial": ("initial", "join", "logs"),
    "join": ("initial", "join"),
    "logs": ("initial", "logs"),
}


def begin_initial(
    home: VmHome,
    owner: Owner,
    wanted: TransferRow,
    *,
    expected_bytes: int,
) -> InitialSink | AlreadyHave:
    """Do what VmReplica.begin_initial() says. wanted: the transfer as it would be if it began now."""
    validate_instant(wanted.instant_s)
    finish_initial(home)
    known = _known_base(home, wanted) if wanted.kind == "join" else _known_point(home, wanted.point_id)
    if known is not None:
        return known
    if wanted.kind == "join":
        _require_joinable(home, wanted)
    found = _unfinished(home, wanted)
    if found is not None:
        targets = _open_disks(home, wanted)
        if targets is not None:
            _renew(home, owner, wanted)
            positions = {index: min(at, wanted.disks[index]) for index, at in found.positions.items()}
            row = dataclasses.replace(wanted, positions=positions, started_s=found.started_s)
            return InitialSink(home, owner, row, targets, continued=True)
    _discard(home, owner, wanted.kind)
    with room(home.files, home.paths.disks, expected_bytes):
        _create_disks(home, wanted, expected_bytes)
        _insert(home, owner, wanted)
        targets = _open_disks(home, wanted)
    if targets is None:
        raise StoreError("the disks that were just made cannot be opened", path=home.paths.disks)
    return InitialSink(home, owner, wanted, targets, continued=False)


def begin_logs(
    home: VmHome,
    owner: Owner,
    wanted: TransferRow,
    *,
    expected_bytes: int,
) -> LogSink | AlreadyHave:
    """Do what VmReplica.begin_logs() says. wanted: the transfer as it would be if it began now."""
    validate_instant(wanted.instant_s)
    finish_initial(home)
    known = _known_point(home, wanted.point_id)
    if known is not None:
        return known
    _require_chain(home, wanted)
    validate_logs(wanted.logs, set(wanted.disks))
    _require_held(home, wanted)
    require_sound(home)
    found = _unfinished(home, wanted)
    if found is not None:
        targets = _open_logs(home, found.logs)
        if targets is not None:
            return LogSink(home, owner, found, targets, continued=True)
    _discard(home, owner, "logs")
    with room(home.files, home.paths.spool, expected_bytes):
        _create_logs(home, wanted.logs, expected_bytes)
        _insert(home, owner, wanted)
        targets = _open_logs(home, wanted.logs)
    if targets is None:
        raise StoreError("the logs that were just made cannot be opened", path=home.paths.spool)
    return LogSink(home, owner, wanted, targets, continued=False)


def sweep(home: VmHome) -> None:
    """Remove files of transfers that the catalog does not know; nothing of a listed or waiting point."""
    with home.catalog.snapshot():
        initials = [row for row in home.catalog.transfers(home.vm_id) if row.kind != "logs"]
        log_ids = home.catalog.log_ids(home.vm_id)
        log_ids |= {row.log_id for row in home.catalog.kept_logs(home.vm_id)}  # on their way to logs/
    keep = {
        path.name for log_id in log_ids for path in (home.paths.log(log_id), home.paths.partial_log(log_id))
    }
    keep |= {home.paths.times(log_id).name for log_id in log_ids}
    _remove(home.files, home.paths.spool, (".hrl", ".hrl" + PARTIAL_SUFFIX, ".hrt", ".tmp"), keep)
    arriving = {home.paths.partial_disk(index).name for row in initials for index in row.disks}
    _remove(home.files, home.paths.disks, (".vhdx" + PARTIAL_SUFFIX,), arriving)
    _remove(home.files, home.paths.disks, (".tmp",), set())  # of disks whose making was cut


def last_point(home: VmHome) -> PointRow | None:
    """Return the newest point that was received whole, applied or not."""
    points = home.catalog.points(home.vm_id)
    return points[-1] if points else None


def last_logs(home: VmHome) -> dict[int, uuid.UUID]:
    """Return the id of the log that was received last for each disk; nil where none was since the initial."""
    last = {row.spec.index: row.last_log_id for row in home.catalog.disks(home.vm_id)}
    for point in home.catalog.points(home.vm_id):
        last.update((log.disk_index, log.log_id) for log in home.catalog.logs(home.vm_id, point.id))
    return last


def _known_base(home: VmHome, wanted: TransferRow) -> AlreadyHave | None:
    """Return the answer where the very disks that would be sent are here."""
    rows = [row for row in home.catalog.disks(home.vm_id) if row.spec.index in wanted.disks]
    if all(row.is_held and row.base_id == wanted.point_id for row in rows):
        return AlreadyHave(wanted.point_id, "base")
    return None


def _known_point(home: VmHome, point_id: uuid.UUID) -> AlreadyHave | None:
    point = home.catalog.point(home.vm_id, point_id)
    if point is None:
        return None
    newer = home.catalog.points(home.vm_id)
    if point.state == "superseded" or any(
        other.sequence > point.sequence and other.applied_s is not None for other in newer
    ):
        raise ChainBroken(
            f"point {point_id} of VM {home.name!r} was applied long ago",
            path=home.paths.folder,
            hint="the primary's state folder is an old copy; compare the disks to find what changed since",
        )
    return AlreadyHave(point_id, point.state)


def _require_joinable(home: VmHome, wanted: TransferRow) -> None:
    """Let only disks join that no point has: one that has them would show two instants at once."""
    newest = last_point(home)
    if newest is None:
        raise InvalidTransition(
            f"VM {home.name!r} has no complete replica yet", hint="its initial replication comes first"
        )
    taken = sorted(home.catalog.members(home.vm_id, newest.id).keys() & wanted.disks.keys())
    if taken:
        raise InvalidTransition(
            f"disk {taken[0]} of VM {home.name!r} belongs to its newest point",
            field="disks",
            hint="its changes come as logs, or all disks come again with `hvreplica replicate --resync`",
        )


def _require_held(home: VmHome, wanted: TransferRow) -> None:
    """Refuse a point with disks of which no whole copy is here."""
    held = {row.spec.index for row in home.catalog.disks(home.vm_id) if row.is_held}
    missing = sorted(wanted.disks.keys() - held)
    if missing:
        raise ReplicaDiverged(
            f"the replica has no copy of disk {missing[0]} of VM {home.name!r}",
            path=home.paths.folder,
            field="disks",
            expected=f"of {sorted(held)}",
            actual=sorted(wanted.disks),
            hint="send an initial replication of this disk first",
        )


def _require_chain(home: VmHome, wanted: TransferRow) -> None:
    newest = last_point(home)
    if newest is None:
        raise InvalidTransition(
            f"VM {home.name!r} has no complete replica yet", hint="its initial replication comes first"
        )
    if newest.id != wanted.previous_point_id:
        raise ChainBroken(
            f"the logs do not follow the newest point of VM {home.name!r}",
            path=home.paths.folder,
            field="previous_point_id",
            expected=newest.id,
            actual=wanted.previous_point_id,
            hint="compare the disks to find what changed since the replica's point",
        )
    last = last_logs(home)
    waiting = {
        log.log_id
        for point in home.catalog.points(home.vm_id)
        for log in home.catalog.logs(home.vm_id, point.id)
    }
    for log in wanted.logs:
        if log.log_id in waiting:
            raise ChainBroken("a log of this id waits to be applied", field="log_id", actual=log.log_id)
        before = last.get(log.disk_index, NIL)
        if NIL not in {log.previous_log_id, before} and log.previous_log_id != before:
            raise ChainBroken(
                f"a log does not follow the last one of disk {log.disk_index} of VM {home.name!r}",
                path=home.paths.folder,
                field="previous_log_id",
                expected=before,
                actual=log.previous_log_id,
                hint="compare the disks to find what changed since the replica's point",
            )
        last[log.disk_index] = log.log_id


def _unfinished(home: VmHome, wanted: TransferRow) -> TransferRow | None:
    """Return the transfer to continue, None where a new one begins. Raises: StoreError if the id was used."""
    found = next((row for row in home.catalog.transfers(home.vm_id) if row.id == wanted.id), None)
    if found is None:
        return None
    same = ("kind", "point_id", "previous_point_id", "logs")
    sizes_may_differ = wanted.kind != "logs"  # a disk that grows while it is sent for the first time goes on
    if any(getattr(found, name) != getattr(wanted, name) for name in same) or (
        found.disks.keys() != wanted.disks.keys() if sizes_may_differ else found.disks != wanted.disks
    ):
        raise StoreError(
            "this transfer was announced with other contents before",
            path=home.paths.folder,
            hint="begin a new transfer under an id of its own",
        )
    return found


def _discard(home: VmHome, owner: Owner, kind: str) -> None:
    """Forget the unfinished transfers in whose place one of `kind` comes, and remove their files."""
    with home.catalog.transaction():
        home.require_owner(owner)
        home.catalog.delete_transfers(home.vm_id, *_REPLACED_BY[kind])
    sweep(home)


def _renew(home: VmHome, owner: Owner, row: TransferRow) -> None:
    with home.catalog.transaction():
        home.require_owner(owner)
        home.catalog.renew_transfer(home.vm_id, row)


def _insert(home: VmHome, owner: Owner, row: TransferRow) -> None:
    with home.catalog.transaction():
        home.require_owner(owner)
        home.catalog.insert_transfer(home.vm_id, row)


def _remove(files: FileSystem, folder: Path, suffixes: tuple[str, ...], keep: set[str]) -> None:
    stale = [name for name in files.names(folder) if name.endswith(suffixes) and name not in keep]
    for name in stale:
        files.unlink(folder / name)
    if stale:
        files.sync_directory(folder)


def _create_disks(home: VmHome, transfer: TransferRow, expected_bytes: int) -> None:
    home.files.make_directory(home.paths.disks)
    require_room(home.files, home.paths.partial_disk(0), expected_bytes)
    for row in _rows(home, transfer):
        create_disk(
            home.files,
            home.paths.partial_disk(row.spec.index),
            virtual_bytes=transfer.disks[row.spec.index],
            format="vhdx",
            type="dynamic",
            block_bytes=row.spec.block_bytes or None,
            logical_sector_bytes=row.spec.logical_sector_bytes,
            physical_sector_bytes=row.spec.physical_sector_bytes,
            clock=home.clock,
        )
    home.files.sync_directory(home.paths.disks)


def _rows(home: VmHome, transfer: TransferRow) -> list[DiskRow]:
    return [row for row in home.catalog.disks(home.vm_id) if row.spec.index in transfer.disks]


def _open_disks(home: VmHome, transfer: TransferRow) -> dict[int, Target[Disk]] | None:
    """Open the .partial disks; None where they are not what an unfinished transfer needs."""
    targets: dict[int, Target[Disk]] = {}
    for row in _rows(home, transfer):
        virtual_bytes = transfer.disks[row.spec.index]
        disk = _open_disk(home, row.spec, virtual_bytes)
        if disk is None:
            for target in targets.values():
                target.medium.abandon()
            return None
        path = home.paths.partial_disk(row.spec.index)
        targets[row.spec.index] = Target(disk, path, virtual_bytes, row.spec.logical_sector_bytes)
    return targets


def _open_disk(home: VmHome, spec: DiskSpec, virtual_bytes: int) -> Disk | None:
    path = home.paths.partial_disk(spec.index)
    if not home.files.exists(path):
        return None
    try:
        fit_disk(home.files, path, virtual_bytes, clock=home.clock)
        disk = open_disk(home.files, path, writable=True, format="vhdx", clock=home.clock)
    except FormatError:
        return None
    if disk.logical_sector_bytes == spec.logical_sector_bytes:
        return disk
    disk.abandon()
    return None


def _create_logs(home: VmHome, logs: tuple[LogSpec, ...], expected_bytes: int) -> None:
    home.files.make_directory(home.paths.spool)
    require_room(home.files, home.paths.spool / "log", expected_bytes)
    for log in logs:
        file = home.files.open(home.paths.partial_log(log.log_id), create=True, exclusive=True)
        try:
            file.resize(log.log_bytes)
            file.sync()
        finally:
            file.close()
    home.files.sync_directory(home.paths.spool)


def _open_logs(home: VmHome, logs: tuple[LogSpec, ...]) -> dict[int, Target[BlockFile]] | None:
    """Open the logs on their way, also those that a cut commit renamed; None where they are not whole."""
    paths = [(home.paths.partial_log(log.log_id), home.paths.log(log.log_id)) for log in logs]
    renamed = [pair for pair in paths if home.files.exists(pair[1])]
    for partial, whole in renamed:
        home.files.replace(whole, partial)
    if renamed:
        home.files.sync_directory(home.paths.spool)
    targets: dict[int, Target[BlockFile]] = {}
    for number, log in enumerate(logs):
        partial = home.paths.partial_log(log.log_id)
        file = home.files.open(partial, writable=True) if home.files.exists(partial) else None
        if file is not None and file.size() == log.log_bytes:
            targets[number] = Target(file, partial, log.log_bytes, 1)
            continue
        for opened in (file, *(target.medium for target in targets.values())):
            if opened is not None:
                opened.close()
        return None
    return targets
