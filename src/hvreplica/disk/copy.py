"""Copy a range of a file to another place, what is zero as a hole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica import native
from hvreplica.units import MIB

if TYPE_CHECKING:
    from hvreplica.files import BlockFile

_WINDOW_BYTES = MIB
_GRAIN_BYTES = 64 * 1024


def copy_range(source: BlockFile, target: BlockFile, start: int, place: int, length: int) -> None:
    """Copy `length` bytes at `start` of `source` to `place` of `target`, another file.

    Nothing is durable until `target` is synced. A target that ends before is grown by the data alone: what
    are holes behind it stays missing.
    """
    target.zero(place, length)
    for at, held in source.data_extents(start, start + length):
        _copy(source, target, at, at - start + place, held)


def copy_within(file: BlockFile, start: int, place: int, length: int) -> None:
    """Copy `length` bytes at `start` to `place` of the same file, which do not overlap, as copy_range() does.

    The file system is not asked where data is: for each of many blocks that would take as long as the file.
    """
    file.zero(place, length)
    _copy(file, file, start, place, length)


def _copy(source: BlockFile, target: BlockFile, start: int, place: int, length: int) -> None:
    for done in range(0, length, _WINDOW_BYTES):
        window = memoryview(source.read(start + done, min(_WINDOW_BYTES, length - done)))
        for first, count in native.data_runs(window, _GRAIN_BYTES).tolist():
            target.write(window[first : first + count], place + done + first)
