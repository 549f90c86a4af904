"""Copy a range of a file to another place, holes as holes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.parallel import COPY_WINDOW_BYTES

if TYPE_CHECKING:
    from hvreplica.files import BlockFile


def copy_range(source: BlockFile, target: BlockFile, start: int, place: int, length: int) -> None:
    """Copy `length` bytes at `start` of `source` to `place` of `target`: the same file, or another one.

    The ranges do not overlap. Nothing is durable until `target` is synced. A target that ends before is
    grown by the data alone: what are holes behind it stays missing.
    """
    target.zero(place, length)
    shift = place - start
    # Listed first: in one file, writing adds to what is held.
    for at, held in list(source.data_extents(start, start + length)):
        for window in range(at, at + held, COPY_WINDOW_BYTES):
            count = min(COPY_WINDOW_BYTES, at + held - window)
            target.write(source.read(window, count), window + shift)
