"""The header section of a VHDX: file type identifier and the two headers.

    0        file type identifier      64 KiB, never rewritten after creation
    64 KiB   header 1                  4 KiB used, summed and replaced as a whole
    128 KiB  header 2
    192 KiB  region table 1            formats/vhdx_region.py
    256 KiB  region table 2
    1 MiB    log, regions and blocks in any order, each on a 1 MiB boundary

The valid header with the larger sequence number is current; an update replaces the other one.
Spec: [MS-VHDX] 2.2.1, 2.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from hvreplica.formats.guid import NIL
from hvreplica.formats.layout import GUID, Field, Layout
from hvreplica.native import crc32c
from hvreplica.units import KIB, MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator, Sequence

    from typing_extensions import Buffer

FILE_SIGNATURE = b"vhdxfile"
HEADER_SIGNATURE = b"head"
HEADER_OFFSETS = (64 * KIB, 128 * KIB)
HEADER_BYTES = 4096
HEADER_SECTION_BYTES = MIB
ALIGNMENT_BYTES = MIB  # of every region, log and block in the file
VERSION = 1
LOG_VERSION = 0
SEQUENCE_NUMBER_MAX = (1 << 64) - 1
# 2.2.2 leaves the log's length open; no known writer makes more than 1 GiB, and a scan must end.
LOG_LENGTH_MAX = 1 << 30
# 64 TiB of blocks, their tables and gaps; keeps every sum of two offsets inside 63 bits.
FILE_BYTES_MAX = 1 << 47

FILE_IDENTIFIER = Layout(
    "file type identifier",
    spec="[MS-VHDX] 2.2.1",
    size=520,
    fields=(
        Field("signature", "8s", '"vhdxfile"'),
        Field("creator", "512s", "UTF-16LE, may end with NUL; diagnostic only"),
    ),
)
HEADER = Layout(
    "header",
    spec="[MS-VHDX] 2.2.2",
    size=HEADER_BYTES,
    fields=(
        Field("signature", "4s", '"head"'),
        Field("checksum", "I", "CRC-32C of these 4096 bytes with this field 0"),
        Field("sequence_number", "Q", "the valid header with the larger one is current; equal: the first"),
        Field("file_write_guid", GUID, "new before the first change of anything in a session"),
        Field("data_write_guid", GUID, "new before the first change that a guest can see in a session"),
        Field("log_guid", GUID, "zero: the log is empty; else only log entries with it count"),
        Field("log_version", "H", "0"),
        Field("version", "H", "1"),
        Field("log_length", "I", "multiple of 1 MiB"),
        Field("log_offset", "Q", "multiple of 1 MiB, at least 1 MiB, overlaps nothing"),
        Field("reserved", "4016s", "0, ignored"),
    ),
)


def unpack_creator(buffer: Buffer) -> str:
    """Return the creator text of the first 520 bytes of a file; what is no UTF-16 becomes U+FFFD.

    Raises: Truncated, BadSignature.
    """
    values = FILE_IDENTIFIER.unpack(buffer)
    if values["signature"] != FILE_SIGNATURE:
        raise BadSignature(
            "this is not a VHDX file",
            offset=0,
            field="signature",
            expected=FILE_SIGNATURE,
            actual=values["signature"],
            spec=FILE_IDENTIFIER.spec,
        )
    text: str = values["creator"].decode("utf-16-le", "replace")
    return text.split("\0", 1)[0]


def pack_identifier(creator: str) -> bytes:
    """Return the file type identifier; `creator` is cut to 255 UTF-16 units."""
    encoded = creator.encode("utf-16-le")[:510]
    return FILE_IDENTIFIER.pack(signature=FILE_SIGNATURE, creator=encoded)


@dataclass(frozen=True, slots=True)
class Header:
    """One header as it was read. computed_checksum: over its bytes. at: its offset in the file."""

    sequence_number: int
    file_write_guid: uuid.UUID
    data_write_guid: uuid.UUID
    log_guid: uuid.UUID
    log_length: int
    log_offset: int
    log_version: int = LOG_VERSION
    version: int = VERSION
    signature: bytes = HEADER_SIGNATURE
    checksum: int = 0
    computed_checksum: int = 0
    at: int = HEADER_OFFSETS[0]

    def pack(self) -> bytes:
        """Return the 4096 bytes with their checksum; checksum fields of this object are not used."""
        packed = bytearray(
            HEADER.pack(
                signature=HEADER_SIGNATURE,
                sequence_number=self.sequence_number,
                file_write_guid=self.file_write_guid,
                data_write_guid=self.data_write_guid,
                log_guid=self.log_guid,
                log_version=self.log_version,
                version=self.version,
                log_length=self.log_length,
                log_offset=self.log_offset,
            )
        )
        packed[4:8] = crc32c(packed).to_bytes(4, "little")
        return bytes(packed)

    def validate(self) -> None:
        """Check signature and checksum, which make a header valid. Raises: BadSignature, ChecksumMismatch."""
        if self.signature != HEADER_SIGNATURE:
            raise BadSignature(
                "a header does not start as one",
                offset=self.at,
                field="signature",
                expected=HEADER_SIGNATURE,
                actual=self.signature,
                spec=HEADER.spec,
            )
        if self.checksum != self.computed_checksum:
            raise ChecksumMismatch(
                "a header's checksum does not belong to its bytes",
                offset=self.at + HEADER.offset_of("checksum"),
                field="checksum",
                expected=f"0x{self.computed_checksum:08x}",
                actual=f"0x{self.checksum:08x}",
                spec=HEADER.spec,
            )

    def validate_within(self, file_size_bytes: int) -> None:
        """Check what only a current header must hold: versions, and a log inside the file.

        Raises: UnsupportedVersion, FieldOutOfRange, Overlap, Truncated.
        """
        for error in self.errors_within(file_size_bytes):
            raise error

    def errors_within(self, file_size_bytes: int) -> Iterator[FormatError]:
        """Yield what validate_within() raises the first of."""
        yield from self._version_errors()
        for field, value in (("log_offset", self.log_offset), ("log_length", self.log_length)):
            if value % ALIGNMENT_BYTES or value > FILE_BYTES_MAX:
                yield self._out_of_range(field, f"a multiple of 1 MiB, at most {FILE_BYTES_MAX}", value)
        if self.log_length == 0:
            if self.log_guid != NIL:
                yield self._out_of_range("log_length", "at least 1 MiB while LogGuid is not zero", 0)
            return
        if self.log_length > LOG_LENGTH_MAX:
            yield self._out_of_range("log_length", f"at most {LOG_LENGTH_MAX}", self.log_length)
        if self.log_offset < HEADER_SECTION_BYTES:
            yield Overlap(
                "the log overlaps the header section",
                offset=self.at + HEADER.offset_of("log_offset"),
                field="log_offset",
                expected=f"at least {HEADER_SECTION_BYTES}",
                actual=self.log_offset,
                spec=HEADER.spec,
            )
        if self.log_offset + self.log_length > file_size_bytes:
            yield Truncated(
                "the file ends before its log does",
                offset=self.at + HEADER.offset_of("log_offset"),
                field="log_offset",
                expected=f"at least {self.log_offset + self.log_length} bytes",
                actual=f"{file_size_bytes} bytes",
                spec=HEADER.spec,
            )

    def _version_errors(self) -> Iterator[UnsupportedVersion]:
        if self.version != VERSION:
            yield UnsupportedVersion(
                "a VHDX of a version that is not known",
                offset=self.at + HEADER.offset_of("version"),
                field="version",
                expected=VERSION,
                actual=self.version,
                spec=HEADER.spec,
            )
        if self.log_version != LOG_VERSION and self.log_guid != NIL:
            yield UnsupportedVersion(
                "the file's own log has a version that is not known, and it is not empty",
                offset=self.at + HEADER.offset_of("log_version"),
                field="log_version",
                expected=LOG_VERSION,
                actual=self.log_version,
                spec=HEADER.spec,
                hint="attach and detach the disk once with the program that wrote it",
            )

    def _out_of_range(self, field: str, expected: object, actual: object) -> FieldOutOfRange:
        return FieldOutOfRange(
            "a header field is outside of what the format allows",
            offset=self.at + HEADER.offset_of(field),
            field=field,
            expected=expected,
            actual=actual,
            spec=HEADER.spec,
        )


def unpack_header(buffer: Buffer, *, file_offset: int) -> Header:
    """Return the header in `buffer`, which came from `file_offset`, unchecked. Raises: Truncated."""
    values = HEADER.unpack(buffer)
    del values["reserved"]
    summed = bytearray(memoryview(buffer).cast("B")[:HEADER_BYTES])
    summed[4:8] = bytes(4)
    return Header(**values, computed_checksum=crc32c(summed), at=file_offset)


def choose_header(candidates: Sequence[Header | FormatError]) -> int:
    """Return the index of the current header. A candidate that could not be read is given as its error.

    Pure. One bad copy is the normal trace of a crash; equal sequence numbers, which Disk2VHD writes, mean the
    first.
    Raises: the first candidate's error if none is valid. Spec: [MS-VHDX] 2.2.2.
    """
    best: int | None = None
    best_sequence_number = -1
    errors = []
    for index, candidate in enumerate(candidates):
        try:
            if isinstance(candidate, FormatError):
                raise candidate
            candidate.validate()
        except FormatError as error:
            errors.append(error)
            continue
        if candidate.sequence_number > best_sequence_number:
            best, best_sequence_number = index, candidate.sequence_number
    if best is None:
        first = errors[0]
        first.hint = (
            "no header copy is valid: the start of the file was overwritten; restore the file from a copy"
        )
        raise first
    return best


def next_header(current: Header, *, at: int, **changes: object) -> Header:
    """Return the header that follows `current`, to be written at `at`, with `changes` made.

    Raises: FieldOutOfRange if the sequence number cannot grow.
    """
    if current.sequence_number >= SEQUENCE_NUMBER_MAX:
        raise FieldOutOfRange(
            "the header's sequence number cannot grow any more",
            offset=current.at + HEADER.offset_of("sequence_number"),
            field="sequence_number",
            expected=f"below {SEQUENCE_NUMBER_MAX}",
            actual=current.sequence_number,
            spec="[MS-VHDX] 2.2.2.1",
            hint="convert the disk into a new file",
        )
    fields: dict[str, object] = {"sequence_number": current.sequence_number + 1, "at": at, **changes}
    return replace(current, **fields)  # type: ignore[arg-type]
