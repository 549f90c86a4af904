"""Virtual disks as guest bytes: open, create, convert, compare, resize, compact."""

from __future__ import annotations

from hvreplica.disk.compact import CompactReport, compact_disk
from hvreplica.disk.compare import CompareReport, compare_disks, compare_open_disks
from hvreplica.disk.convert import ConvertReport, convert_disk, convert_open_disk, copy_data
from hvreplica.disk.create import create_disk
from hvreplica.disk.disk import Disk, DiskInfo, MapEntry
from hvreplica.disk.extents import data_windows
from hvreplica.disk.map import map_disk
from hvreplica.disk.merge import MergeReport, merge_disk
from hvreplica.disk.open import DiskType, Format, open_disk
from hvreplica.disk.rebase import RebaseReport, rebase_disk
from hvreplica.disk.resize import ResizeReport, resize_disk

__all__ = [
    "CompactReport",
    "CompareReport",
    "ConvertReport",
    "Disk",
    "DiskInfo",
    "DiskType",
    "Format",
    "MapEntry",
    "MergeReport",
    "RebaseReport",
    "ResizeReport",
    "compact_disk",
    "compare_disks",
    "compare_open_disks",
    "convert_disk",
    "convert_open_disk",
    "copy_data",
    "create_disk",
    "data_windows",
    "map_disk",
    "merge_disk",
    "open_disk",
    "rebase_disk",
    "resize_disk",
]
