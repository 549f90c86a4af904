"""The store's catalog: one SQLite database, the only thing that says what the files of the store mean.

Every change happens inside transaction() and is durable when that block ends: this is the store's durability
point, so files that a row speaks of are made durable before. No rule lives here: who may write, what follows
what and which file is deleted is decided by the callers, inside the same transaction.

One object per process, used by any thread; several processes may have the same catalog open.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from hvreplica.store.records import NIL, DiskRow, DiskSpec, LogSpec, Owner, PointRow, TransferRow, VmRow
from hvreplica.store.scan_rows import ScanRows
from hvreplica.store.undo_rows import UndoRows

if TYPE_CHECKING:
    from collections.abc import Iterable

_SELECT_VM = (
    "SELECT id, name, folder, relationship_id, generation, certificate, claimed_s, policy, failover FROM vm"
)
_SELECT_POINT = (
    "SELECT id, sequence, instant_s, kind, consistency, state, previous_id, bytes, received_s, applied_s,"
    " damage FROM point"
)


class Catalog(UndoRows, ScanRows):
    """The open catalog; close() when done."""

    # VMs, owners, disks

    def vms(self) -> list[VmRow]:
        """Return all VMs by name."""
        return [self._vm_row(row) for row in self.rows(f"{_SELECT_VM} ORDER BY name")]

    def vm(self, name: str) -> VmRow | None:
        """Return the VM of this exact name."""
        rows = self.rows(f"{_SELECT_VM} WHERE name = ?", (name,))
        return self._vm_row(rows[0]) if rows else None

    def has_folder_key(self, folder_key: str) -> bool:
        """Return whether a VM's folder would be mistaken for one with this key."""
        return bool(self.rows("SELECT 1 FROM vm WHERE folder_key = ?", (folder_key,)))

    @staticmethod
    def _vm_row(row: tuple[Any, ...]) -> VmRow:
        return VmRow(row[0], row[1], row[2], Owner(uuid.UUID(row[3]), row[4], row[5]), *row[6:])

    def insert_vm(self, name: str, folder: str, folder_key: str, owner: Owner, now_s: float) -> int:
        """Add a VM and return its number."""
        self.change(
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
        row = self.rows("SELECT id FROM vm WHERE name = ?", (name,))[0]
        return int(row[0])

    def set_owner(self, vm_id: int, owner: Owner, now_s: float) -> None:
        """Record who writes the VM from now on, and in its history of owners."""
        relationship = str(owner.relationship_id)
        self.change(
            "UPDATE vm SET relationship_id = ?, generation = ?, certificate = ?, claimed_s = ? WHERE id = ?",
            (relationship, owner.generation, owner.certificate, now_s, vm_id),
        )
        updated = self.change(
            "UPDATE owner SET last_generation = ?, last_s = ?"
            " WHERE vm_id = ? AND relationship_id = ? AND certificate = ?",
            (owner.generation, now_s, vm_id, relationship, owner.certificate),
        )
        if not updated:
            self.change(
                "INSERT INTO owner VALUES (?, ?, ?, ?, ?, ?, ?)",
                (vm_id, relationship, owner.certificate, owner.generation, owner.generation, now_s, now_s),
            )

    def owners(self, vm_id: int) -> list[tuple[Owner, float]]:
        """Return who has owned the VM, oldest first, each with the time of its last claim."""
        rows = self.rows(
            "SELECT relationship_id, last_generation, certificate, last_s FROM owner"
            " WHERE vm_id = ? ORDER BY first_s, rowid",
            (vm_id,),
        )
        return [(Owner(uuid.UUID(row[0]), row[1], row[2]), row[3]) for row in rows]

    def disks(self, vm_id: int) -> list[DiskRow]:
        """Return the VM's disks by index, those that were removed too."""
        rows = self.rows(
            "SELECT disk_index, virtual_bytes, logical_sector_bytes, physical_sector_bytes, block_bytes,"
            " label, virtual_disk_id, file_bytes, data_write_guid, last_log_id, base_id, removed_s, digest"
            " FROM disk WHERE vm_id = ? ORDER BY disk_index",
            (vm_id,),
        )
        return [_disk(row) for row in rows]

    def insert_disk(self, vm_id: int, spec: DiskSpec) -> None:
        """Add a disk that holds nothing yet, in the place of one that never held anything."""
        self.change(
            "DELETE FROM disk WHERE vm_id = ? AND disk_index = ? AND file_bytes IS NULL", (vm_id, spec.index)
        )
        sizes = (spec.virtual_bytes, spec.logical_sector_bytes, spec.physical_sector_bytes, spec.block_bytes)
        self.change(
            "INSERT INTO disk VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL, NULL, ?, NULL, NULL, NULL)",
            (vm_id, spec.index, *sizes, spec.label, _text(spec.virtual_disk_id)),
        )

    def delete_disks(self, vm_id: int) -> None:
        """Forget all disks of the VM."""
        self.change("DELETE FROM disk WHERE vm_id = ?", (vm_id,))

    def name_disk(self, vm_id: int, disk_index: int, label: str, virtual_disk_id: uuid.UUID | None) -> None:
        """Record what the primary calls the disk now, and its identity if there is one."""
        self.change(
            "UPDATE disk SET label = ?, virtual_disk_id = coalesce(?, virtual_disk_id)"
            " WHERE vm_id = ? AND disk_index = ?",
            (label, _text(virtual_disk_id), vm_id, disk_index),
        )

    def remove_disk(self, vm_id: int, disk_index: int, now_s: float) -> None:
        """Record that no point from now on has this disk."""
        self.change(
            "UPDATE disk SET removed_s = ? WHERE vm_id = ? AND disk_index = ? AND removed_s IS NULL",
            (now_s, vm_id, disk_index),
        )

    def set_removed(self, vm_id: int, disk_index: int, removed_s: float | None) -> None:
        """Record since when no point has this disk, or None: that points have it again."""
        self.change(
            "UPDATE disk SET removed_s = ? WHERE vm_id = ? AND disk_index = ?", (removed_s, vm_id, disk_index)
        )

    def set_disk_state(self, vm_id: int, row: DiskRow) -> None:
        """Record how the last applied point, or an initial replication, left the disk's file.

        Not its digest: see store/follow.py.
        """
        states = (row.file_bytes, _text(row.data_write_guid), str(row.last_log_id), _text(row.base_id))
        self.change(
            "UPDATE disk SET virtual_bytes = ?, file_bytes = ?, data_write_guid = ?, last_log_id = ?,"
            " base_id = ? WHERE vm_id = ? AND disk_index = ?",
            (row.spec.virtual_bytes, *states, vm_id, row.spec.index),
        )

    # Transfers

    def transfers(self, vm_id: int) -> list[TransferRow]:
        """Return what is on its way for the VM: at most one of each kind."""
        with self.snapshot():
            rows = self.rows(
                "SELECT id, kind, state, point_id, previous_point_id, instant_s, started_s, consistent,"
                " point_kind, consistency FROM transfer WHERE vm_id = ? ORDER BY kind",
                (vm_id,),
            )
            return [self._transfer_row(vm_id, row) for row in rows]

    def transfer(self, vm_id: int, *kinds: str) -> TransferRow | None:
        """Return what is on its way of one of these kinds, which exclude each other."""
        return next((row for row in self.transfers(vm_id) if row.kind in kinds), None)

    def _transfer_row(self, vm_id: int, row: tuple[Any, ...]) -> TransferRow:
        point_id = uuid.UUID(row[3])
        positions = self.rows(
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
            point_kind=row[8],
            consistency=row[9],
            positions=dict(positions),
            disks=self.members(vm_id, point_id),
            logs=tuple(self.logs(vm_id, point_id)) if row[1] == "logs" else (),
        )

    def insert_transfer(self, vm_id: int, row: TransferRow) -> None:
        """Record what is on its way from now on; there must be none of its kind."""
        values = (str(row.id), row.kind, row.state, str(row.point_id), _text(row.previous_point_id))
        self.change(
            "INSERT INTO transfer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(vm_id, *values, row.instant_s, row.started_s, row.consistent),
                *(row.point_kind, row.consistency),
            ),
        )
        self.set_members(vm_id, row.point_id, row.disks)
        self.insert_logs(vm_id, row.point_id, row.logs)
        for target, durable_bytes in row.positions.items():
            self.set_position(vm_id, row.kind, target, durable_bytes)

    def renew_transfer(self, vm_id: int, row: TransferRow) -> None:
        """Record what an unfinished transfer will show once it goes on: when, and its disks' sizes."""
        self.change(
            "UPDATE transfer SET instant_s = ?, consistent = ?, consistency = ? WHERE vm_id = ? AND kind = ?",
            (row.instant_s, row.consistent, row.consistency, vm_id, row.kind),
        )
        self.set_members(vm_id, row.point_id, row.disks)

    def set_position(self, vm_id: int, kind: str, target: int, durable_bytes: int) -> None:
        """Record how many bytes from its start a target of the transfer holds durably."""
        self.change(
            "INSERT INTO position VALUES (?, ?, ?, ?)"
            " ON CONFLICT (vm_id, kind, target) DO UPDATE SET durable_bytes = excluded.durable_bytes",
            (vm_id, kind, target, durable_bytes),
        )

    def set_transfer_state(self, vm_id: int, kind: str, state: str) -> None:
        """Record how far the transfer is."""
        self.change("UPDATE transfer SET state = ? WHERE vm_id = ? AND kind = ?", (state, vm_id, kind))

    def delete_transfers(self, vm_id: int, *kinds: str) -> None:
        """Forget what is on its way of these kinds, its logs included."""
        for row in self.transfers(vm_id):
            if row.kind in kinds:
                self.delete_logs(vm_id, row.point_id)
                self.set_members(vm_id, row.point_id, {})
                self.end_transfer(vm_id, row.kind)

    def end_transfer(self, vm_id: int, kind: str) -> None:
        """Forget a transfer whose logs and disks belong to a point now."""
        self.change("DELETE FROM transfer WHERE vm_id = ? AND kind = ?", (vm_id, kind))

    # Points, their disks and logs

    def members(self, vm_id: int, point_id: uuid.UUID) -> dict[int, int]:
        """Return the disks that a point or transfer has: disk index -> virtual bytes."""
        rows = self.rows(
            "SELECT disk_index, virtual_bytes FROM member"
            " WHERE vm_id = ? AND point_id = ? ORDER BY disk_index",
            (vm_id, str(point_id)),
        )
        return dict(rows)

    def set_members(self, vm_id: int, point_id: uuid.UUID, disks: dict[int, int]) -> None:
        """Record the disks of a point or transfer in the place of those recorded before."""
        self.change("DELETE FROM member WHERE vm_id = ? AND point_id = ?", (vm_id, str(point_id)))
        for disk_index, virtual_bytes in disks.items():
            self.change(
                "INSERT INTO member VALUES (?, ?, ?, ?)", (vm_id, str(point_id), disk_index, virtual_bytes)
            )

    def logs(self, vm_id: int, point_id: uuid.UUID) -> list[LogSpec]:
        """Return the logs of a point or transfer that are not applied yet, in the order of applying."""
        rows = self.rows(
            "SELECT disk_index, log_id, previous_log_id, log_bytes, is_ordered FROM log"
            " WHERE vm_id = ? AND point_id = ? ORDER BY place",
            (vm_id, str(point_id)),
        )
        return [LogSpec(row[0], uuid.UUID(row[1]), uuid.UUID(row[2]), row[3], bool(row[4])) for row in rows]

    def insert_logs(self, vm_id: int, point_id: uuid.UUID, logs: Iterable[LogSpec]) -> None:
        """Add logs that a point or transfer has, in the order of applying; it must have none."""
        for place, log in enumerate(logs):
            ids = (str(log.log_id), str(log.previous_log_id))
            self.change(
                "INSERT INTO log (vm_id, point_id, place, disk_index, log_id, previous_log_id, log_bytes,"
                " is_ordered) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (vm_id, str(point_id), place, log.disk_index, *ids, log.log_bytes, log.is_ordered),
            )

    def log_ids(self, vm_id: int) -> set[uuid.UUID]:
        """Return the ids of all logs of the VM that are not applied yet."""
        return {uuid.UUID(row[0]) for row in self.rows("SELECT log_id FROM log WHERE vm_id = ?", (vm_id,))}

    def delete_logs(self, vm_id: int, point_id: uuid.UUID) -> None:
        """Forget the logs of a point."""
        self.change("DELETE FROM log WHERE vm_id = ? AND point_id = ?", (vm_id, str(point_id)))

    def points(self, vm_id: int, *, superseded: bool = False) -> list[PointRow]:
        """Return the VM's points, oldest first; `superseded`: also those that are only remembered."""
        rows = self.rows(f"{_SELECT_POINT} WHERE vm_id = ? ORDER BY sequence", (vm_id,))
        points = [_point(row) for row in rows]
        return [point for point in points if superseded or point.state != "superseded"]

    def point(self, vm_id: int, point_id: uuid.UUID) -> PointRow | None:
        """Return one point of the VM, whatever its state."""
        rows = self.rows(f"{_SELECT_POINT} WHERE vm_id = ? AND id = ?", (vm_id, str(point_id)))
        return _point(rows[0]) if rows else None

    def insert_point(self, vm_id: int, row: PointRow) -> None:
        """Add a point as the newest one; its sequence is given here."""
        newest = self.rows("SELECT coalesce(max(sequence), 0) FROM point WHERE vm_id = ?", (vm_id,))[0][0]
        self._insert_point(vm_id, newest + 1, row)

    def _insert_point(self, vm_id: int, sequence: int, row: PointRow) -> None:
        times = (row.received_s, row.applied_s)
        states = (row.instant_s, row.kind, row.consistency, row.state, _text(row.previous_id), row.bytes)
        self.change(
            "INSERT INTO point VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (vm_id, sequence, str(row.id), *states, *times, row.damage),
        )

    def insert_point_behind(self, vm_id: int, before_id: uuid.UUID, row: PointRow) -> None:
        """Add a point right behind another one, whatever comes behind that; later ones move on by one."""
        sequence = self.rows(
            "SELECT sequence FROM point WHERE vm_id = ? AND id = ?", (vm_id, str(before_id))
        )[0][0]
        # In two steps, for no two rows may have one number at any moment.
        self.change(
            "UPDATE point SET sequence = -(sequence + 1) WHERE vm_id = ? AND sequence > ?", (vm_id, sequence)
        )
        self.change("UPDATE point SET sequence = -sequence WHERE vm_id = ? AND sequence < 0", (vm_id,))
        self._insert_point(vm_id, sequence + 1, row)

    def set_point_state(self, vm_id: int, point_id: uuid.UUID, state: str) -> None:
        """Record how far a point is."""
        self.change("UPDATE point SET state = ? WHERE vm_id = ? AND id = ?", (state, vm_id, str(point_id)))

    def set_point_kind(self, vm_id: int, point_id: uuid.UUID, kind: str) -> None:
        """Record what kind of point this is."""
        self.change("UPDATE point SET kind = ? WHERE vm_id = ? AND id = ?", (kind, vm_id, str(point_id)))

    def complete_point(self, vm_id: int, point_id: uuid.UUID, state: str, now_s: float) -> None:
        """Record that the disks are on this point. state: complete or base."""
        self.change(
            "UPDATE point SET state = ?, applied_s = ? WHERE vm_id = ? AND id = ?",
            (state, now_s, vm_id, str(point_id)),
        )

    def delete_point(self, vm_id: int, point_id: uuid.UUID) -> None:
        """Forget a point as if it had never been, with its logs and disks."""
        self.delete_logs(vm_id, point_id)
        self.set_members(vm_id, point_id, {})
        self.change("DELETE FROM point WHERE vm_id = ? AND id = ?", (vm_id, str(point_id)))

    def prune_points(self, vm_id: int, kept_count: int) -> None:
        """Forget superseded points but for the newest `kept_count`."""
        newest = self.rows("SELECT coalesce(max(sequence), 0) FROM point WHERE vm_id = ?", (vm_id,))[0][0]
        key = (vm_id, newest - kept_count)
        self.change(
            "DELETE FROM member WHERE vm_id = ?1 AND point_id IN (SELECT id FROM point"
            " WHERE vm_id = ?1 AND state = 'superseded' AND sequence <= ?2)",
            key,
        )
        self.change("DELETE FROM point WHERE vm_id = ? AND state = 'superseded' AND sequence <= ?", key)


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
    return DiskRow(spec, row[7], _guid(row[8]), _guid(row[9]) or NIL, _guid(row[10]), row[11], row[12])


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
        damage=row[10],
    )
