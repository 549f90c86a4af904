"""Let the digest of a disk, and the one of a scan under way, follow what an apply changes.

    before the first byte changes    what the touched pages hold is taken out of the digests, in the very
                                     transaction that sets the point "applying"
    when all is written              what they hold now is added, in the transaction that makes it complete

So the digests in the catalog are those of the disk less its touched pages as long as the point is being
applied, and a repeated apply goes on from there. The same two differences make the digest_change of the undo
part that keeps what was overwritten: with it the digest of every older point is known from the newest one's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk import open_disk
from hvreplica.disk.extents import NO_EXTENTS, difference, intersection, merge
from hvreplica.formats.hrl import FILE_TYPE_HRL
from hvreplica.native import PAGE_BYTES
from hvreplica.store.digest import Digest, DigestReader, pages_of
from hvreplica.store.points_kept import chain, kept_points
from hvreplica.store.undo import log_extents
from hvreplica.units import align_down

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hvreplica.store.home import VmHome
    from hvreplica.store.old_data import OldPages
    from hvreplica.store.records import DiskRow, LogSpec, UndoRow
    from hvreplica.store.undo import Written


@dataclass(frozen=True, slots=True)
class Touched:
    """What one disk's touched pages hold. scanned: those before `position`, how far a scan under way is."""

    disk_index: int
    position: int
    all: Digest
    scanned: Digest


def measure(
    home: VmHome,
    rows: Sequence[DiskRow],
    sizes: dict[int, int],
    logs: Sequence[LogSpec],
    written: Written | None = None,
) -> list[Touched]:
    """Read what the disks hold where `logs`, or their new `sizes`, will change them or have changed them.

    written: the parts that were written before the change and have no row yet; what was read for them is not
    read again. Nothing is read of a disk whose digests nobody needs.
    """
    positions = _positions(home)
    parts = [] if written is None else written.parts
    old = {} if written is None else written.old
    kept = {part.disk_index for part in (*home.catalog.undo_rows(home.vm_id), *parts)}
    found = []
    for row in rows:
        index = row.spec.index
        if row.digest is not None or positions.get(index) or index in kept:
            own = [log for log in logs if log.disk_index == index]
            position = positions.get(index, 0)
            known = None if position else old.get(index)  # a scan wants to know of each page where it is
            found.append(_measure_disk(home, index, position, own, sizes[index], known=known))
    return found


def holds(home: VmHome, touched: Sequence[Touched]) -> bool:
    """Return whether no scan has moved on since it was measured; inside a transaction."""
    positions = _positions(home)
    return all(each.position == positions.get(each.disk_index, 0) for each in touched)


def take_out(home: VmHome, touched: Sequence[Touched]) -> None:
    """Take what was measured out of the digests, inside the transaction that begins the change.

    holds() was asked in it, and parts are recorded.
    """
    for each in touched:
        _change(home, each.disk_index, -each.all, -each.scanned)


def put_in(home: VmHome, touched: Sequence[Touched]) -> None:
    """Add what was measured after the change; inside the transaction that ends it, before it counts."""
    for each in touched:
        _change(home, each.disk_index, each.all, each.scanned)


def expected_digest(home: VmHome, point_id: uuid.UUID, disk_index: int) -> Digest | None:
    """Return the digest that a disk should have at a point; None where it is not known."""
    with home.catalog.snapshot():
        row = _row(home, disk_index)
        parts = chain(home, point_id, disk_index)
    base = row.digest
    if parts and parts[-1].kind == "whole":
        base = parts.pop().digest_change
    changes = [part.digest_change for part in parts]
    if base is None or None in changes:
        return None
    total = Digest.of_hex(base)
    for change in changes:
        total -= Digest.of_hex(change or "")
    return total


def pass_on_damage(home: VmHome, point_id: uuid.UUID) -> None:
    """Let a point that became complete be damaged where its disks were known to be so before."""
    scans = home.catalog.scans(home.vm_id)
    for index in home.catalog.members(home.vm_id, point_id):
        scan = scans.get(index)
        if scan is not None and scan.is_damaged:
            home.catalog.damage_point(home.vm_id, point_id, disk_sentence(home, index))


def disk_sentence(home: VmHome, disk_index: int) -> str:
    """Say that a disk does not hold what it should."""
    return f"{home.paths.disk(disk_index)} does not hold what was written to it"


def begin_anew(home: VmHome, disk_index: int, digest: Digest | None) -> None:
    """Record that another file is the disk from now on, or one that changed unseen; in a transaction.

    digest: of what it holds; None where that is not known, until a scan has read it.
    """
    home.catalog.set_digest(home.vm_id, disk_index, None if digest is None else digest.hex())
    home.catalog.delete_scan(home.vm_id, disk_index)


def _positions(home: VmHome) -> dict[int, int]:
    scans = home.catalog.scans(home.vm_id)
    return {index: scan.position for index, scan in scans.items() if scan.started_s is not None}


def _measure_disk(
    home: VmHome,
    disk_index: int,
    position: int,
    logs: Sequence[LogSpec],
    new_bytes: int,
    *,
    known: OldPages | None,
) -> Touched:
    found = [
        extents for log in logs for extents in log_extents(home, home.paths.log(log.log_id), FILE_TYPE_HRL)
    ]
    path = home.paths.disk(disk_index)
    with open_disk(home.files, path, writable=False, format="vhdx", clock=home.clock) as disk:
        # From the page on in which the new end is, all counts: a shrink cuts it off, and where nothing does,
        # it counts the same before and after.
        tail = align_down(new_bytes, PAGE_BYTES)
        extents = pages_of(merge(np.concatenate(found)) if found else NO_EXTENTS, tail)
        counted = Digest()
        # A part may hold a page that nothing touches. It is not added after the change, so nor taken out now.
        if known is not None and known.digest is not None and not len(difference(known.extents, extents)):
            extents, counted = difference(extents, known.extents), known.digest
        reader = DigestReader(disk)
        scanned = _between(reader, extents, tail, start=0, end=position)
        rest = _between(reader, extents, tail, start=position, end=disk.virtual_bytes)
    return Touched(disk_index, position, scanned + rest + counted, scanned)


def _between(reader: DigestReader, extents: NDArray[np.int64], tail: int, *, start: int, end: int) -> Digest:
    """Return the digest of the extents and of all from `tail` on, as far as they are in [start, end)."""
    if start >= end:
        return Digest()
    inside = intersection(extents, np.array([[start, end - start]], np.int64))
    total = reader.of_extents(inside)
    return total + reader.of_range(max(start, tail), end) if tail < end else total


def _change(home: VmHome, disk_index: int, change: Digest, scanned: Digest) -> None:
    catalog, vm_id = home.catalog, home.vm_id
    row = _row(home, disk_index)
    if row.digest is not None:
        catalog.set_digest(vm_id, disk_index, (Digest.of_hex(row.digest) + change).hex())
    scan = catalog.scans(vm_id).get(disk_index)
    if scan is not None and scan.started_s is not None:
        catalog.set_scan(vm_id, dataclasses.replace(scan, digest=scan.digest + scanned))
    part = _last_part(home, disk_index)
    if part is not None and part.kind == "undo":
        before = Digest() if part.digest_change is None else Digest.of_hex(part.digest_change)
        catalog.set_digest_change(vm_id, part.id, (before + change).hex())


def _row(home: VmHome, disk_index: int) -> DiskRow:
    return next(row for row in home.catalog.disks(home.vm_id) if row.spec.index == disk_index)


def _last_part(home: VmHome, disk_index: int) -> UndoRow | None:
    """Return the newest part of the disk: what was written down of this change is in it, or in those before.

    It may have come to an older point meanwhile, behind that one's parts.
    """
    catalog, vm_id = home.catalog, home.vm_id
    for point in reversed(kept_points(home)):
        if disk_index in catalog.members(vm_id, point.id):
            parts = catalog.undo_rows(vm_id, point_id=point.id, disk_index=disk_index)
            return parts[-1] if parts else None
    return None
