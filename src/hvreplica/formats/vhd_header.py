"""The dynamic disk header of a VHD: where the BAT is, how large blocks are, and who the parent is.

It stands at the footer's data_offset, in dynamic and differencing disks. Spec: VHD 1.0 (2006), Dynamic Disk
Header Format.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    Overlap,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats.layout import Field, Layout
from hvreplica.formats.vhd_footer import SECTOR_BYTES, vhd_checksum
from hvreplica.formats.vhd_locator import LOCATOR_COUNT, LOCATOR_ENTRY, LocatorEntry, unpack_locator_entry

if TYPE_CHECKING:
    from typing_extensions import Buffer

HEADER_COOKIE = b"cxsparse"
DYNAMIC_HEADER_BYTES = 1024
HEADER_OFFSET = 512  # where all known writers put it; the footer's data_offset is what counts
HEADER_VERSION = 0x0001_0000
HEADER_DATA_OFFSET = 0xFFFF_FFFF_FFFF_FFFF
BAT_ENTRY_BYTES = 4
# Half of what the field can hold: keeps a block's offset and length in 63 bits with any table.
BLOCK_BYTES_MAX = 1 << 31
# Bounds what a table may take in memory. 2040 GiB in blocks of 128 KiB have as many; of 2 MiB, a sixteenth.
BLOCK_COUNT_MAX = 1 << 24
_NIL = uuid.UUID(int=0)
_NAME_BYTES = 512

DYNAMIC_HEADER = Layout(
    "VHD dynamic disk header",
    spec="VHD 1.0 Dynamic Disk Header Format",
    size=DYNAMIC_HEADER_BYTES,
    endian=">",
    fields=(
        Field("cookie", "8s", '"cxsparse"'),
        Field("data_offset", "Q", "all ones; not used"),
        Field("table_offset", "Q", "of the BAT; multiple of 512"),
        Field("header_version", "I", "major 1; any minor is read"),
        Field("max_table_entries", "I", "at least as many as the disk has blocks; the size is the footer's"),
        Field("block_size", "I", "bytes of data in a block, without its bitmap; power of two, at least 512"),
        Field("checksum", "I", "ones' complement of the sum of all bytes with this field 0"),
        Field("parent_unique_id", "16s", "the parent's unique_id, as raw bytes"),
        Field("parent_time_stamp", "I", "advice only: Windows 10 writes 0"),
        Field("reserved", "I", "0"),
        Field("parent_unicode_name", "512s", "UTF-16BE, ends with NUL; a full path or a name"),
        *(Field(f"parent_locator_entry_{n}", "24s", "a parent locator entry") for n in range(1, 9)),
        Field("reserved2", "256s", "0; kept as found"),
    ),
)


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """A dynamic disk header as it was read, with the fields of DYNAMIC_HEADER. at: its offset in the file.

    parent_name: parent_unicode_name up to its NUL; what is no UTF-16 becomes U+FFFD. locators: always eight.
    """

    table_offset: int
    max_table_entries: int
    block_size: int
    parent_unique_id: uuid.UUID = _NIL
    parent_time_stamp: int = 0
    parent_name: str = ""
    locators: tuple[LocatorEntry, ...] = (LocatorEntry(),) * LOCATOR_COUNT
    data_offset: int = HEADER_DATA_OFFSET
    header_version: int = HEADER_VERSION
    reserved: int = 0
    reserved2: bytes = b""
    cookie: bytes = HEADER_COOKIE
    checksum: int = 0
    computed_checksum: int = 0
    at: int = 0

    def pack(self) -> bytes:
        """Return the 1024 bytes with their checksum; parent_name is cut to 255 UTF-16 units."""
        entries = {
            f"parent_locator_entry_{index}": entry.pack() for index, entry in enumerate(self.locators, 1)
        }
        packed = bytearray(
            DYNAMIC_HEADER.pack(
                cookie=self.cookie,
                data_offset=self.data_offset,
                table_offset=self.table_offset,
                header_version=self.header_version,
                max_table_entries=self.max_table_entries,
                block_size=self.block_size,
                parent_unique_id=self.parent_unique_id.bytes,
                parent_time_stamp=self.parent_time_stamp,
                reserved=self.reserved,
                parent_unicode_name=self.parent_name.encode("utf-16-be", "replace")[: _NAME_BYTES - 2],
                reserved2=self.reserved2,
                **entries,
            )
        )
        at = DYNAMIC_HEADER.offset_of("checksum")
        packed[at : at + 4] = vhd_checksum(packed, at).to_bytes(4, "big")
        return bytes(packed)

    def validate(self) -> None:
        """Check the header by itself.

        Raises: BadSignature, ChecksumMismatch, UnsupportedVersion, FieldOutOfRange.
        """
        if self.cookie != HEADER_COOKIE:
            raise BadSignature(
                "there is no dynamic disk header where the footer says",
                offset=self.at,
                field="cookie",
                expected=HEADER_COOKIE,
                actual=self.cookie,
                spec=DYNAMIC_HEADER.spec,
            )
        if self.checksum != self.computed_checksum:
            raise ChecksumMismatch(
                "a dynamic disk header's checksum does not belong to its bytes",
                offset=self._place_of("checksum"),
                field="checksum",
                expected=f"0x{self.computed_checksum:08x}",
                actual=f"0x{self.checksum:08x}",
                spec=DYNAMIC_HEADER.spec,
                hint="the header has no copy; restore the file, or its first 2 KiB, from a copy",
            )
        if self.header_version >> 16 != HEADER_VERSION >> 16:
            raise UnsupportedVersion(
                "a dynamic disk header of a version that is not known",
                offset=self._place_of("header_version"),
                field="header_version",
                expected="1.x",
                actual=f"0x{self.header_version:08x}",
                spec=DYNAMIC_HEADER.spec,
            )
        if self.block_size & (self.block_size - 1) or not SECTOR_BYTES <= self.block_size <= BLOCK_BYTES_MAX:
            expected = f"a power of two from {SECTOR_BYTES} to {BLOCK_BYTES_MAX}"
            raise self._out_of_range("block_size", expected, self.block_size)

    def validate_within(self, file_size_bytes: int, *, virtual_bytes: int) -> None:
        """Check that the table suits a disk of `virtual_bytes` and lies in the file, apart from the header.

        Entries behind those that the disk needs may be missing. Raises: FieldOutOfRange, Overlap, Truncated.
        """
        block_count = -(-virtual_bytes // self.block_size)
        if block_count > BLOCK_COUNT_MAX:
            raise self._out_of_range("block_size", f"at most {BLOCK_COUNT_MAX} blocks", self.block_size)
        if self.max_table_entries < block_count:
            raise self._out_of_range("max_table_entries", f"at least {block_count}", self.max_table_entries)
        if self.table_offset % SECTOR_BYTES:
            raise self._out_of_range("table_offset", "a multiple of 512", self.table_offset)
        table_end = self.table_offset + block_count * BAT_ENTRY_BYTES
        if self.table_offset < SECTOR_BYTES or (
            self.table_offset < self.at + DYNAMIC_HEADER_BYTES and table_end > self.at
        ):
            raise Overlap(
                "the BAT overlaps the footer's copy or the header",
                offset=self._place_of("table_offset"),
                field="table_offset",
                expected=f"outside of 0 to {SECTOR_BYTES} and {self.at} to {self.at + DYNAMIC_HEADER_BYTES}",
                actual=self.table_offset,
                spec=DYNAMIC_HEADER.spec,
            )
        if table_end > file_size_bytes:
            raise Truncated(
                "the file ends before its BAT does",
                offset=self._place_of("table_offset"),
                field="table_offset",
                expected=f"at least {table_end} bytes",
                actual=f"{file_size_bytes} bytes",
                spec=DYNAMIC_HEADER.spec,
            )

    def _place_of(self, field: str) -> int:
        return self.at + DYNAMIC_HEADER.offset_of(field)

    def _out_of_range(self, field: str, expected: object, actual: object) -> FieldOutOfRange:
        return FieldOutOfRange(
            "a dynamic disk header's field is outside of what the format allows",
            offset=self._place_of(field),
            field=field,
            expected=expected,
            actual=actual,
            spec=DYNAMIC_HEADER.spec,
        )


def repointed_header(buffer: Buffer, *, table_offset: int, max_table_entries: int) -> bytes:
    """Return the 1024 bytes of a header with its table somewhere else, and all else byte for byte as it is.

    All that changes lies in the first 512 bytes.
    """
    changed = bytearray(memoryview(buffer).cast("B")[:DYNAMIC_HEADER_BYTES])
    for field, length, value in (
        ("table_offset", 8, table_offset),
        ("max_table_entries", 4, max_table_entries),
    ):
        at = DYNAMIC_HEADER.offset_of(field)
        changed[at : at + length] = value.to_bytes(length, "big")
    at = DYNAMIC_HEADER.offset_of("checksum")
    changed[at : at + 4] = vhd_checksum(changed, at).to_bytes(4, "big")
    return bytes(changed)


def unpack_dynamic_header(buffer: Buffer, *, file_offset: int) -> DynamicHeader:
    """Return the header in `buffer`, which came from `file_offset`, unchecked. Raises: Truncated."""
    values = DYNAMIC_HEADER.unpack(buffer)
    values["parent_unique_id"] = uuid.UUID(bytes=values["parent_unique_id"])
    name: str = values.pop("parent_unicode_name").decode("utf-16-be", "replace")
    first = DYNAMIC_HEADER.offset_of("parent_locator_entry_1")
    locators = []
    for index in range(LOCATOR_COUNT):
        packed = values.pop(f"parent_locator_entry_{index + 1}")
        locators.append(unpack_locator_entry(packed, at=file_offset + first + index * LOCATOR_ENTRY.size))
    summed = memoryview(buffer).cast("B")[:DYNAMIC_HEADER_BYTES]
    return DynamicHeader(
        **values,
        parent_name=name.split("\0", 1)[0],
        locators=tuple(locators),
        computed_checksum=vhd_checksum(summed, DYNAMIC_HEADER.offset_of("checksum")),
        at=file_offset,
    )
