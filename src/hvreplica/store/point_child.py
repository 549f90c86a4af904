"""A writable disk on top of one of a recovery point: what is written goes into a file of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.block_reader import BlockReader
from hvreplica.disk.create import create_child
from hvreplica.disk.open import open_layer
from hvreplica.disk.whole_blocks import WholeBlocks
from hvreplica.store.layout import PARTIAL_SUFFIX
from hvreplica.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.store.point_disk import PointDisk

BLOCK_BYTES = MIB  # the least that a VHDX allows: the first write to a block copies all of it


def kept_child(files: FileSystem, path: Path, below: PointDisk, *, clock: Clock) -> WholeBlocks:
    """Return the child of a point's disk in the file at `path`, made where there is none.

    It is a differencing VHDX whose parent is the point: its ParentLinkage is the point's id, and nothing else
    is taken for its parent. It owns `below`. Raises: ParentMismatch for one of another point; Locked while
    another process has it open; FormatError.
    """
    if not files.exists(path):
        files.make_directory(path.parent)
        create_child(files, path, below, block_bytes=BLOCK_BYTES, clock=clock)
    return _open(files, path, below, clock)


def loose_child(files: FileSystem, folder: Path, below: PointDisk, *, clock: Clock) -> WholeBlocks:
    """Return a child whose file has no name in `folder` any more: it ends with the process. Owns `below`."""
    files.make_directory(folder)
    path = folder / f"{clock.guid()}.vhdx{PARTIAL_SUFFIX}"
    create_child(files, path, below, block_bytes=BLOCK_BYTES, clock=clock)
    try:
        return _open(files, path, below, clock)
    finally:
        files.unlink(path)


def _open(files: FileSystem, path: Path, below: PointDisk, clock: Clock) -> WholeBlocks:
    layer = open_layer(files, path, writable=True, format="vhdx", clock=clock)
    try:
        reference = layer.parent_reference
        if reference is None or not isinstance(layer, BlockReader):
            raise FileExistsError(17, "this disk is not the child of a recovery point", str(path))
        reference.verify(below)
        layer.attach(below)
        return WholeBlocks(layer, layer)
    except BaseException:
        layer.abandon()
        raise
