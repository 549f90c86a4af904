"""Change the size of a disk: longer with zeros, or shorter where only zeros are lost.

A power cut leaves the disk with its old or its new size, and all of its bytes; the same call again finishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hvreplica import native
from hvreplica.disk.dependents import require_no_children
from hvreplica.disk.extents import batches, data_windows
from hvreplica.disk.open import open_disk
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.disk.raw import RawDisk
from hvreplica.disk.vhd.disk import FixedVhdDisk, VhdDisk
from hvreplica.disk.vhd.resize import grow_vhd, resize_fixed, shrink_vhd
from hvreplica.disk.vhdx.disk import VhdxDisk
from hvreplica.disk.vhdx.resize import grow_vhdx, shrink_vhdx
from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.vhd_footer import VIRTUAL_BYTES_MAX as VHD_BYTES_MAX
from hvreplica.formats.vhdx_metadata import VIRTUAL_BYTES_MAX as VHDX_BYTES_MAX
from hvreplica.progress import Progress
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.open import Format
    from hvreplica.files import FileSystem
    from hvreplica.progress import ProgressCallback

_BATCH_BYTES = MIB
_RAW_BYTES_MAX = (1 << 63) - (1 << 20)
_BYTES_MAX = {"vhdx": VHDX_BYTES_MAX, "vhd": VHD_BYTES_MAX, "raw": _RAW_BYTES_MAX}


class ResizeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a change of size did. Sizes in bytes: of the guest's disk and of its file."""

    path: str
    format: str
    virtual_bytes_before: int
    virtual_bytes: int
    file_bytes_before: int
    file_bytes: int


def resize_disk(
    files: FileSystem,
    path: str | os.PathLike[str],
    virtual_bytes: int,
    *,
    format: Format | None = None,  # noqa: A002 - the word that users type
    parent: str | os.PathLike[str] | None = None,
    force: bool = False,
    clock: Clock,
    progress: ProgressCallback | None = None,
) -> ResizeReport:
    """Give the disk at `path` another size, durable on return.

    virtual_bytes: a multiple of the logical sector. New bytes read as zeros, also in a child whose parent is
    longer. parent: the file of the parent, where the names in a differencing disk do not lead to it. A disk
    that has children must not be resized: those of a VHDX do not know it any more, those of a VHD do not see
    that it changed. Children beside it are looked for; force: not.
    Raises: FieldOutOfRange for a size that the format does not allow, and for one that would lose what is not
    zero: its hint names the smallest possible; Locked; FormatError and ParentError as open_disk() does.
    """
    disk = open_disk(files, path, writable=True, format=format, parent=parent, clock=clock)
    try:
        before, file_before = disk.virtual_bytes, disk.info().file_bytes
        _require_size(disk, virtual_bytes)
        if not force and virtual_bytes != before:
            require_no_children(files, disk, clock=clock)
        if virtual_bytes < before:
            _require_zeros(disk, virtual_bytes, progress)
        _resize(files, disk, virtual_bytes, clock)
        disk.close()
    except BaseException:
        disk.abandon()
        raise
    # What is there now must open before anybody is told that it was done.
    with open_disk(files, path, format=format, parent=parent, clock=clock) as disk:
        return ResizeReport(
            path=str(path),
            format=disk.format,
            virtual_bytes_before=before,
            virtual_bytes=disk.virtual_bytes,
            file_bytes_before=file_before,
            file_bytes=disk.info().file_bytes,
        )


def _resize(files: FileSystem, disk: Disk, virtual_bytes: int, clock: Clock) -> None:
    grows = virtual_bytes > disk.virtual_bytes
    if isinstance(disk, VhdDisk):
        # Also to the size that it has: a power cut may have left something to do.
        grow_vhd(disk, virtual_bytes) if grows else shrink_vhd(disk, virtual_bytes)
    elif virtual_bytes == disk.virtual_bytes:
        return
    elif isinstance(disk, VhdxDisk):
        grow_vhdx(disk, virtual_bytes, clock=clock) if grows else shrink_vhdx(disk, virtual_bytes)
    elif isinstance(disk, FixedVhdDisk):
        resize_fixed(files, disk, virtual_bytes, clock=clock)
    elif isinstance(disk, RawDisk):
        disk.file.resize(virtual_bytes)
        disk.file.sync()


def _require_size(disk: Disk, virtual_bytes: int) -> None:
    size_max = _BYTES_MAX[disk.format]
    sector_bytes = disk.logical_sector_bytes
    if not 0 < virtual_bytes <= size_max or virtual_bytes % sector_bytes:
        raise FieldOutOfRange(
            f"a {disk.format.upper() if disk.format != 'raw' else 'raw disk'} cannot have this size",
            path=disk.path,
            field="size",
            expected=f"a multiple of {sector_bytes}, above 0 and at most {size_max}",
            actual=virtual_bytes,
            hint="a VHDX holds up to 64 TiB" if disk.format == "vhd" else None,
        )


def _require_zeros(disk: Disk, virtual_bytes: int, progress: ProgressCallback | None) -> None:
    """Make sure that nothing is lost. Raises: FieldOutOfRange, with the smallest size that loses nothing."""
    last = last_data(disk, virtual_bytes, progress)
    if last is None:
        return
    smallest = align_up(last + 1, disk.logical_sector_bytes)
    raise FieldOutOfRange(
        "the disk holds data behind the end that it would have",
        path=disk.path,
        field="size",
        expected=f"at least {smallest}",
        actual=virtual_bytes,
        hint=f"the smallest size that loses nothing is {smallest}; make the guest's partitions smaller first",
    )


def last_data(disk: Disk, start: int, progress: ProgressCallback | None = None) -> int | None:
    """Return the offset of the disk's last byte from `start` on that is not zero, None if there is none."""
    scratch = Scratch(_BATCH_BYTES)

    def look(rows: NDArray[np.int64]) -> tuple[int, int | None]:
        octets = scratch.take(int(rows[:, 1].sum()))
        disk.read_extents(rows, octets.data)
        if native.is_zero(octets.data):
            return len(octets), None
        at = int(np.flatnonzero(octets)[-1])
        ends = np.cumsum(rows[:, 1])
        row = int(np.searchsorted(ends, at, "right"))
        return len(octets), int(rows[row].sum() - ends[row] + at)

    def wanted() -> Iterator[NDArray[np.int64]]:
        for _, _, rows in data_windows(disk, start, disk.virtual_bytes):
            yield from batches(rows, _BATCH_BYTES)

    last: int | None = None
    done = 0
    for length, found in map_ordered(look, wanted()):
        done += length
        last = last if found is None else found
        if progress is not None:
            progress(Progress("look", done, disk.virtual_bytes - start, raw_bytes=done))
    return last
