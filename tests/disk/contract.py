"""Ways to make a disk for the tests that every kind of disk must pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.support.disks import create_kind
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.disk import Disk

SIZE = 9 * MIB + 8192


def make_disk(path: Path, kind: str, *, size: int = SIZE, block_bytes: int = MIB, seed: int = 1) -> Disk:
    """Create a disk and open it for writing."""
    clock = FakeClock(seed=seed)
    create_kind(OS_FILES, path, kind, virtual_bytes=size, block_bytes=block_bytes, clock=clock)
    return open_disk(OS_FILES, path, writable=True, clock=clock)


def reopen(disk: Disk, *, writable: bool = True) -> Disk:
    """Close and open again."""
    disk.close()
    return open_disk(OS_FILES, disk.path, writable=writable, clock=FakeClock(seed=9))


def everything(disk: Disk) -> bytes:
    """Return all guest bytes."""
    buffer = bytearray(disk.virtual_bytes)
    disk.read_into(buffer, 0)
    return bytes(buffer)
