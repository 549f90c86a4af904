"""Read a replica's disk again for its digest, while points are applied to it.

    position   0 ───────────── read, digest kept in the catalog ──────────>|<──── not yet ──── end of disk
    apply                 what it changes here goes into that digest too   |   is read later

A step reads some pages and then adds them in one transaction, in which it makes sure that no apply has begun
since: an apply commits that it begins before it changes a byte. So nobody waits for a scan, and a scan that
was cut goes on where it was, in whichever process. At the end the digest is held against the one that the
disk should have; where that is not known, this is how it becomes known.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.disk import open_disk
from hvreplica.errors import FormatError, Locked
from hvreplica.progress import Progress
from hvreplica.store.apply import finish, is_cut
from hvreplica.store.digest import Digest, DigestReader
from hvreplica.store.scan_rows import ScanRow

if TYPE_CHECKING:
    import uuid

    from hvreplica.disk import Disk
    from hvreplica.store.home import VmHome
    from hvreplica.store.pace import Pace
    from hvreplica.store.records import DiskRow

_WAIT_S = 0.1  # for an apply
_APPLYING_LOOKS_MAX = 3000


@dataclass(frozen=True, slots=True)
class _Ground:
    """What must be the same before and after a read for the bytes to be of one state of the disk."""

    newest_id: uuid.UUID | None
    data_write_guid: uuid.UUID | None
    digest: str | None
    is_moving: bool


def scan_disk(home: VmHome, disk_index: int, pace: Pace) -> ScanRow:
    """Go on with the scan of a disk, or begin one, and return what it found, as it is recorded.

    Raises: Locked where the disk is never between two applies; Stopped.
    """
    row = _begin(home, disk_index)
    reader = _Reader(home, disk_index)
    try:
        while row.started_s is not None:
            row = _step(home, row, reader, pace)
    finally:
        reader.close()
    return row


def _begin(home: VmHome, disk_index: int) -> ScanRow:
    with home.catalog.transaction():
        row = home.catalog.scans(home.vm_id).get(disk_index, ScanRow(disk_index))
        if row.started_s is None:
            row = _begun(home, row)
            home.catalog.set_scan(home.vm_id, row)
    return row


def _begun(home: VmHome, row: ScanRow) -> ScanRow:
    return dataclasses.replace(row, position=0, digest=Digest(), started_s=home.clock.now_s())


class _Reader:
    """Keeps the disk open as long as nobody changes it."""

    def __init__(self, home: VmHome, disk_index: int) -> None:
        self._home = home
        self._disk_index = disk_index
        self._disk: Disk | None = None
        self._digests: DigestReader | None = None
        self._ground: _Ground | None = None

    def read(self, ground: _Ground, position: int, bytes_max: int) -> tuple[Digest, int, int, int]:
        """Return DigestReader.of_some(), and the disk's size. Raises: FormatError for a damaged file."""
        if self._disk is None or self._digests is None or ground != self._ground:
            self.close()
            path = self._home.paths.disk(self._disk_index)
            self._disk = open_disk(
                self._home.files, path, writable=False, format="vhdx", clock=self._home.clock
            )
            self._digests = DigestReader(self._disk)
            self._ground = ground
        digest, end, read_bytes = self._digests.of_some(position, bytes_max)
        return digest, end, read_bytes, self._disk.virtual_bytes

    def close(self) -> None:
        if self._disk is not None:
            self._disk.abandon()
        self._disk = self._digests = None


def _step(home: VmHome, row: ScanRow, reader: _Reader, pace: Pace) -> ScanRow:
    ground = _steady(home, row.disk_index, pace)
    try:
        digest, end, read_bytes, virtual_bytes = reader.read(ground, row.position, pace.step_bytes)
    except (FormatError, OSError) as error:
        if _ground(home, row.disk_index) == ground:
            return _end(home, row, ground, damage=str(error))
        return _now(home, row)
    pace.spend(read_bytes)
    if pace.progress is not None:
        pace.progress(Progress("verify", end, virtual_bytes, raw_bytes=end))
    with home.catalog.transaction():
        if home.catalog.scans(home.vm_id).get(row.disk_index) == row and (
            _ground(home, row.disk_index) == ground
        ):
            row = dataclasses.replace(row, position=end, digest=row.digest + digest)
            home.catalog.set_scan(home.vm_id, row)
            is_done = end >= virtual_bytes
        else:
            is_done = False
    return _end(home, row, ground) if is_done else _now(home, row)


def _now(home: VmHome, row: ScanRow) -> ScanRow:
    """Return the row as it is recorded: an apply moved its digest, or another scan has gone on with it."""
    return home.catalog.scans(home.vm_id).get(row.disk_index) or _begin(home, row.disk_index)


def _end(home: VmHome, row: ScanRow, ground: _Ground, *, damage: str | None = None) -> ScanRow:
    """Record what a whole scan has found, if the disk is still what it was."""
    catalog = home.catalog
    with catalog.transaction():
        if catalog.scans(home.vm_id).get(row.disk_index) != row or _ground(home, row.disk_index) != ground:
            return row
        drift = row.drift
        if damage is None and ground.digest is None:
            catalog.set_digest(home.vm_id, row.disk_index, row.digest.hex())
            drift = Digest()
        elif damage is None and ground.digest is not None:
            drift = row.digest - Digest.of_hex(ground.digest)
        ended = ScanRow(row.disk_index, ended_s=home.clock.now_s(), drift=drift, damage=damage)
        catalog.set_scan(home.vm_id, ended)
    return ended


def _steady(home: VmHome, disk_index: int, pace: Pace) -> _Ground:
    """Wait until nothing is being applied, and return what the disk stands on. Raises: Locked."""
    for _ in range(_APPLYING_LOOKS_MAX):
        ground = _ground(home, disk_index)
        if not ground.is_moving:
            return ground
        try:
            finish(home)  # if nobody does, for it was cut
        except Locked:
            pace.pause(_WAIT_S)
    raise Locked(f"the disks of VM {home.name!r} are changed all the time", path=home.paths.lock)


def _ground(home: VmHome, disk_index: int) -> _Ground:
    with home.catalog.snapshot():
        row = _disk_row(home, disk_index)
        points = home.catalog.points(home.vm_id)
        applied = [point.id for point in points if point.state not in {"spooled", "applying"}]
        return _Ground(
            applied[-1] if applied else None,
            None if row is None else row.data_write_guid,
            None if row is None else row.digest,
            is_cut(home),
        )


def _disk_row(home: VmHome, disk_index: int) -> DiskRow | None:
    return next((row for row in home.catalog.disks(home.vm_id) if row.spec.index == disk_index), None)
