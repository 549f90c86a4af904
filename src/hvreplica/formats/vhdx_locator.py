"""The parent locator of a differencing VHDX: a header, a table of entries, and the keys and values they point
to.

Spec: [MS-VHDX] 2.6.2.6.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange, FormatError, Overlap, Truncated, UnsupportedVersion
from hvreplica.formats.guid import NIL, braced, parse_guid
from hvreplica.formats.layout import GUID, Field, Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

VHDX_LOCATOR_TYPE = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
PARENT_LINKAGE = "parent_linkage"
PARENT_LINKAGE2 = "parent_linkage2"
RELATIVE_PATH = "relative_path"
VOLUME_PATH = "volume_path"
ABSOLUTE_WIN32_PATH = "absolute_win32_path"
PATH_KEYS = (RELATIVE_PATH, VOLUME_PATH, ABSOLUTE_WIN32_PATH)  # in the order in which they are to be tried
# 2.6.2.6.1 leaves the count open; known writers have five, and a locator is read as a whole.
LOCATOR_ENTRY_COUNT_MAX = 1024
_REBASE_HINT = "tell which file the parent is: `hvreplica disk rebase FILE --parent PARENT --unsafe`"

PARENT_LOCATOR_HEADER = Layout(
    "parent locator header",
    spec="[MS-VHDX] 2.6.2.6.1",
    size=20,
    fields=(
        Field("locator_type", GUID, "b04aefb7-d19e-4a81-b789-25b8e9445913: the parent is a VHDX"),
        Field("reserved", "H", "0, ignored"),
        Field("key_value_count", "H", "number of entries that follow"),
    ),
)
PARENT_LOCATOR_ENTRY = Layout(
    "parent locator entry",
    spec="[MS-VHDX] 2.6.2.6.2",
    size=12,
    fields=(
        Field("key_offset", "I", "from the start of the item; above 0"),
        Field("value_offset", "I", "from the start of the item; above 0"),
        Field("key_length", "H", "bytes of UTF-16LE without a NUL; above 0"),
        Field("value_length", "H", "bytes of UTF-16LE without a NUL; above 0"),
    ),
)


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """What a child says of its parent. entries: keys and values in order. at: the item's file offset."""

    locator_type: uuid.UUID
    entries: Mapping[str, str]
    at: int = 0

    def validate(self) -> None:
        """Check that it is of the type that is known, and names and identifies a parent.

        Raises: UnsupportedVersion, FieldOutOfRange. Spec: [MS-VHDX] 2.6.2.6.3.
        """
        if self.locator_type != VHDX_LOCATOR_TYPE:
            raise UnsupportedVersion(
                "the parent of this disk is of a kind that is not known",
                offset=self.at,
                field="locator_type",
                expected=VHDX_LOCATOR_TYPE,
                actual=self.locator_type,
                spec=PARENT_LOCATOR_HEADER.spec,
                hint="merge the disk with the program that made it",
            )
        if not self.linkages:
            raise self._missing(PARENT_LINKAGE, "the parent's DataWriteGuid")
        if not self.paths:
            raise self._missing(" or ".join(PATH_KEYS), "a path of the parent")

    def _missing(self, field: str, expected: str) -> FieldOutOfRange:
        return FieldOutOfRange(
            "the parent locator lacks an entry",
            offset=self.at,
            field=field,
            expected=expected,
            actual=f"{len(self.entries)} entries: {', '.join(sorted(self.entries))[:200]}",
            spec="[MS-VHDX] 2.6.2.6.3",
            hint=_REBASE_HINT,
        )

    @property
    def linkages(self) -> tuple[uuid.UUID, ...]:
        """The values that the parent's DataWriteGuid may have; one of zeros says nothing.

        Raises: FieldOutOfRange for one that is no GUID.
        """
        found = (self._linkage(key) for key in (PARENT_LINKAGE, PARENT_LINKAGE2))
        return tuple(guid for guid in found if guid is not None)

    @property
    def second_linkage(self) -> uuid.UUID | None:
        """The value that the parent's DataWriteGuid has once the change of it is done that is under way."""
        return self._linkage(PARENT_LINKAGE2)

    def _linkage(self, key: str) -> uuid.UUID | None:
        guid = _linkage(key, self.entries[key], at=self.at) if key in self.entries else NIL
        return None if guid == NIL else guid

    @property
    def paths(self) -> tuple[str, ...]:
        """The parent's paths, in the order in which they are to be tried."""
        return tuple(self.entries[key] for key in PATH_KEYS if self.entries.get(key))


def _linkage(key: str, text: str, *, at: int) -> uuid.UUID:
    try:
        return parse_guid(text)
    except FormatError as error:
        raise FieldOutOfRange(
            "the parent locator has an identity that is no GUID",
            offset=at,
            field=key,
            expected=error.expected,
            actual=error.actual,
            spec="[MS-VHDX] 2.6.2.6.3",
            hint=_REBASE_HINT,
        ) from None


def unpack_parent_locator(buffer: Buffer, *, file_offset: int) -> ParentLocator:
    """Return the locator in `buffer`, the whole item from `file_offset`; validate() says if it can be used.

    Raises: Truncated, FieldOutOfRange for an entry outside of the item or text that is no UTF-16, Overlap for
    a key that is there twice.
    """
    view = memoryview(buffer).cast("B")
    header = PARENT_LOCATOR_HEADER.unpack(view)
    count = header["key_value_count"]
    end = PARENT_LOCATOR_HEADER.size + count * PARENT_LOCATOR_ENTRY.size
    if count > LOCATOR_ENTRY_COUNT_MAX or end > len(view):
        raise Truncated(
            "the parent locator's entries do not fit",
            offset=file_offset + PARENT_LOCATOR_HEADER.offset_of("key_value_count"),
            field="key_value_count",
            expected=f"at most {LOCATOR_ENTRY_COUNT_MAX}, within {len(view)} bytes",
            actual=count,
            spec=PARENT_LOCATOR_HEADER.spec,
        )
    entries: dict[str, str] = {}
    for at in range(PARENT_LOCATOR_HEADER.size, end, PARENT_LOCATOR_ENTRY.size):
        row = PARENT_LOCATOR_ENTRY.unpack(view, at)
        key = _text(view, row, "key", file_offset=file_offset, at=at)
        if key in entries:
            raise Overlap(
                "the parent locator has a key twice",
                offset=file_offset + at,
                field="key",
                actual=repr(key[:64]),
                spec=PARENT_LOCATOR_ENTRY.spec,
            )
        entries[key] = _text(view, row, "value", file_offset=file_offset, at=at)
    return ParentLocator(header["locator_type"], entries, at=file_offset)


def _text(view: memoryview, row: Mapping[str, int], name: str, *, file_offset: int, at: int) -> str:
    start, length = row[f"{name}_offset"], row[f"{name}_length"]
    if length % 2 or not 0 < start <= len(view) - length:
        raise FieldOutOfRange(
            f"the {name} of a parent locator entry does not lie in the item",
            offset=file_offset + at,
            field=f"{name}_offset, {name}_length",
            expected=f"an even length within {len(view)} bytes",
            actual=f"{length} bytes at {start}",
            spec=PARENT_LOCATOR_ENTRY.spec,
        )
    try:
        text = bytes(view[start : start + length]).decode("utf-16-le")
    except UnicodeDecodeError:
        text = "\0"
    # Some writers count a NUL at the end; one inside would let a name mean two things.
    text = text.removesuffix("\0") if text != "\0" else text
    if "\0" in text:
        raise FieldOutOfRange(
            f"the {name} of a parent locator entry is no UTF-16 text",
            offset=file_offset + start,
            field=name,
            expected="UTF-16LE without NUL",
            actual=f"{length} bytes",
            spec=PARENT_LOCATOR_ENTRY.spec,
        )
    return text


def pack_parent_locator(entries: Mapping[str, str]) -> bytes:
    """Return the item of a VHDX locator with `entries`, read back and compared."""
    rows, texts = [], b""
    start = PARENT_LOCATOR_HEADER.size + len(entries) * PARENT_LOCATOR_ENTRY.size
    for key, value in entries.items():
        octets = key.encode("utf-16-le"), value.encode("utf-16-le")
        rows.append(
            PARENT_LOCATOR_ENTRY.pack(
                key_offset=start + len(texts),
                value_offset=start + len(texts) + len(octets[0]),
                key_length=len(octets[0]),
                value_length=len(octets[1]),
            )
        )
        texts += octets[0] + octets[1]
    header = PARENT_LOCATOR_HEADER.pack(locator_type=VHDX_LOCATOR_TYPE, key_value_count=len(entries))
    item = header + b"".join(rows) + texts
    if dict(unpack_parent_locator(item, file_offset=0).entries) != dict(entries):
        raise AssertionError("a parent locator does not read back as it was meant")
    return item


def locator_entries(linkage: uuid.UUID, paths: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that identify a parent by its DataWriteGuid and name it by `paths` (by their keys).

    No parent_linkage2: 2.6.2.6.3 wants it absent unless a parent is being changed.
    """
    return {PARENT_LINKAGE: braced(linkage), **paths}
