"""Virtual disks as guest bytes: open, create, convert, compare."""

from __future__ import annotations

from hvreplica.disk.disk import Disk, DiskInfo, MapEntry
from hvreplica.disk.extents import data_windows
from hvreplica.disk.open import create_disk, open_disk

__all__ = ["Disk", "DiskInfo", "MapEntry", "create_disk", "data_windows", "open_disk"]
