"""The footer of a VHD: what the disk is, at the end of the file and, but for fixed disks, again at offset 0.

    fixed     guest's bytes | footer
    others    copy of the footer | header | BAT, locators | block | block | ... | footer

Virtual PC before 2004 wrote 511 bytes of it: the last reserved byte is then not there. Numbers are
big-endian. The size of a disk is `current_size` whatever its geometry says, which rounds down.
Spec: VHD 1.0 (2006), Hard Disk Footer Format.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    Overlap,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats.layout import Field, Layout
from hvreplica.native import byte_sum
from hvreplica.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

COOKIE = b"conectix"
FOOTER_BYTES = 512
OLD_FOOTER_BYTES = 511
SECTOR_BYTES = 512
FILE_FORMAT_VERSION = 0x0001_0000
FEATURES_RESERVED = 0x2  # "This bit must always be set to 1"
NO_DATA_OFFSET = 0xFFFF_FFFF_FFFF_FFFF
# What Windows makes at most. Sector numbers of 32 bits would reach 2 TiB, with blocks and bitmaps less.
VIRTUAL_BYTES_MAX = 2040 * GIB

FOOTER = Layout(
    "VHD footer",
    spec="VHD 1.0 Hard Disk Footer Format",
    size=FOOTER_BYTES,
    endian=">",
    fields=(
        Field("cookie", "8s", '"conectix"'),
        Field("features", "I", "2: the reserved bit that is always set; bit 0 marks a temporary disk"),
        Field("file_format_version", "I", "major 1; any minor is read"),
        Field("data_offset", "Q", "of the dynamic disk header; all ones for a fixed disk"),
        Field("time_stamp", "I", "creation, seconds since 2000-01-01 UTC"),
        Field("creator_application", "4s", "advice only; qemu takes its rule for the size from it"),
        Field("creator_version", "I", "advice only"),
        Field("creator_host_os", "4s", '"Wi2k", "Mac " or 0; advice only'),
        Field("original_size", "Q", "bytes at creation; differs from current_size after a resize"),
        Field("current_size", "Q", "bytes: the size of the disk; multiple of 512, at most 2040 GiB"),
        Field("cylinders", "H", "geometry, rounded down: never the size"),
        Field("heads", "B", ""),
        Field("sectors_per_track", "B", ""),
        Field("disk_type", "I", "2 fixed, 3 dynamic, 4 differencing"),
        Field("checksum", "I", "ones' complement of the sum of all bytes with this field 0"),
        Field("unique_id", "16s", "compared as raw bytes; children name their parent by it"),
        Field("saved_state", "B", "1: belongs to a saved state"),
        Field("reserved", "427s", "0; kept as found"),
    ),
)


class VhdType(IntEnum):
    """The disk types that can be opened; 0, 1, 5 and 6 are reserved. Spec: VHD 1.0 Disk Type."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


class Geometry(NamedTuple):
    """Cylinders, heads and sectors per track, as a BIOS of the time would show the disk."""

    cylinders: int
    heads: int
    sectors_per_track: int


GEOMETRY_MAX = Geometry(65535, 16, 255)


def geometry_of(virtual_bytes: int) -> Geometry:
    """Return the geometry of a disk; its product is at most its size, and less where nothing fits exactly.

    Spec: VHD 1.0 Appendix: CHS Calculation.
    """
    total = min(virtual_bytes // SECTOR_BYTES, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return Geometry(total // 255 // 16, 16, 255)
    tracks = total // 17
    heads = max(-(-tracks // 1024), 4)
    if tracks < heads * 1024 and heads <= 16:
        return Geometry(tracks // heads, heads, 17)
    tracks = total // 31
    if tracks < 16 * 1024:
        return Geometry(tracks // 16, 16, 31)
    return Geometry(total // 63 // 16, 16, 63)


def vhd_checksum(buffer: Buffer, checksum_offset: int) -> int:
    """Return the checksum of a structure whose own field at `checksum_offset` counts as 0.

    Spec: VHD 1.0 Checksum.
    """
    view = memoryview(buffer).cast("B")
    total = byte_sum(view) - byte_sum(view[checksum_offset : checksum_offset + 4])
    return ~total & 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Footer:
    """One footer as it was read, with the fields of FOOTER. computed_checksum: over its bytes.

    at: its offset in the file. footer_bytes: 512, or 511 in a file of an old Virtual PC.
    """

    data_offset: int
    time_stamp: int
    creator_application: bytes
    creator_version: int
    creator_host_os: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    sectors_per_track: int
    disk_type: int
    unique_id: uuid.UUID
    features: int = FEATURES_RESERVED
    file_format_version: int = FILE_FORMAT_VERSION
    saved_state: int = 0
    reserved: bytes = b""
    cookie: bytes = COOKIE
    checksum: int = 0
    computed_checksum: int = 0
    at: int = 0
    footer_bytes: int = FOOTER_BYTES

    @property
    def is_fixed(self) -> bool:
        """Whether the guest's bytes stand in the file as they are."""
        return self.disk_type == VhdType.FIXED

    def pack(self) -> bytes:
        """Return the 512 bytes with their checksum; checksum fields of this object are not used."""
        packed = bytearray(
            FOOTER.pack(
                cookie=self.cookie,
                features=self.features,
                file_format_version=self.file_format_version,
                data_offset=self.data_offset,
                time_stamp=self.time_stamp,
                creator_application=self.creator_application,
                creator_version=self.creator_version,
                creator_host_os=self.creator_host_os,
                original_size=self.original_size,
                current_size=self.current_size,
                cylinders=self.cylinders,
                heads=self.heads,
                sectors_per_track=self.sectors_per_track,
                disk_type=self.disk_type,
                unique_id=self.unique_id.bytes,
                saved_state=self.saved_state,
                reserved=self.reserved,
            )
        )
        at = FOOTER.offset_of("checksum")
        packed[at : at + 4] = vhd_checksum(packed, at).to_bytes(4, "big")
        return bytes(packed)

    def resized(self, virtual_bytes: int) -> Footer:
        """Return this footer with another current size and the geometry that goes with it."""
        geometry = geometry_of(virtual_bytes)
        return replace(
            self,
            current_size=virtual_bytes,
            cylinders=geometry.cylinders,
            heads=geometry.heads,
            sectors_per_track=geometry.sectors_per_track,
        )

    def validate(self) -> None:
        """Check what makes a footer one: cookie and checksum. Raises: BadSignature, ChecksumMismatch."""
        if self.cookie != COOKIE:
            raise BadSignature(
                "there is no VHD footer",
                offset=self.at,
                field="cookie",
                expected=COOKIE,
                actual=self.cookie,
                spec=FOOTER.spec,
            )
        if self.checksum != self.computed_checksum:
            raise ChecksumMismatch(
                "a VHD footer's checksum does not belong to its bytes",
                offset=self.at + FOOTER.offset_of("checksum"),
                field="checksum",
                expected=f"0x{self.computed_checksum:08x}",
                actual=f"0x{self.checksum:08x}",
                spec=FOOTER.spec,
            )

    def validate_within(self, file_size_bytes: int) -> None:
        """Check what the footer in use must hold: version, type, size, and that the file can hold it.

        Raises: UnsupportedVersion, FieldOutOfRange, Truncated.
        """
        if self.file_format_version >> 16 != FILE_FORMAT_VERSION >> 16:
            raise UnsupportedVersion(
                "a VHD of a version that is not known",
                offset=self.at + FOOTER.offset_of("file_format_version"),
                field="file_format_version",
                expected="1.x",
                actual=f"0x{self.file_format_version:08x}",
                spec=FOOTER.spec,
            )
        if self.disk_type not in frozenset(VhdType):
            raise self._out_of_range("disk_type", "2, 3 or 4", self.disk_type)
        if not 0 < self.current_size <= VIRTUAL_BYTES_MAX or self.current_size % SECTOR_BYTES:
            expected = f"a multiple of 512 from 512 to {VIRTUAL_BYTES_MAX}"
            raise self._out_of_range("current_size", expected, self.current_size)
        if self.is_fixed:
            self._require_file("current_size", self.current_size + self.footer_bytes, file_size_bytes)
            return
        if self.data_offset < FOOTER_BYTES or self.data_offset % SECTOR_BYTES:
            raise self._out_of_range("data_offset", "a multiple of 512, at least 512", self.data_offset)
        self._require_file("data_offset", self.data_offset + 1024, file_size_bytes)

    def _require_file(self, field: str, needed_bytes: int, file_size_bytes: int) -> None:
        if needed_bytes > file_size_bytes:
            raise Truncated(
                "the file ends before what its footer names",
                offset=self.at + FOOTER.offset_of(field),
                field=field,
                expected=f"at least {needed_bytes} bytes",
                actual=f"{file_size_bytes} bytes",
                spec=FOOTER.spec,
            )

    def _out_of_range(self, field: str, expected: object, actual: object) -> FieldOutOfRange:
        return FieldOutOfRange(
            "a VHD footer's field is outside of what the format allows",
            offset=self.at + FOOTER.offset_of(field),
            field=field,
            expected=expected,
            actual=actual,
            spec=FOOTER.spec,
        )


def unpack_footer(buffer: Buffer, *, file_offset: int) -> Footer:
    """Return the footer in `buffer`, which came from `file_offset`, unchecked.

    buffer: 512 bytes, or 511 at the end of a file of an old Virtual PC. Raises: Truncated.
    """
    found = bytes(memoryview(buffer).cast("B")[:FOOTER_BYTES])
    footer_bytes = len(found)
    if footer_bytes == OLD_FOOTER_BYTES:
        found += b"\0"
    values = FOOTER.unpack(found)
    values["unique_id"] = uuid.UUID(bytes=values["unique_id"])
    computed_checksum = vhd_checksum(found, FOOTER.offset_of("checksum"))
    return Footer(**values, computed_checksum=computed_checksum, at=file_offset, footer_bytes=footer_bytes)


def choose_footer(
    trailing: Sequence[Footer | FormatError], copy: Footer | FormatError, *, file_size_bytes: int
) -> Footer:
    """Return the footer that counts: the one at the end, else the copy at offset 0.

    trailing: what stands 512 and 511 bytes before the end; copy: what stands at 0. What could not be read is
    given as its error. Pure.

    A missing or damaged footer at the end is the trace of a crash while the file grew, and only then the copy
    counts; a fixed disk has none, so a copy that claims to be one is the guest's own bytes. The last bytes of
    a torn file may also be the guest's, and look like the footer of another disk that is stored inside: a
    footer at the end that is not of the same disk as a valid copy is believed only where it describes
    exactly this file as fixed, and where it could be either nothing is.
    Raises: the error of the footer at the end if none is valid; Overlap if both may be. Spec: VHD 1.0 Hard
    Disk Footer Format.
    """
    backup = None
    if isinstance(copy, Footer) and _error_of(copy) is None and not copy.is_fixed:
        backup = copy
    errors: list[FormatError] = []
    for candidate in trailing:
        error = _error_of(candidate)
        if error is not None:
            errors.append(error)
        elif isinstance(candidate, Footer):
            end = candidate.current_size + candidate.footer_bytes
            if backup is None or candidate.unique_id == backup.unique_id:
                return candidate
            if candidate.is_fixed and end == file_size_bytes:
                return candidate
            if candidate.is_fixed and end < file_size_bytes:
                raise _two_disks(candidate, backup)
    if backup is not None:
        return backup
    # One that has the cookie tells more than one that is not there.
    first = next((each for each in errors if not isinstance(each, BadSignature)), errors[0])
    if isinstance(first, ChecksumMismatch):
        first.hint = (
            "the footer was changed by hand or damaged, and no copy of it is valid; restore the file from a"
            " copy, or give the disk a new footer with the program that made it"
        )
    raise first


def _two_disks(trailing: Footer, copy: Footer) -> Overlap:
    """Return the refusal of a file that may be either of two disks: the wrong one is a guest's bytes."""
    return Overlap(
        "the file begins as one disk and ends as another one",
        offset=trailing.at,
        field="unique_id",
        expected=copy.unique_id,
        actual=trailing.unique_id,
        spec=FOOTER.spec,
        hint="a fixed disk with room behind its data, whose guest wrote a disk to its start, or a dynamic one"
        " that was cut off inside of a guest's data; cut the file behind its data, or restore it from a copy",
    )


def _error_of(candidate: Footer | FormatError) -> FormatError | None:
    """Return what makes a candidate no footer, None where it is one."""
    if isinstance(candidate, FormatError):
        return candidate
    try:
        candidate.validate()
    except FormatError as error:
        return error
    return None
