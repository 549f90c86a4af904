"""What this side has written to a VM's disks since a point: the half of a fork that a promoted replica knows.

    point K ── N1 ── N2 (newest) ── active disk
       └─ undo parts of K, N1 ─┘       └─ its own blocks

What changed between two points is what the undo parts between them hold; what changed after the newest is
what its child holds differently. A superset of what differs, never less.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.chain import layers
from hvreplica.disk.extents import NO_EXTENTS, union, widened
from hvreplica.errors import FormatError, LogError, StoreError
from hvreplica.store.part_files import open_part
from hvreplica.store.point_view import part_rows
from hvreplica.store.points_kept import chain, kept_points, part_path
from hvreplica.tracking.compare import RangeSink
from hvreplica.tracking.differencing import DifferencingDisk

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Collection
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.disk import Disk
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import PointRow, UndoRow

_LOG = logging.getLogger("hvreplica.failover")
_LOOKS_MAX = 10


def newest_known(home: VmHome, known: Collection[uuid.UUID]) -> PointRow | None:
    """Return the newest point of this store that is among `known`; None where it has none of them."""
    points = home.catalog.points(home.vm_id, superseded=True)
    return next((point for point in reversed(points) if point.id in known), None)


def changed_between(
    home: VmHome, point: PointRow, disk_index: int, virtual_bytes: int
) -> NDArray[np.int64] | None:
    """Return where the replica's disk may differ from what it was at `point`; None where nothing tells.

    int64 (n, 2), sorted, disjoint. A part that cannot be read counts as the whole disk.
    """
    with home.catalog.snapshot():
        points = home.catalog.points(home.vm_id, superseded=True)
        if points[-1].id == point.id:
            return NO_EXTENTS
        # Parts of an older point that is kept lead over this one; without one, nobody made them. One that
        # does not have the disk yet has no parts of it either.
        base = next((row for row in reversed(points) if row.sequence <= point.sequence and row.is_kept), None)
        if base is None or disk_index not in home.catalog.members(home.vm_id, base.id):
            return None
        newer = {row.id for row in points if row.sequence >= base.sequence}
        parts = home.catalog.undo_rows(home.vm_id, disk_index=disk_index)
    rows = NO_EXTENTS
    for part in parts:
        if part.point_id in newer:
            rows = union(rows, _touched(home, part, virtual_bytes))
    return rows


def written_between(
    home: VmHome, older_id: uuid.UUID, newer_id: uuid.UUID, disk_index: int
) -> NDArray[np.int64] | None:
    """Return in which ranges alone a disk may differ between two kept points; None where nothing tells.

    int64 (n, 2), in any order, as the parts between the points have them: they may overlap, and lie beyond
    the end of either where the disk was longer in between. What only the longer one has may be missing.
    Raises: FormatError, LogError for a part that is damaged.
    """
    for _ in range(_LOOKS_MAX):
        with home.catalog.snapshot():
            order = [
                point.id
                for point in kept_points(home)
                if point.id in {older_id, newer_id}
                and disk_index in home.catalog.members(home.vm_id, point.id)
            ]
            later = {part.id for part in chain(home, newer_id, disk_index)}
            between = [part for part in chain(home, older_id, disk_index) if part.id not in later]
        is_ordered = set(order) == {older_id, newer_id} and order[-1] == newer_id
        if not is_ordered or any(part.kind == "whole" for part in between):
            return None
        try:
            found = [part_rows(home.files, part_path(home, part))[:, :2] for part in between]
        except FileNotFoundError:
            continue  # it was put together with others meanwhile
        return np.concatenate([NO_EXTENTS, *found])
    return None


def changed_above(
    child: Disk, base_path: Path, *, on_read: Callable[[int], None] = lambda _: None
) -> NDArray[np.int64]:
    """Return where an active disk, open with its parents, differs from the replica's disk below it.

    int64 (n, 2), sorted, disjoint, in whole grains of 4 KiB. Raises: StoreError where it does not rest on it.
    """
    sink = RangeSink()
    DifferencingDisk(child, base_of(child, base_path), skip_equal=True).changes_into(sink, on_read=on_read)
    return widened(sink.rows, start=0, end=child.virtual_bytes)


def base_of(child: Disk, path: Path) -> Disk:
    """Return the disk at `path` from the chain below `child`. Raises: StoreError."""
    for layer in layers(child):
        if layer is not child and layer.path.resolve() == path.resolve():
            return layer
    raise StoreError("the active disk does not rest on the replica's", path=child.path, expected=path)


def _touched(home: VmHome, part: UndoRow, virtual_bytes: int) -> NDArray[np.int64]:
    whole = np.array([[0, virtual_bytes]], np.int64)
    if part.kind == "whole":
        return whole
    rows = NO_EXTENTS
    path = home.paths.undo(part.id)
    try:
        with open_part(home.files, path) as reader:
            for entries in reader.blocks():
                starts = entries["byte_offset"].astype(np.int64)
                lengths = np.minimum(entries["data_length"].astype(np.int64), virtual_bytes - starts)
                rows = union(rows, np.stack((starts, lengths), axis=1)[lengths > 0])
    except (FileNotFoundError, FormatError, LogError) as error:
        _LOG.warning("the whole disk %d is compared: %s", part.disk_index, error)
        return whole
    return rows
