"""Which file of a chain each range of a disk comes from, and where in it, in the terms of `qemu-img map`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.chain import parent_of
from hvreplica.disk.disk import MapEntry, Stretch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.disk.disk import Disk


def map_disk(disk: Disk) -> Iterator[MapEntry]:
    """Yield runs that cover the whole disk, in order; neighbours that say the same are one.

    Raises: ParentMissing for a differencing disk that was opened without its parent.
    """
    held: MapEntry | None = None
    for entry in _entries(disk, 0, disk.virtual_bytes, depth=0):
        if held is None:
            held = entry
        elif (joined := _joined(held, entry)) is not None:
            held = joined
        else:
            yield held
            held = entry
    if held is not None:
        yield held


def _entries(layer: Disk, start: int, end: int, *, depth: int) -> Iterator[MapEntry]:
    stop = max(start, min(end, layer.virtual_bytes))
    for stretch in layer.stretches(start, stop):
        if stretch.kind == "parent":
            yield from _entries(
                parent_of(layer), stretch.start, stretch.start + stretch.length, depth=depth + 1
            )
        else:
            yield _entry(layer, stretch, depth)
    if stop < end:
        # A child may be longer than its parent: what is missing there is zeros.
        yield _entry(layer, Stretch(stop, end - stop, "absent", None), depth)


def _entry(layer: Disk, stretch: Stretch, depth: int) -> MapEntry:
    return MapEntry(
        start=stretch.start,
        length=stretch.length,
        depth=depth,
        present=stretch.kind != "absent",
        zero=stretch.kind != "data",
        data=stretch.kind == "data",
        offset=stretch.file_offset,
        filename=None if stretch.file_offset is None else str(layer.path),
    )


def _joined(a: MapEntry, b: MapEntry) -> MapEntry | None:
    """Return one entry for both, None where they say different things."""
    if (a.depth, a.present, a.zero) != (b.depth, b.present, b.zero):
        return None
    if (a.offset is None) != (b.offset is None):
        return None
    if a.offset is not None and a.offset + a.length != b.offset:
        return None
    return MapEntry(a.start, a.length + b.length, a.depth, a.present, a.zero, a.data, a.offset, a.filename)
