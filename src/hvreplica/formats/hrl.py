"""The Hyper-V Replica log: its header and the headers of its metadata blocks. Spec: [MS-HRL] 6.0.

    0            4096           8192                                       EOLLocation
    | header     | metadata #1  | data of #2's entries | metadata #2 | ... | metadata #n |
                 ^ PreviousMetadataLocation 0          ^ distance back to metadata #1

The data of a block's entries stands before the block, in entry order, right behind the block before it or the
header. A closed log ends with a metadata block, so that it is found at EOLLocation - MetadataSize; an open
one has EOLLocation 0. All numbers are little-endian and packed.

unpack() only needs enough bytes; validate() checks what a structure says of itself and validate_within()
where it stands. Entries are a table and stay one: see hrl_entries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from hvreplica import native
from hvreplica.errors import BadSignature, ChecksumMismatch, FieldOutOfRange, Truncated, UnsupportedVersion
from hvreplica.formats.layout import GUID, Field, Layout

if TYPE_CHECKING:
    from typing_extensions import Buffer

HEADER_BYTES = 4096
METADATA_HEADER_BYTES = 32
ENTRY_BYTES = 32
SECTOR_BYTES = 512
COOKIE = b"msctlog\0"
LOG_FORMAT_VERSION_1 = 0x00010000
LOG_FORMAT_VERSION_2 = 0x00020000
FILE_TYPE_HRL = 0
FILE_TYPE_UNDO = 0x00757268  # "hru" and NUL; ours, see docs/formats/hru.md
META_OPERATION_WRITE = 1
NIL_GUID = UUID(int=0)

METADATA_BYTES_DEFAULT = 4096
METADATA_BYTES_MAX = 1 << 20  # the specification sets none; bounds what one block makes a reader allocate
LOG_BYTES_MAX = 1 << 62  # the specification sets none; keeps every sum of two offsets within 63 bits
DISK_BYTES_MAX = 1 << 62  # likewise for guest offsets; VHDX ends at 64 TiB
DATA_CHECKSUM_ABSENT = 0  # only data whose bytes add up to 0xFFFFFFFF has this checksum: over 16 MiB of it

# Unclear: [MS-HRL] 2.2 calls "msctlog" eight characters, it is seven. Logs with a NUL and with a space behind
# it are read, NUL is written; test_header_cookie_with_space_is_read pins it.
_COOKIES = (COOKIE, b"msctlog ")
_VERSIONS = (LOG_FORMAT_VERSION_1, LOG_FORMAT_VERSION_2)

_HEADER_FIELDS = (
    Field("cookie", "8s", "ASCII `msctlog` and NUL (space is accepted)"),
    Field("log_format_version", "I", "0x00020000; 0x00010000 is read"),
    Field("time_stamp", "I", "creation, seconds since 2000-01-01 00:00:00 UTC"),
    Field("creator_application", "4s", "not verified; `hvr` is written"),
    Field("creator_version", "I", "not verified"),
    Field("original_size", "Q", "bytes at creation; 0 is written"),
    Field("current_size", "Q", "bytes now; at least eol_location, equal to it in what is written"),
    Field("checksum", "I", "2.6 over the header without this field"),
    Field("eol_location", "Q", "0 while open; the end of the log once closed"),
    Field("error_code", "i", "0, or the writer gave up"),
    Field("metadata_size", "I", "multiple of 512, 512 to 1 MiB; 4096 is usual"),
    Field("unique_id", GUID, "of this log"),
    Field("previous_unique_id", GUID, "of the log before it"),
    Field("last_modified_time_stamp", "I", "as time_stamp"),
    Field("total_metadata_entries", "Q", "the sum of valid_metadata_entries over all blocks"),
    Field("file_type", "I", "0 for an .hrl; 0x00757268 for an .hru of ours"),
    Field("flags", "H", "0"),
)
HEADER = Layout(
    "log header",
    spec="[MS-HRL] 2.2",
    size=HEADER_BYTES,
    fields=(
        *_HEADER_FIELDS,
        Field("vhd2_data_write_guid", GUID, "DataWriteGuid of the VHDX that the log belongs to"),
        Field("reserved", "3970s", "0"),
    ),
)
HEADER_VERSION_1 = Layout(
    "log header of version 1",
    spec="[MS-HRL] 2.2",
    size=HEADER_BYTES,
    fields=(*_HEADER_FIELDS, Field("reserved", "3986s", "0")),
)
METADATA_HEADER = Layout(
    "metadata header",
    spec="[MS-HRL] 2.3",
    size=METADATA_HEADER_BYTES,
    fields=(
        Field("previous_metadata_location", "Q", "bytes back to the block before; 0 in the first"),
        Field("valid_metadata_entries", "I", "at most (metadata_size - 32) / 32"),
        Field("checksum", "I", "2.6 over this header with this field 0"),
        Field("reserved", "16s", "0"),
    ),
)
METADATA_ENTRY = Layout(
    "metadata entry",
    spec="[MS-HRL] 2.4",
    size=ENTRY_BYTES,
    fields=(
        Field("byte_offset", "Q", "guest offset of the write, multiple of 512"),
        Field("checksum", "I", "2.6 over this entry with this field 0"),
        Field(
            "data_length", "I", "bytes of data in the log, multiple of 512, not 0; at most 2 MiB is written"
        ),
        Field("time_stamp", "I", "of the write, seconds since 2000-01-01 00:00:00 UTC"),
        Field("meta_operation", "B", "1 (write)"),
        Field("data_checksum", "I", "2.6 over the data; 0 is read as not computed, never written"),
        Field("location", "B", "0"),
        Field("reserved", "6s", "0"),
    ),
)


def checksum(buffer: Buffer) -> int:
    """Return the ones' complement of the sum of all bytes; a field to be left out is to be 0.

    Spec: [MS-HRL] 2.6.
    """
    return ~native.byte_sum(buffer) & 0xFFFFFFFF


def entry_capacity(metadata_size: int) -> int:
    """Return how many entries a metadata block of `metadata_size` bytes holds."""
    return (metadata_size - METADATA_HEADER_BYTES) // ENTRY_BYTES


def _require_guid(value: UUID | None) -> UUID:
    return NIL_GUID if value is None else value


@dataclass(frozen=True, slots=True)
class LogHeader:
    """The header of a log, every byte of it, with the fields of HEADER.

    vhd2_data_write_guid is None in a log of version 1, which has no such field.
    """

    cookie: bytes
    log_format_version: int
    time_stamp: int
    creator_application: bytes
    creator_version: int
    original_size: int
    current_size: int
    checksum: int
    eol_location: int
    error_code: int
    metadata_size: int
    unique_id: UUID
    previous_unique_id: UUID
    last_modified_time_stamp: int
    total_metadata_entries: int
    file_type: int
    flags: int
    vhd2_data_write_guid: UUID | None
    reserved: bytes

    @property
    def is_closed(self) -> bool:
        """Whether the writer came to its end."""
        return self.eol_location != 0

    @property
    def entries_per_block(self) -> int:
        """How many entries one metadata block holds."""
        return entry_capacity(self.metadata_size)

    @classmethod
    def unpack(cls, buffer: Buffer, at: int = 0) -> LogHeader:
        """Return the header at offset `at` of `buffer`, unchecked. Raises: Truncated if it does not fit."""
        values = HEADER.unpack(buffer, at)
        if values["log_format_version"] == LOG_FORMAT_VERSION_1:
            values = {**HEADER_VERSION_1.unpack(buffer, at), "vhd2_data_write_guid": None}
        return cls(**values)

    def pack(self) -> bytes:
        """Return the 4096 bytes as they are, checksum included as it is; see sealed()."""
        values = {name: getattr(self, name) for name in self.__slots__}
        if self.log_format_version == LOG_FORMAT_VERSION_1:
            del values["vhd2_data_write_guid"]
            return HEADER_VERSION_1.pack(**values)
        return HEADER.pack(**{**values, "vhd2_data_write_guid": _require_guid(self.vhd2_data_write_guid)})

    def computed_checksum(self) -> int:
        """Return the checksum that belongs to the other fields."""
        return checksum(dataclasses.replace(self, checksum=0).pack())

    def sealed(self, **changes: Any) -> LogHeader:
        """Return a copy with `changes` and the checksum that belongs to them."""
        changed = dataclasses.replace(self, **changes)
        return dataclasses.replace(changed, checksum=changed.computed_checksum())

    def validate(self, *, file_type: int = FILE_TYPE_HRL) -> None:
        """Check what the header says of itself, and that it is a log of this type.

        Raises: BadSignature, UnsupportedVersion, ChecksumMismatch, FieldOutOfRange. Spec: [MS-HRL] 2.2.
        """
        if self.cookie not in _COOKIES:
            raise BadSignature(
                "this is not an .hrl log",
                **_place("cookie"),
                expected=COOKIE,
                actual=self.cookie,
                hint="check that the file is a replica log and was copied whole",
            )
        if self.log_format_version not in _VERSIONS:
            raise UnsupportedVersion(
                "a log of unknown version",
                **_place("log_format_version"),
                expected="0x00010000 or 0x00020000",
                actual=f"{self.log_format_version:#010x}",
            )
        computed = self.computed_checksum()
        if self.checksum != computed:
            raise ChecksumMismatch(
                "the log's header is damaged",
                **_place("checksum"),
                expected=computed,
                actual=self.checksum,
                hint="the log cannot be trusted; a comparison of the disks finds what changed",
            )
        for name, expected in (("file_type", file_type), ("flags", 0)):
            if getattr(self, name) != expected:
                raise FieldOutOfRange(
                    f"{name} has no known meaning",
                    **_place(name),
                    expected=expected,
                    actual=getattr(self, name),
                )
        if self.metadata_size % SECTOR_BYTES or not SECTOR_BYTES <= self.metadata_size <= METADATA_BYTES_MAX:
            raise FieldOutOfRange(
                "a metadata block has an impossible size",
                **_place("metadata_size"),
                expected=f"a multiple of {SECTOR_BYTES} from {SECTOR_BYTES} to {METADATA_BYTES_MAX}",
                actual=self.metadata_size,
            )

    def validate_within(self, file_bytes: int) -> None:
        """Check a closed log's header against the length of its file.

        Raises: FieldOutOfRange, or Truncated if the file ends before the log does.
        """
        end = self.eol_location
        least = HEADER_BYTES + self.metadata_size
        if end % SECTOR_BYTES or not least <= end <= LOG_BYTES_MAX:
            raise FieldOutOfRange(
                "the end of the log is impossible",
                **_place("eol_location"),
                expected=f"a multiple of {SECTOR_BYTES} from {least} to {LOG_BYTES_MAX}",
                actual=end,
            )
        if end > file_bytes:
            raise Truncated(
                "the file ends before the log does",
                **_place("eol_location"),
                expected=f"{end} bytes",
                actual=f"{file_bytes} bytes",
                hint="the log was not copied whole; fetch it again",
            )
        if self.current_size < end:
            raise FieldOutOfRange(
                "the log is said to be shorter than its end",
                **_place("current_size"),
                expected=f"{end} or more",
                actual=self.current_size,
            )
        # A metadata entry describes at least one sector of data, so the file bounds the count.
        most = end // SECTOR_BYTES
        if self.total_metadata_entries > most:
            raise FieldOutOfRange(
                "more entries than the log has sectors",
                **_place("total_metadata_entries"),
                expected=f"at most {most}",
                actual=self.total_metadata_entries,
            )


def _place(name: str) -> dict[str, Any]:
    return {"field": name, "offset": HEADER.offset_of(name), "spec": HEADER.spec}


@dataclass(frozen=True, slots=True)
class MetadataHeader:
    """The first 32 bytes of a metadata block; field rules stand in METADATA_HEADER."""

    previous_metadata_location: int
    valid_metadata_entries: int
    checksum: int
    reserved: bytes

    @classmethod
    def unpack(cls, buffer: Buffer, at: int = 0) -> MetadataHeader:
        """Return the header at offset `at` of `buffer`, unchecked. Raises: Truncated if it does not fit."""
        return cls(**METADATA_HEADER.unpack(buffer, at))

    @classmethod
    def sealed(cls, *, previous_metadata_location: int, valid_metadata_entries: int) -> MetadataHeader:
        """Return a metadata header with its checksum."""
        draft = cls(previous_metadata_location, valid_metadata_entries, 0, bytes(16))
        return dataclasses.replace(draft, checksum=draft.computed_checksum())

    def pack(self) -> bytes:
        """Return the 32 bytes as they are."""
        return METADATA_HEADER.pack(
            previous_metadata_location=self.previous_metadata_location,
            valid_metadata_entries=self.valid_metadata_entries,
            checksum=self.checksum,
            reserved=self.reserved,
        )

    def computed_checksum(self) -> int:
        """Return the checksum that belongs to the other fields."""
        # A sum of bytes does not depend on their order, so the fields need not be packed for it.
        distance, count = self.previous_metadata_location, self.valid_metadata_entries
        total = sum(distance.to_bytes(8, "little")) + sum(count.to_bytes(4, "little")) + sum(self.reserved)
        return ~total & 0xFFFFFFFF

    def validate(self, *, block_offset: int, metadata_size: int) -> None:
        """Check the header of the block at `block_offset` of the log: checksum, count, distance.

        A distance leads to an earlier block that does not overlap this one, and never into the log's header.
        Raises: ChecksumMismatch, FieldOutOfRange. Spec: [MS-HRL] 2.3.
        """
        spec = METADATA_HEADER.spec
        computed = self.computed_checksum()
        if self.checksum != computed:
            raise ChecksumMismatch(
                "a metadata block is damaged",
                field="checksum",
                offset=block_offset + METADATA_HEADER.offset_of("checksum"),
                expected=computed,
                actual=self.checksum,
                spec=spec,
            )
        capacity = entry_capacity(metadata_size)
        if self.valid_metadata_entries > capacity:
            raise FieldOutOfRange(
                "a metadata block names more entries than it has room for",
                field="valid_metadata_entries",
                offset=block_offset + METADATA_HEADER.offset_of("valid_metadata_entries"),
                expected=f"at most {capacity}",
                actual=self.valid_metadata_entries,
                spec=spec,
            )
        distance = self.previous_metadata_location
        most = block_offset - HEADER_BYTES
        if distance and (distance % SECTOR_BYTES or not metadata_size <= distance <= most):
            raise FieldOutOfRange(
                "a metadata block points to a place where the one before it cannot stand",
                field="previous_metadata_location",
                offset=block_offset,
                expected=f"0, or a multiple of {SECTOR_BYTES} from {metadata_size} to {most}",
                actual=distance,
                spec=spec,
            )
