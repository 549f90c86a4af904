"""The fingerprint table: what the replica is known to hold of one disk, 16 bytes for each block.

    0      header, 4096 bytes
    4096   block 0, block 1, … : XXH3-128 of the block, canonical (big-endian); 16 zero bytes say "all zero"

A hole in the file is therefore a range of zero blocks, and the table of a sparse disk is as sparse as the
disk. The last block is short where the disk ends inside it. 16 bytes of 255 say "not known": no content has
them but by a chance of one in 2^128, so such a block counts as different from any.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica import native
from hvreplica.errors import BadSignature, ChecksumMismatch, FieldOutOfRange, UnsupportedVersion
from hvreplica.formats.layout import GUID, Field, Layout

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIGNATURE = b"HVRPRINT"
VERSION = 1
HEADER_BYTES = 4096
FINGERPRINT_BYTES = 16
UNKNOWN = b"\xff" * FINGERPRINT_BYTES
BLOCK_BYTES_MIN = 512
BLOCK_BYTES_MAX = 1 << 20
DISK_BYTES_MAX = 64 << 40

HEADER = Layout(
    "fingerprint table header",
    spec="docs/formats/store.md",
    size=64,
    fields=(
        Field("signature", "8s", "HVRPRINT"),
        Field("version", "I", "1"),
        Field("checksum", "I", "CRC-32C over these 64 bytes with this field 0"),
        Field("block_bytes", "I", "512 bytes to 1 MiB, a multiple of 512"),
        Field("disk_index", "I", "the disk's place in its VM"),
        Field("virtual_bytes", "Q", "the disk's size, a multiple of 512"),
        Field("point_id", GUID, "the recovery point it describes; nil while it is being filled"),
        Field("reserved", "16s", "0"),
    ),
)
LAYOUTS = (HEADER,)
NIL = uuid.UUID(int=0)


@dataclass(frozen=True, slots=True)
class FingerprintHeader:
    """The header's values. point_id: what the table describes; nil = nothing that may be relied on."""

    block_bytes: int
    disk_index: int
    virtual_bytes: int
    point_id: uuid.UUID

    @property
    def block_count(self) -> int:
        """The blocks of the disk, a short last one included."""
        return -(-self.virtual_bytes // self.block_bytes)


def pack_header(header: FingerprintHeader) -> bytes:
    """Return the 64 bytes that stand at the start of the table."""
    values = {
        "signature": SIGNATURE,
        "version": VERSION,
        "block_bytes": header.block_bytes,
        "disk_index": header.disk_index,
        "virtual_bytes": header.virtual_bytes,
        "point_id": header.point_id,
    }
    return HEADER.pack(**values, checksum=native.crc32c(HEADER.pack(**values)))


def unpack_header(buffer: Buffer) -> FingerprintHeader:
    """Return the header at the start of `buffer`, wholly checked. Raises: FormatError."""
    values = HEADER.unpack(buffer)
    if values["signature"] != SIGNATURE:
        raise BadSignature(
            "not a fingerprint table",
            offset=0,
            field="signature",
            expected=SIGNATURE,
            actual=values["signature"],
        )
    if values["version"] != VERSION:
        raise UnsupportedVersion(
            "unknown version of a fingerprint table",
            offset=HEADER.offset_of("version"),
            field="version",
            expected=VERSION,
            actual=values["version"],
            hint="use the hvreplica that wrote it, or start over with --resync",
        )
    stored = values.pop("checksum")
    computed = native.crc32c(HEADER.pack(**values))
    if stored != computed:
        raise ChecksumMismatch(
            "the header of the fingerprint table is damaged",
            offset=HEADER.offset_of("checksum"),
            field="checksum",
            expected=f"{computed:#010x}",
            actual=f"{stored:#010x}",
            hint="run replicate with --resync: it rebuilds the table from the replica",
        )
    _validate_range("block_bytes", values["block_bytes"], BLOCK_BYTES_MIN, BLOCK_BYTES_MAX)
    _validate_range("virtual_bytes", values["virtual_bytes"], 512, DISK_BYTES_MAX)
    return FingerprintHeader(
        values["block_bytes"], values["disk_index"], values["virtual_bytes"], values["point_id"]
    )


def _validate_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high or value % 512:
        raise FieldOutOfRange(
            "the header of the fingerprint table is not possible",
            offset=HEADER.offset_of(field),
            field=field,
            expected=f"{low} to {high}, a multiple of 512",
            actual=value,
        )
