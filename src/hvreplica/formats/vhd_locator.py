"""Parent locators of a differencing VHD: up to eight places that each name the parent's file in their way.

An entry names a place in the file; `platform_data_space` is bytes in files of Windows, VirtualBox and
XenServer and sectors by the specification's text, so that only offset and length are used.
Spec: VHD 1.0 (2006), Parent Locator Entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange, Truncated
from hvreplica.formats.layout import Field, Layout
from hvreplica.units import KIB

if TYPE_CHECKING:
    from typing_extensions import Buffer

LOCATOR_COUNT = 8
# The longest path that Windows knows is 32767 UTF-16 units.
LOCATOR_BYTES_MAX = 64 * KIB
# Room for a name of ours. A path of 4096 bytes has at most as many UTF-16 units: a rebase onto any name fits.
LOCATOR_SPACE_BYTES = 8 * KIB

NONE = b"\0\0\0\0"
RELATIVE = b"W2ru"
ABSOLUTE = b"W2ku"
FILE_URL = b"MacX"
RELATIVE_OLD = b"Wi2r"
ABSOLUTE_OLD = b"Wi2k"
MAC_ALIAS = b"Mac "

_RULES = "None, W2ru and W2ku UTF-16LE, MacX UTF-8 URL, Wi2r and Wi2k of old Virtual PC, Mac a blob"
_ENCODINGS = {
    RELATIVE: "utf-16-le",
    ABSOLUTE: "utf-16-le",
    FILE_URL: "utf-8",
    RELATIVE_OLD: "cp1252",  # "deprecated", no encoding stated; names of that time are in the ANSI code page
    ABSOLUTE_OLD: "cp1252",
}

LOCATOR_ENTRY = Layout(
    "VHD parent locator entry",
    spec="VHD 1.0 Parent Locator Entry",
    size=24,
    endian=">",
    fields=(
        Field("platform_code", "4s", _RULES),
        Field("platform_data_space", "I", "room for the data; bytes or sectors, so never used"),
        Field("platform_data_length", "I", "bytes"),
        Field("reserved", "I", "0"),
        Field("platform_data_offset", "Q", "of the data in the file, bytes"),
    ),
)


@dataclass(frozen=True, slots=True)
class LocatorEntry:
    """One of the eight entries, with the fields of LOCATOR_ENTRY. at: its offset in the file."""

    platform_code: bytes = NONE
    platform_data_space: int = 0
    platform_data_length: int = 0
    platform_data_offset: int = 0
    reserved: int = 0
    at: int = 0

    @property
    def is_used(self) -> bool:
        """Whether it names anything."""
        return self.platform_code != NONE

    def pack(self) -> bytes:
        """Return the 24 bytes."""
        return LOCATOR_ENTRY.pack(
            platform_code=self.platform_code,
            platform_data_space=self.platform_data_space,
            platform_data_length=self.platform_data_length,
            reserved=self.reserved,
            platform_data_offset=self.platform_data_offset,
        )

    def validate_within(self, file_size_bytes: int) -> None:
        """Check that the data of a used entry lies in the file. Raises: FieldOutOfRange, Truncated."""
        if not self.is_used:
            return
        if self.platform_data_length > LOCATOR_BYTES_MAX:
            raise FieldOutOfRange(
                "a parent locator is longer than any path",
                offset=self.at + LOCATOR_ENTRY.offset_of("platform_data_length"),
                field="platform_data_length",
                expected=f"at most {LOCATOR_BYTES_MAX}",
                actual=self.platform_data_length,
                spec=LOCATOR_ENTRY.spec,
            )
        end = self.platform_data_offset + self.platform_data_length
        if end > file_size_bytes:
            raise Truncated(
                "the file ends before a parent locator's data",
                offset=self.at + LOCATOR_ENTRY.offset_of("platform_data_offset"),
                field="platform_data_offset",
                expected=f"at least {end} bytes",
                actual=f"{file_size_bytes} bytes",
                spec=LOCATOR_ENTRY.spec,
            )


def unpack_locator_entry(buffer: Buffer, *, at: int) -> LocatorEntry:
    """Return the entry in `buffer`, which came from `at` in the file, unchecked. Raises: Truncated."""
    return LocatorEntry(**LOCATOR_ENTRY.unpack(buffer), at=at)


def decode_locator(platform_code: bytes, data: bytes) -> str:
    """Return the name that a locator's data spells, as it stands there, "" for codes that spell none.

    Of a file URL that is the URL. Never fails: what cannot be decoded becomes U+FFFD; the text ends at a NUL.
    """
    encoding = _ENCODINGS.get(platform_code)
    return "" if encoding is None else data.decode(encoding, "replace").split("\0", 1)[0]


def encode_locator(platform_code: bytes, name: str) -> bytes:
    """Return the data of a locator that spells `name`; without a NUL, as Windows writes it."""
    return name.encode(_ENCODINGS[platform_code], "replace")
