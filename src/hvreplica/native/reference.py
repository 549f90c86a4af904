"""The same answers as the compiled kernels in plain Python and numpy: slow, short, and the oracle of their
tests.

The facade uses this module only for files whose fileno() is None; tests compare every kernel with it bit for
bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from hvreplica.errors import Truncated
from hvreplica.native.tables import (
    FILE_OFFSET_MAX,
    HRL_ENTRY,
    HRL_ENTRY_BYTES,
    HRL_META_OPERATION_WRITE,
    HRL_METADATA_HEADER_BYTES,
    PAGE_BYTES,
    Array,
    BadEntry,
    BlockAbsent,
    BlockMap,
    checked_column,
    checked_extents,
    checked_pieces,
    view_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.files import BlockFile
    from hvreplica.native.tables import Octets

_CRC32C_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected; RFC 3720 12.1
_U64_MAX = (1 << 64) - 1
_PRIME64_1 = 0x9E3779B185EBCA87  # of XXH64
_PRIME64_2 = 0xC2B2AE3D27D4EB4F
_PRIME64_3 = 0x165667B19E3779F9
_WINDOW_BYTES = 1 << 20
_PACKED_ENTRY = np.dtype(
    [
        ("byte_offset", "<u8"),
        ("checksum", "<u4"),
        ("data_length", "<u4"),
        ("time_stamp", "<u4"),
        ("meta_operation", "u1"),
        ("data_checksum", "<u4"),
        ("location", "u1"),
        ("reserved", "V6"),
    ]
)


_ZERO_PIECE = (1 << 64) - 1  # a file offset of -1


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_CRC32C_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C_TABLE = _crc32c_table()


def _bytes_of(buffer: Octets) -> Array:
    return np.frombuffer(view_of(buffer), np.uint8)


def _runs_of(flags: Array) -> Array:
    """Return the runs of True in `flags` as int64 rows (first, count)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    firsts, ends = edges[::2], edges[1::2]
    return np.stack((firsts, ends - firsts), axis=1).astype(np.int64)


def _grain_runs(flags: Array, grain_bytes: int, length: int) -> Array:
    runs = _runs_of(flags) * grain_bytes
    if len(runs) and runs[-1].sum() > length:
        runs[-1, 1] = length - runs[-1, 0]
    return runs


def _grain_flags(octets: Array, grain_bytes: int) -> Array:
    if grain_bytes <= 0:
        message = f"grain_bytes must be above 0, not {grain_bytes}"
        raise ValueError(message)
    whole = len(octets) // grain_bytes * grain_bytes
    flags = octets[:whole].reshape(-1, grain_bytes).any(axis=1)
    if whole < len(octets):
        flags = np.append(flags, octets[whole:].any())
    return np.asarray(flags)


def _same_length(a: Octets, b: Octets) -> tuple[Array, Array]:
    first, second = _bytes_of(a), _bytes_of(b)
    if len(first) != len(second):
        message = f"buffers of equal length are needed, not {len(first)} and {len(second)} bytes"
        raise ValueError(message)
    return first, second


def crc32c(buffer: Octets, value: int = 0) -> int:
    """See hvreplica.native.crc32c."""
    crc = value ^ 0xFFFFFFFF
    for octet in view_of(buffer):
        crc = _CRC32C_TABLE[(crc ^ octet) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def byte_sum(buffer: Octets) -> int:
    """See hvreplica.native.byte_sum."""
    return int(_bytes_of(buffer).sum(dtype=np.uint64)) & 0xFFFFFFFF


def byte_sums(buffer: Octets, lengths: Array) -> Array:
    """See hvreplica.native.byte_sums."""
    octets = _bytes_of(buffer)
    sizes = [int(size) for size in checked_column(lengths)]
    if sum(sizes) != len(octets):
        message = f"the lengths add up to {sum(sizes)}, the buffer has {len(octets)} bytes"
        raise ValueError(message)
    sums = np.empty(len(sizes), np.uint32)
    at = 0
    for index, size in enumerate(sizes):
        sums[index] = byte_sum(octets[at : at + size])
        at += size
    return sums


def is_zero(buffer: Octets) -> bool:
    """See hvreplica.native.is_zero."""
    return not _bytes_of(buffer).any()


def data_runs(buffer: Octets, grain_bytes: int = 4096) -> Array:
    """See hvreplica.native.data_runs."""
    octets = _bytes_of(buffer)
    return _grain_runs(_grain_flags(octets, grain_bytes), grain_bytes, len(octets))


def first_difference(a: Octets, b: Octets) -> int:
    """See hvreplica.native.first_difference."""
    first, second = _same_length(a, b)
    places = np.flatnonzero(first != second)
    return int(places[0]) if len(places) else -1


def changed_runs(a: Octets, b: Octets, grain_bytes: int) -> Array:
    """See hvreplica.native.changed_runs."""
    first, second = _same_length(a, b)
    return _grain_runs(_grain_flags(first != second, grain_bytes), grain_bytes, len(first))


def fingerprints(buffer: Octets, block_bytes: int, out: Array | None = None) -> Array:
    """See hvreplica.native.fingerprints."""
    view = view_of(buffer)
    if block_bytes <= 0:
        message = f"block_bytes must be above 0, not {block_bytes}"
        raise ValueError(message)
    blocks = [view[at : at + block_bytes] for at in range(0, len(view), block_bytes)]
    target = np.empty((len(blocks), 16), np.uint8) if out is None else out
    if target.shape != (len(blocks), 16) or target.dtype != np.uint8:
        message = f"out must be uint8 of shape ({len(blocks)}, 16)"
        raise ValueError(message)
    for index, block in enumerate(blocks):
        digest = bytes(16) if is_zero(block) else xxhash.xxh3_128_digest(block)
        target[index] = np.frombuffer(digest, np.uint8)
    return target


def _mix(word: int) -> int:
    """Return the last step of XXH64 over 64 bits."""
    word ^= word >> 33
    word = word * _PRIME64_2 & _U64_MAX
    word ^= word >> 29
    word = word * _PRIME64_3 & _U64_MAX
    return word ^ (word >> 32)


def page_digest(buffer: Octets, first_page: int) -> tuple[int, int]:
    """See hvreplica.native.page_digest."""
    view = view_of(buffer)
    if not 0 <= first_page <= _U64_MAX:
        message = f"a page has a number of 64 bits, not {first_page}"
        raise OverflowError(message)
    low = high = 0
    for at in range(0, len(view), PAGE_BYTES):
        page = bytes(view[at : at + PAGE_BYTES]).ljust(PAGE_BYTES, b"\0")
        if any(page):
            number = first_page + at // PAGE_BYTES
            high_half, low_half = divmod(xxhash.xxh3_128_intdigest(page), 1 << 64)
            low += _mix((low_half + number * _PRIME64_1) & _U64_MAX)
            high += _mix((high_half + number * _PRIME64_2) & _U64_MAX)
    return low & _U64_MAX, high & _U64_MAX


def extents_digest(buffer: Octets, extents: Array) -> tuple[int, int]:
    """See hvreplica.native.extents_digest."""
    view = view_of(buffer)
    _check_length(extents, len(view))
    low = high = at = 0
    for disk_offset, length in checked_extents(extents).tolist():
        if disk_offset % PAGE_BYTES:
            message = f"an extent does not begin with a page of {PAGE_BYTES} bytes"
            raise ValueError(message)
        sums = page_digest(view[at : at + length], disk_offset // PAGE_BYTES)
        low, high, at = low + sums[0], high + sums[1], at + length
    return low & _U64_MAX, high & _U64_MAX


def _bits(bitmap: Octets) -> Array:
    return np.unpackbits(_bytes_of(bitmap), bitorder="little")


def _change_bits(bitmap: Octets, first: int, count: int, value: int) -> None:
    bits = _bits(bitmap)
    if first < 0 or count < 0 or first + count > len(bits):
        message = f"bits {first}..{first + count} are outside of a bitmap of {len(bits)}"
        raise IndexError(message)
    bits[first : first + count] = value
    view_of(bitmap)[:] = np.packbits(bits, bitorder="little").tobytes()


def bitmap_set(bitmap: Octets, first: int, count: int) -> None:
    """See hvreplica.native.bitmap_set."""
    _change_bits(bitmap, first, count, 1)


def bitmap_clear(bitmap: Octets, first: int, count: int) -> None:
    """See hvreplica.native.bitmap_clear."""
    _change_bits(bitmap, first, count, 0)


def bitmap_runs(bitmap: Octets, bit_count: int) -> Array:
    """See hvreplica.native.bitmap_runs."""
    bits = _bits(bitmap)
    if not 0 <= bit_count <= len(bits):
        message = f"{bit_count} bits were asked of a bitmap of {len(bits)}"
        raise IndexError(message)
    return _runs_of(bits[:bit_count].astype(bool))


def bitmap_merge(target: Octets, other: Octets) -> None:
    """See hvreplica.native.bitmap_merge."""
    first, second = _same_length(target, other)
    view_of(target)[:] = (first | second).tobytes()


def bitmap_count(bitmap: Octets) -> int:
    """See hvreplica.native.bitmap_count."""
    return int(_bits(bitmap).sum(dtype=np.uint64))


def parse_hrl_entries(block: Octets, count: int, log_offset: int) -> Array:
    """See hvreplica.native.parse_hrl_entries."""
    octets = _bytes_of(block)
    count_max = max(len(octets) - HRL_METADATA_HEADER_BYTES, 0) // HRL_ENTRY_BYTES
    if not 0 <= count <= count_max:
        message = f"{count} entries were asked of a block that has room for {count_max}"
        raise ValueError(message)
    table = octets[HRL_METADATA_HEADER_BYTES : HRL_METADATA_HEADER_BYTES + count * HRL_ENTRY_BYTES]
    packed = np.frombuffer(table.tobytes(), _PACKED_ENTRY)
    entries = np.zeros(count, HRL_ENTRY)
    for index in range(count):
        row = table[index * HRL_ENTRY_BYTES : (index + 1) * HRL_ENTRY_BYTES]
        expected = ~(byte_sum(row) - byte_sum(row[8:12])) & 0xFFFFFFFF
        if packed["checksum"][index] != expected:
            raise BadEntry(index, "checksum", expected, int(packed["checksum"][index]))
        if packed["meta_operation"][index] != HRL_META_OPERATION_WRITE:
            operation = int(packed["meta_operation"][index])
            raise BadEntry(index, "meta_operation", HRL_META_OPERATION_WRITE, operation)
        entries["log_offset"][index] = log_offset
        log_offset += int(packed["data_length"][index])
    for name in ("byte_offset", "data_length", "time_stamp", "data_checksum", "meta_operation"):
        entries[name] = packed[name]
    return entries


def pack_hrl_entries(extents: Array, time_stamp: int, data_checksums: Array) -> bytes:
    """See hvreplica.native.pack_hrl_entries."""
    rows = checked_extents(extents)
    checksums = checked_column(data_checksums)
    if len(rows) != len(checksums):
        message = f"{len(rows)} extents need as many checksums, not {len(checksums)}"
        raise ValueError(message)
    if (rows[:, 1] > 0xFFFFFFFF).any() or (checksums > 0xFFFFFFFF).any() or not 0 <= time_stamp <= 0xFFFFFFFF:
        message = "lengths, checksums and the time stamp of an entry have 32 bits"
        raise ValueError(message)
    packed = np.zeros(len(rows), _PACKED_ENTRY)
    packed["byte_offset"], packed["data_length"] = rows[:, 0], rows[:, 1]
    packed["time_stamp"], packed["data_checksum"] = time_stamp, checksums
    packed["meta_operation"] = HRL_META_OPERATION_WRITE
    sums = packed.view(np.uint8).reshape(-1, HRL_ENTRY_BYTES).sum(axis=1, dtype=np.uint32)
    packed["checksum"] = ~sums
    return packed.tobytes()


def coalesce(disk_offsets: Array, lengths: Array, log_offsets: Array) -> tuple[Array, Array, Array]:
    """See hvreplica.native.coalesce."""
    starts, sizes, logs = ([int(x) for x in checked_column(a)] for a in (disk_offsets, lengths, log_offsets))
    if not len(starts) == len(sizes) == len(logs):
        message = "disk_offsets, lengths and log_offsets must be of equal length"
        raise ValueError(message)
    if any(
        start + size >= 1 << 64 or log + size >= 1 << 64
        for start, size, log in zip(starts, sizes, logs, strict=True)
    ):
        message = "an extent ends beyond 64 bits"
        raise ValueError(message)
    edges = sorted({*starts, *(start + size for start, size in zip(starts, sizes, strict=True))})
    places = {edge: index for index, edge in enumerate(edges)}
    owners = np.full(max(len(edges) - 1, 0), -1, np.int64)
    for index, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        owners[places[start] : places[start + size]] = index
    pieces: list[list[int]] = []
    for (start, end), owner in zip(pairwise(edges), owners.tolist(), strict=True):
        if owner < 0:
            continue
        log = logs[owner] + start - starts[owner]
        if pieces and pieces[-1][0] + pieces[-1][1] == start and pieces[-1][2] + pieces[-1][1] == log:
            pieces[-1][1] += end - start
        else:
            pieces.append([start, end - start, log])
    columns = np.array(pieces, np.uint64).reshape(-1, 3)
    return columns[:, 0].copy(), columns[:, 1].copy(), columns[:, 2].copy()


def _pieces(
    block_map: BlockMap | None, extents: Array, *, for_write: bool = False
) -> Iterator[tuple[int, int | None, int, int]]:
    """Yield (buffer offset, file offset or None where absent, length, block) for each part of an extent in
    one block.
    """
    at = 0
    for row in checked_extents(extents).tolist():
        offset, length = row
        if offset + length > FILE_OFFSET_MAX:
            message = f"extent ({offset}, {length}) ends beyond 63 bits"
            raise IndexError(message)
        while length > 0:
            block, inside, size = 0, offset, length
            file_offset: int | None = offset
            if block_map is not None:
                block, inside = divmod(offset, block_map.block_bytes)
                size = min(length, block_map.block_bytes - inside)
                base = block_map.file_offset(block, for_write=for_write)
                file_offset = None if base is None else base + inside
                if file_offset is not None and file_offset + size > FILE_OFFSET_MAX:
                    message = f"block {block} ends beyond 63 bits in its file"
                    raise IndexError(message)
            yield at, file_offset, size, block
            at, offset, length = at + size, offset + size, length - size


def _check_length(extents: Array, length: int) -> None:
    total = sum(row[1] for row in checked_extents(extents).tolist())
    if total != length:
        message = f"the extents add up to {total} bytes, the buffer has {length}"
        raise ValueError(message)


def _check_present(block_map: BlockMap | None, extents: Array) -> None:
    for _, file_offset, _, block in _pieces(block_map, extents, for_write=True):
        if file_offset is None:
            raise BlockAbsent(block)


def _read_into(file: BlockFile, view: memoryview, file_offset: int) -> None:
    size = file.size()
    if file_offset + len(view) > size:
        raise Truncated(
            "the file ends inside what was to be read", path=file.path, offset=max(size, file_offset)
        )
    file.read_into(view, file_offset)


def read_extents(file: BlockFile, block_map: BlockMap | None, extents: Array, out: Octets) -> None:
    """See hvreplica.native.read_extents."""
    view = view_of(out)
    _check_length(extents, len(view))
    pieces = list(_pieces(block_map, extents))
    for at, file_offset, length, _ in pieces:
        if file_offset is None:
            view[at : at + length] = bytes(length)
        else:
            _read_into(file, view[at : at + length], file_offset)


def read_pieces(file: BlockFile, pieces: Array, out: Octets) -> None:
    """See hvreplica.native.read_pieces."""
    view = view_of(out)
    rows = checked_pieces(pieces).tolist()
    for row, (file_offset, length, at) in enumerate(rows):
        beyond = file_offset != _ZERO_PIECE and file_offset + length > FILE_OFFSET_MAX
        if at + length > len(view) or beyond:
            message = f"an extent leaves the disk at block or row {row}, or ends beyond 63 bits"
            raise IndexError(message)
    for file_offset, length, at in rows:
        if file_offset == _ZERO_PIECE:
            view[at : at + length] = bytes(length)
        elif length:
            _read_into(file, view[at : at + length], file_offset)


def write_extents(file: BlockFile, block_map: BlockMap | None, extents: Array, data: Octets) -> None:
    """See hvreplica.native.write_extents."""
    view = view_of(data)
    _check_length(extents, len(view))
    _check_present(block_map, extents)
    for at, file_offset, length, _ in _pieces(block_map, extents, for_write=True):
        if file_offset is not None:
            file.write(view[at : at + length], file_offset)


def copy_extents(
    source: BlockFile, source_offsets: Array, file: BlockFile, block_map: BlockMap | None, extents: Array
) -> None:
    """See hvreplica.native.copy_extents."""
    offsets = checked_column(source_offsets).tolist()
    rows = checked_extents(extents)
    if len(offsets) != len(rows):
        message = f"{len(rows)} extents need as many source offsets, not {len(offsets)}"
        raise ValueError(message)
    for offset, length in zip(offsets, rows[:, 1].tolist(), strict=True):
        if offset + length > FILE_OFFSET_MAX:
            message = f"source range ({offset}, {length}) ends beyond 63 bits"
            raise IndexError(message)
    _check_present(block_map, rows)
    window = memoryview(bytearray(_WINDOW_BYTES))
    for source_offset, row in zip(offsets, rows, strict=True):
        for at, file_offset, length, _ in _pieces(block_map, row[np.newaxis], for_write=True):
            for done in range(0, length, _WINDOW_BYTES):
                part = window[: min(_WINDOW_BYTES, length - done)]
                _read_into(source, part, source_offset + at + done)
                if file_offset is not None:
                    file.write(part, file_offset + done)
