"""Decide which recovery points hold what they should, from what was read again.

    disk's file      read whole by a scan: how its content differs from its digest is the drift
    newest point     differs by the drift
    older point P    differs as the next newer one Q does, plus what P holds in the ranges of its own undo
                     parts, less what Q holds there, against what the catalog says of that change

So one reading of the disk and two of the parts judge every point, however many there are. A damage counts for
the points that read it and for no others: where a part hides a damaged block of the disk, the difference is
gone again. Points that need a file that cannot be read at all are damaged without further reading.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import NO_EXTENTS, difference, merge
from hvreplica.errors import HvReplicaError, Locked, NoSuchPoint
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.native import PAGE_BYTES
from hvreplica.store.counter import Counter
from hvreplica.store.digest import Digest, DigestReader, digest_of, pages_of
from hvreplica.store.follow import disk_sentence
from hvreplica.store.point_disk import PointDisk
from hvreplica.store.point_use import hold_shared
from hvreplica.store.point_view import PartFile, PointSource, Watch
from hvreplica.store.points_kept import chain, kept_points, part_path
from hvreplica.store.records import NIL
from hvreplica.store.undo import log_extents
from hvreplica.units import align_down

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.store.home import VmHome
    from hvreplica.store.pace import Pace
    from hvreplica.store.part_check import Fault
    from hvreplica.store.records import DiskRow, PointRow, UndoRow

_LOOKS_MAX = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one disk of a point. sentence: why it is damaged, None where it is not. is_proven: by its digest."""

    sentence: str | None
    is_proven: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the walk from the newest to the oldest point is.

    point: None before the first. difference: of its content from its digest; None where it cannot be read,
    for what `sentence` says. is_proven: whether all digests on the way are known.
    """

    point: PointRow | None
    size_bytes: int
    difference: Digest | None
    sentence: str | None
    is_proven: bool = True


def judge_disk(
    home: VmHome, disk_index: int, faults: dict[uuid.UUID, Fault], pace: Pace
) -> dict[uuid.UUID, Verdict]:
    """Return a verdict for each kept point that has the disk, after scan_disk(). faults: of parts, by id.

    No point goes while it is looked at. Raises: Locked where points come and go all the time; Stopped.
    """
    verdicts: dict[uuid.UUID, Verdict] = {}
    walk = _Walk(home, disk_index, faults, pace)
    with contextlib.ExitStack() as stack:
        place = _begin(home, disk_index)
        held = stack.enter_context(contextlib.ExitStack())
        while True:
            holding = contextlib.ExitStack()
            point = _next_point(home, place.point, holding)
            held.close()
            held = stack.enter_context(holding)
            if point is None:
                return verdicts
            place = _reach(walk, place, point)
            if disk_index in home.catalog.members(home.vm_id, point.id):
                verdicts[point.id] = _verdict(home, disk_index, place, point, faults)


def disk_at(home: VmHome, point_id: uuid.UUID | None, disk_index: int, virtual_bytes: int) -> PointDisk:
    """Open a disk as it was at a point, damaged or not; None: as its file is. Raises: as make_view()."""

    def walk() -> list[PartFile]:
        if point_id is None:
            return []
        with home.catalog.snapshot():
            parts = chain(home, point_id, disk_index)
            if all(point.id != point_id for point in kept_points(home)):
                raise NoSuchPoint(f"VM {home.name!r} has no point {point_id} any more")
        return [PartFile(part.id, part_path(home, part), part.kind == "whole") for part in parts]

    source = PointSource(
        files=home.files,
        clock=home.clock,
        disk_path=home.paths.disk(disk_index),
        virtual_bytes=virtual_bytes,
        walk=walk,
        watch=Watch(Counter(home.files, home.paths.counter)),
    )
    path = home.paths.points / f"{point_id}.{disk_index}"
    return PointDisk(source, path, point_id=point_id or NIL, spec=_row(home, disk_index).spec)


def causes(home: VmHome, parts: list[UndoRow], faults: dict[uuid.UUID, Fault]) -> list[str]:
    """Return what of the damaged files is read through a chain of parts, a sentence for each."""
    found = []
    covered = NO_EXTENTS
    for part in parts:
        fault = faults.get(part.id)
        if fault is not None and (fault.extents is None or len(difference(merge(fault.extents), covered))):
            found.append(fault.sentence)
        if part.kind == "undo" and (fault is None or fault.extents is not None):
            covered = merge(np.concatenate([covered, *_extents(home, part)]))
    return found


def _begin(home: VmHome, disk_index: int) -> _Place:
    scan = home.catalog.scans(home.vm_id).get(disk_index)
    row = _row(home, disk_index)
    size_bytes = row.spec.virtual_bytes
    if scan is None or (scan.drift is None and scan.damage is None):
        return _Place(None, size_bytes, Digest(), None, is_proven=False)
    if scan.damage is not None:
        return _Place(None, size_bytes, None, scan.damage)
    return _Place(None, size_bytes, scan.drift, None)


def _row(home: VmHome, disk_index: int) -> DiskRow:
    return next(row for row in home.catalog.disks(home.vm_id) if row.spec.index == disk_index)


def _next_point(home: VmHome, after: PointRow | None, stack: contextlib.ExitStack) -> PointRow | None:
    """Return the newest kept point that is older, held against those who drop points."""
    for _ in range(_LOOKS_MAX):
        points = [point for point in kept_points(home) if after is None or point.sequence < after.sequence]
        if not points:
            return None
        stack.enter_context(hold_point(home, points[-1].id))
        if any(point.id == points[-1].id for point in kept_points(home)):
            return points[-1]
        stack.close()
    raise Locked(
        f"the points of VM {home.name!r} come and go all the time", path=home.paths.points, hint="try again"
    )


@contextlib.contextmanager
def hold_point(home: VmHome, point_id: uuid.UUID) -> Iterator[None]:
    """Keep a point from being dropped. Raises: Locked while it is."""
    lock = hold_shared(home, point_id)
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Walk:
    """What every step from a point to the next older one needs."""

    home: VmHome
    disk_index: int
    faults: dict[uuid.UUID, Fault]
    pace: Pace


def _reach(walk: _Walk, place: _Place, point: PointRow) -> _Place:
    """Go on from a point, or the disk's file, to the next older point."""
    home = walk.home
    for _ in range(_LOOKS_MAX):
        own = _own_parts(home, point, walk.disk_index)
        try:
            reached = _step(walk, place, point, own)
        except (HvReplicaError, OSError) as error:
            reached = dataclasses.replace(place, point=point, difference=None, sentence=str(error))
        kept = {each.id for each in kept_points(home)}
        if point.id not in kept or (place.point is not None and place.point.id not in kept):
            break
        if _own_parts(home, point, walk.disk_index) == own:
            return reached
    raise Locked(
        f"the points of VM {home.name!r} come and go all the time", path=home.paths.points, hint="try again"
    )


def _own_parts(home: VmHome, point: PointRow, disk_index: int) -> list[UndoRow]:
    parts = home.catalog.undo_rows(home.vm_id, point_id=point.id, disk_index=disk_index)
    ends = [place for place, part in enumerate(parts) if part.kind == "whole"]
    return parts[: ends[0] + 1] if ends else parts


def _step(walk: _Walk, place: _Place, point: PointRow, own: list[UndoRow]) -> _Place:
    home, disk_index, faults = walk.home, walk.disk_index, walk.faults
    size_bytes = home.catalog.members(home.vm_id, point.id).get(disk_index, place.size_bytes)
    unreadable = [
        faults[part.id].sentence for part in own if part.id in faults and faults[part.id].extents is None
    ]
    reached = _Place(point, size_bytes, place.difference, place.sentence, place.is_proven)
    if unreadable:
        return dataclasses.replace(reached, difference=None, sentence=unreadable[0])
    if own and own[-1].kind == "whole":
        return _read_whole(walk, reached, point, own)
    if place.difference is None or (not own and size_bytes == place.size_bytes):
        return reached
    change = _sum(own)
    if change is None:
        return dataclasses.replace(reached, is_proven=False)
    newer_id = None if place.point is None else place.point.id
    with (
        disk_at(home, newer_id, disk_index, place.size_bytes) as newer,
        disk_at(home, point.id, disk_index, size_bytes) as older,
    ):
        found = [NO_EXTENTS, *(extents for part in own for extents in _extents(home, part))]
        tail = align_down(min(size_bytes, place.size_bytes), PAGE_BYTES)
        extents = pages_of(merge(np.concatenate(found)), tail)
        sums = [
            reader.of_extents(extents) + reader.of_range(tail, disk.virtual_bytes)
            for disk in (older, newer)
            for reader in [DigestReader(disk, on_read=walk.pace.spend)]
        ]
    return dataclasses.replace(reached, difference=place.difference + sums[0] - sums[1] + change)


def _read_whole(walk: _Walk, reached: _Place, point: PointRow, own: list[UndoRow]) -> _Place:
    """Judge a point whose disk ends in a whole part by reading all of it: no newer one tells of it."""
    home = walk.home
    with disk_at(home, point.id, walk.disk_index, reached.size_bytes) as disk:
        content = digest_of(disk, on_read=walk.pace.spend)
    change = _sum(own[:-1])
    base = own[-1].digest_change
    if change is None:
        return _Place(point, reached.size_bytes, Digest(), None, is_proven=False)
    if base is None:
        with home.catalog.transaction():
            home.catalog.set_digest_change(home.vm_id, own[-1].id, (content + change).hex())
        return _Place(point, reached.size_bytes, Digest(), None)
    return _Place(point, reached.size_bytes, content - (Digest.of_hex(base) - change), None)


def _sum(parts: list[UndoRow]) -> Digest | None:
    total = Digest()
    for part in parts:
        if part.digest_change is None:
            return None
        total += Digest.of_hex(part.digest_change)
    return total


def _extents(home: VmHome, part: UndoRow) -> list[NDArray[np.int64]]:
    return log_extents(home, part_path(home, part), FILE_TYPE_UNDO)


def _verdict(
    home: VmHome, disk_index: int, place: _Place, point: PointRow, faults: dict[uuid.UUID, Fault]
) -> Verdict:
    if place.difference is None:
        return Verdict(place.sentence, is_proven=True)
    if place.is_proven and not place.difference:
        return Verdict(None, is_proven=True)
    parts = chain(home, point.id, disk_index)
    found = causes(home, parts, faults)
    scan = home.catalog.scans(home.vm_id).get(disk_index)
    is_on_disk = not parts or parts[-1].kind != "whole"
    if not found and place.difference and is_on_disk and scan is not None and scan.is_damaged:
        found = [disk_sentence(home, disk_index)]
    if not found and place.difference and not is_on_disk:
        found = [f"{part_path(home, parts[-1])} does not hold what was written to it"]
    if not found and place.difference:
        found = [f"disk {disk_index} does not have its digest at this point, and no file of it says why"]
    return Verdict("; ".join(found) or None, is_proven=place.is_proven)
