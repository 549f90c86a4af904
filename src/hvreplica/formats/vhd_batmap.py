"""XenServer's batmap: one bit per block that says "every sector of it is here", so that no bitmap is read.

Not part of VHD 1.0. It follows the BAT in files whose creator is "tap", and says nothing that the sector
bitmaps do not say. A writer that takes blocks away or clears sectors must keep it right or take it out: a
stale one makes XenServer read sectors that are the parent's from the child.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import BadSignature, FieldOutOfRange, Overlap, Truncated
from hvreplica.formats.layout import Field, Layout
from hvreplica.formats.vhd_footer import SECTOR_BYTES
from hvreplica.formats.vhd_header import BAT_ENTRY_BYTES
from hvreplica.units import align_up

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from hvreplica.formats.vhd_header import DynamicHeader

BATMAP_COOKIE = b"tdbatmap"
BATMAP_CREATOR = b"tap"
# One bit per block, and no table has more than 2**32 entries; keeps sums with an unchecked offset in bounds.
BATMAP_SECTORS_MAX = (1 << 32) // 8 // SECTOR_BYTES

BATMAP_HEADER = Layout(
    "VHD batmap header",
    spec="XenServer, not in VHD 1.0",
    size=SECTOR_BYTES,
    endian=">",
    fields=(
        Field("cookie", "8s", '"tdbatmap"'),
        Field("batmap_offset", "Q", "of the bits in the file, bytes"),
        Field("batmap_size", "I", "sectors of 512 bytes"),
        Field("batmap_version", "I", "0x00010002"),
        Field("checksum", "I", "ones' complement of the sum of the batmap's bytes"),
        Field("rest", "484s", "a marker and key material of XenServer; left alone"),
    ),
)


@dataclass(frozen=True, slots=True)
class Batmap:
    """A batmap header as it was read. at: its offset in the file."""

    cookie: bytes
    batmap_offset: int
    batmap_size: int
    batmap_version: int
    checksum: int
    at: int

    @property
    def batmap_bytes(self) -> int:
        """Bytes of the bits."""
        return self.batmap_size * SECTOR_BYTES

    def validate(self) -> None:
        """Check that there is one. Raises: BadSignature."""
        if self.cookie != BATMAP_COOKIE:
            raise BadSignature(
                "there is no batmap behind the BAT",
                offset=self.at,
                field="cookie",
                expected=BATMAP_COOKIE,
                actual=self.cookie,
                spec=BATMAP_HEADER.spec,
            )

    def validate_within(self, file_size_bytes: int) -> None:
        """Check that its bits lie in the file, behind its header.

        Raises: FieldOutOfRange, Overlap, Truncated.
        """
        if self.batmap_size > BATMAP_SECTORS_MAX:
            raise FieldOutOfRange(
                "a batmap is longer than any BAT needs",
                offset=self.at + BATMAP_HEADER.offset_of("batmap_size"),
                field="batmap_size",
                expected=f"at most {BATMAP_SECTORS_MAX}",
                actual=self.batmap_size,
                spec=BATMAP_HEADER.spec,
            )
        place = self.at + BATMAP_HEADER.offset_of("batmap_offset")
        if self.batmap_offset < self.at + BATMAP_HEADER.size:
            raise Overlap(
                "the batmap's bits overlap what stands before them",
                offset=place,
                field="batmap_offset",
                expected=f"at least {self.at + BATMAP_HEADER.size}",
                actual=self.batmap_offset,
                spec=BATMAP_HEADER.spec,
            )
        if self.batmap_offset + self.batmap_bytes > file_size_bytes:
            raise Truncated(
                "the file ends before its batmap does",
                offset=place,
                field="batmap_offset",
                expected=f"at least {self.batmap_offset + self.batmap_bytes} bytes",
                actual=f"{file_size_bytes} bytes",
                spec=BATMAP_HEADER.spec,
            )


def batmap_header_offset(header: DynamicHeader) -> int:
    """Return where the batmap's header stands, if there is one: in the first sector behind the BAT."""
    return align_up(header.table_offset + header.max_table_entries * BAT_ENTRY_BYTES, SECTOR_BYTES)


def unpack_batmap(buffer: Buffer, *, file_offset: int) -> Batmap:
    """Return the batmap header in `buffer`, which came from `file_offset`, unchecked. Raises: Truncated."""
    values = BATMAP_HEADER.unpack(buffer)
    del values["rest"]
    return Batmap(**values, at=file_offset)
