"""The rows of the catalog about what was read again to find damage: how far, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.store.database import Database
from hvreplica.store.digest import NO_DIGEST, Digest

if TYPE_CHECKING:
    import uuid

_SELECT = "SELECT disk_index, position, digest, started_s, ended_s, drift, damage FROM scan WHERE vm_id = ?"

# The damage of a disk of which blocks are being written: nobody knows its drift before the next scan then.
REPAIRING = "blocks of it were being repaired; the next verification tells whether it is whole"


@dataclass(frozen=True, slots=True)
class ScanRow:
    """What reading a disk's file again has found.

    position: bytes from the disk's start that the scan under way has read; 0 where none is. digest: of those
    bytes, as they are now. started_s: of the scan under way, None where none is. ended_s: of the last whole
    one. drift: what it found: the digest of the content less the one it should have, None before the first.
    damage: why the file cannot be read, a sentence.
    """

    disk_index: int
    position: int = 0
    digest: Digest = NO_DIGEST
    started_s: float | None = None
    ended_s: float | None = None
    drift: Digest | None = None
    damage: str | None = None

    @property
    def is_unreadable(self) -> bool:
        """Whether only another copy of the disk helps."""
        return self.damage not in {None, REPAIRING}

    @property
    def is_damaged(self) -> bool:
        """Whether the disk is known not to hold what it should."""
        return self.damage is not None or bool(self.drift)


class ScanRows(Database):
    """Their part of store/catalog.py."""

    def scans(self, vm_id: int) -> dict[int, ScanRow]:
        """Return what was found for each disk of the VM that a scan was begun of, by its index."""
        rows = self.rows(f"{_SELECT} ORDER BY disk_index", (vm_id,))
        return {
            row[0]: ScanRow(
                row[0],
                row[1],
                Digest.of_hex(row[2]),
                row[3],
                row[4],
                None if row[5] is None else Digest.of_hex(row[5]),
                row[6],
            )
            for row in rows
        }

    def set_scan(self, vm_id: int, row: ScanRow) -> None:
        """Record how far a scan is and what the last one found."""
        drift = None if row.drift is None else row.drift.hex()
        self.change(
            "INSERT OR REPLACE INTO scan VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(vm_id, row.disk_index, row.position, row.digest.hex()),
                *(row.started_s, row.ended_s, drift, row.damage),
            ),
        )

    def delete_scan(self, vm_id: int, disk_index: int) -> None:
        """Forget what was found in a disk's file, for another one has its place."""
        self.change("DELETE FROM scan WHERE vm_id = ? AND disk_index = ?", (vm_id, disk_index))

    def judge_point(self, vm_id: int, point_id: uuid.UUID, sentence: str | None) -> None:
        """Record that a kept point is damaged, or that it was read and is not."""
        self.change(
            "UPDATE point SET state = iif(?, 'complete', 'damaged'), damage = ?"
            " WHERE vm_id = ? AND id = ? AND state IN ('complete', 'damaged')",
            (sentence is None, sentence, vm_id, str(point_id)),
        )

    def set_digest_change(self, vm_id: int, part_id: uuid.UUID, change: str) -> None:
        """Record what the applying that an undo part undoes has changed in the disk's digest.

        Of a whole part it is the digest of all of it.
        """
        self.change(
            "UPDATE undo SET digest_change = ? WHERE vm_id = ? AND id = ?", (change, vm_id, str(part_id))
        )
