"""What the replication verbs return; the JSON of the command line is these structures, field by field."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hvreplica.errors import StateError

if TYPE_CHECKING:
    from hvreplica.replication.work import Work


class DiskChange(msgspec.Struct, frozen=True):
    """One disk of a replicate call.

    changed_bytes: guest bytes shipped as new or different, zeros included.
    """

    path: str
    virtual_bytes: int
    changed_bytes: int


class ShippedLog(msgspec.Struct, frozen=True):
    """One .hrl of a cycle.

    id: its UniqueId. path: where it stood in the state folder until it was acknowledged.
    """

    id: str
    path: str


class GonePoint(msgspec.Struct, frozen=True):
    """A recovery point that the replica let go. instant: the time it showed, ISO 8601 in UTC."""

    id: str
    instant: str
    reason: str


class ReplicateResult(msgspec.Struct, frozen=True):
    """The outcome of one replicate call.

    kind: "initial" (the whole disks were shipped), "delta" (logs were shipped) or "none" (nothing differed).
    wire_bytes: bytes that this side put on the network, all connections and TLS included. seconds: wall time.
    point: the id of the recovery point that the replica now holds. gone: older ones that it let go. warning:
    which one it lets go next for the budget of older points. prepared: whether the VM is held here for a
    planned failover from now on. waits_for: why the replica, which has the point durably, applies it later.
    """

    vm: str
    kind: str
    disks: list[DiskChange]
    wire_bytes: int
    seconds: float
    logs: list[ShippedLog]
    point: str
    gone: list[GonePoint] = []
    warning: str | None = None
    prepared: bool = False
    waits_for: str | None = None


class CutLog(msgspec.Struct, frozen=True):
    """One log of a cut. disk: its index in the VM. id: its UniqueId. path: where it stands until shipped."""

    disk: int
    id: str
    path: str
    bytes: int
    entries: int


class CutResult(msgspec.Struct, frozen=True):
    """A cut. logs: of the disks that changed. held_us: microseconds for which writes were held.

    instant: ISO 8601 in UTC. point: the recovery point that it becomes, None where nothing had changed or the
    replica has no copy yet. frozen: file systems that the guest held still for it, None where it was not
    asked to. warnings: sentences that say where the cut is less than what was asked for.
    """

    logs: list[CutLog]
    held_us: float
    instant: str
    point: str | None
    frozen: int | None = None
    warnings: list[str] = []


def make_result(work: Work, seconds: float, *, prepared: bool = False) -> ReplicateResult:
    """Return what a call has done by its tally. Raises: StateError where the replica has no point."""
    if work.state.last_point is None:
        raise StateError(
            "the replica has no recovery point yet", path=work.folder.folder, hint="call replicate again"
        )
    return ReplicateResult(
        vm=work.state.vm,
        kind=work.tally.kind,
        disks=[
            DiskChange(str(disk.path), disk.virtual_bytes, changed_bytes)
            for disk, changed_bytes in zip(work.disks, work.tally.changed_bytes, strict=True)
        ],
        wire_bytes=work.tally.wire_bytes,
        seconds=round(seconds, 3),
        logs=work.tally.shipped,
        point=str(work.state.last_point),
        gone=work.tally.gone,
        warning=work.tally.warning,
        prepared=prepared,
        waits_for=work.tally.waits_for,
    )
