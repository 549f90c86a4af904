"""Kernels over bytes, bitmaps, log entries and extents: buffers and numpy arrays in, numpy arrays out.

Every call is a batch and releases the GIL; buffers that it reads or writes must not change meanwhile. Nothing
is kept after a call returns, but for the entries of a BlockMap. Answers are those of native/reference.py, bit
for bit.
"""

from __future__ import annotations

from hvreplica.native.bat import BatFault, BatRules, BatWalk
from hvreplica.native.entries import pack_hrl_entries, parse_hrl_entries
from hvreplica.native.extents import coalesce, copy_extents, read_extents, read_pieces, write_extents
from hvreplica.native.kernels import KERNELS
from hvreplica.native.library import available_variants, kernel_variant
from hvreplica.native.tables import HRL_ENTRY, PAGE_BYTES, BadEntry, BlockAbsent, BlockMap

__all__ = [
    "HRL_ENTRY",
    "PAGE_BYTES",
    "BadEntry",
    "BatFault",
    "BatRules",
    "BatWalk",
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
    "extents_digest",
    "fingerprints",
    "first_difference",
    "is_zero",
    "kernel_variant",
    "pack_hrl_entries",
    "page_digest",
    "parse_hrl_entries",
    "read_extents",
    "read_pieces",
    "write_extents",
]

crc32c = KERNELS.crc32c
byte_sum = KERNELS.byte_sum
byte_sums = KERNELS.byte_sums
is_zero = KERNELS.is_zero
data_runs = KERNELS.data_runs
first_difference = KERNELS.first_difference
changed_runs = KERNELS.changed_runs
fingerprints = KERNELS.fingerprints
page_digest = KERNELS.page_digest
extents_digest = KERNELS.extents_digest
bitmap_set = KERNELS.bitmap_set
bitmap_clear = KERNELS.bitmap_clear
bitmap_runs = KERNELS.bitmap_runs
bitmap_merge = KERNELS.bitmap_merge
bitmap_count = KERNELS.bitmap_count
