"""One VM of the store in this process: where its files stand, and who may touch its disks at a time."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import Fenced, StoreError
from hvreplica.store.failover import pack_failover, unpack_failover
from hvreplica.store.fencing import fenced, validate_owner
from hvreplica.store.layout import VmPaths
from hvreplica.store.room import room

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.store.catalog import Catalog
    from hvreplica.store.digest import Digest
    from hvreplica.store.failover import Failover
    from hvreplica.store.records import Owner, PointRow, VmRow


@dataclass(frozen=True, slots=True)
class StoreParts:
    """What every part of an open store works with."""

    files: FileSystem
    root: Path
    catalog: Catalog
    clock: Clock


class VmHome:
    """Thread-safe. One for each VM and process, so that all sessions of the process share its locks."""

    def __init__(self, parts: StoreParts, row: VmRow) -> None:
        self.parts = parts
        self.files = parts.files
        self.catalog = parts.catalog
        self.clock = parts.clock
        self.vm_id = row.id
        self.name = row.name
        self.paths = VmPaths.of(parts.root, row.folder)
        self.verified_logs: set[uuid.UUID] = set()  # checked from end to end by this process
        self.left: list[PointRow] = []  # points that went as the disks moved on, until somebody is told
        self.part_bytes: dict[uuid.UUID, int] = {}  # what the files of undo parts take, looked up once
        self.unpressed: set[uuid.UUID] = set()  # parts that need not be tried again, see store/press.py
        self.warned_of: tuple[uuid.UUID | None] | None = None  # the point of the last warning of the budget
        self.arrived_digests: dict[int, Digest] = {}  # of the disks that are about to take over
        self.repair_tries: dict[tuple[int, float], int] = {}  # by disk and scan
        self._work = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the VM's disks to change them; may be nested.

        Waits for other threads of this process, not for other processes. Raises: Locked.
        """
        with self._work:
            if self._depth:
                yield
                return
            with room(self.files, self.paths.lock):
                self.files.make_directory(self.paths.folder)
                lock = self.files.lock(self.paths.lock)
            self._depth = 1
            try:
                yield
            finally:
                self._depth = 0
                lock.release()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the VM's disks to read them, beside other readers. Raises: Locked while they are changed."""
        with self._work, room(self.files, self.paths.lock):
            self.files.make_directory(self.paths.folder)
            lock = self.files.lock(self.paths.lock, shared=True)
        try:
            yield
        finally:
            lock.release()

    def row(self) -> VmRow:
        """Return the VM's row as it is now. Raises: Fenced if it is gone."""
        row = self.catalog.vm(self.name)
        if row is None:
            raise Fenced(f"VM {self.name!r} is not in the store any more")
        return row

    def require_owner(self, owner: Owner) -> None:
        """Refuse a change by a session that was fenced; inside a transaction. Raises: Fenced."""
        validate_owner(self.row(), owner)

    def failover(self) -> Failover:
        """Return where a failover of the VM stands. Raises: StoreError for a damaged record."""
        return unpack_failover(self.row().failover)

    def set_failover(self, failover: Failover) -> None:
        """Record where a failover stands; inside a transaction."""
        self.catalog.set_failover(self.vm_id, pack_failover(failover))

    def require_transfer(self, transfer_id: uuid.UUID) -> None:
        """Refuse a change by a transfer that was replaced; inside a transaction. Raises: Fenced."""
        if all(transfer.id != transfer_id for transfer in self.catalog.transfers(self.vm_id)):
            raise fenced(self.name)

    def damage(self, *names: str, hint: str) -> StoreError:
        """Return the error that says which files of the VM are not as the catalog knows them."""
        return StoreError(f"VM {self.name!r}: {'; '.join(names)}", path=self.paths.folder, hint=hint)
