"""Give a replica's disk the size that the primary's has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk import open_disk, resize_disk

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem


def fit_disk(files: FileSystem, path: Path, virtual_bytes: int, *, clock: Clock) -> None:
    """Make the VHDX at `path` `virtual_bytes` long, durably; nothing is done where it is that already.

    What it grows by reads as zeros, what is cut off is lost: the primary's disk does not have it any more.
    Cut anywhere, the disk has its old size or the new one, with all that lies within both; call it again.
    Raises: OSError, FormatError.
    """
    with open_disk(files, path, writable=False, format="vhdx", clock=clock) as disk:
        before = disk.virtual_bytes
    if before == virtual_bytes:
        return
    if before > virtual_bytes:
        # A disk is only made shorter where it holds zeros: that rule protects people, who are not asked here.
        with open_disk(files, path, writable=True, format="vhdx", clock=clock) as disk:
            disk.write_zeroes(virtual_bytes, before - virtual_bytes)
    # No search for children: a replica's disk has none, or none that outlives the next log.
    resize_disk(files, path, virtual_bytes, format="vhdx", force=True, clock=clock)
