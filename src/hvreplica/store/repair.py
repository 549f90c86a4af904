"""Put right what a scan has found wrong in a replica's disk, with blocks that the primary sends.

    drift          content less digest, as the last scan found it; not zero: the disk is damaged
    blocks         come from the primary, which compared fingerprints and whose bytes are still those that the
                   replica should hold; they are written in place, below all undo parts
    end            drift plus what the blocks changed: zero proves that the disk is whole again, and with it
                   every older point that shares the blocks

What the primary has changed since the damage cannot be put in place: it comes with the next cycle as any
change, and older points that share it stay damaged, for nobody has their bytes any more. Once the primary has
found every block equal, the newest point is right whatever the drift says. It is given the digest of its
content then, and the undo part before it the difference, so that older points keep theirs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk import open_disk
from hvreplica.errors import FieldOutOfRange, InvalidTransition
from hvreplica.native import PAGE_BYTES
from hvreplica.store.apply import is_unfinished
from hvreplica.store.check import file_length
from hvreplica.store.digest import Digest, DigestReader
from hvreplica.store.points_kept import kept_points
from hvreplica.store.room import room
from hvreplica.store.scan_rows import REPAIRING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import DiskRow, Owner, UndoRow
    from hvreplica.store.scan_rows import ScanRow

TRIES_MAX = 3  # after one scan: each compares the whole disk


class Repair:
    """The repairs of one session. One thread at a time, as questions are answered."""

    def __init__(self, home: VmHome, owner: Owner) -> None:
        self._home = home
        self._owner = owner
        self._drifts: dict[int, Digest] = {}  # of disks of which blocks were written

    def wanted(self) -> list[int]:
        """Return the disks that the primary is asked to compare, as long as it is worth it."""
        if is_unfinished(self._home):
            return []
        scans = self._home.catalog.scans(self._home.vm_id)
        return [
            index
            for index, scan in scans.items()
            if scan.drift and scan.damage is None and self._home.repair_tries.get(_key(scan), 0) < TRIES_MAX
        ]

    def write(self, disk_index: int, blocks: Sequence[int], data: Buffer) -> None:
        """Write blocks in place; durable on return, and repeatable. See VmReplica.repair()."""
        home = self._home
        with home.exclusive():
            row, scan = self._damaged(disk_index)
            extents = _extents(blocks, row.spec.virtual_bytes, memoryview(data).nbytes)
            if disk_index not in self._drifts:
                self._drifts[disk_index] = scan.drift or Digest()
                with home.catalog.transaction():
                    home.require_owner(self._owner)
                    # Until the end is reached nobody knows the drift: a cut leaves that to the next scan, and
                    # one that is under way has read what is about to change.
                    home.catalog.set_scan(
                        home.vm_id,
                        dataclasses.replace(
                            scan, position=0, digest=Digest(), started_s=None, drift=None, damage=REPAIRING
                        ),
                    )
            change = self._write(row, extents, data)
            self._drifts[disk_index] += change

    def end(self, disk_index: int, *, is_proven: bool) -> bool:
        """Record what came of it; return whether the disk is whole.

        is_proven: whether the primary found every block of the disk to be what it should.
        """
        home = self._home
        with home.exclusive(), home.catalog.transaction():
            home.require_owner(self._owner)
            scan = home.catalog.scans(home.vm_id).get(disk_index)
            if scan is None:
                return True
            drift = self._drifts.pop(disk_index, scan.drift)
            if drift is None:
                return False  # a repair was cut: the next scan tells
            if drift and is_proven:
                self._rebase(disk_index, drift)
                drift = Digest()
            scan = dataclasses.replace(scan, drift=drift, damage=None)
            home.catalog.set_scan(home.vm_id, scan)
            home.repair_tries[_key(scan)] = home.repair_tries.get(_key(scan), 0) + 1
            return not drift

    def _damaged(self, disk_index: int) -> tuple[DiskRow, ScanRow]:
        home = self._home
        row = next((row for row in home.catalog.disks(home.vm_id) if row.spec.index == disk_index), None)
        scan = home.catalog.scans(home.vm_id).get(disk_index)
        if row is None or scan is None or not row.is_held or not (scan.drift or disk_index in self._drifts):
            raise InvalidTransition(
                f"disk {disk_index} of VM {home.name!r} is not known to be damaged", path=home.paths.folder
            )
        if is_unfinished(home):
            raise InvalidTransition(
                f"a point of VM {home.name!r} waits to be applied",
                path=home.paths.folder,
                hint="a disk is repaired when nothing waits",
            )
        return row, scan

    def _write(self, row: DiskRow, extents: NDArray[np.int64], data: Buffer) -> Digest:
        """Write, keeping the disk's identity: it is the disk that it should have been all the time."""
        home, path = self._home, self._home.paths.disk(row.spec.index)
        with room(home.files, path, memoryview(data).nbytes):
            disk = open_disk(home.files, path, writable=True, format="vhdx", clock=home.clock)
            try:
                disk.direct(data_write_guid=row.data_write_guid)
                before = DigestReader(disk).of_extents(extents)
                disk.write_extents(extents, data)
                disk.flush()
                after = DigestReader(disk).of_extents(extents)
            except BaseException:
                disk.abandon()
                raise
            disk.close()
        with home.catalog.transaction():
            home.require_owner(self._owner)
            state = dataclasses.replace(row, file_bytes=file_length(home.files, path))
            home.catalog.set_disk_state(home.vm_id, state)
        return after - before

    def _rebase(self, disk_index: int, drift: Digest) -> None:
        """Let the digest of the newest point be that of its content, and those of older ones stay."""
        catalog, vm_id = self._home.catalog, self._home.vm_id
        row = next(row for row in catalog.disks(vm_id) if row.spec.index == disk_index)
        if row.digest is not None:
            catalog.set_digest(vm_id, disk_index, (Digest.of_hex(row.digest) + drift).hex())
        part = self._newest_part(disk_index)
        if part is not None and part.kind == "undo" and part.digest_change is not None:
            catalog.set_digest_change(vm_id, part.id, (Digest.of_hex(part.digest_change) + drift).hex())

    def _newest_part(self, disk_index: int) -> UndoRow | None:
        for point in reversed(kept_points(self._home)):
            parts = self._home.catalog.undo_rows(self._home.vm_id, point_id=point.id, disk_index=disk_index)
            if parts:
                return parts[-1]
        return None


def _extents(blocks: Sequence[int], disk_bytes: int, data_bytes: int) -> NDArray[np.int64]:
    """Return where blocks stand. Raises: FieldOutOfRange."""
    starts = np.array(blocks, np.int64) * PAGE_BYTES
    if (np.diff(starts) <= 0).any() or not 0 <= int(starts[0]) <= int(starts[-1]) < disk_bytes:
        raise FieldOutOfRange(
            "the disk has no such blocks",
            field="blocks",
            expected=f"ascending, below {-(-disk_bytes // PAGE_BYTES)}",
            actual=f"{blocks[0]} to {blocks[-1]}",
        )
    extents = np.stack((starts, np.minimum(PAGE_BYTES, disk_bytes - starts)), axis=1)
    if int(extents[:, 1].sum()) != data_bytes:
        raise FieldOutOfRange(
            "blocks to repair came with other data than they hold",
            field="data",
            expected=int(extents[:, 1].sum()),
            actual=data_bytes,
        )
    return extents


def _key(scan: ScanRow) -> tuple[int, float]:
    return scan.disk_index, scan.ended_s or 0.0
