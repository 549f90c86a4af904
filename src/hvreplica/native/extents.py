"""Extents: which write is the newest at each place, and the bytes of a disk through its block map.

Payload calls go to the descriptor in C, without the GIL; a file whose fileno() is None takes the reference
path, with the same result through BlockFile.read_into() and write(). Nothing is durable until the file's
sync(). Reads and writes of disjoint ranges may run in many threads.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from hvreplica.errors import Truncated
from hvreplica.native import reference
from hvreplica.native.library import ffi, lib, octets, u64s, writable_octets, writable_u64s
from hvreplica.native.tables import (
    Array,
    BlockAbsent,
    BlockMap,
    checked_column,
    checked_extents,
    checked_pieces,
)

if TYPE_CHECKING:
    from hvreplica.files import BlockFile
    from hvreplica.native.tables import Octets

WINDOW_BYTES = 1 << 20  # what copy_extents() holds in memory; stays within a processor's own cache


def coalesce(disk_offsets: Array, lengths: Array, log_offsets: Array) -> tuple[Array, Array, Array]:
    """Return for each byte the newest of the extents that cover it, as uint64 (disk_offsets, lengths,
    log_offsets).

    Input in any disk order, oldest first. Output sorted by disk offset, disjoint, at most twice as many rows
    as came in; neighbours are one row where both offsets continue. Extents of length 0 cover nothing. Raises:
    ValueError if the columns differ in length or an extent ends beyond 64 bits.
    """
    columns = [checked_column(disk_offsets), checked_column(lengths), checked_column(log_offsets)]
    count = len(columns[0])
    if not count == len(columns[1]) == len(columns[2]):
        message = "disk_offsets, lengths and log_offsets must be of equal length"
        raise ValueError(message)
    result = np.empty((3, 2 * count), np.uint64)
    scratch = np.empty(4 * count, np.uint64)
    pointers = [u64s(column) for column in columns]
    targets = [writable_u64s(row) for row in result]
    source = ffi.new("struct hvr_source_extents *", [*pointers, count])
    target = ffi.new("struct hvr_target_extents *", [*targets, 2 * count, 0])
    if lib.hvr_coalesce(source, target, writable_u64s(scratch), len(scratch)) != lib.HVR_OK:
        message = "an extent ends beyond 64 bits"
        raise ValueError(message)
    return result[0, : target.count], result[1, : target.count], result[2, : target.count]


def read_extents(file: BlockFile, block_map: BlockMap | None, extents: Array, out: Octets) -> None:
    """Fill `out` with the bytes of the guest's extents, one after another; absent blocks read as zeros.

    block_map: None where file offset is disk offset. What follows each other in the file is read with one
    call, so sorted extents are fastest. `out` is undefined after an error. Raises: Truncated with the offset
    of the first byte that the file does not have; IndexError if an extent leaves the block map; ValueError
    unless the extents add up to the length of `out`; OSError.
    """
    descriptor = file.fileno()
    if descriptor is None:
        reference.read_extents(file, block_map, extents, out)
        return
    rows, view, place = checked_extents(extents), writable_octets(out), ffi.new("struct hvr_place *")
    table, kept = map_table(block_map)
    status = lib.hvr_read_extents(descriptor, table, u64s(rows), len(rows), view, len(view), place)
    del kept
    if status != lib.HVR_OK:
        _fail(status, place, "read", (file,))


def read_pieces(file: BlockFile, pieces: Array, out: Octets) -> None:
    """Fill parts of `out` from anywhere in the file.

    pieces: int64 or uint64 (n, 3) of (file_offset, length, offset in `out`), bytes; a file offset of -1
    stands for zeros. Pieces that follow each other in file and buffer are read with one call. Raises:
    IndexError for a piece that does not lie in `out`, before anything is read; Truncated; OSError.
    """
    descriptor = file.fileno()
    if descriptor is None:
        reference.read_pieces(file, pieces, out)
        return
    rows, view, place = checked_pieces(pieces), writable_octets(out), ffi.new("struct hvr_place *")
    status = lib.hvr_read_pieces(descriptor, u64s(rows), len(rows), view, len(view), place)
    if status != lib.HVR_OK:
        _fail(status, place, "read", (file,))


def write_extents(file: BlockFile, block_map: BlockMap | None, extents: Array, data: Octets) -> None:
    """Write `data` to the guest's extents, one after another, in this order.

    Raises: BlockAbsent if a block has no place, IndexError if an extent leaves the block map, ValueError
    unless the extents add up to the length of `data`, all before anything is written; OSError, after which
    any part of it may be.
    """
    descriptor = file.fileno()
    if descriptor is None:
        reference.write_extents(file, block_map, extents, data)
        return
    rows, view, place = checked_extents(extents), octets(data), ffi.new("struct hvr_place *")
    table, kept = map_table(block_map)
    status = lib.hvr_write_extents(descriptor, table, u64s(rows), len(rows), view, len(view), place)
    del kept
    if status != lib.HVR_OK:
        _fail(status, place, "write", (file,))


def copy_extents(
    source: BlockFile, source_offsets: Array, file: BlockFile, block_map: BlockMap | None, extents: Array
) -> None:
    """Copy source[source_offsets[i]:][:length of extents[i]] to the guest's extents[i], in this order.

    Two distinct files. Memory is bounded by WINDOW_BYTES. Neighbours in the source are read with one call,
    neighbours in the target written with one, whatever order the other side has. Raises: BlockAbsent,
    IndexError or ValueError before anything is written; Truncated if the source ends too early, or OSError,
    after which any part of it may be written.
    """
    descriptor, source_descriptor = file.fileno(), source.fileno()
    if descriptor is None or source_descriptor is None:
        reference.copy_extents(source, source_offsets, file, block_map, extents)
        return
    rows, offsets = checked_extents(extents), checked_column(source_offsets)
    if len(rows) != len(offsets):
        message = f"{len(rows)} extents need as many source offsets, not {len(offsets)}"
        raise ValueError(message)
    window = np.empty(max(min(int(rows[:, 1].sum(dtype=np.float64)), WINDOW_BYTES), 1), np.uint8)
    place, (table, kept) = ffi.new("struct hvr_place *"), map_table(block_map)
    target, length = writable_octets(window), len(window)
    status = lib.hvr_copy_extents(
        source_descriptor, u64s(offsets), descriptor, table, u64s(rows), len(rows), target, length, place
    )
    del kept
    if status != lib.HVR_OK:
        _fail(status, place, "copy", (file, source))


def map_table(block_map: BlockMap | None) -> tuple[Any, Any]:
    """Return the C view of a block map and what keeps it alive."""
    if block_map is None:
        return ffi.NULL, None
    entries = u64s(block_map.entries)
    fields = [
        entries,
        len(block_map.entries),
        block_map.block_bytes,
        block_map.chunk_ratio,
        block_map.offset_mask,
    ]
    return ffi.new("struct hvr_block_map *", fields), entries


def _fail(status: int, place: Any, operation: str, files: tuple[BlockFile, ...]) -> NoReturn:
    if status == lib.HVR_ABSENT:
        raise BlockAbsent(place.index)
    if status == lib.HVR_OUT_OF_RANGE:
        message = f"an extent leaves the disk at block or row {place.index}, or ends beyond 63 bits"
        raise IndexError(message)
    if status == lib.HVR_LENGTH:
        message = "the extents do not add up to the length of the buffer"
        raise ValueError(message)
    path = files[place.file].path
    if status == lib.HVR_TRUNCATED:
        raise Truncated("the file ends inside what was to be read", path=path, offset=place.offset)
    error = OSError(-status, os.strerror(-status), os.fspath(path))
    error.add_note(f"{operation} {path} at offset {place.offset}")
    raise error
