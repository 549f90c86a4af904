"""Empty disks of every kind for tests; a differencing one lies on a parent whose content is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk import create_disk, open_disk
from hvreplica.units import KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.clock import Clock
    from hvreplica.disk.open import DiskType, Format
    from hvreplica.files import FileSystem

SECTOR_BYTES = 512
# name: format, type, logical sector, whether it has a parent
KINDS: dict[str, tuple[Format, DiskType, int, bool]] = {
    "raw": ("raw", "dynamic", 512, False),
    "dynamic": ("vhdx", "dynamic", 512, False),
    "fixed": ("vhdx", "fixed", 512, False),
    "dynamic-4096": ("vhdx", "dynamic", 4096, False),
    "differencing": ("vhdx", "differencing", 512, True),
    "differencing-4096": ("vhdx", "differencing", 4096, True),
    "vhd-dynamic": ("vhd", "dynamic", 512, False),
    "vhd-fixed": ("vhd", "fixed", 512, False),
    "vhd-differencing": ("vhd", "differencing", 512, True),
}


def parent_numbers(virtual_bytes: int) -> np.ndarray:
    """Return the number that fills each 512-byte sector of the parent: runs of several lengths, zeros among them."""
    sectors = np.arange(virtual_bytes // SECTOR_BYTES)
    return np.where(sectors // 8 % 3 == 1, 0, 200 + sectors // 1000 % 40).astype(np.uint8)


def _block_bytes(format_: Format, type_: DiskType, wanted: int) -> int | None:
    """Return the size to ask for: a VHD has blocks of two sizes only."""
    if format_ == "raw" or (type_ == "fixed" and format_ == "vhd"):
        return None
    return wanted if format_ == "vhdx" or wanted == 2 * MIB else 512 * KIB


def create_kind(
    files: FileSystem, path: Path, kind: str, *, virtual_bytes: int, clock: Clock, block_bytes: int = MIB
) -> np.ndarray:
    """Create the disk, and beside it its parent where it has one; return the number in each of its sectors."""
    format_, type_, sector_bytes, has_parent = KINDS[kind]
    parent = None
    numbers = np.zeros(virtual_bytes // SECTOR_BYTES, np.uint8)
    if has_parent:
        parent = path.with_name(f"parent of {path.name}")
        numbers = parent_numbers(virtual_bytes)
        create_disk(
            files,
            parent,
            virtual_bytes=virtual_bytes,
            format=format_,
            block_bytes=_block_bytes(format_, type_, 2 * block_bytes),
            logical_sector_bytes=sector_bytes,
            clock=clock,
        )
        with open_disk(files, parent, writable=True, clock=clock) as disk:
            disk.write(np.repeat(numbers, SECTOR_BYTES).data, 0)
    create_disk(
        files,
        path,
        virtual_bytes=virtual_bytes,
        format=format_,
        type=type_,
        block_bytes=_block_bytes(format_, type_, block_bytes),
        logical_sector_bytes=sector_bytes,
        parent=parent,
        clock=clock,
    )
    return numbers
