"""Which disks a protected VM has, and how large they are: told from what was known, and told to the replica.

A disk keeps its index for good. It is known again by its VirtualDiskId, where its file has one that no other
file of the VM has, else by its path.

    (added) ──> joining ──its copy is at the replica──> joined ──a point has it──> protected
                   │                                      └──────(removed)──────────────┤
                   └──(removed)──> removed <──the first point without it── leaving <────┘

Each cut is recorded with the disks and sizes of its instant; the replica follows as it applies the logs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.errors import StateError, TrackingLost
from hvreplica.formats import messages
from hvreplica.replication.state import TrackedDisk, cuts, track, tracked_disk
from hvreplica.replication.stopped import require_running

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterable, Mapping, Sequence

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.replication.state import PrimaryState, Transfer


def state_of_call(
    known: PrimaryState | None,
    vm: str,
    disks: Sequence[Disk],
    *,
    remove: Iterable[str | int] = (),
    prepare: bool = False,
    folder: Path,
    clock: Clock,
) -> tuple[PrimaryState, list[Disk]]:
    """Return the state for a call, and its disks in the order of their indexes; the caller saves the state.

    disks: all that the VM has now, in any order once they are known. remove: paths or indexes of those that
    it does not have any more. prepare: the VM may be prepared for failover. Raises: StateError, TrackingLost.
    """
    if known is not None:
        require_running(known, folder, prepare=prepare)
    if known is not None and (known.phase != "new" or not all(disk.is_here for disk in known.disks)):
        return known, follow(known, vm, disks, folder, remove=remove)
    # Nothing was sent: the call may name another VM or other disks. The replica may know the identity.
    fresh = track(vm, disks, clock=clock)
    for index in sorted(_numbers(remove)):
        # The indexes of a VM whose state was lost: what was removed then keeps its place.
        leave_gap(fresh, index)
    if known is not None:
        fresh.relationship_id, fresh.generation, fresh.paused = (
            known.relationship_id,
            known.generation,
            known.paused,
        )
    return fresh, list(disks)


def follow(
    state: PrimaryState, vm: str, disks: Sequence[Disk], folder: Path, *, remove: Iterable[str | int] = ()
) -> list[Disk]:
    """Make the state say what the VM has now, and return its disks by index; the caller saves the state.

    Raises: StateError for another VM, a disk that is missing and not said to be removed, one that cannot be
    added now; TrackingLost for one with other sectors.
    """
    if state.vm != vm:
        raise StateError(
            "the state folder belongs to another VM",
            path=folder,
            expected=state.vm,
            actual=vm,
            hint="give each VM a state folder of its own",
        )
    gone = removed_indexes(state, remove, folder)
    found, added = _match(state, disks)
    for index in gone & found.keys():
        raise StateError("this disk is named and removed at once", path=found[index].path, actual=index)
    _require_all(state, found.keys() | gone, added, folder)
    _pin(state)
    for index, disk in found.items():
        _follow_disk(state, index, disk)
    for index in gone:
        _remove(state, index)
    for disk in added:
        found[_add(state, disk, folder)] = disk
    if not found:
        raise StateError("a VM has at least one disk", path=folder)
    return [found[index] for index in sorted(found)]


def follow_point(state: PrimaryState, disks: Mapping[int, Disk], folder: Path) -> list[Disk]:
    """Make the state say what a recovery point has, whose disks have the indexes that they have at the other
    side too; return those of them that a cycle is to ship, by index; the caller saves the state.

    A disk that is new while the first copy of the others is on its way is left for the cycle after it.
    Raises: StateError for a disk that the state knows as removed; TrackingLost for one with other sectors.
    """
    for index in set(indexes(state)) - disks.keys():
        _remove(state, index)
    if state.phase == "new":
        state.disks = [_gap() for _ in range(max(disks) + 1)]
        for index, disk in disks.items():
            state.disks[index] = tracked_disk(disk)
    known = [index for index in sorted(disks) if index < len(state.disks)]
    for index in known:
        if not state.disks[index].is_here:
            raise StateError(
                f"the point has disk {index}, which was removed from the VM before",
                path=folder,
                hint="is this the folder of another store's replica? name another one with --state, and"
                " become the VM's primary at the further site with --takeover",
            )
        _follow_disk(state, index, disks[index])
    if state.phase == "initial":
        return [disks[index] for index in known]
    for index in sorted(disks.keys() - known):
        state.disks += [_gap() for _ in range(index - len(state.disks))]
        _add(state, disks[index], folder)
    return [disks[index] for index in sorted(disks)]


def removed_indexes(state: PrimaryState, names: Iterable[str | int], folder: Path) -> set[int]:
    """Return the disks that are named to be removed, by path or index. Raises: StateError."""
    return {_index_of(state, name, folder) for name in names}


def leave_gap(state: PrimaryState, index: int) -> None:
    """Give the disk at an index, and those behind it, the next one: it was that of a disk that is removed."""
    state.disks.insert(index, _gap())


def _gap() -> TrackedDisk:
    return TrackedDisk("", 512, 512, 512, 0, stage="removed")


def indexes(state: PrimaryState) -> list[int]:
    """Return the indexes of the disks that the VM has, in ascending order."""
    return [index for index, disk in enumerate(state.disks) if disk.is_here]


def point_disks(state: PrimaryState) -> list[messages.DiskSize]:
    """Return what a point of this instant has."""
    return [
        messages.DiskSize(index, disk.virtual_bytes)
        for index, disk in enumerate(state.disks)
        if disk.stage in {"protected", "joined"}
    ]


def differs(state: PrimaryState) -> bool:
    """Return whether the next point has other disks, or others' sizes, than the one that was cut last."""
    recorded = cuts(state)
    if recorded and recorded[-1].disks:
        last = recorded[-1].disks
    else:
        last = [
            messages.DiskSize(index, disk.replica_bytes or disk.virtual_bytes)
            for index, disk in enumerate(state.disks)
            if disk.stage in {"protected", "leaving"}
        ]
    return last != point_disks(state)


def settled(state: PrimaryState, transfer: Transfer) -> None:
    """Take note that the replica has the point of `transfer`, with its disks."""
    sizes = {disk.index: disk.virtual_bytes for disk in transfer.disks}
    later = {disk.index for cut in cuts(state) if cut is not transfer for disk in cut.disks}
    for index, disk in enumerate(state.disks):
        if index in sizes:
            disk.replica_bytes = None if sizes[index] == disk.virtual_bytes else sizes[index]
            disk.stage = "protected" if disk.stage == "joined" else disk.stage
        elif sizes and disk.stage == "leaving" and index not in later:
            disk.stage = "removed"


def restart(state: PrimaryState) -> None:
    """Forget what the replica has: all disks are sent as a whole."""
    state.joining = None
    for disk in state.disks:
        disk.stage = "protected" if disk.is_here else "removed"
        disk.replica_bytes = None


def adopt(state: PrimaryState, claimed: messages.Claimed) -> None:
    """Believe what the replica says that it holds, for a resync."""
    state.joining = None
    for held in claimed.disks:
        disk = state.disks[held.index]
        if held.virtual_bytes == 0:
            disk.stage = "joining" if disk.is_here else "removed"
            continue
        disk.last_log_id = held.last_log_id
        if held.virtual_bytes is not None:
            disk.stage = "leaving" if not disk.is_here else "protected" if held.in_point else "joined"
            disk.replica_bytes = None if held.virtual_bytes == disk.virtual_bytes else held.virtual_bytes


def agree(state: PrimaryState, claimed: messages.Claimed) -> bool:
    """Send an added disk again whose copy the replica has lost; return whether there is one."""
    lost = [
        state.disks[held.index]
        for held in claimed.disks
        if held.virtual_bytes == 0 and state.disks[held.index].stage == "joined"
    ]
    for disk in lost:
        disk.stage = "joining"
    return bool(lost)


# ---- telling disks apart


def _match(state: PrimaryState, disks: Sequence[Disk]) -> tuple[dict[int, Disk], list[Disk]]:
    """Return the known disks by index, and those that are new."""
    here = {index: disk for index, disk in enumerate(state.disks) if disk.is_here}
    by_id = _unique({index: disk.virtual_disk_id for index, disk in here.items()})
    own = _unique({place: disk.virtual_disk_id for place, disk in enumerate(disks)})
    found = {by_id[disk_id]: disks[place] for disk_id, place in own.items() if disk_id in by_id}
    taken = {id(disk) for disk in found.values()}
    by_path = {disk.path: index for index, disk in here.items() if index not in found}
    added = []
    for disk in disks:
        if id(disk) in taken:
            continue
        index = by_path.pop(str(disk.path), None)
        if index is None:
            added.append(disk)
        else:
            found[index] = disk
    return found, added


def _unique(ids: dict[int, uuid.UUID | None]) -> dict[uuid.UUID, int]:
    """Return the places of the identities that only one has: a copied file has that of its original."""
    counts = Counter(ids.values())
    return {disk_id: place for place, disk_id in ids.items() if disk_id is not None and counts[disk_id] == 1}


def _require_all(state: PrimaryState, accounted: set[int], added: Sequence[Disk], folder: Path) -> None:
    missing = [index for index in indexes(state) if index not in accounted]
    if not missing:
        return
    path = state.disks[missing[0]].path
    hint = (
        "name every disk that the VM has now with --disk, or none where they are those of before; for one"
        f" that it does not have any more say --remove-disk {path}"
    )
    if added:
        hint += f"; {added[0].path} is none of the disks that are known"
    raise StateError(
        "a disk of the VM is not named",
        path=folder,
        expected=", ".join(disk.path for disk in state.disks if disk.is_here),
        actual=f"without {path}",
        hint=hint,
    )


def _numbers(names: Iterable[str | int]) -> set[int]:
    return {int(name) for name in names if str(name).isdecimal() and int(name) < messages.DISKS_MAX}


def _index_of(state: PrimaryState, name: str | int, folder: Path) -> int:
    """Return the index of a disk that is named to be removed."""
    for index in reversed(range(len(state.disks))):  # a path may have been that of an earlier disk
        disk = state.disks[index]
        if str(name) == str(index) or (disk.path and str(Path(str(name)).absolute()) == disk.path):
            return index
    raise StateError(
        "there is no such disk to remove",
        path=folder,
        expected="; ".join(f"{index}: {disk.path}" for index, disk in enumerate(state.disks) if disk.is_here),
        actual=str(name),
        hint="name it by its path or its index",
    )


# ---- following what changed


def _pin(state: PrimaryState) -> None:
    """Write down what the cuts that wait have, where they were recorded without it."""
    for transfer in cuts(state):
        if not transfer.disks:
            transfer.disks = point_disks(state)


def _follow_disk(state: PrimaryState, index: int, disk: Disk) -> None:
    tracked, now = state.disks[index], tracked_disk(disk)
    if now.logical_sector_bytes != tracked.logical_sector_bytes:
        raise TrackingLost(
            "the disk has another sector size than when it was protected",
            path=disk.path,
            field="logical_sector_bytes",
            expected=tracked.logical_sector_bytes,
            actual=now.logical_sector_bytes,
            hint=f"let it go with --remove-disk {index}, then name it again as a disk of its own",
        )
    if now.virtual_bytes != tracked.virtual_bytes:
        _follow_size(state, index, now.virtual_bytes)
    tracked.path, tracked.physical_sector_bytes = now.path, now.physical_sector_bytes
    tracked.virtual_disk_id = now.virtual_disk_id or tracked.virtual_disk_id


def _follow_size(state: PrimaryState, index: int, virtual_bytes: int) -> None:
    tracked = state.disks[index]
    held = tracked.replica_bytes or tracked.virtual_bytes
    tracked.replica_bytes = None if held == virtual_bytes or tracked.stage == "joining" else held
    tracked.virtual_bytes = virtual_bytes
    first, joining = state.transfer, state.joining
    if first is not None and first.kind == "initial":
        place = indexes(state).index(index)
        first.positions[place] = min(first.positions[place], virtual_bytes)
    if joining is not None and joining.disks[0].index == index:
        joining.disks = [messages.DiskSize(index, virtual_bytes)]
        joining.positions = [min(joining.positions[0], virtual_bytes)]


def _remove(state: PrimaryState, index: int) -> None:
    disk = state.disks[index]
    if not disk.is_here:
        return
    if state.phase == "ready":
        disk.stage = "removed" if disk.stage == "joining" else "leaving"
    else:
        # A first copy is of all disks at once, or none: it begins anew without this one.
        disk.stage, state.phase, state.transfer = "removed", "new", None
    if state.joining is not None and state.joining.disks[0].index == index:
        state.joining = None


def _add(state: PrimaryState, disk: Disk, folder: Path) -> int:
    if state.phase == "initial":
        raise StateError(
            "a disk can be added once the first copy of the others is complete",
            path=disk.path,
            hint="leave it out until then",
        )
    if len(state.disks) >= messages.DISKS_MAX:
        raise StateError(
            "the VM has had as many disks as it can have: no index is used again",
            path=folder,
            expected=f"at most {messages.DISKS_MAX}",
            hint="protect the VM anew under another name",
        )
    tracked = tracked_disk(disk)
    tracked.stage = "joining" if state.phase == "ready" else "protected"
    state.disks.append(tracked)
    return len(state.disks) - 1
