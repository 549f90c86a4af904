"""The VHDX's own log: a ring of entries, each a set of 4 KiB updates to BAT, metadata, region tables.

    entry    header sector: 64-byte header, 126 descriptors
             more descriptor sectors of 128 each, where there are more descriptors
             one data sector per data descriptor; its first 8 and last 4 bytes stand in the descriptor, and in
             their place signature and sequence number

Finding the sequence to replay is here too, as a pure function over entry headers. Spec: [MS-VHDX] 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    HvReplicaError,
    Truncated,
)
from hvreplica.formats.layout import GUID, Field, Layout
from hvreplica.formats.vhdx_header import FILE_BYTES_MAX
from hvreplica.native import crc32c
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from typing_extensions import Buffer

LOG_SECTOR_BYTES = 4096
ENTRY_SIGNATURE = b"loge"
ZERO_SIGNATURE = b"zero"
DESCRIPTOR_SIGNATURE = b"desc"
DATA_SIGNATURE = b"data"
ENTRY_HEADER_BYTES = 64
DESCRIPTOR_BYTES = 32
DESCRIPTORS_IN_HEADER_SECTOR = 126
LEADING_BYTES = 8
TRAILING_BYTES = 4
# No known writer makes entries above 16 MiB, most logs have 1 MiB; one entry is held in memory as a whole.
ENTRY_BYTES_MAX = 64 * MIB

LOG_ENTRY_HEADER = Layout(
    "log entry header",
    spec="[MS-VHDX] 2.3.1.1",
    size=ENTRY_HEADER_BYTES,
    fields=(
        Field("signature", "4s", '"loge"'),
        Field("checksum", "I", "CRC-32C of the whole entry with this field 0"),
        Field("entry_length", "I", "multiple of 4096; descriptor and data sectors together"),
        Field("tail", "I", "offset in the log of the first entry still needed; multiple of 4096"),
        Field("sequence_number", "Q", "one more than in the entry before; above 0"),
        Field("descriptor_count", "I", "may be 0"),
        Field("reserved", "I", "0"),
        Field("log_guid", GUID, "LogGuid of the header at the time; another one makes the entry dead"),
        Field("flushed_file_offset", "Q", "file size that was durable; a shorter file cannot be replayed"),
        Field("last_file_offset", "Q", "size that holds all structures; replay extends the file to it"),
    ),
)
ZERO_DESCRIPTOR = Layout(
    "zero descriptor",
    spec="[MS-VHDX] 2.3.1.2",
    size=DESCRIPTOR_BYTES,
    fields=(
        Field("zero_signature", "4s", '"zero"'),
        Field("reserved", "I", "0"),
        Field("zero_length", "Q", "multiple of 4096"),
        Field("file_offset", "Q", "multiple of 4096"),
        Field("sequence_number", "Q", "that of the entry"),
    ),
)
DATA_DESCRIPTOR = Layout(
    "data descriptor",
    spec="[MS-VHDX] 2.3.1.3",
    size=DESCRIPTOR_BYTES,
    fields=(
        Field("data_signature", "4s", '"desc"'),
        Field("trailing_bytes", "4s", "last 4 bytes of the update"),
        Field("leading_bytes", "8s", "first 8 bytes of the update"),
        Field("file_offset", "Q", "multiple of 4096"),
        Field("sequence_number", "Q", "that of the entry"),
    ),
)
DATA_SECTOR = Layout(
    "data sector",
    spec="[MS-VHDX] 2.3.1.4",
    size=LOG_SECTOR_BYTES,
    fields=(
        Field("data_signature", "4s", '"data"'),
        Field("sequence_high", "I", "upper half of the entry's sequence number"),
        Field("data", "4084s", "bytes 8 to 4091 of the update"),
        Field("sequence_low", "I", "lower half of the entry's sequence number"),
    ),
)

# The same 32 bytes for both kinds; a table of descriptors stays an array.
_DESCRIPTOR = np.dtype(
    [
        ("signature", "S4"),
        ("trailing", "<u4"),
        ("leading", "<u8"),
        ("file_offset", "<u8"),
        ("sequence_number", "<u8"),
    ]
)


@dataclass(frozen=True, slots=True)
class LogEntryHeader:
    """The header of one entry as it was read. log_offset: where it stands in the ring."""

    entry_length: int
    tail: int
    sequence_number: int
    descriptor_count: int
    log_guid: uuid.UUID
    flushed_file_offset: int
    last_file_offset: int
    signature: bytes = ENTRY_SIGNATURE
    checksum: int = 0
    log_offset: int = 0

    @property
    def descriptor_sector_count(self) -> int:
        """Sectors that hold the header and all descriptors."""
        return descriptor_sectors(self.descriptor_count)

    def validate(self, *, log_guid: uuid.UUID, log_length: int) -> None:
        """Check each field; an entry that fails is dead and no error of the file.

        Raises: BadSignature, FieldOutOfRange. Spec: [MS-VHDX] 2.3.1.1.
        """
        if self.signature != ENTRY_SIGNATURE:
            raise BadSignature(
                "no log entry", field="signature", expected=ENTRY_SIGNATURE, actual=self.signature
            )
        if self.log_guid != log_guid:
            raise self._refuse("log_guid", log_guid, self.log_guid)
        length = self.entry_length
        if length % LOG_SECTOR_BYTES or not LOG_SECTOR_BYTES <= length <= min(log_length, ENTRY_BYTES_MAX):
            raise self._refuse("entry_length", f"a multiple of 4096, at most {log_length}", length)
        if self.tail % LOG_SECTOR_BYTES or self.tail >= log_length:
            raise self._refuse("tail", f"a multiple of 4096 below {log_length}", self.tail)
        if self.sequence_number == 0:
            raise self._refuse("sequence_number", "above 0", 0)
        if self.descriptor_sector_count * LOG_SECTOR_BYTES > length:
            raise self._refuse("descriptor_count", f"what fits into {length} bytes", self.descriptor_count)
        if max(self.flushed_file_offset, self.last_file_offset) > FILE_BYTES_MAX:
            largest = max(self.flushed_file_offset, self.last_file_offset)
            raise self._refuse("flushed_file_offset, last_file_offset", f"at most {FILE_BYTES_MAX}", largest)

    def _refuse(self, field: str, expected: object, actual: object) -> FieldOutOfRange:
        return FieldOutOfRange(
            "a log entry has a bad field",
            offset=self.log_offset,
            field=field,
            expected=expected,
            actual=actual,
            spec=LOG_ENTRY_HEADER.spec,
        )


@dataclass(frozen=True, slots=True)
class LogUpdates:
    """What one entry does. All arrays are in the order of its descriptors.

    data_offsets: int64 (n,), data: uint8 (n, 4096), data_positions: (n,) place among the descriptors;
    zero_offsets, zero_lengths, zero_positions: int64 (m,).
    """

    header: LogEntryHeader
    data_offsets: NDArray[np.int64]
    data: NDArray[np.uint8]
    data_positions: NDArray[np.int64]
    zero_offsets: NDArray[np.int64]
    zero_lengths: NDArray[np.int64]
    zero_positions: NDArray[np.int64]


def descriptor_sectors(descriptor_count: int) -> int:
    """Return how many sectors hold the header and this many descriptors."""
    descriptor_slots = LOG_SECTOR_BYTES // DESCRIPTOR_BYTES
    return -(-(descriptor_count + descriptor_slots - DESCRIPTORS_IN_HEADER_SECTOR) // descriptor_slots)


def entry_bytes(data_sector_count: int) -> int:
    """Return the length of an entry with this many data descriptors and no others."""
    return (descriptor_sectors(data_sector_count) + data_sector_count) * LOG_SECTOR_BYTES


def unpack_entry_header(buffer: Buffer, *, log_offset: int) -> LogEntryHeader:
    """Return the header at the start of `buffer`, unchecked. Raises: Truncated."""
    values = LOG_ENTRY_HEADER.unpack(buffer)
    del values["reserved"]
    return LogEntryHeader(**values, log_offset=log_offset)


def unpack_entry(buffer: Buffer, *, log_offset: int, log_guid: uuid.UUID, log_length: int) -> LogUpdates:
    """Return the entry that `buffer` holds from its first byte to its last, checked in every field.

    Raises: FormatError of the kind that fits; such an entry is dead. Spec: [MS-VHDX] 2.3.1.
    """
    header = unpack_entry_header(buffer, log_offset=log_offset)
    header.validate(log_guid=log_guid, log_length=log_length)
    octets = np.frombuffer(memoryview(buffer), np.uint8)
    if len(octets) < header.entry_length:
        raise Truncated(
            "a log entry does not fit", offset=log_offset, expected=header.entry_length, actual=len(octets)
        )
    octets = octets[: header.entry_length]
    descriptor_end = header.descriptor_sector_count * LOG_SECTOR_BYTES
    table = octets[ENTRY_HEADER_BYTES:descriptor_end].view(_DESCRIPTOR)[: header.descriptor_count]
    is_data = table["signature"] == DESCRIPTOR_SIGNATURE
    is_zero = table["signature"] == ZERO_SIGNATURE
    sectors = octets[descriptor_end:].reshape(-1, LOG_SECTOR_BYTES)
    _check_descriptors(header, table, is_data | is_zero, int(is_data.sum()), len(sectors))
    _check_data_sectors(header, sectors)
    _check_entry_checksum(header, octets)
    described = table[is_data]
    data = sectors.copy()
    data[:, :LEADING_BYTES] = (
        np.ascontiguousarray(described["leading"]).view(np.uint8).reshape(-1, LEADING_BYTES)
    )
    data[:, -TRAILING_BYTES:] = (
        np.ascontiguousarray(described["trailing"]).view(np.uint8).reshape(-1, TRAILING_BYTES)
    )
    return LogUpdates(
        header=header,
        data_offsets=described["file_offset"].astype(np.int64),
        data=data,
        data_positions=np.flatnonzero(is_data),
        zero_offsets=table["file_offset"][is_zero].astype(np.int64),
        zero_lengths=table["leading"][is_zero].astype(np.int64),
        zero_positions=np.flatnonzero(is_zero),
    )


def _check_descriptors(
    header: LogEntryHeader,
    table: NDArray[Any],
    is_known: NDArray[np.bool_],
    data_count: int,
    sector_count: int,
) -> None:
    if not is_known.all():
        raise _dead(
            header, BadSignature, "signature", "desc or zero", bytes(table["signature"][np.argmin(is_known)])
        )
    if data_count != sector_count:
        raise _dead(
            header, FieldOutOfRange, "descriptor_count", f"{sector_count} data descriptors", data_count
        )
    if (table["sequence_number"] != np.uint64(header.sequence_number)).any():
        raise _dead(
            header, FieldOutOfRange, "sequence_number", header.sequence_number, "another in a descriptor"
        )
    is_zero = table["signature"] == ZERO_SIGNATURE
    lengths = np.where(is_zero, table["leading"], np.uint64(LOG_SECTOR_BYTES))
    limit = np.uint64(FILE_BYTES_MAX)
    if (lengths > limit).any() or (table["file_offset"] > limit - np.minimum(lengths, limit)).any():
        raise _dead(
            header, FieldOutOfRange, "file_offset", f"an end of at most {FILE_BYTES_MAX}", "one beyond it"
        )
    if ((lengths | table["file_offset"]) % np.uint64(LOG_SECTOR_BYTES)).any():
        raise _dead(header, FieldOutOfRange, "file_offset", "multiples of 4096", "another value")


def _check_data_sectors(header: LogEntryHeader, sectors: NDArray[np.uint8]) -> None:
    heads = np.ascontiguousarray(sectors[:, :8]).view("<u4").reshape(-1, 2)
    ends = np.ascontiguousarray(sectors[:, -4:]).view("<u4").reshape(-1)
    good = (
        (heads[:, 0] == np.uint32(int.from_bytes(DATA_SIGNATURE, "little")))
        & (heads[:, 1] == np.uint32(header.sequence_number >> 32))
        & (ends == np.uint32(header.sequence_number & 0xFFFF_FFFF))
    )
    if not good.all():
        raise _dead(
            header, BadSignature, "data sector", "signature and sequence number of its entry", "others"
        )


def _check_entry_checksum(header: LogEntryHeader, octets: NDArray[np.uint8]) -> None:
    computed = crc32c(octets[:4].data)
    computed = crc32c(bytes(4), computed)
    computed = crc32c(octets[8:].data, computed)
    if computed != header.checksum:
        raise _dead(header, ChecksumMismatch, "checksum", f"0x{computed:08x}", f"0x{header.checksum:08x}")


def _dead(
    header: LogEntryHeader, kind: type[HvReplicaError], field: str, expected: object, actual: object
) -> HvReplicaError:
    return kind(
        "a log entry is not whole",
        offset=header.log_offset,
        field=field,
        expected=expected,
        actual=actual,
        spec="[MS-VHDX] 2.3.1",
    )


def pack_entry(header: LogEntryHeader, file_offsets: NDArray[np.int64], data: NDArray[np.uint8]) -> bytes:
    """Return the entry that writes data[i], 4096 bytes, to file_offsets[i], with its checksum.

    entry_length, descriptor_count, signature and checksum of `header` are computed here. The result is read
    back and compared before it is returned.
    """
    count = len(file_offsets)
    first_data = descriptor_sectors(count)
    octets = np.zeros(entry_bytes(count), np.uint8)
    octets[:ENTRY_HEADER_BYTES] = np.frombuffer(
        LOG_ENTRY_HEADER.pack(
            signature=ENTRY_SIGNATURE,
            entry_length=len(octets),
            tail=header.tail,
            sequence_number=header.sequence_number,
            descriptor_count=count,
            log_guid=header.log_guid,
            flushed_file_offset=header.flushed_file_offset,
            last_file_offset=header.last_file_offset,
        ),
        np.uint8,
    )
    table = octets[ENTRY_HEADER_BYTES : first_data * LOG_SECTOR_BYTES].view(_DESCRIPTOR)[:count]
    sectors = octets[first_data * LOG_SECTOR_BYTES :].reshape(-1, LOG_SECTOR_BYTES)
    sectors[:] = data
    table["signature"] = DESCRIPTOR_SIGNATURE
    table["trailing"] = np.ascontiguousarray(data[:, -TRAILING_BYTES:]).view("<u4").reshape(-1)
    table["leading"] = np.ascontiguousarray(data[:, :LEADING_BYTES]).view("<u8").reshape(-1)
    table["file_offset"] = file_offsets.astype(np.uint64)
    table["sequence_number"] = np.uint64(header.sequence_number)
    signature = np.frombuffer(DATA_SIGNATURE, np.uint8)
    sectors[:, :4] = signature
    sectors[:, 4:8] = np.frombuffer((header.sequence_number >> 32).to_bytes(4, "little"), np.uint8)
    sectors[:, -4:] = np.frombuffer((header.sequence_number & 0xFFFF_FFFF).to_bytes(4, "little"), np.uint8)
    octets[4:8] = np.frombuffer(crc32c(octets.data).to_bytes(4, "little"), np.uint8)
    again = unpack_entry(
        octets.data, log_offset=header.log_offset, log_guid=header.log_guid, log_length=ENTRY_BYTES_MAX
    )
    if not (np.array_equal(again.data, data) and np.array_equal(again.data_offsets, file_offsets)):
        raise AssertionError("a log entry does not read back as it was meant")
    return octets.tobytes()


def choose_active_sequence(entries: Mapping[int, LogEntryHeader], *, log_length: int) -> list[LogEntryHeader]:
    """Return the entries to replay, tail first; empty if there is no valid sequence.

    entries: the valid entries by their offset in the log. Pure. A chain is followed as far as entries join
    without a gap and sequence numbers grow by one; it counts if its last entry's tail is inside it; among
    those the one with the highest last sequence number is active. Work is linear: no start inside a chain
    that failed can succeed, because its chain would be a part of the failed one. Spec: [MS-VHDX] 2.3.3.
    """
    best: list[LogEntryHeader] = []
    failed: set[int] = set()
    for start in sorted(entries):
        if start in failed:
            continue
        chain: list[LogEntryHeader] = []
        position = start
        while (entry := entries.get(position)) is not None and (
            not chain or entry.sequence_number == chain[-1].sequence_number + 1
        ):
            chain.append(entry)
            position = (position + entry.entry_length) % log_length
        positions = [entry.log_offset for entry in chain]
        if chain[-1].tail not in positions:
            failed.update(positions)
        elif not best or chain[-1].sequence_number > best[-1].sequence_number:
            best = chain[positions.index(chain[-1].tail) :]
        else:
            failed.update(positions)
    return best


def raise_no_sequence(*, log_offset: int) -> None:
    """Raise the error of a log that must be replayed and cannot. Spec: [MS-VHDX] 2.3.3."""
    raise FormatError(
        "the file's own log is not empty, and holds no valid sequence of entries",
        offset=log_offset,
        field="log_guid",
        spec="[MS-VHDX] 2.3.3",
        hint="the file was damaged after an unclean stop; restore it from a copy",
    )
