"""The verb `store adopt`: an old primary's disks and state folder become a replica in a store of its site.

state.json: adopting ──> what was written since is computed and durable ──> disks are taken ──> adopted
                         (from here on a repeated call needs no disk under its old name)
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.disk.extents import NO_EXTENTS
from hvreplica.errors import InvalidTransition, Locked, StateError
from hvreplica.files import OS_FILES
from hvreplica.progress import Progress, quiet
from hvreplica.replication.changed import bring_up_to_date, changed_since, known_points
from hvreplica.replication.opening import check_vm
from hvreplica.replication.shape import follow
from hvreplica.replication.state import NIL, StateFolder, Stopped, TrackedDisk, tracked_disk
from hvreplica.replication.stopped import require_own_disks
from hvreplica.replication.work import Tally, Work
from hvreplica.store import Store
from hvreplica.store.adopted import AdoptedFiles
from hvreplica.store.adoption import AdoptedDisk, Adoption, AdoptReport, adopt, require_adoptable
from hvreplica.store.records import DiskSpec, Owner

if TYPE_CHECKING:
    import os
    import uuid
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.progress import ProgressCallback
    from hvreplica.replication.state import PrimaryState
    from hvreplica.store.home import VmHome

    PathLike = str | os.PathLike[str]


def store_adopt(
    store: PathLike,
    vm: str,
    *,
    state: PathLike | None = None,
    disks: Sequence[PathLike] = (),
    unknown: bool = False,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> AdoptReport:
    """Make a replica in `store` of a VM's disks at its old site; the VM is off there, for good.

    state: the folder of `capture` or `replicate`; it says which disks there are, and what they hold that the
    other site does not have. unknown: it is lost: name the `disks` in the order of their indexes, and all
    will be compared. The disks move into the store; a file <disk>.moved.txt says where to. After any failure
    the same call goes on. Raises: StateError for a wrong folder, InvalidTransition, StoreError, Locked,
    HvReplicaError, OSError, ValueError.
    """
    check_vm(vm, disks)
    if (state is None) != unknown or bool(disks) != unknown:
        message = "name either the state folder, or, with `unknown`, the disks"
        raise ValueError(message)
    root = Path(store).absolute()
    told = progress or quiet
    if unknown:
        paths = [Path(path).absolute() for path in disks]
        return _adopt_unknown(root, vm, paths, told, files=files, clock=clock)
    assert state is not None
    folder_path = Path(state).absolute()
    if not files.exists(folder_path / "state.json"):
        raise StateError(
            "the folder holds no state of a VM",
            path=folder_path,
            hint="is it the one of --state? if it is lost, adopt with --unknown and name the disks",
        )
    with contextlib.ExitStack() as stack:
        folder = StateFolder(files, folder_path, clock=clock)
        stack.callback(folder.release)
        known = folder.load()
        assert known is not None
        _check(known, vm, root, folder_path)
        return _adopt_known(root, folder, known, told, files=files, clock=clock)


def _check(known: PrimaryState, vm: str, root: Path, folder: Path) -> None:
    """Refuse a folder that is not this VM's, or was taken in elsewhere."""
    if known.vm != vm:
        raise StateError(
            "the state folder belongs to another VM",
            path=folder,
            expected=vm,
            actual=known.vm,
            hint="give the folder of this VM",
        )
    require_own_disks(known, folder)
    stopped = known.stopped
    if stopped is not None and stopped.store and stopped.store != str(root):
        raise StateError(
            "the VM was taken into another store",
            path=folder,
            expected=stopped.store,
            actual=root,
            hint="call this with that store",
        )
    if known.phase != "ready" or (stopped is not None and stopped.kind == "reversing"):
        raise InvalidTransition(
            "the VM has no replica yet that it could go back to",
            path=folder,
            actual=known.phase,
            hint="what is at the other site did not grow from these disks",
        )


def _adopt_known(
    root: Path,
    folder: StateFolder,
    known: PrimaryState,
    progress: ProgressCallback,
    *,
    files: FileSystem,
    clock: Clock,
) -> AdoptReport:
    stopped = known.stopped
    is_begun = stopped is not None and stopped.kind in {"adopting", "adopted"}
    adoption_id = stopped.point if is_begun and stopped is not None and stopped.point else clock.guid()
    owner = Owner(known.relationship_id, known.generation, f"state folder {folder.folder}")
    with _opened(root, files, clock) as store:
        if not is_begun:
            _require_disks(known, files)
        home = store.register_adopted(known.vm, owner, _specs(known))
        if not is_begun:
            # Before the mark: it binds the folder to this store, and another one is refused from then on.
            require_adoptable(home, {index: Path(known.disks[index].path) for index in _indexes(known)})
            known.stopped = Stopped("adopting", clock.now_s(), adoption_id, str(root))
            folder.save(known)
        record = AdoptedFiles(home).read()
        if record is not None and record.adoption == adoption_id:
            disks = [_adopted(known, index, NO_EXTENTS) for index in _indexes(known)]
            points = record.known
        else:
            disks, points = _looked_at(folder, known, progress, files=files, clock=clock)
        report = adopt(home, Adoption(adoption_id, owner, disks, points, is_known=True), progress=progress)
    assert known.stopped is not None
    known.stopped.kind = "adopted"
    folder.save(known)
    return report


def _adopt_unknown(
    root: Path,
    vm: str,
    paths: list[Path],
    progress: ProgressCallback,
    *,
    files: FileSystem,
    clock: Clock,
) -> AdoptReport:
    with _opened(root, files, clock) as store:
        taken = store.disk_specs(vm)
        # Of a call that was cut some disks have left their places.
        specs = [
            taken[index] if index in taken and not files.exists(path) else _spec_of(files, path, index, clock)
            for index, path in enumerate(paths)
        ]
        owner = Owner(clock.guid(), 0, "unknown primary")
        home = store.register_adopted(vm, owner, specs)
        disks = [AdoptedDisk(spec, path, NIL, NO_EXTENTS) for spec, path in zip(specs, paths, strict=True)]
        adoption = Adoption(_unfinished(home) or clock.guid(), owner, disks, [], is_known=False)
        return adopt(home, adoption, progress=progress)


def _unfinished(home: VmHome) -> uuid.UUID | None:
    """Return the id of a call that was cut off, without a state folder that would tell."""
    record = AdoptedFiles(home).read()
    if record is None or record.is_known:
        return None
    is_open = home.failover().intent is not None or home.catalog.point(home.vm_id, record.point) is None
    is_last = AdoptedFiles(home).current() is not None
    return record.adoption if is_open or is_last else None


def _spec_of(files: FileSystem, path: Path, index: int, clock: Clock) -> DiskSpec:
    with open_disk(files, path, clock=clock) as disk:
        return _spec(index, tracked_disk(disk))


def _spec(index: int, disk: TrackedDisk) -> DiskSpec:
    return DiskSpec(
        index,
        disk.virtual_bytes,
        disk.logical_sector_bytes,
        disk.physical_sector_bytes,
        disk.block_bytes,
        Path(disk.path).name,
        disk.virtual_disk_id,
    )


def _indexes(known: PrimaryState) -> list[int]:
    """Return the disks that the other site's points have and that are here."""
    return [index for index, disk in enumerate(known.disks) if disk.stage == "protected"]


def _specs(known: PrimaryState) -> list[DiskSpec]:
    return [_spec(index, known.disks[index]) for index in _indexes(known)]


def _adopted(known: PrimaryState, index: int, ranges: NDArray[np.int64]) -> AdoptedDisk:
    disk = known.disks[index]
    return AdoptedDisk(_spec(index, disk), Path(disk.path), disk.last_log_id, ranges)


def _require_disks(known: PrimaryState, files: FileSystem) -> None:
    """Refuse before anything is written down where a disk is not in its place."""
    for index in _indexes(known):
        if not files.exists(Path(known.disks[index].path)):
            raise StateError(
                "a disk of the VM is not in its place",
                path=known.disks[index].path,
                hint="put it back, or, where it is lost, replicate the VM to this site from the start",
            )


def _looked_at(
    folder: StateFolder,
    known: PrimaryState,
    progress: ProgressCallback,
    *,
    files: FileSystem,
    clock: Clock,
) -> tuple[list[AdoptedDisk], list[uuid.UUID]]:
    """Return the disks with what was written to each, and the points that this counts from."""
    with contextlib.ExitStack() as stack:
        opened: list[Disk] = []
        for disk in known.disks:
            if disk.is_here:
                opened.append(open_disk(files, disk.path, shared=True, clock=clock))
                stack.callback(opened[-1].close)
        ordered = follow(known, known.vm, opened, folder.folder)
        work = Work(
            folder=folder,
            state=known,
            disks=ordered,
            link=None,
            files=files,
            clock=clock,
            on_progress=progress,
            tally=Tally("none", [0] * len(ordered)),
        )
        stack.callback(work.close_tables)
        bring_up_to_date(work)
        total_bytes = sum(disk.virtual_bytes for disk in ordered)
        done_bytes = 0

        def looked_at(length: int) -> None:
            nonlocal done_bytes
            done_bytes += length
            progress(Progress("compare", done_bytes, total_bytes, raw_bytes=done_bytes))

        rows = dict(zip(work.indexes, changed_since(work, on_read=looked_at), strict=True))
        points = known_points(work)
        work.save()
    return [_adopted(known, index, rows[index]) for index in _indexes(known)], points


@contextlib.contextmanager
def _opened(root: Path, files: FileSystem, clock: Clock) -> Iterator[Store]:
    """Open the store beside the process that serves it, or make one."""
    try:
        store = Store.create_or_open(files, root, clock=clock)
    except Locked:
        store = Store.open_reading(files, root, clock=clock)
    with contextlib.closing(store):
        yield store
