"""The metadata region of a VHDX: a table of items and the items that say what the disk is.

    0         table: 32-byte header, up to 2047 entries of 32 bytes, 64 KiB in all
    64 KiB    items, anywhere behind the table, apart from each other

Spec: [MS-VHDX] 2.6.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import (
    BadSignature,
    FieldOutOfRange,
    FormatError,
    Overlap,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats.layout import GUID, Field, Layout
from hvreplica.units import KIB, MIB, TIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from typing_extensions import Buffer

METADATA_SIGNATURE = b"metadata"
METADATA_TABLE_BYTES = 64 * KIB
METADATA_ENTRY_COUNT_MAX = 2047
METADATA_USER_COUNT_MAX = 1024
METADATA_ITEM_BYTES_MAX = MIB

FLAG_IS_USER = 1
FLAG_IS_VIRTUAL_DISK = 2
FLAG_IS_REQUIRED = 4
_FLAGS_KNOWN = FLAG_IS_USER | FLAG_IS_VIRTUAL_DISK | FLAG_IS_REQUIRED

FILE_PARAMETERS_ITEM = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE_ITEM = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID_ITEM = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE_ITEM = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE_ITEM = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR_ITEM = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

BLOCK_BYTES_MIN = MIB
BLOCK_BYTES_MAX = 256 * MIB
VIRTUAL_BYTES_MAX = 64 * TIB
SECTOR_SIZES = (512, 4096)
FLAG_LEAVE_BLOCKS_ALLOCATED = 1
FLAG_HAS_PARENT = 2

METADATA_TABLE_HEADER = Layout(
    "metadata table header",
    spec="[MS-VHDX] 2.6.1.1",
    size=32,
    fields=(
        Field("signature", "8s", '"metadata"'),
        Field("reserved", "H", "0, ignored"),
        Field("entry_count", "H", "at most 2047"),
        Field("reserved2", "20s", "0, ignored"),
    ),
)
METADATA_TABLE_ENTRY = Layout(
    "metadata table entry",
    spec="[MS-VHDX] 2.6.1.2",
    size=32,
    fields=(
        Field("item_id", GUID, "unique in the table together with IsUser"),
        Field("offset", "I", "from the start of the region, at least 64 KiB; 0 where length is 0"),
        Field("length", "I", "at most 1 MiB"),
        Field("flags", "I", "bit 0 IsUser, bit 1 IsVirtualDisk, bit 2 IsRequired; the rest 0"),
        Field("reserved2", "I", "0, ignored"),
    ),
)
FILE_PARAMETERS = Layout(
    "file parameters",
    spec="[MS-VHDX] 2.6.2.1",
    size=8,
    fields=(
        Field("block_size", "I", "power of two, 1 MiB to 256 MiB"),
        Field("flags", "I", "bit 0 LeaveBlockAllocated, bit 1 HasParent; the rest 0"),
    ),
)
VIRTUAL_DISK_SIZE = Layout(
    "virtual disk size",
    spec="[MS-VHDX] 2.6.2.2",
    size=8,
    fields=(Field("virtual_disk_size", "Q", "multiple of the logical sector size, at most 64 TiB"),),
)
VIRTUAL_DISK_ID = Layout(
    "virtual disk ID",
    spec="[MS-VHDX] 2.6.2.3",
    size=16,
    fields=(Field("virtual_disk_id", GUID, "SCSI page 0x83"),),
)
LOGICAL_SECTOR_SIZE = Layout(
    "logical sector size",
    spec="[MS-VHDX] 2.6.2.4",
    size=4,
    fields=(Field("logical_sector_size", "I", "512 or 4096"),),
)
PHYSICAL_SECTOR_SIZE = Layout(
    "physical sector size",
    spec="[MS-VHDX] 2.6.2.5",
    size=4,
    fields=(Field("physical_sector_size", "I", "512 or 4096"),),
)

KNOWN_ITEMS: Mapping[uuid.UUID, Layout | None] = {
    FILE_PARAMETERS_ITEM: FILE_PARAMETERS,
    VIRTUAL_DISK_SIZE_ITEM: VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_ID_ITEM: VIRTUAL_DISK_ID,
    LOGICAL_SECTOR_SIZE_ITEM: LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE_ITEM: PHYSICAL_SECTOR_SIZE,
    PARENT_LOCATOR_ITEM: None,
}


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One row of the table. at: the row's own offset in the file."""

    item_id: uuid.UUID
    offset: int
    length: int
    flags: int
    at: int = 0

    @property
    def is_user(self) -> bool:
        """Whether it belongs to a user of the file and not to the format."""
        return bool(self.flags & FLAG_IS_USER)

    @property
    def is_required(self) -> bool:
        """Whether a reader that does not know it refuses the file."""
        return bool(self.flags & FLAG_IS_REQUIRED)


@dataclass(frozen=True, slots=True)
class MetadataTable:
    """The table as it was read; `entries` is empty where entry_count cannot be."""

    signature: bytes
    entry_count: int
    entries: tuple[MetadataEntry, ...]
    at: int

    def validate(self) -> None:
        """Check signature, counts and flags, and that nothing unknown is required.

        Raises: BadSignature, FieldOutOfRange, UnsupportedVersion, Overlap.
        """
        for error in self.errors():
            raise error

    def errors(self) -> Iterator[FormatError]:
        """Yield what validate() raises the first of."""
        if self.signature != METADATA_SIGNATURE:
            yield BadSignature(
                "the metadata table does not start as one",
                offset=self.at,
                field="signature",
                expected=METADATA_SIGNATURE,
                actual=self.signature,
                spec=METADATA_TABLE_HEADER.spec,
            )
        yield from self._count_errors("entry_count", self.entry_count, METADATA_ENTRY_COUNT_MAX)
        user_count = sum(entry.is_user for entry in self.entries)
        yield from self._count_errors("entries with IsUser", user_count, METADATA_USER_COUNT_MAX)
        seen = set()
        for entry in self.entries:
            key = (entry.item_id, entry.is_user)
            if key in seen:
                yield Overlap(
                    "a metadata item is listed twice",
                    offset=entry.at,
                    field="item_id",
                    actual=entry.item_id,
                    spec=METADATA_TABLE_ENTRY.spec,
                )
            seen.add(key)
            yield from _entry_errors(entry)

    def _count_errors(self, field: str, count: int, count_max: int) -> Iterator[FormatError]:
        if count > count_max:
            yield FieldOutOfRange(
                "the metadata table has too many entries",
                offset=self.at,
                field=field,
                expected=f"at most {count_max}",
                actual=count,
                spec=METADATA_TABLE_HEADER.spec,
            )

    def validate_within(self, region_bytes: int) -> None:
        """Check that items lie in the region, behind the table, apart. Raises: FieldOutOfRange, Overlap."""
        for error in self.errors_within(region_bytes):
            raise error

    def errors_within(self, region_bytes: int) -> Iterator[FormatError]:
        """Yield what validate_within() raises the first of."""
        end = METADATA_TABLE_BYTES
        for entry in sorted((e for e in self.entries if e.length), key=lambda e: e.offset):
            if entry.offset < METADATA_TABLE_BYTES or entry.offset + entry.length > region_bytes:
                yield FieldOutOfRange(
                    "a metadata item is outside of the metadata region",
                    offset=entry.at + METADATA_TABLE_ENTRY.offset_of("offset"),
                    field="offset",
                    expected=f"{METADATA_TABLE_BYTES} to {region_bytes - entry.length}",
                    actual=entry.offset,
                    spec=METADATA_TABLE_ENTRY.spec,
                )
            elif entry.offset < end:
                yield Overlap(
                    "two metadata items overlap",
                    offset=entry.at + METADATA_TABLE_ENTRY.offset_of("offset"),
                    field="offset",
                    expected=f"at least {end}",
                    actual=entry.offset,
                    spec=METADATA_TABLE_ENTRY.spec,
                )
            end = max(end, entry.offset + entry.length)

    def find(self, item_id: uuid.UUID) -> MetadataEntry:
        """Return the system item with this id. Raises: FieldOutOfRange if absent or of a wrong length."""
        layout = KNOWN_ITEMS[item_id]
        for entry in self.entries:
            if entry.item_id != item_id or entry.is_user:
                continue
            if layout is not None and entry.length != layout.size:
                raise FieldOutOfRange(
                    f"the {layout.name} item has a wrong length",
                    offset=entry.at + METADATA_TABLE_ENTRY.offset_of("length"),
                    field="length",
                    expected=layout.size,
                    actual=entry.length,
                    spec=layout.spec,
                )
            return entry
        raise FieldOutOfRange(
            f"the metadata table has no {layout.name if layout else 'parent locator'} item",
            offset=self.at,
            field="item_id",
            expected=item_id,
            spec="[MS-VHDX] 2.6.2",
        )


def _entry_errors(entry: MetadataEntry) -> Iterator[FormatError]:
    spec = METADATA_TABLE_ENTRY.spec
    known = entry.item_id in KNOWN_ITEMS and not entry.is_user
    if entry.is_required and not known:
        yield UnsupportedVersion(
            "the file needs a metadata item that is not known here",
            offset=entry.at,
            field="item_id",
            actual=entry.item_id,
            spec=spec,
            hint="the file is unfinished or was written by a newer program; convert it there",
        )
    if entry.flags & ~_FLAGS_KNOWN:
        yield FieldOutOfRange(
            "a metadata item has unknown flags",
            offset=entry.at + METADATA_TABLE_ENTRY.offset_of("flags"),
            field="flags",
            expected="bits 0 to 2 only",
            actual=f"0x{entry.flags:08x}",
            spec=spec,
        )
    if entry.length > METADATA_ITEM_BYTES_MAX or (entry.length == 0 and entry.offset != 0):
        yield FieldOutOfRange(
            "a metadata item has a length that does not go with its offset",
            offset=entry.at + METADATA_TABLE_ENTRY.offset_of("length"),
            field="length",
            expected=f"1 to {METADATA_ITEM_BYTES_MAX}, or 0 at offset 0",
            actual=entry.length,
            spec=spec,
        )


def unpack_metadata_table(buffer: Buffer, *, file_offset: int) -> MetadataTable:
    """Return the table in the 64 KiB of `buffer` from `file_offset`, unchecked. Raises: Truncated."""
    view = memoryview(buffer).cast("B")
    if len(view) < METADATA_TABLE_BYTES:
        raise Truncated(
            "the metadata table does not fit",
            offset=file_offset,
            expected=f"{METADATA_TABLE_BYTES} bytes",
            actual=f"{len(view)} bytes",
            spec=METADATA_TABLE_HEADER.spec,
        )
    values = METADATA_TABLE_HEADER.unpack(view)
    count = values["entry_count"] if values["entry_count"] <= METADATA_ENTRY_COUNT_MAX else 0
    entries = []
    for index in range(count):
        at = METADATA_TABLE_HEADER.size + index * METADATA_TABLE_ENTRY.size
        row = METADATA_TABLE_ENTRY.unpack(view, at)
        del row["reserved2"]
        entries.append(MetadataEntry(**row, at=file_offset + at))
    return MetadataTable(values["signature"], values["entry_count"], tuple(entries), at=file_offset)


@dataclass(frozen=True, slots=True)
class DiskParameters:
    """What the known items say."""

    virtual_bytes: int
    block_bytes: int
    logical_sector_bytes: int
    physical_sector_bytes: int
    virtual_disk_id: uuid.UUID
    flags: int = 0  # of the file parameters
    at: int = 0  # the region's offset in the file, for messages

    @property
    def is_fixed(self) -> bool:
        """Whether all blocks are to stay allocated; the flag means nothing where there is a parent."""
        return bool(self.flags & FLAG_LEAVE_BLOCKS_ALLOCATED) and not self.has_parent

    @property
    def has_parent(self) -> bool:
        """Whether this is a differencing disk."""
        return bool(self.flags & FLAG_HAS_PARENT)

    def validate(self) -> None:
        """Check each value by itself and size against sector. Raises: FieldOutOfRange, UnsupportedVersion."""
        for error in self.errors():
            raise error

    def errors(self) -> Iterator[FieldOutOfRange]:
        """Yield what validate() raises the first of."""
        block = self.block_bytes
        if block & (block - 1) or not BLOCK_BYTES_MIN <= block <= BLOCK_BYTES_MAX:
            yield self._refuse(
                "block_size", "a power of two from 1 MiB to 256 MiB", block, FILE_PARAMETERS.spec
            )
        if self.flags & ~(FLAG_LEAVE_BLOCKS_ALLOCATED | FLAG_HAS_PARENT):
            yield self._refuse("flags", "bits 0 and 1 only", f"0x{self.flags:08x}", FILE_PARAMETERS.spec)
        for field, value, spec in (
            ("logical_sector_size", self.logical_sector_bytes, LOGICAL_SECTOR_SIZE.spec),
            ("physical_sector_size", self.physical_sector_bytes, PHYSICAL_SECTOR_SIZE.spec),
        ):
            if value not in SECTOR_SIZES:
                yield self._refuse(field, "512 or 4096", value, spec)
        sector = self.logical_sector_bytes if self.logical_sector_bytes in SECTOR_SIZES else SECTOR_SIZES[0]
        size = self.virtual_bytes
        if size % sector or not 0 < size <= VIRTUAL_BYTES_MAX:
            expected = f"a multiple of {sector}, above 0 and at most {VIRTUAL_BYTES_MAX}"
            yield self._refuse("virtual_disk_size", expected, size, VIRTUAL_DISK_SIZE.spec)

    def _refuse(self, field: str, expected: object, actual: object, spec: str) -> FieldOutOfRange:
        return FieldOutOfRange(
            "a metadata item has a value that the format does not allow",
            offset=self.at,
            field=field,
            expected=expected,
            actual=actual,
            spec=spec,
        )


def pack_metadata(parameters: DiskParameters, locator: bytes = b"") -> bytes:
    """Return the table and the known items, to stand at the start of a metadata region.

    locator: the parent locator item of a disk with a parent. Item order, offsets and flags are those that
    Windows writes.
    """
    virtual_required = FLAG_IS_VIRTUAL_DISK | FLAG_IS_REQUIRED
    block_row = FILE_PARAMETERS.pack(block_size=parameters.block_bytes, flags=parameters.flags)
    size_row = VIRTUAL_DISK_SIZE.pack(virtual_disk_size=parameters.virtual_bytes)
    id_row = VIRTUAL_DISK_ID.pack(virtual_disk_id=parameters.virtual_disk_id)
    logical_row = LOGICAL_SECTOR_SIZE.pack(logical_sector_size=parameters.logical_sector_bytes)
    physical_row = PHYSICAL_SECTOR_SIZE.pack(physical_sector_size=parameters.physical_sector_bytes)
    items = [
        (FILE_PARAMETERS_ITEM, FLAG_IS_REQUIRED, block_row),
        (VIRTUAL_DISK_SIZE_ITEM, virtual_required, size_row),
        (VIRTUAL_DISK_ID_ITEM, virtual_required, id_row),
        (LOGICAL_SECTOR_SIZE_ITEM, virtual_required, logical_row),
        (PHYSICAL_SECTOR_SIZE_ITEM, virtual_required, physical_row),
    ]
    if locator:
        items.append((PARENT_LOCATOR_ITEM, FLAG_IS_REQUIRED, locator))
    rows = [METADATA_TABLE_HEADER.pack(signature=METADATA_SIGNATURE, entry_count=len(items))]
    values = bytearray()
    for item_id, flags, value in items:
        offset = METADATA_TABLE_BYTES + len(values)
        rows.append(METADATA_TABLE_ENTRY.pack(item_id=item_id, offset=offset, length=len(value), flags=flags))
        values += value
    return b"".join(rows).ljust(METADATA_TABLE_BYTES, b"\0") + bytes(values)
