"""The backup that a repair writes before it changes a file: what stood where it writes.

    0       header, 512 bytes; zeros until all records are durable
    512     record: 32 bytes, then `length` bytes of the file as they were; and so on, record_count times

Records stand in the order in which the repair writes; putting them back goes from the last to the first, so
that one valid copy of each doubled structure stands in the file at any instant. Little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import BadSignature, ChecksumMismatch, FieldOutOfRange, UnsupportedVersion
from hvreplica.formats.layout import GUID, Field, Layout
from hvreplica.native import crc32c
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid

    from typing_extensions import Buffer

BACKUP_SIGNATURE = b"hvrepair"
RECORD_SIGNATURE = b"brec"
BACKUP_VERSION = 1
BACKUP_HEADER_BYTES = 512
RECORD_HEADER_BYTES = 32
RECORD_BYTES_MAX = MIB  # one record is held in memory as a whole
SPEC = "docs/formats/backup.md"

BACKUP_HEADER = Layout(
    "backup header",
    spec=SPEC,
    size=BACKUP_HEADER_BYTES,
    fields=(
        Field("signature", "8s", '"hvrepair"'),
        Field("version", "I", "1"),
        Field("checksum", "I", "CRC-32C of these 512 bytes with this field 0"),
        Field("created_s", "Q", "Unix time in seconds"),
        Field("file_bytes", "Q", "length of the file before the repair"),
        Field("record_count", "Q", "records that follow"),
        Field(
            "identity_before",
            GUID,
            "VHDX: FileWriteGuid; VHD: XXH3-128 of unique_id and BAT",
        ),
        Field("identity_after", GUID, "VHDX: FileWriteGuid that the repair gives; VHD: as before"),
        Field("format", "8s", "format of the file, ASCII"),
        Field("file_name", "256s", "name of the file without its folder, UTF-8; for people"),
        Field("reserved", "176s", "0"),
    ),
)
BACKUP_RECORD = Layout(
    "backup record",
    spec=SPEC,
    size=RECORD_HEADER_BYTES,
    fields=(
        Field("signature", "4s", '"brec"'),
        Field("checksum", "I", "CRC-32C of these 32 bytes with this field 0, and then of the data"),
        Field("step", "I", "of the repair that overwrites this; an undo syncs wherever it changes"),
        Field("reserved", "I", "0"),
        Field("file_offset", "Q", "where the data stood"),
        Field("length", "Q", "bytes of data, at most 1 MiB"),
    ),
)


@dataclass(frozen=True, slots=True)
class BackupHeader:
    """What a backup says of itself."""

    created_s: int
    file_bytes: int
    record_count: int
    identity_before: uuid.UUID
    identity_after: uuid.UUID
    format: str
    file_name: str

    def pack(self) -> bytes:
        """Return the 512 bytes with their checksum."""
        packed = bytearray(
            BACKUP_HEADER.pack(
                signature=BACKUP_SIGNATURE,
                version=BACKUP_VERSION,
                created_s=self.created_s,
                file_bytes=self.file_bytes,
                record_count=self.record_count,
                identity_before=self.identity_before,
                identity_after=self.identity_after,
                format=self.format.encode("ascii"),
                file_name=self.file_name.encode("utf-8", "surrogateescape")[:256],
            )
        )
        packed[12:16] = crc32c(packed).to_bytes(4, "little")
        return bytes(packed)


def unpack_backup_header(buffer: Buffer) -> BackupHeader:
    """Return the header of a backup, checked.

    Raises: Truncated, BadSignature (for one that was never finished too), ChecksumMismatch,
    UnsupportedVersion.
    """
    values = BACKUP_HEADER.unpack(buffer)
    if values["signature"] != BACKUP_SIGNATURE:
        unfinished = not any(memoryview(buffer).cast("B")[:BACKUP_HEADER_BYTES])
        raise BadSignature(
            "the backup was never finished" if unfinished else "this is no backup of a repair",
            offset=0,
            field="signature",
            expected=BACKUP_SIGNATURE,
            actual=values["signature"],
            spec=SPEC,
            hint="its repair had not changed anything yet" if unfinished else None,
        )
    summed = bytearray(memoryview(buffer).cast("B")[:BACKUP_HEADER_BYTES])
    summed[12:16] = bytes(4)
    _check("header", values["checksum"], crc32c(summed), BACKUP_HEADER.offset_of("checksum"))
    if values["version"] != BACKUP_VERSION:
        raise UnsupportedVersion(
            "a backup of a version that is not known",
            offset=BACKUP_HEADER.offset_of("version"),
            field="version",
            expected=BACKUP_VERSION,
            actual=values["version"],
            spec=SPEC,
        )
    return BackupHeader(
        created_s=values["created_s"],
        file_bytes=values["file_bytes"],
        record_count=values["record_count"],
        identity_before=values["identity_before"],
        identity_after=values["identity_after"],
        format=values["format"].rstrip(b"\0").decode("ascii", "replace"),
        file_name=values["file_name"].rstrip(b"\0").decode("utf-8", "replace"),
    )


@dataclass(frozen=True, slots=True)
class BackupRecord:
    """The header of one record. at: its own offset in the backup."""

    step: int
    file_offset: int
    length: int
    checksum: int
    at: int

    @property
    def end(self) -> int:
        """The offset in the backup behind its data."""
        return self.at + RECORD_HEADER_BYTES + self.length

    def validate(self, data: Buffer) -> None:
        """Check its data. Raises: ChecksumMismatch."""
        _check("record", self.checksum, _record_checksum(self, data), self.at + 4)


def pack_record(*, step: int, file_offset: int, data: Buffer) -> bytes:
    """Return the 32 bytes that stand before `data`."""
    length = memoryview(data).nbytes
    record = BackupRecord(step, file_offset, length, 0, 0)
    checksum = _record_checksum(record, data)
    return _packed_record(record, checksum)


def unpack_record(buffer: Buffer, *, at: int) -> BackupRecord:
    """Return the record whose header is in `buffer`. Raises: Truncated, BadSignature, FieldOutOfRange."""
    values = BACKUP_RECORD.unpack(buffer)
    if values["signature"] != RECORD_SIGNATURE:
        raise BadSignature(
            "a record of a backup does not start as one",
            offset=at,
            field="signature",
            expected=RECORD_SIGNATURE,
            actual=values["signature"],
            spec=SPEC,
        )
    for field, limit in (("length", RECORD_BYTES_MAX), ("file_offset", 1 << 62)):
        if values[field] > limit:
            raise FieldOutOfRange(
                "a record of a backup has an impossible field",
                offset=at + BACKUP_RECORD.offset_of(field),
                field=field,
                expected=f"at most {limit}",
                actual=values[field],
                spec=SPEC,
            )
    return BackupRecord(values["step"], values["file_offset"], values["length"], values["checksum"], at)


def _packed_record(record: BackupRecord, checksum: int) -> bytes:
    return BACKUP_RECORD.pack(
        signature=RECORD_SIGNATURE,
        checksum=checksum,
        step=record.step,
        file_offset=record.file_offset,
        length=record.length,
    )


def _record_checksum(record: BackupRecord, data: Buffer) -> int:
    return crc32c(data, crc32c(_packed_record(record, 0)))


def _check(what: str, stored: int, computed: int, at: int) -> None:
    if stored != computed:
        raise ChecksumMismatch(
            f"the {what} of a backup is damaged",
            offset=at,
            field="checksum",
            expected=f"0x{computed:08x}",
            actual=f"0x{stored:08x}",
            spec=SPEC,
            hint="nothing was changed; use another copy of the backup",
        )
