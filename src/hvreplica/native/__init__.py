"""Kernels over bytes, bitmaps, log entries and extents: buffers and numpy arrays in, numpy arrays out.

Every call is a batch and releases the GIL; buffers that it reads or writes must not change meanwhile. Nothing is
kept after a call returns, but for the entries of a BlockMap.
"""

from __future__ import annotations

from hvreplica.native.reference import (
    bitmap_clear,
    bitmap_count,
    bitmap_merge,
    bitmap_runs,
    bitmap_set,
    byte_sum,
    byte_sums,
    changed_runs,
    coalesce,
    copy_extents,
    crc32c,
    data_runs,
    fingerprints,
    first_difference,
    is_zero,
    pack_hrl_entries,
    parse_hrl_entries,
    read_extents,
    write_extents,
)
from hvreplica.native.tables import HRL_ENTRY, BadEntry, BlockAbsent, BlockMap

__all__ = [
    "HRL_ENTRY",
    "BadEntry",
    "BlockAbsent",
    "BlockMap",
    "available_variants",
    "bitmap_clear",
    "bitmap_count",
    "bitmap_merge",
    "bitmap_runs",
    "bitmap_set",
    "byte_sum",
    "byte_sums",
    "changed_runs",
    "coalesce",
    "copy_extents",
    "crc32c",
    "data_runs",
    "fingerprints",
    "first_difference",
    "is_zero",
    "kernel_variant",
    "pack_hrl_entries",
    "parse_hrl_entries",
    "read_extents",
    "write_extents",
]


def kernel_variant() -> str:
    """Return the name of the kernels in use."""
    return "reference"


def available_variants() -> tuple[str, ...]:
    """Return the names of the kernels that this machine can run, slowest first."""
    return ("reference",)
