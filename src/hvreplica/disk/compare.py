"""Compare what two disks show their guests, whatever files hold them.

Only ranges that one of the two may hold data for are read. Disks of different sizes are equal if the longer
one has only zeros where the shorter one has ended, as `qemu-img compare` has it without its strict mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hvreplica import native
from hvreplica.disk.extents import batches, data_windows, union
from hvreplica.disk.open import open_disk
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.progress import Progress
from hvreplica.units import MIB

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.open import Format
    from hvreplica.files import FileSystem
    from hvreplica.progress import ProgressCallback

# Large enough that the fixed price of a batch does not count, small enough for the last-level cache.
_BATCH_BYTES = 4 * MIB


class CompareReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a comparison found. first_difference: disk offset of the first byte that differs, else None.

    bytes_compared: the bytes that were read from each disk; ranges that neither holds are equal without
    reading.
    """

    equal: bool
    first_difference: int | None
    bytes_compared: int
    a_virtual_bytes: int
    b_virtual_bytes: int


def compare_disks(  # noqa: PLR0913 - each is a choice that a user may make
    files: FileSystem,
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    a_format: Format | None = None,
    b_format: Format | None = None,
    a_parent: str | os.PathLike[str] | None = None,
    b_parent: str | os.PathLike[str] | None = None,
    clock: Clock,
    progress: ProgressCallback | None = None,
) -> CompareReport:
    """Return whether the disks in the files `a` and `b` are equal; stops at the first difference.

    a_parent, b_parent: the files of their parents, where the names in them do not lead there. Raises:
    FormatError for either file.
    """
    with (
        open_disk(files, a, shared=True, format=a_format, parent=a_parent, clock=clock) as first,
        open_disk(files, b, shared=True, format=b_format, parent=b_parent, clock=clock) as second,
    ):
        return compare_open_disks(first, second, progress)


def compare_open_disks(a: Disk, b: Disk, progress: ProgressCallback | None = None) -> CompareReport:
    """Return whether `a` and `b`, which nobody writes meanwhile, are equal."""
    shorter, longer = sorted((a, b), key=lambda disk: disk.virtual_bytes)
    common = shorter.virtual_bytes
    compared = 0
    found: int | None = None
    for compare, batch_source in (
        (_difference(shorter, longer), _common_batches(shorter, longer, common)),
        (_first_data(longer), _tail_batches(longer, common)),
    ):
        for length, offset in map_ordered(compare, batch_source):
            compared += length
            if progress is not None:
                progress(Progress("compare", compared, longer.virtual_bytes, raw_bytes=compared))
            if offset is not None:
                found = offset
                break
        if found is not None:
            break
    return CompareReport(
        equal=found is None,
        first_difference=found,
        bytes_compared=compared,
        a_virtual_bytes=a.virtual_bytes,
        b_virtual_bytes=b.virtual_bytes,
    )


def _common_batches(a: Disk, b: Disk, end: int) -> Iterator[NDArray[np.int64]]:
    for start, stop, rows in data_windows(a, 0, end):
        yield from batches(union(rows, b.extents(start, stop)), _BATCH_BYTES)


def _tail_batches(disk: Disk, start: int) -> Iterator[NDArray[np.int64]]:
    for _, _, rows in data_windows(disk, start, disk.virtual_bytes):
        yield from batches(rows, _BATCH_BYTES)


def _difference(a: Disk, b: Disk) -> Callable[[NDArray[np.int64]], tuple[int, int | None]]:
    a_scratch, b_scratch = Scratch(_BATCH_BYTES), Scratch(_BATCH_BYTES)

    def compare(rows: NDArray[np.int64]) -> tuple[int, int | None]:
        first, second = _read(a, rows, a_scratch), _read(b, rows, b_scratch)
        at = native.first_difference(first.data, second.data)
        return len(first), None if at < 0 else _disk_offset(rows, at)

    return compare


def _first_data(disk: Disk) -> Callable[[NDArray[np.int64]], tuple[int, int | None]]:
    scratch = Scratch(_BATCH_BYTES)

    def look(rows: NDArray[np.int64]) -> tuple[int, int | None]:
        octets = _read(disk, rows, scratch)
        at = None if native.is_zero(octets.data) else int(np.flatnonzero(octets)[0])
        return len(octets), None if at is None else _disk_offset(rows, at)

    return look


def _read(disk: Disk, rows: NDArray[np.int64], scratch: Scratch) -> NDArray[np.uint8]:
    buffer = scratch.take(int(rows[:, 1].sum()))
    disk.read_extents(rows, buffer.data)
    return buffer


def _disk_offset(rows: NDArray[np.int64], at: int) -> int:
    """Return the disk offset of byte `at` of the concatenated rows."""
    ends = np.cumsum(rows[:, 1])
    row = int(np.searchsorted(ends, at, "right"))
    return int(rows[row, 0] + at - (ends[row] - rows[row, 1]))
