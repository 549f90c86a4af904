"""The region table of a VHDX: where BAT and metadata stand. Two copies, both summed over 64 KiB.

Spec: [MS-VHDX] 2.2.3.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    Overlap,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats.layout import GUID, Field, Layout
from hvreplica.formats.vhdx_header import ALIGNMENT_BYTES, FILE_BYTES_MAX, HEADER_SECTION_BYTES
from hvreplica.native import crc32c
from hvreplica.units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Buffer

REGION_SIGNATURE = b"regi"
REGION_TABLE_OFFSETS = (192 * KIB, 256 * KIB)
REGION_TABLE_BYTES = 64 * KIB
REGION_COUNT_MAX = 2047

BAT_REGION = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_NAMES = {BAT_REGION: "BAT", METADATA_REGION: "metadata region"}

REGION_TABLE_HEADER = Layout(
    "region table header",
    spec="[MS-VHDX] 2.2.3.1",
    size=16,
    fields=(
        Field("signature", "4s", '"regi"'),
        Field("checksum", "I", "CRC-32C of the 64 KiB table with this field 0"),
        Field("entry_count", "I", "at most 2047"),
        Field("reserved", "I", "0, ignored"),
    ),
)
REGION_TABLE_ENTRY = Layout(
    "region table entry",
    spec="[MS-VHDX] 2.2.3.2",
    size=32,
    fields=(
        Field("guid", GUID, "unique within the table"),
        Field("file_offset", "Q", "multiple of 1 MiB, at least 1 MiB"),
        Field("length", "I", "multiple of 1 MiB"),
        Field("required", "I", "1: a reader that does not know the region refuses the file"),
    ),
)


@dataclass(frozen=True, slots=True)
class Region:
    """One entry of the table. at: the entry's own offset in the file."""

    guid: uuid.UUID
    file_offset: int
    length: int
    required: int
    at: int = 0

    @property
    def name(self) -> str:
        """The region's name for messages."""
        return _NAMES.get(self.guid, f"region {self.guid}")


@dataclass(frozen=True, slots=True)
class RegionTable:
    """One copy of the table as it was read; `regions` is empty where entry_count cannot be."""

    signature: bytes
    checksum: int
    computed_checksum: int
    entry_count: int
    regions: tuple[Region, ...]
    at: int

    def validate(self) -> None:
        """Check signature, checksum, count and each entry by itself.

        Raises: BadSignature, ChecksumMismatch, FieldOutOfRange, UnsupportedVersion, Overlap.
        """
        for error in (*self.copy_errors(), *self.entry_errors()):
            raise error

    def copy_errors(self) -> Iterator[FormatError]:
        """Yield what makes this copy unfit to be believed: signature, checksum, count."""
        spec = REGION_TABLE_HEADER.spec
        if self.signature != REGION_SIGNATURE:
            yield BadSignature(
                "a region table does not start as one",
                offset=self.at,
                field="signature",
                expected=REGION_SIGNATURE,
                actual=self.signature,
                spec=spec,
            )
        elif self.checksum != self.computed_checksum:
            yield ChecksumMismatch(
                "a region table's checksum does not belong to its bytes",
                offset=self.at + 4,
                field="checksum",
                expected=f"0x{self.computed_checksum:08x}",
                actual=f"0x{self.checksum:08x}",
                spec=spec,
            )
        elif self.entry_count > REGION_COUNT_MAX:
            yield FieldOutOfRange(
                "a region table has too many entries",
                offset=self.at + 8,
                field="entry_count",
                expected=f"at most {REGION_COUNT_MAX}",
                actual=self.entry_count,
                spec=spec,
            )

    def entry_errors(self) -> Iterator[FormatError]:
        """Yield what is wrong with entries by themselves."""
        seen: set[uuid.UUID] = set()
        for region in self.regions:
            yield from _region_errors(region, seen)
            seen.add(region.guid)

    def find(self, guid: uuid.UUID) -> Region:
        """Return the region with this GUID. Raises: FieldOutOfRange if the table has none."""
        for region in self.regions:
            if region.guid == guid:
                return region
        raise FieldOutOfRange(
            f"the region table has no {_NAMES.get(guid, 'such region')}",
            offset=self.at,
            field="guid",
            expected=guid,
            spec="[MS-VHDX] 2.2.3.2",
        )


def _region_errors(region: Region, seen: set[uuid.UUID]) -> Iterator[FormatError]:
    spec = REGION_TABLE_ENTRY.spec
    if region.guid in seen:
        yield Overlap(
            "a region is listed twice", offset=region.at, field="guid", actual=region.guid, spec=spec
        )
    if region.guid not in _NAMES and region.required:
        yield UnsupportedVersion(
            "the file needs a region that is not known here",
            offset=region.at,
            field="guid",
            actual=region.guid,
            spec=spec,
            hint="the file was written by a newer program; convert it there",
        )
    for field, value in (("file_offset", region.file_offset), ("length", region.length)):
        if value % ALIGNMENT_BYTES or not ALIGNMENT_BYTES <= value <= FILE_BYTES_MAX:
            yield FieldOutOfRange(
                f"the {region.name} is not on a 1 MiB boundary behind the header section",
                offset=region.at + REGION_TABLE_ENTRY.offset_of(field),
                field=field,
                expected=f"a multiple of {ALIGNMENT_BYTES}, at least {ALIGNMENT_BYTES}",
                actual=value,
                spec=spec,
            )


def unpack_region_table(buffer: Buffer, *, file_offset: int) -> RegionTable:
    """Return the table in the 64 KiB of `buffer` from `file_offset`, unchecked. Raises: Truncated."""
    view = memoryview(buffer).cast("B")
    if len(view) < REGION_TABLE_BYTES:
        raise Truncated(
            "the region table does not fit",
            offset=file_offset,
            expected=f"{REGION_TABLE_BYTES} bytes",
            actual=f"{len(view)} bytes",
            spec=REGION_TABLE_HEADER.spec,
        )
    values = REGION_TABLE_HEADER.unpack(view)
    summed = bytearray(view[:REGION_TABLE_BYTES])
    summed[4:8] = bytes(4)
    count = values["entry_count"] if values["entry_count"] <= REGION_COUNT_MAX else 0
    regions = []
    for index in range(count):
        at = REGION_TABLE_HEADER.size + index * REGION_TABLE_ENTRY.size
        regions.append(Region(**REGION_TABLE_ENTRY.unpack(view, at), at=file_offset + at))
    return RegionTable(
        signature=values["signature"],
        checksum=values["checksum"],
        computed_checksum=crc32c(summed),
        entry_count=values["entry_count"],
        regions=tuple(regions),
        at=file_offset,
    )


def choose_region_table(candidates: Sequence[RegionTable | FormatError]) -> RegionTable:
    """Return the first copy that is valid. Pure. Raises: the first copy's error if none is."""
    first_error: FormatError | None = None
    for candidate in candidates:
        try:
            if isinstance(candidate, FormatError):
                raise candidate
            candidate.validate()
        except FormatError as error:
            first_error = first_error or error
            continue
        return candidate
    if first_error is None:
        raise TypeError("no candidates")
    raise first_error


def validate_regions_within(
    regions: Iterable[Region], *, file_size_bytes: int, log_offset: int, log_length: int
) -> None:
    """Check that log and regions lie inside the file and apart. Raises: Truncated, Overlap. Spec: 2.2.3.2."""
    for error in region_errors_within(
        regions, file_size_bytes=file_size_bytes, log_offset=log_offset, log_length=log_length
    ):
        raise error


def region_errors_within(
    regions: Iterable[Region], *, file_size_bytes: int, log_offset: int, log_length: int
) -> Iterator[FormatError]:
    """Yield each region that the file does not hold whole, and each that begins inside of another."""
    spans = [(region.file_offset, region.length, region.name, region.at) for region in regions]
    for file_offset, length, name, at in spans:
        if file_offset + length > file_size_bytes:
            yield Truncated(
                f"the file ends before its {name} does",
                offset=at,
                field="file_offset",
                expected=f"at least {file_offset + length} bytes",
                actual=f"{file_size_bytes} bytes",
                spec=REGION_TABLE_ENTRY.spec,
            )
    if log_length:
        spans.append((log_offset, log_length, "log", 0))
    spans.sort()
    end, holder = HEADER_SECTION_BYTES, "header section"
    for file_offset, length, name, at in spans:
        if file_offset < end:
            yield Overlap(
                f"the {name} overlaps the {holder}",
                offset=at,
                field="file_offset",
                expected=f"at least {end}",
                actual=file_offset,
                spec=REGION_TABLE_ENTRY.spec,
            )
        if file_offset + length > end:
            end, holder = file_offset + length, name


def moved_region(buffer: Buffer, guid: uuid.UUID, *, file_offset: int, length: int) -> bytes:
    """Return a valid table with one region at another place, and all else byte for byte as it is.

    Raises: FieldOutOfRange if the table has no such region.
    """
    table = bytearray(memoryview(buffer).cast("B")[:REGION_TABLE_BYTES])
    region = unpack_region_table(table, file_offset=0).find(guid)
    row = REGION_TABLE_ENTRY.pack(guid=guid, file_offset=file_offset, length=length, required=region.required)
    table[region.at : region.at + len(row)] = row
    table[4:8] = bytes(4)
    table[4:8] = crc32c(table).to_bytes(4, "little")
    return bytes(table)


def pack_region_table(regions: Iterable[Region]) -> bytes:
    """Return the 64 KiB of a table with its checksum."""
    rows = [
        REGION_TABLE_ENTRY.pack(
            guid=region.guid, file_offset=region.file_offset, length=region.length, required=region.required
        )
        for region in regions
    ]
    table = bytearray(REGION_TABLE_BYTES)
    packed = REGION_TABLE_HEADER.pack(signature=REGION_SIGNATURE, entry_count=len(rows)) + b"".join(rows)
    table[: len(packed)] = packed
    table[4:8] = crc32c(table).to_bytes(4, "little")
    return bytes(table)
