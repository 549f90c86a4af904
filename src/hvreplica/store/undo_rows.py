"""The rows of the catalog that older points are kept by: undo parts, kept logs, damage, policy."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from hvreplica.store.database import Database
from hvreplica.store.records import KeptLogRow, UndoRow

if TYPE_CHECKING:
    from collections.abc import Sequence

_SELECT_UNDO = (
    "SELECT undo.point_id, undo.place, undo.disk_index, undo.id, undo.kind, undo.file_bytes,"
    " undo.covered_bytes, undo.log_id, undo.digest_change FROM undo"
)
_CHAIN = (
    " JOIN point ON point.vm_id = undo.vm_id AND point.id = undo.point_id"
    " WHERE undo.vm_id = ? AND undo.disk_index = ? AND point.sequence >="
    " (SELECT sequence FROM point WHERE vm_id = ? AND id = ?) ORDER BY point.sequence, undo.place"
)
_SELECT_HEIR = """
    SELECT point.id FROM point JOIN member ON member.vm_id = point.vm_id AND member.point_id = point.id
    WHERE point.vm_id = ? AND member.disk_index = ? AND point.state IN ('complete', 'damaged')
    AND point.sequence < (SELECT sequence FROM point WHERE vm_id = ? AND id = ?)
    ORDER BY point.sequence DESC LIMIT 1
"""
_SELECT_ON_DISKS = """
    SELECT id FROM point WHERE vm_id = ? AND state IN ('complete', 'damaged', 'base', 'applying')
    ORDER BY sequence DESC LIMIT 1
"""
_SELECT_KEPT_LOG = (
    "SELECT log_id, disk_index, previous_log_id, log_bytes, point_id, before_point_id, instant_s, is_ordered,"
    " kept_until_s FROM kept_log"
)


class UndoRows(Database):
    """Their part of store/catalog.py."""

    def undo_rows(
        self, vm_id: int, *, point_id: uuid.UUID | None = None, disk_index: int | None = None
    ) -> list[UndoRow]:
        """Return undo parts of the VM, of one point or disk where that is given, by point, disk and place."""
        # Only what is given is asked for, so that the table's key finds it among thousands of rows.
        wanted = (("point_id", _text(point_id)), ("disk_index", disk_index))
        given = [(name, value) for name, value in wanted if value is not None]
        where = "".join(f" AND {name} = ?" for name, _ in given)
        rows = self.rows(
            f"{_SELECT_UNDO} WHERE vm_id = ?{where} ORDER BY point_id, disk_index, place",
            (vm_id, *(value for _, value in given)),
        )
        return [_undo(row) for row in rows]

    def undo_chain(self, vm_id: int, point_id: uuid.UUID, disk_index: int) -> list[UndoRow]:
        """Return the parts of a point and of all newer ones, for one disk, in the order of reading."""
        rows = self.rows(f"{_SELECT_UNDO}{_CHAIN}", (vm_id, disk_index, vm_id, str(point_id)))
        return [_undo(row) for row in rows]

    def heir(self, vm_id: int, point_id: uuid.UUID, disk_index: int) -> uuid.UUID | None:
        """Return the newest kept point before this one that has the disk: who gets its parts when it goes."""
        rows = self.rows(_SELECT_HEIR, (vm_id, disk_index, vm_id, str(point_id)))
        return uuid.UUID(rows[0][0]) if rows else None

    def newest_on_disks(self, vm_id: int) -> uuid.UUID | None:
        """Return the point that the disks are on or are being moved to."""
        rows = self.rows(_SELECT_ON_DISKS, (vm_id,))
        return uuid.UUID(rows[0][0]) if rows else None

    def add_undo(self, vm_id: int, row: UndoRow) -> None:
        """Add a part behind the others of its point and disk; its place is given here."""
        key = (vm_id, str(row.point_id), row.disk_index)
        self._insert_undo(vm_id, row, self._free_place(*key))

    def _insert_undo(self, vm_id: int, row: UndoRow, place: int) -> None:
        sizes = (row.file_bytes, row.covered_bytes)
        self.change(
            "INSERT INTO undo VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(vm_id, str(row.point_id), place, row.disk_index, str(row.id), row.kind),
                *(*sizes, _text(row.log_id), row.digest_change),
            ),
        )

    def replace_undo(self, vm_id: int, old: Sequence[UndoRow], new: UndoRow) -> None:
        """Let one part stand for others of its point and disk, at its own place, which is one of theirs."""
        for row in old:
            self.delete_undo(vm_id, row.id)
        self._insert_undo(vm_id, new, new.place)

    def move_undo(self, vm_id: int, *, point_id: uuid.UUID, target_id: uuid.UUID, disk_index: int) -> None:
        """Make the parts of one point and disk those of another point, in their order behind its own."""
        place = self._free_place(vm_id, str(target_id), disk_index)
        for row in self.undo_rows(vm_id, point_id=point_id, disk_index=disk_index):
            self.change(
                "UPDATE undo SET point_id = ?, place = ? WHERE vm_id = ? AND id = ?",
                (str(target_id), place, vm_id, str(row.id)),
            )
            place += 1

    def move_part(self, vm_id: int, part_id: uuid.UUID, target_id: uuid.UUID) -> None:
        """Make one part that of another point, behind its own."""
        row = next(row for row in self.undo_rows(vm_id) if row.id == part_id)
        place = self._free_place(vm_id, str(target_id), row.disk_index)
        self.change(
            "UPDATE undo SET point_id = ?, place = ? WHERE vm_id = ? AND id = ?",
            (str(target_id), place, vm_id, str(part_id)),
        )

    def delete_undo(self, vm_id: int, part_id: uuid.UUID) -> None:
        """Forget a part."""
        self.change("DELETE FROM undo WHERE vm_id = ? AND id = ?", (vm_id, str(part_id)))

    def _free_place(self, vm_id: int, point_id: str, disk_index: int) -> int:
        found = self.rows(
            "SELECT coalesce(max(place) + 1, 0) FROM undo"
            " WHERE vm_id = ? AND point_id = ? AND disk_index = ?",
            (vm_id, point_id, disk_index),
        )
        return int(found[0][0])

    def supersede_point(self, vm_id: int, point_id: uuid.UUID) -> None:
        """Record that a point can be had no more; it and its disks are remembered until prune_points()."""
        key = (vm_id, str(point_id))
        self.change("UPDATE point SET state = 'superseded', damage = NULL WHERE vm_id = ? AND id = ?", key)

    def damage_point(self, vm_id: int, point_id: uuid.UUID, sentence: str) -> None:
        """Record why a complete point cannot be trusted; the first reason stays."""
        self.change(
            "UPDATE point SET state = 'damaged', damage = ?"
            " WHERE vm_id = ? AND id = ? AND state = 'complete'",
            (sentence, vm_id, str(point_id)),
        )

    def kept_logs(self, vm_id: int) -> list[KeptLogRow]:
        """Return the logs that were kept after they had been applied, oldest first."""
        rows = self.rows(f"{_SELECT_KEPT_LOG} WHERE vm_id = ? ORDER BY instant_s, rowid", (vm_id,))
        return [_kept_log(row) for row in rows]

    def insert_kept_log(self, vm_id: int, row: KeptLogRow) -> None:
        """Record that a log is kept."""
        ids = (str(row.log_id), row.disk_index, str(row.previous_log_id), row.log_bytes)
        points = (str(row.point_id), _text(row.before_point_id), row.instant_s)
        self.change(
            "INSERT INTO kept_log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (vm_id, *ids, *points, row.is_ordered, row.kept_until_s),
        )

    def delete_kept_log(self, vm_id: int, log_id: uuid.UUID) -> None:
        """Forget a kept log."""
        self.change("DELETE FROM kept_log WHERE vm_id = ? AND log_id = ?", (vm_id, str(log_id)))

    def set_policy(self, vm_id: int, policy: str | None) -> None:
        """Record what is kept of the VM: JSON of store/policy.py, None for what holds where nobody said."""
        self.change("UPDATE vm SET policy = ? WHERE id = ?", (policy, vm_id))

    def set_failover(self, vm_id: int, failover: str | None) -> None:
        """Record where a failover stands: JSON; None while the replica is at work."""
        self.change("UPDATE vm SET failover = ? WHERE id = ?", (failover, vm_id))

    def set_digest(self, vm_id: int, disk_index: int, digest: str | None) -> None:
        """Record the digest of a disk on its newest applied point; None where it is not known."""
        self.change(
            "UPDATE disk SET digest = ? WHERE vm_id = ? AND disk_index = ?", (digest, vm_id, disk_index)
        )


def _text(guid: uuid.UUID | None) -> str | None:
    return None if guid is None else str(guid)


def _undo(row: tuple[Any, ...]) -> UndoRow:
    return UndoRow(
        point_id=uuid.UUID(row[0]),
        place=row[1],
        disk_index=row[2],
        id=uuid.UUID(row[3]),
        kind=row[4],
        file_bytes=row[5],
        covered_bytes=row[6],
        log_id=None if row[7] is None else uuid.UUID(row[7]),
        digest_change=row[8],
    )


def _kept_log(row: tuple[Any, ...]) -> KeptLogRow:
    return KeptLogRow(
        log_id=uuid.UUID(row[0]),
        disk_index=row[1],
        previous_log_id=uuid.UUID(row[2]),
        log_bytes=row[3],
        point_id=uuid.UUID(row[4]),
        before_point_id=None if row[5] is None else uuid.UUID(row[5]),
        instant_s=row[6],
        is_ordered=bool(row[7]),
        kept_until_s=row[8],
    )
