"""Metadata entries of an .hrl, a whole block at a time. Spec: [MS-HRL] 2.4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.native.library import ffi, lib, octets, u64s, writable_octets
from hvreplica.native.tables import (
    HRL_ENTRY,
    HRL_ENTRY_BYTES,
    HRL_METADATA_HEADER_BYTES,
    Array,
    BadEntry,
    checked_column,
    checked_extents,
)

if TYPE_CHECKING:
    from hvreplica.native.tables import Octets

_U32_MAX = 0xFFFFFFFF


def parse_hrl_entries(block: Octets, count: int, log_offset: int) -> Array:
    """Return the `count` entries that stand after the 32-byte header of a metadata block, as rows of
    HRL_ENTRY.

    log_offset: where the data of the first entry stands in the log; each entry's data follows the one before.
    Entry checksums and operations are checked, data and disk bounds are not. Reserved and location are not
    looked at. Raises: BadEntry for the first entry that is damaged or no write; ValueError if the block is
    too short for `count` entries or the data would end beyond 64 bits.
    """
    view = octets(block)
    count_max = max(len(view) - HRL_METADATA_HEADER_BYTES, 0) // HRL_ENTRY_BYTES
    if not 0 <= count <= count_max:
        message = f"{count} entries were asked of a block that has room for {count_max}"
        raise ValueError(message)
    entries = np.empty(count, HRL_ENTRY)
    target = ffi.cast("struct hvr_hrl_entry *", writable_octets(entries))
    bad = ffi.new("struct hvr_bad_entry *")
    status = lib.hvr_hrl_parse(view, len(view), count, log_offset, target, bad)
    if status in (lib.HVR_CHECKSUM, lib.HVR_OPERATION):
        reason = "checksum" if status == lib.HVR_CHECKSUM else "meta_operation"
        raise BadEntry(bad.index, reason, bad.expected, bad.actual)
    if status != lib.HVR_OK:
        message = f"the data of {count} entries from log offset {log_offset} on ends beyond 64 bits"
        raise ValueError(message)
    return entries


def pack_hrl_entries(extents: Array, time_stamp: int, data_checksums: Array) -> bytes:
    """Return the packed write entries for `extents` (disk offset, length), 32 bytes each, with their
    checksums.

    time_stamp: seconds since 2000-01-01 UTC, for all. data_checksums: one per extent as it stands in the
    entry, that is the complement of byte_sum(). Raises: ValueError if a length, checksum or the time stamp
    has more than 32 bits.
    """
    rows, checksums = checked_extents(extents), checked_column(data_checksums)
    if len(rows) != len(checksums):
        message = f"{len(rows)} extents need as many checksums, not {len(checksums)}"
        raise ValueError(message)
    packed = bytearray(len(rows) * HRL_ENTRY_BYTES)
    status = lib.HVR_OUT_OF_RANGE
    if 0 <= time_stamp <= _U32_MAX:
        status = lib.hvr_hrl_pack(u64s(rows), u64s(checksums), len(rows), time_stamp, writable_octets(packed))
    if status != lib.HVR_OK:
        message = "lengths, checksums and the time stamp of an entry have 32 bits"
        raise ValueError(message)
    return bytes(packed)
