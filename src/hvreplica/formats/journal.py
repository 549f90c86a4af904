"""The intent journal of one disk: which regions of 4 MiB may differ from what is durably cut.

    0        header, copy 0, 512 bytes, then zeros
    4096     header, copy 1, 512 bytes, then zeros
    8192     bitmap sector 0, 512 bytes; sector 1; and so on, one for each 3968 regions of the disk

The valid copy of the header with the higher sequence counts. Each sector stands for itself: one whose
checksum or number is wrong, or that the file does not have, says that all of its regions are marked. So a
torn write costs reading, never a change. Bits are least significant first; region r is bit r % 3968 of sector
r // 3968. Little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats.guid import NIL
from hvreplica.formats.layout import GUID, Field, Layout
from hvreplica.native import crc32c
from hvreplica.units import MIB, TIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from numpy.typing import NDArray
    from typing_extensions import Buffer

SIGNATURE = b"hvintent"
VERSION = 1
SPEC = "docs/formats/journal.md"
HEADER_BYTES = 512
HEADER_SPACING_BYTES = 4096  # no sector of a drive, of 512 or 4096 bytes, has both copies
BITMAP_OFFSET = 2 * HEADER_SPACING_BYTES
SECTOR_BYTES = 512
SECTOR_HEADER_BYTES = 16
SECTOR_BITMAP_BYTES = SECTOR_BYTES - SECTOR_HEADER_BYTES
SECTOR_REGIONS = SECTOR_BITMAP_BYTES * 8
REGION_BYTES = 4 * MIB
DISK_BYTES_MAX = 64 * TIB  # bounds the journal to 2.1 MiB
REGION_COUNT_MAX = DISK_BYTES_MAX // REGION_BYTES
SEQUENCE_MAX = 1 << 63  # what counts from 0 never gets there


class JournalState(IntEnum):
    """What the recorded identity is worth."""

    NOT_RECORDED = 0
    IN_USE = 1
    CLEAN = 2


HEADER = Layout(
    "intent journal header",
    spec=SPEC,
    size=HEADER_BYTES,
    fields=(
        Field("signature", "8s", '"hvintent"'),
        Field("version", "I", "1"),
        Field("checksum", "I", "CRC-32C of these 512 bytes with this field 0"),
        Field("sequence", "Q", "counts the headers written; the valid copy with the higher one counts"),
        Field("disk_index", "I", "the disk's place in its VM"),
        Field("state", "I", "0 no identity recorded, 1 in use, 2 stopped cleanly"),
        Field("region_bytes", "I", "4194304"),
        Field("reserved_1", "4s", "0"),
        Field("virtual_bytes", "Q", "size of the disk, a multiple of 512, at most 64 TiB"),
        Field("data_write_guid", GUID, "of a VHDX when this was recorded; nil for other formats"),
        Field("next_guid", GUID, "the DataWriteGuid that the disk is about to get; nil when it has it"),
        Field("file_bytes", "Q", "length of the disk's file"),
        Field("mtime_ns", "q", "its last change, Unix time in ns; 0 not known"),
        Field("inode", "Q", "its inode number"),
        Field("device", "Q", "number of the file system that has it"),
        Field("reserved_2", "400s", "0"),
    ),
)
SECTOR = Layout(
    "intent journal bitmap sector",
    spec=SPEC,
    size=SECTOR_BYTES,
    fields=(
        Field("checksum", "I", "CRC-32C of the 508 bytes that follow"),
        Field("number", "I", "place among the bitmap sectors, from 0"),
        Field("sequence", "Q", "counts the writes of the journal; for people"),
        Field("bits", "496s", "3968 regions, least significant bit first; 1 = marked"),
    ),
)
_SECTOR_ROW = np.dtype(
    [("checksum", "<u4"), ("number", "<u4"), ("sequence", "<u8"), ("bits", "u1", (SECTOR_BITMAP_BYTES,))]
)


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    """What a disk's file looked like when it was recorded.

    data_write_guid: of a VHDX, else None. next_guid: what the DataWriteGuid is about to become, while that
    change is under way. mtime_ns: Unix time, 0 where it says nothing, as for a block device. device: number
    of the file system, which some change at each mount.
    """

    data_write_guid: UUID | None
    file_bytes: int
    mtime_ns: int
    inode: int
    device: int
    next_guid: UUID | None = None


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """The header's values. identity: None while nothing is recorded."""

    sequence: int
    disk_index: int
    virtual_bytes: int
    state: JournalState
    identity: DiskIdentity | None

    @property
    def region_count(self) -> int:
        """The regions of the disk, a short last one included."""
        return regions_of(self.virtual_bytes)

    def followed(self, **changes: Any) -> JournalHeader:
        """Return the header that replaces this one. Raises: FieldOutOfRange where none can."""
        if self.sequence >= SEQUENCE_MAX:
            raise FieldOutOfRange(
                "the intent journal cannot count its headers further",
                field="sequence",
                expected=f"below {SEQUENCE_MAX}",
                actual=self.sequence,
                spec=SPEC,
                hint="another program made this header: compare the disk, with a new journal",
            )
        return replace(self, sequence=self.sequence + 1, **changes)

    def pack(self) -> bytes:
        """Return the 512 bytes with their checksum."""
        identity = self.identity or DiskIdentity(None, 0, 0, 0, 0)
        packed = bytearray(
            HEADER.pack(
                signature=SIGNATURE,
                version=VERSION,
                sequence=self.sequence,
                disk_index=self.disk_index,
                state=self.state,
                region_bytes=REGION_BYTES,
                virtual_bytes=self.virtual_bytes,
                data_write_guid=identity.data_write_guid or NIL,
                next_guid=identity.next_guid or NIL,
                file_bytes=identity.file_bytes,
                mtime_ns=identity.mtime_ns,
                inode=identity.inode,
                device=identity.device,
            )
        )
        packed[12:16] = crc32c(packed).to_bytes(4, "little")
        return bytes(packed)


def regions_of(virtual_bytes: int) -> int:
    """Return the regions of a disk, a short last one included."""
    return -(-virtual_bytes // REGION_BYTES)


def sectors_of(region_count: int) -> int:
    """Return the bitmap sectors that hold so many regions."""
    return -(-region_count // SECTOR_REGIONS)


def file_bytes_of(region_count: int) -> int:
    """Return the length of a journal's file."""
    return BITMAP_OFFSET + sectors_of(region_count) * SECTOR_BYTES


def header_offset_of(sequence: int) -> int:
    """Return where the header with this sequence is written: never over the one before it."""
    return sequence % 2 * HEADER_SPACING_BYTES


def sector_offset_of(number: int) -> int:
    """Return where the bitmap sector with this number stands in the file."""
    return BITMAP_OFFSET + number * SECTOR_BYTES


def unpack_header(buffer: Buffer, *, at: int = 0) -> JournalHeader:
    """Return the copy of the header at offset `at`, wholly checked.

    Raises: Truncated, BadSignature, ChecksumMismatch, UnsupportedVersion, FieldOutOfRange.
    """
    values = HEADER.unpack(buffer, at)
    if values["signature"] != SIGNATURE:
        raise BadSignature(
            "not an intent journal",
            offset=at,
            field="signature",
            expected=SIGNATURE,
            actual=values["signature"],
            spec=SPEC,
        )
    summed = bytearray(memoryview(buffer).cast("B")[at : at + HEADER_BYTES])
    summed[12:16] = bytes(4)
    if values["checksum"] != crc32c(summed):
        raise ChecksumMismatch(
            "a header of the intent journal is damaged",
            offset=at + HEADER.offset_of("checksum"),
            field="checksum",
            expected=f"0x{crc32c(summed):08x}",
            actual=f"0x{values['checksum']:08x}",
            spec=SPEC,
        )
    # After the checksum: a torn copy must not pass for one that a later version wrote.
    if values["version"] != VERSION:
        raise UnsupportedVersion(
            "unknown version of an intent journal",
            offset=at + HEADER.offset_of("version"),
            field="version",
            expected=VERSION,
            actual=values["version"],
            spec=SPEC,
            hint="use the hvreplica that wrote it",
        )
    _validate(values, at)
    return _header_from(values)


def choose_header(buffer: Buffer) -> JournalHeader:
    """Return the header that counts of the two copies at the start of a journal.

    buffer: the file's first 8192 bytes, or what there is of them. Raises: UnsupportedVersion if either copy
    is whole and of another version; else, if none is valid, the error of the first.
    """
    valid: list[JournalHeader] = []
    first: FormatError | None = None
    for at in (0, HEADER_SPACING_BYTES):
        try:
            valid.append(unpack_header(buffer, at=at))
        except UnsupportedVersion:
            raise
        except FormatError as error:
            first = first or error
    if valid:
        return max(valid, key=lambda header: header.sequence)
    if first is None:
        raise Truncated("an intent journal has no header", spec=SPEC)
    first.hint = "both copies are bad, so what changed is not known: the disk has to be compared"
    raise first


def pack_sectors(numbers: Sequence[int], bitmap: NDArray[np.uint8], *, sequence: int) -> list[bytes]:
    """Return the sectors with these numbers, 512 bytes each, as `bitmap` has them.

    bitmap: of all regions, least significant bit first; what it does not have is 0.
    """
    packed = []
    for number in numbers:
        bits = bitmap[number * SECTOR_BITMAP_BYTES : (number + 1) * SECTOR_BITMAP_BYTES].tobytes()
        body = SECTOR.pack(number=number, sequence=sequence, bits=bits)[4:]
        packed.append(crc32c(body).to_bytes(4, "little") + body)
    return packed


@dataclass(frozen=True, slots=True)
class JournalBitmap:
    """What the bitmap sectors say.

    bitmap: uint8, exactly the bytes that the regions need, least significant bit first, bits behind the last
    region 0. sequence: the highest of the valid sectors. damaged: numbers of the sectors that were taken as
    all marked, int64.
    """

    bitmap: NDArray[np.uint8]
    sequence: int
    damaged: NDArray[np.int64]


def unpack_sectors(buffer: Buffer, region_count: int) -> JournalBitmap:
    """Return the bits of `region_count` regions; any bytes give a value.

    buffer: the file from BITMAP_OFFSET on; what is missing counts as damaged, what is too much is not looked
    at. region_count: at most REGION_COUNT_MAX, which bounds the memory.
    """
    if not 0 < region_count <= REGION_COUNT_MAX:
        message = f"an intent journal has 1 to {REGION_COUNT_MAX} regions, not {region_count}"
        raise ValueError(message)
    view = memoryview(buffer).cast("B")
    count = sectors_of(region_count)
    bits = np.full((count, SECTOR_BITMAP_BYTES), 0xFF, np.uint8)
    whole = min(count, len(view) // SECTOR_BYTES)
    rows = np.frombuffer(view[: whole * SECTOR_BYTES], _SECTOR_ROW)
    starts = range(0, len(rows) * SECTOR_BYTES, SECTOR_BYTES)
    sums = [crc32c(view[start + 4 : start + SECTOR_BYTES]) for start in starts]
    valid = np.zeros(count, bool)
    valid[:whole] = (rows["checksum"] == np.array(sums, np.uint32)) & (rows["number"] == np.arange(whole))
    good = rows[valid[:whole]]
    bits[valid] = good["bits"]
    bitmap = bits.reshape(-1)[: -(-region_count // 8)].copy()
    if region_count % 8:
        bitmap[-1] &= (1 << region_count % 8) - 1
    sequence = min(int(good["sequence"].max(initial=0)), SEQUENCE_MAX)
    return JournalBitmap(bitmap, sequence, np.flatnonzero(~valid))


def _validate(values: dict[str, Any], at: int) -> None:
    rules = (
        ("region_bytes", values["region_bytes"] == REGION_BYTES, f"{REGION_BYTES}"),
        ("sequence", values["sequence"] <= SEQUENCE_MAX, f"at most {SEQUENCE_MAX}"),
        ("state", values["state"] in set(JournalState), "0 to 2"),
        (
            "virtual_bytes",
            0 < values["virtual_bytes"] <= DISK_BYTES_MAX and values["virtual_bytes"] % 512 == 0,
            f"512 to {DISK_BYTES_MAX}, a multiple of 512",
        ),
    )
    for field, holds, expected in rules:
        if not holds:
            raise FieldOutOfRange(
                "a header of the intent journal is not possible",
                offset=at + HEADER.offset_of(field),
                field=field,
                expected=expected,
                actual=values[field],
                spec=SPEC,
            )


def _header_from(values: dict[str, Any]) -> JournalHeader:
    identity = DiskIdentity(
        data_write_guid=None if values["data_write_guid"] == NIL else values["data_write_guid"],
        file_bytes=values["file_bytes"],
        mtime_ns=values["mtime_ns"],
        inode=values["inode"],
        device=values["device"],
        next_guid=None if values["next_guid"] == NIL else values["next_guid"],
    )
    state = JournalState(values["state"])
    return JournalHeader(
        sequence=values["sequence"],
        disk_index=values["disk_index"],
        virtual_bytes=values["virtual_bytes"],
        state=state,
        identity=None if state == JournalState.NOT_RECORDED else identity,
    )
