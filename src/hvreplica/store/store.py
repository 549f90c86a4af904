"""The store: all VMs that are replicated to this place, and who may write them.

One process serves a store (Store.create_or_open); others may look and export meanwhile (Store.open_reading).
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

import msgspec

from hvreplica.errors import (
    HvReplicaError,
    InvalidTransition,
    Locked,
    NoSuchPoint,
    StoreError,
    UnsupportedVersion,
)
from hvreplica.store.adopted import require_adopted
from hvreplica.store.apply import finish, is_cut
from hvreplica.store.catalog import Catalog
from hvreplica.store.failover import is_frozen, may_apply
from hvreplica.store.fencing import validate_claim, validate_disks_follow
from hvreplica.store.home import StoreParts, VmHome
from hvreplica.store.instant import make_instant
from hvreplica.store.instant_spans import InstantSpan, instant_spans
from hvreplica.store.layout import (
    CATALOG_NAME,
    STORE_LOCK_NAME,
    VmPaths,
    collision_key,
    folder_name,
    validate_vm_name,
)
from hvreplica.store.open_point import LATEST, OpenPoint, open_point, point_id_of
from hvreplica.store.plan import PointPlan, plan_points
from hvreplica.store.point_diff import PointDiff, diff_points
from hvreplica.store.points import ExportReport, Format, export_point
from hvreplica.store.points_kept import kept_points, sweep_points
from hvreplica.store.policy import changed_policy, follow, policy_of
from hvreplica.store.prepared import forget_prepared
from hvreplica.store.press import Pressed, press_parts
from hvreplica.store.records import DiskSpec, Owner, printable, validate_disks
from hvreplica.store.replica import VmReplica
from hvreplica.store.retain import GonePoint, delete_points, retain
from hvreplica.store.room import room
from hvreplica.store.status import (
    MadePoint,
    PointStatus,
    StoreStatus,
    made_point,
    points_of,
    store_status,
)
from hvreplica.store.transfers import sweep
from hvreplica.store.verify import StoreVerdict, VmVerdict, verified_s, verify_point, verify_vm

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileLock, FileSystem
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.progress import ProgressCallback
    from hvreplica.store.pace import Pace
    from hvreplica.store.records import PointRow, VmRow


class RecoveredVm(msgspec.Struct, frozen=True):
    """What recover() found for one VM. points: those that became complete. error: why it is not finished."""

    name: str
    points: list[str]
    error: str | None


class Store:
    """An open store; close() when done. Thread-safe."""

    def __init__(self, parts: StoreParts, lock: FileLock | None) -> None:
        """Use create_or_open() or open_reading()."""
        self._parts = parts
        self._lock = lock
        self._guard = threading.Lock()
        self._homes: dict[int, VmHome] = {}
        self._claims: dict[str, threading.Lock] = {}
        self._replicas: dict[int, VmReplica] = {}

    @classmethod
    def create_or_open(
        cls, files: FileSystem, root: Path, *, clock: Clock, on_commit: Callable[[bytes], None] | None = None
    ) -> Store:
        """Open the store at `root` to serve it, making an empty one where there is none.

        on_commit: called with the catalog's bytes after each of its commits. Call recover() before serving.
        Raises: Locked while another process serves it, UnsupportedVersion, StoreError, StoreFull.
        """
        with room(files, root):
            files.make_directory(root)
            lock = files.lock(root / STORE_LOCK_NAME)
        try:
            catalog = Catalog(files, root / CATALOG_NAME, create=True, on_commit=on_commit)
            try:
                if not catalog.vms():
                    _require_no_orphans(files, root)
                files.sync_directory(root)
            except BaseException:
                catalog.close()
                raise
        except BaseException:
            lock.release()
            raise
        return cls(StoreParts(files, root, catalog, clock), lock)

    @classmethod
    def open_reading(cls, files: FileSystem, root: Path, *, clock: Clock) -> Store:
        """Open an existing store for status, points and exports, beside the process that serves it.

        One that an older version wrote is brought on if nobody serves it. Raises: StoreError if there is
        none, Locked where another version serves it.
        """
        try:
            catalog = Catalog(files, root / CATALOG_NAME, create=False)
        except UnsupportedVersion:
            _bring_on(files, root)
            catalog = Catalog(files, root / CATALOG_NAME, create=False)
        return cls(StoreParts(files, root, catalog, clock), None)

    def close(self) -> None:
        """End all sessions and close; may be called twice."""
        with self._guard:
            replicas = list(self._replicas.values())
            self._replicas.clear()
        for replica in replicas:
            replica.close()
        self._parts.catalog.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def claim(
        self,
        vm: str,
        *,
        relationship_id: uuid.UUID,
        generation: int,
        certificate: str,
        disks: Sequence[DiskSpec],
        removed: Sequence[int] = (),
        policy: PointPolicy | None = None,
        reverse: bool = False,
    ) -> VmReplica:
        """Become the writer of a VM by the rule of store/fencing.py, and end the session that was.

        Durable on return. certificate: the identity that the trust list accepted; recorded. disks: as they
        are now. Once the replica holds a point they must include those that it holds, but for the indexes
        `removed`; their sizes may differ and further ones may be among them: logs will say so. One that is
        in both may be in points that are still to come, and in no first copy. policy: what is to be kept of
        the VM's points from now on. reverse: by the site to which the VM was failed over: only a replica
        that was made of the old primary is taken. Raises: Fenced, FailoverRefused, ReplicaDiverged,
        FieldOutOfRange, StoreFull.
        """
        self._require_serving()
        validate_vm_name(vm)
        owner = Owner(relationship_id, generation, printable(certificate))
        owner.validate()
        validate_disks(disks)
        with self._claim_lock(vm):
            if reverse:
                require_adopted(self._parts, vm)
            row = self._register(vm, owner, disks, set(removed), policy)
            home = self._home(row)
            with self._guard:
                older = self._replicas.get(row.id)
            if older is not None:
                older.fence()
            replica = VmReplica(home, owner, disks, removed)
            with self._guard:
                self._replicas[row.id] = replica
        return replica

    def register_adopted(self, vm: str, owner: Owner, disks: Sequence[DiskSpec]) -> VmHome:
        """Return what works on a VM that is to be adopted; one that is new here is recorded, without a point.

        Durable on return. Raises: StoreError where something of unknown origin stands in its folder.
        """
        validate_vm_name(vm)
        owner.validate()
        validate_disks(disks)
        catalog = self._parts.catalog
        with catalog.transaction():
            row = catalog.vm(vm)
            if row is None:
                self._insert(vm, owner, disks)
            elif not catalog.points(row.id):  # of a call that was cut, perhaps with other disks
                held = {disk.spec.index for disk in catalog.disks(row.id) if disk.is_held}
                for disk in disks:
                    if disk.index not in held:
                        catalog.insert_disk(row.id, disk)
        return self.home(vm)

    def disk_specs(self, vm: str) -> dict[int, DiskSpec]:
        """Return the disks of a VM as they are recorded, by index; none for a VM that is not here."""
        row = self._parts.catalog.vm(vm)
        disks = [] if row is None else self._parts.catalog.disks(row.id)
        return {disk.spec.index: disk.spec for disk in disks}

    def recover(self, *, progress: ProgressCallback | None = None) -> list[RecoveredVm]:
        """Finish what a cut left: apply what was acknowledged, remove what nothing knows; before any claim.

        A VM that cannot be finished is reported and keeps its files; the others go on.
        """
        self._require_serving()
        return [self._recover(self._home(row), progress) for row in self._parts.catalog.vms()]

    def status(self) -> StoreStatus:
        """Return what the store holds; a consistent view of each VM, without reading any disk."""
        homes = [self._home(row) for row in self._parts.catalog.vms()]
        return store_status(self._parts.root, self._parts.files.free_bytes(self._parts.root), homes)

    def points(self, vm: str) -> list[PointStatus]:
        """Return a VM's points, oldest first; "complete" ones can be exported. Raises: NoSuchPoint."""
        return points_of(self._known(vm))

    def open_point(self, vm: str, which: uuid.UUID | str, *, disks: Iterable[int] | None = None) -> OpenPoint:
        """Return a point of a VM with its disks, for reading while replication goes on: see open_point.py."""
        return open_point(self.home(vm), which, disks=disks)

    def diff_points(
        self, vm: str, a: uuid.UUID | str, b: uuid.UUID | str, *, coarse: bool = False
    ) -> PointDiff:
        """Return the ranges in which two points of a VM differ: see point_diff.py."""
        return diff_points(self.home(vm), a, b, coarse=coarse)

    def plan_points(self, vm: str, wish: PointPolicy | None = None) -> PointPlan:
        """Return what the VM's policy, as `wish` would change it, makes of its points; changes nothing.

        Raises: NoSuchPoint for an unknown VM, FieldOutOfRange for a rule that is none.
        """
        home = self.home(vm)
        policy = policy_of(home)
        return plan_points(home, policy if wish is None else follow(policy, wish))

    def set_policy(self, vm: str, wish: PointPolicy) -> PointPlan:
        """Change what is kept of a VM from the next cycle on; durable on return. Raises: as plan_points()."""
        home = self.home(vm)
        with home.catalog.transaction():
            row = home.catalog.vm(vm)
            home.catalog.set_policy(home.vm_id, changed_policy(row.policy if row else None, wish))
        return self.plan_points(vm)

    def make_point_at(self, vm: str, instant_s: float, *, flush: bool = False) -> MadePoint:
        """Make a point of any instant between two cycles. See instant.make_point_at()."""
        home = self.home(vm)
        made = make_instant(home, instant_s, flush=flush)
        status = next(point for point in points_of(home) if point.id == str(made.point.id))
        return made_point(status, made)

    def instant_spans(self, vm: str) -> list[InstantSpan]:
        """Return which instants between points can be had. See instant_spans.py."""
        return instant_spans(self.home(vm))

    def delete_points(self, vm: str, point_ids: Sequence[uuid.UUID]) -> list[GonePoint]:
        """Let points go that a person named. See retain.delete_points()."""
        return delete_points(self.home(vm), point_ids)

    def export_point(
        self,
        vm: str,
        point_id: uuid.UUID | str | None,
        disk_index: int,
        output: Path,
        format: Format = "vhdx",  # noqa: A002  # the word that every disk tool uses
        *,
        progress: ProgressCallback | None = None,
        overwrite: bool = False,
    ) -> ExportReport:
        """Write one disk of a point to `output`, a file of its own. See points.export_point()."""
        return export_point(
            self._known(vm),
            output,
            point_id=point_id,
            disk_index=disk_index,
            format=format,
            progress=progress,
            overwrite=overwrite,
        )

    def verify(self, vm: str | None, pace: Pace, *, since_s: float | None = None) -> StoreVerdict:
        """Read all of a VM again, or of every one, and mark points that are damaged. See store/verify.py.

        since_s: a disk that was read whole after that time is not read again. Raises: NoSuchPoint for an
        unknown VM, Locked where one changes too fast, Stopped.
        """
        homes = [self._home(row) for row in self._parts.catalog.vms()] if vm is None else [self.home(vm)]
        found = [verify_vm(home, pace, since_s=since_s) for home in homes]
        return StoreVerdict(str(self._parts.root), found)

    def verify_point(self, vm: str, which: uuid.UUID | str, pace: Pace) -> VmVerdict:
        """Read one point again, by its id or "latest", and mark it if it is damaged. Raises: as verify()."""
        home = self.home(vm)
        return verify_point(home, _kept_point(home, which), pace)

    def press(self, vm: str, pace: Pace) -> Pressed:
        """Compress undo parts of a VM that its policy says are old enough. See store/press.py.

        Raises: NoSuchPoint for an unknown VM, Stopped.
        """
        home = self.home(vm)
        pace.give_way = lambda: is_cut(home)
        return press_parts(home, pause=lambda: pace.spend(0))

    def names(self) -> list[str]:
        """Return the names of the VMs."""
        return [row.name for row in self._parts.catalog.vms()]

    def verified_s(self) -> dict[str, float]:
        """Return when each VM was last read again as a whole; 0 for never."""
        return {row.name: verified_s(self._home(row)) for row in self._parts.catalog.vms()}

    def home(self, vm: str) -> VmHome:
        """Return what works on one VM. Raises: NoSuchPoint for a VM that the store does not have."""
        return self._known(vm)

    def _require_serving(self) -> None:
        if self._lock is None:
            raise InvalidTransition("the store was opened for reading", path=self._parts.root)

    def _claim_lock(self, vm: str) -> threading.Lock:
        with self._guard:
            return self._claims.setdefault(vm, threading.Lock())

    def _home(self, row: VmRow) -> VmHome:
        with self._guard:
            return self._homes.setdefault(row.id, VmHome(self._parts, row))

    def _known(self, vm: str) -> VmHome:
        row = self._parts.catalog.vm(vm)
        if row is None:
            names = ", ".join(known.name for known in self._parts.catalog.vms()[:10])
            raise NoSuchPoint(
                f"the store has no VM {vm!r}", path=self._parts.root, hint=f"it has: {names or 'none yet'}"
            )
        return self._home(row)

    def _recover(self, home: VmHome, progress: ProgressCallback | None) -> RecoveredVm:
        points: list[uuid.UUID] = []
        error = None
        try:
            # What a failover froze stays as it is; the failover itself goes on when its verb is called again.
            points = finish(home, progress=progress) if may_apply(home.failover()) else []
            # Where it is locked, a failover beside this server may be making files: the next start sweeps.
            with room(home.files, home.paths.folder):
                with contextlib.suppress(Locked), home.exclusive():
                    sweep(home)
                    sweep_points(home)
                if not is_frozen(home.failover()):  # the newest of its points may be one that is on trial
                    retain(home)
        except (HvReplicaError, OSError) as failure:
            error = str(failure)
        return RecoveredVm(home.name, [str(point) for point in points], error)

    def _register(
        self,
        vm: str,
        owner: Owner,
        disks: Sequence[DiskSpec],
        removed: set[int],
        policy: PointPolicy | None,
    ) -> VmRow:
        """Decide the claim and record it, in one transaction."""
        catalog, now_s = self._parts.catalog, self._parts.clock.now_s()
        with catalog.transaction():
            row = catalog.vm(vm)
            if row is None:
                vm_id = self._insert(vm, owner, disks)
            else:
                vm_id = row.id
                validate_claim(row, owner)
                forget_prepared(catalog, row)
                self._keep_disks(row, disks, removed)
            catalog.set_owner(vm_id, owner, now_s)
            if policy is not None:
                catalog.set_policy(vm_id, changed_policy(row.policy if row else None, policy))
            for disk in disks:
                catalog.name_disk(vm_id, disk.index, printable(disk.label), disk.virtual_disk_id)
        row = catalog.vm(vm)
        if row is None:
            raise StoreError(f"VM {vm!r} vanished from the catalog", path=self._parts.root)
        return row

    def _insert(self, vm: str, owner: Owner, disks: Sequence[DiskSpec]) -> int:
        """Add a VM; inside a transaction."""
        catalog, now_s = self._parts.catalog, self._parts.clock.now_s()
        folder = self._free_folder(vm)
        vm_id = catalog.insert_vm(vm, folder, collision_key(folder), owner, now_s)
        for disk in disks:
            catalog.insert_disk(vm_id, disk)
        return vm_id

    def _keep_disks(self, row: VmRow, disks: Sequence[DiskSpec], removed: set[int]) -> None:
        """Hold the claim to the disks that the replica has; while it has no point, other disks begin anew."""
        catalog = self._parts.catalog
        stored = catalog.disks(row.id)
        transfer = catalog.transfer(row.id, "initial")
        points = catalog.points(row.id)
        if points or (transfer is not None and transfer.state == "renaming"):
            validate_disks_follow(row.name, stored, disks, removed)
        elif {disk.spec.key for disk in stored} != {disk.key for disk in disks}:
            catalog.delete_transfers(row.id, "initial", "logs")
            catalog.delete_disks(row.id)
            stored = []
        held = {disk.spec.index for disk in stored if disk.is_held}
        for disk in disks:
            if disk.index not in held | removed:
                catalog.insert_disk(row.id, disk)
        in_points = {index for point in points for index in catalog.members(row.id, point.id)}
        # Those of points leave with the first one that does not have them, those announced may join one yet.
        for index in removed - in_points - {disk.index for disk in disks}:
            catalog.remove_disk(row.id, index, self._parts.clock.now_s())

    def _free_folder(self, vm: str) -> str:
        """Choose the folder of a new VM. Raises: StoreError if something of unknown origin stands there."""
        folder = folder_name(vm)
        if self._parts.catalog.has_folder_key(collision_key(folder)):
            folder = folder_name(vm, strict=True)
        paths = VmPaths.of(self._parts.root, folder)
        if self._parts.files.names(paths.disks) or self._parts.files.names(paths.spool):
            raise StoreError(
                f"the folder for VM {vm!r} holds files that the catalog does not know",
                path=paths.folder,
                hint="move the folder away, or restore the catalog that belongs to it",
            )
        return folder


def _kept_point(home: VmHome, which: uuid.UUID | str) -> PointRow:
    """Return a point that is kept, damaged or not. Raises: NoSuchPoint."""
    points = kept_points(home)
    if which == LATEST and points:
        return points[-1]
    point_id = None if which == LATEST else point_id_of(which)
    for point in points:
        if point.id == point_id:
            return point
    raise NoSuchPoint(
        f"VM {home.name!r} has no point {which}", path=home.paths.folder, hint="see `point list`"
    )


def _bring_on(files: FileSystem, root: Path) -> None:
    """Bring an older version's catalog on, alone: its server would not understand what it finds."""
    lock = files.lock(root / STORE_LOCK_NAME)
    try:
        Catalog(files, root / CATALOG_NAME, create=True).close()
    finally:
        lock.release()


def _require_no_orphans(files: FileSystem, root: Path) -> None:
    """Refuse to begin a new catalog where the replicas of a lost one stand."""
    for name in files.names(root):
        with contextlib.suppress(NotADirectoryError):
            if any(disk.endswith(".vhdx") for disk in files.names(root / name / "disks")):
                raise StoreError(
                    "the store has replicas but its catalog is empty or lost",
                    path=root / name,
                    hint="restore catalog.db, or choose another folder; the replicas are plain VHDX files",
                )
