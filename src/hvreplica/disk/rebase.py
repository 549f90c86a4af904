"""Give a differencing disk another parent, without a change of what its guest sees.

    the new parent has the identity that the child asks for    only names change
    else                                                       what differs is copied into the child first
    unsafe                                                     only names and identity change

What is copied are the bytes of the old chain, where the child leaves them to its parents and the new parent
has others. They hide the old parent with what it shows itself, so that a power cut changes nothing that the
guest sees, and the same call goes on. When they are durable, the new parent takes the place of the old one at
once (disk/vhdx/relink.py, disk/vhd/relink.py). The DataWriteGuid of a VHDX stays, and with it the child's own
children. What neither chain holds is not read. Spec: [MS-VHDX] 2.2.2, 2.6.2.6.3.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from hvreplica import native
from hvreplica.disk.chain import layers, parent_of, read_layers
from hvreplica.disk.extents import (
    NO_EXTENTS,
    batches,
    data_windows,
    intersection,
    merge,
    select_runs,
    union,
)
from hvreplica.disk.open import open_disk, open_layer, open_parents
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.disk.vhd.disk import VhdDisk
from hvreplica.disk.vhdx.disk import VhdxDisk
from hvreplica.errors import FormatError, ParentLoop, ParentMismatch, ParentMissing
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

Reason = Literal["identity", "content", "unsafe"]


class RebaseReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a rebase did.

    by: why the new parent is right: its "identity" is the one that the child asked for; or its "content" was
    compared and what differs was copied; or nothing was looked at ("unsafe"). compared_bytes: read from each
    chain. copied_bytes: written to the child.
    """

    child: str
    parent: str
    by: Reason
    compared_bytes: int
    copied_bytes: int


def rebase_disk(
    files: FileSystem,
    child: str | os.PathLike[str],
    parent: str | os.PathLike[str],
    *,
    unsafe: bool = False,
    clock: Clock,
    progress: ProgressCallback | None = None,
) -> RebaseReport:
    """Make `parent` the parent of the differencing disk `child`, whose guest sees the same bytes as before.

    Durable on return; after a crash the child opens with its old parent or its new one. unsafe: believe that
    the content is the same, and do not look for the old parent. Raises: ParentMissing if `child` has no
    parent, or an old one is needed and not found; ParentLoop if `parent` rests on `child`; ParentMismatch for
    another format or sector size; Locked, FormatError.
    """
    path = Path(child)
    # The child comes last: a chain that leads back to it by another name fails at its lock.
    with open_layer(files, parent, shared=True, clock=clock) as below:
        open_parents(files, below, clock=clock)
        _refuse_loop(path, below)
        by, compared, copied = _prepare(files, path, below, unsafe=unsafe, clock=clock, progress=progress)
        with open_layer(files, path, writable=True, clock=clock) as upper:
            _relinkable(upper).rebase(below)
    return RebaseReport(
        child=str(path), parent=str(parent), by=by, compared_bytes=compared, copied_bytes=copied
    )


def _refuse_loop(child: Path, parent: Disk) -> None:
    for layer in layers(parent):
        if os.path.realpath(layer.path) == os.path.realpath(child):
            raise ParentLoop(
                "the new parent rests on the disk that is to rest on it",
                path=child,
                field="parent",
                actual=str(parent.path),
                hint="choose a disk that the chain of the new parent does not lead through",
            )


def _relinkable(disk: Disk) -> VhdDisk | VhdxDisk:
    if disk.parent_reference is None or not isinstance(disk, (VhdDisk, VhdxDisk)):
        raise ParentMissing(
            "this is no differencing disk: it has no parent to be replaced",
            path=disk.path,
            field="type",
            expected="differencing",
            actual=disk.info().type,
        )
    return disk


def _prepare(
    files: FileSystem,
    path: Path,
    parent: Disk,
    *,
    unsafe: bool,
    clock: Clock,
    progress: ProgressCallback | None,
) -> tuple[Reason, int, int]:
    """Make the child show the same on top of `parent`; return why it does, and bytes compared and copied."""
    with open_layer(files, path, clock=clock) as upper:
        _require_kin(_relinkable(upper), parent)
        if unsafe:
            return "unsafe", 0, 0
        if _is_proven(upper, parent):
            return "identity", 0, 0
    with _with_old_parent(files, path, parent, clock) as upper:
        return "content", *_copy_differences(upper, parent, progress)


def _require_kin(child: Disk, parent: Disk) -> None:
    """Check what no parent may differ in, whatever its identity is. Raises: ParentMismatch."""
    for field, ours, theirs in (
        ("format", child.format, parent.format),
        ("logical_sector_size", child.logical_sector_bytes, parent.logical_sector_bytes),
    ):
        if ours != theirs:
            raise ParentMismatch(
                f"parent and child must have the same {field.replace('_', ' ')}",
                path=parent.path,
                field=field,
                expected=ours,
                actual=theirs,
                hint=f"convert the new parent first: hvreplica disk convert {parent.path} NEW.{child.format}",
            )


def _is_proven(child: Disk, parent: Disk) -> bool:
    if child.parent_reference is None:
        return False
    try:
        child.parent_reference.verify(parent)
    except (ParentMismatch, FormatError):
        return False
    return True


def _with_old_parent(files: FileSystem, path: Path, parent: Disk, clock: Clock) -> Disk:
    try:
        return open_disk(files, path, writable=True, clock=clock)
    except (ParentMissing, ParentMismatch) as error:
        error.hint = (
            "what differs between old and new parent must be copied into the child, and for that the old one"
            f" must be there; if you know that {parent.path} holds the same, add --unsafe"
        )
        raise


def _copy_differences(child: Disk, parent: Disk, progress: ProgressCallback | None) -> tuple[int, int]:
    """Write to the child what its parent shows and `parent` does not; durable when it is closed."""
    old = parent_of(child)
    size = child.logical_sector_bytes
    scratches = Scratch(_BATCH_BYTES), Scratch(_BATCH_BYTES)
    if isinstance(child, VhdxDisk):
        child.identify(child.data_write_guid)

    def compare(rows: NDArray[np.int64]) -> tuple[int, int, int]:
        length, end = int(rows[:, 1].sum()), int(rows[-1].sum())
        wanted, actual = (scratch.take(length) for scratch in scratches)
        read_layers(old, rows, wanted.data)
        read_layers(parent, rows, actual.data)
        extents, data = _differences(rows, wanted, actual, size)
        if len(data):
            child.write_extents(extents, data.data)
        return length, len(data), end

    compared = copied = 0
    for length, written, end in map_ordered(compare, _all_rows(child, old, parent)):
        compared, copied = compared + length, copied + written
        if progress is not None:
            progress(Progress("rebase", end, child.virtual_bytes, raw_bytes=compared))
    return compared, copied


def _all_rows(child: Disk, old: Disk, new: Disk) -> Iterator[NDArray[np.int64]]:
    """Yield batches of what the child leaves to its parent, and one of `old` and `new` may hold."""
    size = child.logical_sector_bytes
    for start, stop, found in data_windows(old, 0, child.virtual_bytes):
        rows = union(found, new.extents(start, stop))
        if not len(rows):
            continue
        # A raw disk may end inside of a sector, which is then zeros to its end.
        firsts = rows[:, 0] // size * size
        rows = merge(np.column_stack((firsts, -(-rows.sum(axis=1) // size) * size - firsts)))
        below = [each[:2] for each in child.stretches(start, stop) if each.kind == "parent"]
        yield from batches(intersection(rows, np.array(below, np.int64).reshape(-1, 2)), _BATCH_BYTES)


def _differences(
    rows: NDArray[np.int64], wanted: NDArray[np.uint8], actual: NDArray[np.uint8], size: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the extents of the sectors of `rows` in which `actual` differs, and what is wanted there."""
    runs = native.changed_runs(wanted.data, actual.data, size)
    if not len(runs):
        return NO_EXTENTS, wanted[:0]
    packed = np.concatenate([wanted[start : start + length] for start, length in runs.tolist()])
    return select_runs(rows, runs), packed
