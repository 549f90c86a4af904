"""Which formats this version can write, and what QEMU calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.open import DiskType, Format
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from pathlib import Path

DRIVERS = {"raw": "raw", "vhdx": "vhdx", "vhd": "vpc"}  # our name, and QEMU's
_TRIAL_BYTES = 4 << 20


def can_write(name: str, folder: Path) -> bool:
    """Return whether a new disk of the format `name` opens as one; a name may be there before its code."""
    if name not in get_args(Format):
        return False
    path = folder / f"trial.{name}"
    create_disk(OS_FILES, path, virtual_bytes=_TRIAL_BYTES, format=name, block_bytes=2 << 20, clock=SYSTEM)  # type: ignore[arg-type]
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        found: str = disk.format
    path.unlink()
    return found == name


def can_have_parents() -> bool:
    """Return whether differencing disks can be made."""
    return "differencing" in get_args(DiskType)
