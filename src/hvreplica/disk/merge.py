"""Merge a differencing disk into its parent, so that any power cut leaves a chain that shows the same bytes.

What the child holds hides the parent, so while that is copied down nothing that the child shows can change.
Only the link between the two has to hold at every instant. A VHD's parent keeps its identity whatever is
written to it. A VHDX's DataWriteGuid changes, so the child names two identities, for which the format has a
second entry (C: that of the child; G: that of the parent; M: new):

    1. child says G or M     durable before the parent changes
    2. parent becomes M      and gets the data of the child; nobody but the child takes it for whole
    3. child says M or C
    4. parent becomes C      the child's children may now rest on it: it shows what the child shows
    5. child is removed, or says C

After any power cut the child opens and the same call begins again at 1; only where 4 is durable it goes on
with 5, because a child that names its own identity as the parent's has been copied. Sizes, and why so, are in
docs/merge.md. Spec: [MS-VHDX] 2.6.2.6.3.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from hvreplica.disk.dependents import require_no_dependents
from hvreplica.disk.extents import batches
from hvreplica.disk.open import open_disk, open_layer
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.disk.vhdx.disk import VhdxDisk
from hvreplica.errors import FieldOutOfRange, ParentMismatch, ParentMissing
from hvreplica.formats.guid import NIL
from hvreplica.progress import Progress
from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.progress import ProgressCallback

_BATCH_BYTES = MIB
_RANGE_COUNT = 256  # ranges of the child that are looked at together


class MergeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a merge did.

    copied_bytes: data of the child that was written to the parent; zeroed_bytes: what was made zeros there,
    which takes in what lies behind the end of a shorter child. removed: whether the child is gone.
    """

    child: str
    parent: str
    child_virtual_bytes: int
    parent_virtual_bytes: int
    copied_bytes: int
    zeroed_bytes: int
    removed: bool


def merge_disk(
    files: FileSystem,
    child: str | os.PathLike[str],
    *,
    keep: bool = False,
    force: bool = False,
    clock: Clock,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Write what the differencing disk `child` holds into its parent, and remove the child.

    Durable on return; after a crash or an error the child still opens, and the same call finishes. keep:
    leave the child, which then holds nothing that its parent has not. force: also where other disks rest on
    the parent, or on a child that is to be removed, and would no longer show what they did. Raises:
    ParentInUse for those; ParentMissing if it has no parent, and as open_disk(); FieldOutOfRange for a child
    that is longer than its parent; Locked.
    """
    path = Path(child)
    below = _parent_path(files, path, clock)
    if not force:
        require_no_dependents(files, path, below, keep=keep, clock=clock)
    with open_layer(files, path, writable=True, clock=clock) as upper:
        with open_disk(files, below, writable=True, clock=clock) as lower:
            copied, zeroed = _merge(upper, lower, keep=keep, clock=clock, progress=progress)
        if not keep:  # while its lock is held, and with the parent's own log empty
            real = Path(os.path.realpath(path))  # a link may stand for the file
            files.unlink(real)
            files.sync_directory(real.parent)
        return MergeReport(
            child=str(path),
            parent=str(below),
            child_virtual_bytes=upper.virtual_bytes,
            parent_virtual_bytes=lower.virtual_bytes,
            copied_bytes=copied,
            zeroed_bytes=zeroed,
            removed=not keep,
        )


def _parent_path(files: FileSystem, child: Path, clock: Clock) -> Path:
    """Return the file of the parent; the whole chain opens and leads back nowhere."""
    with open_disk(files, child, clock=clock) as disk:
        if disk.parent is None:
            raise ParentMissing(
                "this is no differencing disk: it has no parent to be merged into",
                path=child,
                field="type",
                expected="differencing",
                actual=disk.info().type,
            )
        _require_room(disk, disk.parent)
        return disk.parent.path


def _require_room(child: Disk, parent: Disk) -> None:
    if child.virtual_bytes > parent.virtual_bytes:
        raise FieldOutOfRange(
            "the child is longer than its parent",
            path=parent.path,
            field="virtual size",
            expected=f"at least {child.virtual_bytes}",
            actual=parent.virtual_bytes,
            # Growing the parent by itself would give it an identity that the child does not know.
            hint=f"write both into one new disk: hvreplica disk convert {child.path} NEW.{child.format}",
        )


def _merge(
    child: Disk, parent: Disk, *, keep: bool, clock: Clock, progress: ProgressCallback | None
) -> tuple[int, int]:
    if child.parent_reference is None:
        raise ParentMismatch("the disk was changed while it was looked at", path=child.path)
    # Nothing held the files between finding the parent and here.
    child.parent_reference.verify(parent)
    _require_room(child, parent)
    if not isinstance(child, VhdxDisk) or not isinstance(parent, VhdxDisk):
        return _copy(child, parent, progress)  # flushed when it is closed, before the child goes
    figures = 0, 0
    final = child.data_write_guid
    if not (child.is_merged and parent.data_write_guid == final):
        between = clock.guid()
        child.relink([parent.data_write_guid, between])
        parent.identify(between)
        figures = _copy(child, parent, progress)
        final = between if final == NIL else final  # which names nothing
        child.relink([between, final])
        parent.identify(final)
    if keep:
        child.relink([final])
    return figures


class _Work(NamedTuple):
    """Ranges of the child, int64 (n, 2), that hold data or are zeros."""

    rows: NDArray[np.int64]
    is_data: bool


def _copy(child: Disk, parent: Disk, progress: ProgressCallback | None) -> tuple[int, int]:
    """Make the parent hold what the child holds; return bytes copied and zeroed. Memory is bounded."""
    scratch = Scratch(_BATCH_BYTES)

    def perform(work: _Work) -> tuple[int, int, int]:
        length, end = int(work.rows[:, 1].sum()), int(work.rows[-1].sum())
        if not work.is_data:
            for start, count in work.rows.tolist():
                parent.write_zeroes(start, count)
            return 0, length, end
        buffer = scratch.take(length)
        child.read_extents(work.rows, buffer.data)
        parent.write_extents(work.rows, buffer.data)
        return length, 0, end

    copied = zeroed = reached = 0
    for more_copied, more_zeroed, end in map_ordered(perform, _all_work(child, parent.virtual_bytes)):
        copied, zeroed, reached = copied + more_copied, zeroed + more_zeroed, max(reached, end)
        if progress is not None:
            progress(Progress("merge", reached, parent.virtual_bytes, raw_bytes=copied))
    return copied, zeroed


def _all_work(child: Disk, parent_bytes: int) -> Iterator[_Work]:
    ranges = _own_ranges(child)
    while some := list(itertools.islice(ranges, _RANGE_COUNT)):
        for is_data in (True, False):
            rows = [[start, end - start] for start, end, holds in some if holds == is_data]
            if not rows:
                continue
            found = np.array(rows, np.int64)
            if is_data:
                yield from (_Work(batch, is_data=True) for batch in batches(found, _BATCH_BYTES))
            else:
                yield _Work(found, is_data=False)
    if parent_bytes > child.virtual_bytes:
        # The guest of a shorter child never saw these bytes, and a longer grandchild sees zeros here.
        rest = [[child.virtual_bytes, parent_bytes - child.virtual_bytes]]
        yield _Work(np.array(rest, np.int64), is_data=False)


def _own_ranges(child: Disk) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether it holds data) of all that the child does not leave to its parent.

    In whole sectors, disjoint: two threads that each write a part of one sector would have to take turns.
    """
    size = child.logical_sector_bytes
    position = 0
    for stretch in child.stretches(0, child.virtual_bytes):
        if stretch.kind == "parent":
            continue
        start, end, is_data = stretch.start, stretch.start + stretch.length, stretch.kind == "data"
        if is_data:
            start, end = start // size * size, -(-end // size) * size
        else:
            start, end = -(-start // size) * size, end // size * size
        start = max(start, position)
        if start < end:
            yield start, end, is_data
            position = end
