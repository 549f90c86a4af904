"""The store's catalog: one SQLite database, the only thing that says what the files of the store mean.

Every change happens inside transaction() and is durable when that block ends (WAL, synchronous=FULL): this is
the store's durability point, so files that a row speaks of are made durable before. No rule lives here: who
may write, what follows what and which file is deleted is decided by the callers, inside the same transaction.

One object per process, used by any thread; several processes may have the same catalog open.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hvreplica.errors import BadSignature, Locked, StoreError, StoreFull, UnsupportedVersion, kept
from hvreplica.store.records import NIL, DiskRow, DiskSpec, LogSpec, Owner, PointRow, TransferRow, VmRow
from hvreplica.store.schema import APPLICATION_ID, MIGRATIONS, SCHEMA_VERSION, TABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.files import FileSystem

_BUSY_TIMEOUT_S = 30.0  # another process holds the write lock for one small transaction at a time
_SELECT_VM = "SELECT id, name, folder, relationship_id, generation, certificate, claimed_s FROM vm"
_SELECT_POINT = (
    "SELECT id, sequence, instant_s, kind, consistency, state, previous_id, bytes, received_s, applied_s"
    " FROM point"
)
_RESTORE_HINT = "restore catalog.db from a copy; the disks beside it are plain VHDX files"


class Catalog:
    """The open database; close() when done."""

    def __init__(
        self,
        files: FileSystem,
        path: Path,
        *,
        create: bool,
        on_commit: Callable[[bytes], None] | None = None,
    ) -> None:
        """Open what is at `path`; with `create`, make the tables where there are none, and bring old ones on.

        on_commit: called after each commit with the whole database as bytes, while no other change can
        happen. Raises: BadSignature for a database that is not a store's, UnsupportedVersion for a newer one
        and, without `create`, for an older one; StoreError for a damaged one.
        """
        self._files = files
        self._path = path
        self._on_commit = on_commit
        self._lock = threading.RLock()
        self._changing = False
        self._failure: StoreError | None = None
        with self._translated():
            self._connection = sqlite3.connect(
                f"file:{quote(str(path))}?mode={'rwc' if create else 'rw'}",
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
                uri=True,
            )
        try:
            self._prepare(create=create)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close; may be called twice."""
        with self._lock:
            self._connection.close()

    def _prepare(self, *, create: bool) -> None:
        with self._translated():
            version = self._pragma("user_version")
            if self._pragma("application_id") != APPLICATION_ID and (
                version != 0 or self._rows("SELECT 1 FROM sqlite_master")
            ):
                raise BadSignature(
                    "this database is not the catalog of a replica store",
                    path=self._path,
                    field="application_id",
                    expected=APPLICATION_ID,
                    actual=self._pragma("application_id"),
                    hint="choose an empty folder for the store",
                )
            if version > SCHEMA_VERSION:
                raise UnsupportedVersion(
                    "the store was written by a newer hvreplica",
                    path=self._path,
                    field="user_version",
                    expected=f"at most {SCHEMA_VERSION}",
                    actual=version,
                    hint="use the hvreplica that wrote it, or a newer one",
                )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            found = self._rows("PRAGMA quick_check")
        if found != [("ok",)]:
            raise StoreError(
                f"the catalog is damaged: {found[0][0]}",
                path=self._path,
                hint=_RESTORE_HINT,
            )
        if version == 0 and not create:
            raise _no_store(self._path)
        if version < SCHEMA_VERSION:
            if not create:
                raise _outdated(self._path, version)
            self._bring_on(version)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def _bring_on(self, version: int) -> None:
        """Make the tables, or those of this version out of older ones, as a whole."""
        steps = (
            [TABLES.split(";")] if version == 0 else [MIGRATIONS[at] for at in range(version, SCHEMA_VERSION)]
        )
        with self.transaction():
            if self._pragma("user_version") != version:
                return  # another process was faster
            for statement in (statement for step in steps for statement in step):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    # Transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Change the catalog: all of the block or nothing, durable on return, alone in all processes.

        Raises: StoreFull, Locked, StoreError. After an error nothing is known to have changed; where the disk
        failed, the change may still show up after a restart, so every caller must be able to meet its own
        work again, and this object takes no further change.
        """
        with self._lock:
            if self._failure is not None:
                raise kept(self._failure)
            if self._changing:
                message = "transactions do not nest"
                raise AssertionError(message)
            with self._translated():
                self._connection.execute("BEGIN IMMEDIATE")
                self._changing = True
                try:
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
                finally:
                    self._changing = False
            if self._on_commit is not None:
                self._on_commit(self._connection.serialize())

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read several rows that belong together."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            with self._translated():
                self._connection.execute("BEGIN")
                try:
                    yield
                finally:
                    self._connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CANTOPEN:
            return _no_store(self._path)
        free_bytes = 0
        with contextlib.suppress(OSError):
            free_bytes = self._files.free_bytes(self._path.parent)
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and free_bytes < 1 << 20):
            return StoreFull(
                "no room left for the catalog",
                path=self._path,
                actual=f"{free_bytes} bytes free",
                hint="make room in the store's file system; nothing is lost, the next try continues",
            )
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return Locked("another process changes the catalog", path=self._path, hint="try again")
        if code == sqlite3.SQLITE_NOTADB:
            return StoreError(
                "the catalog is not a database any more",
                path=self._path,
                hint=_RESTORE_HINT,
            )
        failure = StoreError(
            f"the catalog failed: {error}",
            path=self._path,
            hint="look at the disk it is on, then start again",
        )
        if code == sqlite3.SQLITE_IOERR:
            self._failure = kept(failure)
        return failure

    def _rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._translated():
            return self._connection.execute(statement, values).fetchall()

    def _change(self, statement: str, values: tuple[Any, ...]) -> int:
        if not self._changing:
            message = "a change outside of transaction()"
            raise AssertionError(message)
        return self._connection.execute(statement, values).rowcount

    # VMs, owners, disks

    def vms(self) -> list[VmRow]:
        """Return all VMs by name."""
        return [self._vm_row(row) for row in self._rows(f"{_SELECT_VM} ORDER BY name")]

    def vm(self, name: str) -> VmRow | None:
        """Return the VM of this exact name."""
        rows = self._rows(f"{_SELECT_VM} WHERE name = ?", (name,))
        return self._vm_row(rows[0]) if rows else None

    def has_folder_key(self, folder_key: str) -> bool:
        """Return whether a VM's folder would be mistaken for one with this key."""
        return bool(self._rows("SELECT 1 FROM vm WHERE folder_key = ?", (folder_key,)))

    @staticmethod
    def _vm_row(row: tuple[Any, ...]) -> VmRow:
        return VmRow(row[0], row[1], row[2], Owner(uuid.UUID(row[3]), row[4], row[5]), row[6])

    def insert_vm(self, name: str, folder: str, folder_key: str, owner: Owner, now_s: float) -> int:
        """Add a VM and return its number."""
        self._change(
            "INSERT INTO vm (name, folder, folder_key, relationship_id, generation, certificate, claimed_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                name,
                folder,
                folder_key,
                str(owner.relationship_id),
                owner.generation,
                owner.certificate,
                now_s,
            ),
        )
        row = self._rows("SELECT id FROM vm WHERE name = ?", (name,))[0]
        return int(row[0])

    def set_owner(self, vm_id: int, owner: Owner, now_s: float) -> None:
        """Record who writes the VM from now on, and in its history of owners."""
        relationship = str(owner.relationship_id)
        self._change(
            "UPDATE vm SET relationship_id = ?, generation = ?, certificate = ?, claimed_s = ? WHERE id = ?",
            (relationship, owner.generation, owner.certificate, now_s, vm_id),
        )
        updated = self._change(
            "UPDATE owner SET last_generation = ?, last_s = ?"
            " WHERE vm_id = ? AND relationship_id = ? AND certificate = ?",
            (owner.generation, now_s, vm_id, relationship, owner.certificate),
        )
        if not updated:
            self._change(
                "INSERT INTO owner VALUES (?, ?, ?, ?, ?, ?, ?)",
                (vm_id, relationship, owner.certificate, owner.generation, owner.generation, now_s, now_s),
            )

    def owners(self, vm_id: int) -> list[tuple[Owner, float]]:
        """Return who has owned the VM, oldest first, each with the time of its last claim."""
        rows = self._rows(
            "SELECT relationship_id, last_generation, certificate, last_s FROM owner"
            " WHERE vm_id = ? ORDER BY first_s, rowid",
            (vm_id,),
        )
        return [(Owner(uuid.UUID(row[0]), row[1], row[2]), row[3]) for row in rows]

    def disks(self, vm_id: int) -> list[DiskRow]:
        """Return the VM's disks by index, those that were removed too."""
        rows = self._rows(
            "SELECT disk_index, virtual_bytes, logical_sector_bytes, physical_sector_bytes, block_bytes,"
            " label, virtual_disk_id, file_bytes, data_write_guid, last_log_id, base_id, removed_s"
            " FROM disk WHERE vm_id = ? ORDER BY disk_index",
            (vm_id,),
        )
        return [_disk(row) for row in rows]

    def insert_disk(self, vm_id: int, spec: DiskSpec) -> None:
        """Add a disk that holds nothing yet, in the place of one that never held anything."""
        self._change(
            "DELETE FROM disk WHERE vm_id = ? AND disk_index = ? AND file_bytes IS NULL", (vm_id, spec.index)
        )
        sizes = (spec.virtual_bytes, spec.logical_sector_bytes, spec.physical_sector_bytes, spec.block_bytes)
        self._change(
            "INSERT INTO disk VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL, NULL, ?, NULL, NULL)",
            (vm_id, spec.index, *sizes, spec.label, _text(spec.virtual_disk_id)),
        )

    def delete_disks(self, vm_id: int) -> None:
        """Forget all disks of the VM."""
        self._change("DELETE FROM disk WHERE vm_id = ?", (vm_id,))

    def name_disk(self, vm_id: int, disk_index: int, label: str, virtual_disk_id: uuid.UUID | None) -> None:
        """Record what the primary calls the disk now, and its identity if there is one."""
        self._change(
            "UPDATE disk SET label = ?, virtual_disk_id = coalesce(?, virtual_disk_id)"
            " WHERE vm_id = ? AND disk_index = ?",
            (label, _text(virtual_disk_id), vm_id, disk_index),
        )

    def remove_disk(self, vm_id: int, disk_index: int, now_s: float) -> None:
        """Record that no point from now on has this disk."""
        self._change(
            "UPDATE disk SET removed_s = ? WHERE vm_id = ? AND disk_index = ? AND removed_s IS NULL",
            (now_s, vm_id, disk_index),
        )

    def set_disk_state(self, vm_id: int, row: DiskRow) -> None:
        """Record how the last applied point, or an initial replication, left the disk's file."""
        states = (row.file_bytes, _text(row.data_write_guid), str(row.last_log_id), _text(row.base_id))
        self._change(
            "UPDATE disk SET virtual_bytes = ?, file_bytes = ?, data_write_guid = ?, last_log_id = ?,"
            " base_id = ? WHERE vm_id = ? AND disk_index = ?",
            (row.spec.virtual_bytes, *states, vm_id, row.spec.index),
        )

    # Transfers

    def transfers(self, vm_id: int) -> list[TransferRow]:
        """Return what is on its way for the VM: at most one of each kind."""
        with self.snapshot():
            rows = self._rows(
                "SELECT id, kind, state, point_id, previous_point_id, instant_s, started_s, consistent"
                " FROM transfer WHERE vm_id = ? ORDER BY kind",
                (vm_id,),
            )
            return [self._transfer_row(vm_id, row) for row in rows]

    def transfer(self, vm_id: int, *kinds: str) -> TransferRow | None:
        """Return what is on its way of one of these kinds, which exclude each other."""
        return next((row for row in self.transfers(vm_id) if row.kind in kinds), None)

    def _transfer_row(self, vm_id: int, row: tuple[Any, ...]) -> TransferRow:
        point_id = uuid.UUID(row[3])
        positions = self._rows(
            "SELECT target, durable_bytes FROM position WHERE vm_id = ? AND kind = ?", (vm_id, row[1])
        )
        return TransferRow(
            id=uuid.UUID(row[0]),
            kind=row[1],
            state=row[2],
            point_id=point_id,
            previous_point_id=_guid(row[4]),
            instant_s=row[5],
            started_s=row[6],
            consistent=bool(row[7]),
            positions=dict(positions),
            disks=self.members(vm_id, point_id),
            logs=tuple(self.logs(vm_id, point_id)) if row[1] == "logs" else (),
        )

    def insert_transfer(self, vm_id: int, row: TransferRow) -> None:
        """Record what is on its way from now on; there must be none of its kind."""
        values = (str(row.id), row.kind, row.state, str(row.point_id), _text(row.previous_point_id))
        self._change(
            "INSERT INTO transfer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (vm_id, *values, row.instant_s, row.started_s, row.consistent),
        )
        self.set_members(vm_id, row.point_id, row.disks)
        for place, log in enumerate(row.logs):
            ids = (str(log.log_id), str(log.previous_log_id))
            self._change(
                "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?)",
                (vm_id, str(row.point_id), place, log.disk_index, *ids, log.log_bytes),
            )
        for target, durable_bytes in row.positions.items():
            self.set_position(vm_id, row.kind, target, durable_bytes)

    def renew_transfer(self, vm_id: int, row: TransferRow) -> None:
        """Record what an unfinished transfer will show once it goes on: its time, and its disks' sizes."""
        self._change(
            "UPDATE transfer SET instant_s = ?, consistent = ? WHERE vm_id = ? AND kind = ?",
            (row.instant_s, row.consistent, vm_id, row.kind),
        )
        self.set_members(vm_id, row.point_id, row.disks)

    def set_position(self, vm_id: int, kind: str, target: int, durable_bytes: int) -> None:
        """Record how many bytes from its start a target of the transfer holds durably."""
        self._change(
            "INSERT INTO position VALUES (?, ?, ?, ?)"
            " ON CONFLICT (vm_id, kind, target) DO UPDATE SET durable_bytes = excluded.durable_bytes",
            (vm_id, kind, target, durable_bytes),
        )

    def set_transfer_state(self, vm_id: int, kind: str, state: str) -> None:
        """Record how far the transfer is."""
        self._change("UPDATE transfer SET state = ? WHERE vm_id = ? AND kind = ?", (state, vm_id, kind))

    def delete_transfers(self, vm_id: int, *kinds: str) -> None:
        """Forget what is on its way of these kinds, its logs included."""
        for row in self.transfers(vm_id):
            if row.kind in kinds:
                self.delete_logs(vm_id, row.point_id)
                self.set_members(vm_id, row.point_id, {})
                self.end_transfer(vm_id, row.kind)

    def end_transfer(self, vm_id: int, kind: str) -> None:
        """Forget a transfer whose logs and disks belong to a point now."""
        self._change("DELETE FROM transfer WHERE vm_id = ? AND kind = ?", (vm_id, kind))

    # Points, their disks and logs

    def members(self, vm_id: int, point_id: uuid.UUID) -> dict[int, int]:
        """Return the disks that a point or transfer has: disk index -> virtual bytes."""
        rows = self._rows(
            "SELECT disk_index, virtual_bytes FROM member"
            " WHERE vm_id = ? AND point_id = ? ORDER BY disk_index",
            (vm_id, str(point_id)),
        )
        return dict(rows)

    def set_members(self, vm_id: int, point_id: uuid.UUID, disks: dict[int, int]) -> None:
        """Record the disks of a point or transfer in the place of those recorded before."""
        self._change("DELETE FROM member WHERE vm_id = ? AND point_id = ?", (vm_id, str(point_id)))
        for disk_index, virtual_bytes in disks.items():
            self._change(
                "INSERT INTO member VALUES (?, ?, ?, ?)", (vm_id, str(point_id), disk_index, virtual_bytes)
            )

    def logs(self, vm_id: int, point_id: uuid.UUID) -> list[LogSpec]:
        """Return the logs of a point or transfer that are not applied yet, in the order of applying."""
        rows = self._rows(
            "SELECT disk_index, log_id, previous_log_id, log_bytes FROM log"
            " WHERE vm_id = ? AND point_id = ? ORDER BY place",
            (vm_id, str(point_id)),
        )
        return [LogSpec(row[0], uuid.UUID(row[1]), uuid.UUID(row[2]), row[3]) for row in rows]

    def log_ids(self, vm_id: int) -> set[uuid.UUID]:
        """Return the ids of all logs of the VM that are not applied yet."""
        return {uuid.UUID(row[0]) for row in self._rows("SELECT log_id FROM log WHERE vm_id = ?", (vm_id,))}

    def delete_logs(self, vm_id: int, point_id: uuid.UUID) -> None:
        """Forget the logs of a point."""
        self._change("DELETE FROM log WHERE vm_id = ? AND point_id = ?", (vm_id, str(point_id)))

    def points(self, vm_id: int, *, superseded: bool = False) -> list[PointRow]:
        """Return the VM's points, oldest first; `superseded`: also those that its disks have left."""
        rows = self._rows(f"{_SELECT_POINT} WHERE vm_id = ? ORDER BY sequence", (vm_id,))
        points = [_point(row) for row in rows]
        return [point for point in points if superseded or point.state != "superseded"]

    def point(self, vm_id: int, point_id: uuid.UUID) -> PointRow | None:
        """Return one point of the VM, whatever its state."""
        rows = self._rows(f"{_SELECT_POINT} WHERE vm_id = ? AND id = ?", (vm_id, str(point_id)))
        return _point(rows[0]) if rows else None

    def insert_point(self, vm_id: int, row: PointRow) -> None:
        """Add a point as the newest one; its sequence is given here."""
        newest = self._rows("SELECT coalesce(max(sequence), 0) FROM point WHERE vm_id = ?", (vm_id,))[0][0]
        times = (row.received_s, row.applied_s)
        states = (row.instant_s, row.kind, row.consistency, row.state, _text(row.previous_id), row.bytes)
        self._change(
            "INSERT INTO point VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (vm_id, newest + 1, str(row.id), *states, *times),
        )

    def set_point_state(self, vm_id: int, point_id: uuid.UUID, state: str) -> None:
        """Record how far a point is."""
        self._change("UPDATE point SET state = ? WHERE vm_id = ? AND id = ?", (state, vm_id, str(point_id)))

    def complete_point(self, vm_id: int, point_id: uuid.UUID, state: str, now_s: float) -> None:
        """Record that the disks are on this point, and on no older one any more. state: complete or base."""
        self._change(
            "UPDATE point SET state = 'superseded' WHERE vm_id = ? AND state <> 'superseded'"
            " AND sequence < (SELECT sequence FROM point WHERE vm_id = ? AND id = ?)",
            (vm_id, vm_id, str(point_id)),
        )
        self._change(
            "UPDATE point SET state = ?, applied_s = ? WHERE vm_id = ? AND id = ?",
            (state, now_s, vm_id, str(point_id)),
        )
        self._change(
            "DELETE FROM member WHERE vm_id = ? AND point_id IN"
            " (SELECT id FROM point WHERE vm_id = ? AND state = 'superseded')",
            (vm_id, vm_id),
        )

    def prune_points(self, vm_id: int, kept_count: int) -> None:
        """Forget superseded points but for the newest `kept_count`."""
        self._change(
            "DELETE FROM point WHERE vm_id = ? AND state = 'superseded' AND sequence <="
            " (SELECT max(sequence) FROM point WHERE vm_id = ?) - ?",
            (vm_id, vm_id, kept_count),
        )


def _no_store(path: Path) -> StoreError:
    return StoreError(
        "there is no replica store here, or it cannot be opened",
        path=path,
        hint="name the folder that `hvreplica serve --store` uses, and check its permissions",
    )


def _outdated(path: Path, version: int) -> UnsupportedVersion:
    return UnsupportedVersion(
        "the store was written by an older hvreplica",
        path=path,
        field="user_version",
        expected=SCHEMA_VERSION,
        actual=version,
        hint="start `hvreplica serve` of this version on it once",
    )


def _guid(text: str | None) -> uuid.UUID | None:
    return None if text is None else uuid.UUID(text)


def _text(guid: uuid.UUID | None) -> str | None:
    return None if guid is None else str(guid)


def _disk(row: tuple[Any, ...]) -> DiskRow:
    index, virtual_bytes, logical_bytes, physical_bytes, block_bytes, label, disk_id = row[:7]
    spec = DiskSpec(
        index,
        virtual_bytes,
        logical_bytes,
        physical_bytes,
        block_bytes,
        label,
        virtual_disk_id=_guid(disk_id),
    )
    return DiskRow(spec, row[7], _guid(row[8]), _guid(row[9]) or NIL, _guid(row[10]), row[11])


def _point(row: tuple[Any, ...]) -> PointRow:
    return PointRow(
        id=uuid.UUID(row[0]),
        sequence=row[1],
        instant_s=row[2],
        kind=row[3],
        consistency=row[4],
        state=row[5],
        previous_id=_guid(row[6]),
        bytes=row[7],
        received_s=row[8],
        applied_s=row[9],
    )
