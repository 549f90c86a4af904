"""What the store tells about itself; the JSON of the command line is these structures, field by field."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import exact_time
from hvreplica.store.check import find_damage
from hvreplica.store.failover import describe, is_frozen
from hvreplica.store.moment import SECOND_US, reach_us
from hvreplica.store.waits import why_waiting
from hvreplica.store.warning import point_warning, room_warning

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.store.home import VmHome
    from hvreplica.store.instant import Made
    from hvreplica.store.records import DiskRow, PointRow, TransferRow


class PointStatus(msgspec.Struct, frozen=True):
    """A recovery point. instant_s: the time that its disks show; received_s, applied_s: when; Unix seconds.

    state: "complete" (it can be had), "damaged" (it could, but for what `damage` says), "spooled" (received,
    the disks are still on the point before) or "applying". kind: "initial", "standard", "planned" or
    "manual". consistency: "crash" or "app". bytes: what was received for it. warning: of the point that
    goes next where older points take nearly all of their budget.
    """

    id: str
    instant_s: float
    kind: str
    consistency: str
    state: str
    bytes: int
    received_s: float
    applied_s: float | None
    damage: str | None = None
    warning: str | None = None


class MadePoint(PointStatus, frozen=True):
    """A point that was made of an instant between two cycles.

    instant: the last microsecond that it has, ISO 8601. is_flush: whether the guest asked for a flush then,
    so that it wanted just this to be durable. entries: the entries of the cycle's logs that were replayed;
    None where the point was there. note: a sentence where parts of seconds were wanted and are not known.
    """

    instant: str = ""
    is_flush: bool = False
    entries: int | None = None
    note: str | None = None


class DiskStatus(msgspec.Struct, frozen=True):
    """A replica's disk. label: the primary's name for it. path: its file, which may not exist yet.

    file_bytes: length of that file when the last point was applied. state: "arriving" (no whole copy is here
    yet), "waiting" (it is whole, and belongs to points from the next one on), "protected", or "removed" (the
    file is as the last point left it that had the disk).
    """

    index: int
    label: str
    path: str
    virtual_bytes: int
    file_bytes: int | None
    state: str = "protected"


class TransferStatus(msgspec.Struct, frozen=True):
    """What is on its way. durable_bytes of total_bytes: received from the start of each disk or log."""

    id: str
    kind: str
    started_s: float
    durable_bytes: int
    total_bytes: int


class OwnerStatus(msgspec.Struct, frozen=True):
    """A primary that writes or wrote the VM. certificate: how it proved who it is. last_s: its last claim."""

    relationship_id: str
    generation: int
    certificate: str
    last_s: float


class VmStatus(msgspec.Struct, frozen=True):
    """A VM. damage: a sentence for each file that is not right.

    phase: "empty"; "initial", while the first copy arrives; "waiting" for the first cut, which makes a point
    of a copy that was made while the VM wrote; "failed over", while no primary may write to it, for it is the
    active side or about to be; "primary", once the VM replicates from here; "ready". points: oldest first.
    spool_bytes: of logs that wait to be applied. owners: the present one last. joining: the first copy of
    disks that were added. failover: the state of it, "Replicating" where there is none. test: the point of a
    test failover. warnings: of points that go next for their budget, and of room, a sentence each. waits_for:
    who keeps those logs from being applied now; None where nobody does. kept_logs, kept_log_bytes: applied
    ones that stay for points between two cycles, which no budget counts.
    """

    name: str
    folder: str
    phase: str
    disks: list[DiskStatus]
    points: list[PointStatus]
    transfer: TransferStatus | None
    spool_bytes: int
    owners: list[OwnerStatus]
    damage: list[str]
    joining: TransferStatus | None = None
    failover: str = "Replicating"
    test: str | None = None
    warnings: list[str] = []
    waits_for: str | None = None
    kept_logs: int = 0
    kept_log_bytes: int = 0


class StoreStatus(msgspec.Struct, frozen=True):
    """The whole store. free_bytes: of its file system."""

    root: str
    free_bytes: int
    vms: list[VmStatus]


def vm_status(home: VmHome) -> VmStatus:
    """Return what is known about one VM."""
    catalog, vm_id = home.catalog, home.vm_id
    with catalog.snapshot():
        rows = catalog.disks(vm_id)
        points = points_of(home)
        stored = catalog.points(vm_id)
        transfer = _transfer_status(catalog.transfer(vm_id, "initial", "logs"))
        joining = _transfer_status(catalog.transfer(vm_id, "join"))
        waiting = [point for point in stored if point.state in {"spooled", "applying"}]
        members = {index for point in stored for index in catalog.members(vm_id, point.id)}
        owners = catalog.owners(vm_id)
        failover = home.failover()
        kept = catalog.kept_logs(vm_id)
    if is_frozen(failover):
        phase = "failed over" if failover.mode == "Replica" else "primary"
    elif transfer is not None and transfer.kind == "initial":
        phase = "initial"
    elif any(point.state == "base" for point in stored):
        phase = "waiting"
    else:
        phase = "ready" if points else "empty"
    return VmStatus(
        name=home.name,
        folder=str(home.paths.folder),
        phase=phase,
        disks=[
            DiskStatus(
                row.spec.index,
                row.spec.label,
                str(home.paths.disk(row.spec.index)),
                row.spec.virtual_bytes,
                row.file_bytes,
                _disk_state(row, members),
            )
            for row in rows
        ],
        points=points,
        transfer=transfer,
        spool_bytes=sum(point.bytes for point in waiting),
        owners=[
            OwnerStatus(str(owner.relationship_id), owner.generation, owner.certificate, last_s)
            for owner, last_s in owners
        ],
        damage=find_damage(home),
        joining=joining,
        failover=describe(failover),
        test=None if failover.test is None else str(failover.test.point),
        warnings=_warnings(home),
        waits_for=why_waiting(home),
        kept_logs=len(kept),
        kept_log_bytes=sum(log.log_bytes for log in kept),
    )


def _warnings(home: VmHome) -> list[str]:
    of_points = point_warning(home)
    return [*([] if of_points is None else of_points[:1]), *filter(None, [room_warning(home)])]


def _disk_state(row: DiskRow, members: set[int]) -> str:
    if row.removed_s is not None:
        return "removed"
    if row.file_bytes is None:
        return "arriving"
    return "protected" if row.spec.index in members else "waiting"


def points_of(home: VmHome) -> list[PointStatus]:
    """Return the points that can be had, and those that wait to be applied, oldest first.

    A copy that shows no single instant is not listed, nor is a point that the disks have left and that is
    not kept.
    """
    sentence, point_id = point_warning(home) or (None, None)
    return [
        _point_status(row, sentence if str(row.id) == point_id else None)
        for row in home.catalog.points(home.vm_id)
        if row.state != "base"
    ]


def made_point(status: PointStatus, made: Made) -> MadePoint:
    """Return a point with what is told of it once, where it was made."""
    note = None
    if made.is_coarse:
        note = "the parts of seconds are not known of this cycle: the point shows the second before"
    return MadePoint(
        **msgspec.structs.asdict(status),
        instant=exact_time(reach_us(status.instant_s, status.kind) / SECOND_US),
        is_flush=made.is_flush,
        entries=made.entries,
        note=note,
    )


def store_status(root: Path, free_bytes: int, homes: list[VmHome]) -> StoreStatus:
    """Return what is known about the store."""
    return StoreStatus(str(root), free_bytes, [vm_status(home) for home in homes])


def _point_status(row: PointRow, warning: str | None) -> PointStatus:
    return PointStatus(
        id=str(row.id),
        instant_s=row.instant_s,
        kind=row.kind,
        consistency=row.consistency,
        state=row.state,
        bytes=row.bytes,
        received_s=row.received_s,
        applied_s=row.applied_s,
        damage=row.damage,
        warning=warning,
    )


def _transfer_status(transfer: TransferRow | None) -> TransferStatus | None:
    if transfer is None:
        return None
    if transfer.kind == "logs":
        total_bytes = sum(log.log_bytes for log in transfer.logs)
    else:
        total_bytes = sum(transfer.disks.values())
    done_bytes = sum(transfer.positions.values())
    return TransferStatus(str(transfer.id), transfer.kind, transfer.started_s, done_bytes, total_bytes)
