"""GUIDs as Windows writes them: 16 bytes, the first three fields little-endian; braces in text."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange, Truncated

if TYPE_CHECKING:
    from typing_extensions import Buffer

NIL = uuid.UUID(int=0)
GUID_BYTES = 16


def unpack_guid(buffer: Buffer, at: int = 0) -> uuid.UUID:
    """Return the GUID at offset `at`. Raises: Truncated if fewer than 16 bytes stand there."""
    view = memoryview(buffer).cast("B")
    if at < 0 or len(view) - at < GUID_BYTES:
        raise Truncated(
            "a GUID does not fit", offset=at, expected="16 bytes", actual=f"{max(len(view) - at, 0)} bytes"
        )
    return uuid.UUID(bytes_le=bytes(view[at : at + GUID_BYTES]))


def pack_guid(guid: uuid.UUID) -> bytes:
    """Return the 16 bytes of `guid` in on-disk order."""
    return guid.bytes_le


def parse_guid(text: str) -> uuid.UUID:
    """Return the GUID that `text` spells, in either case, with or without braces.

    Raises: FieldOutOfRange if it is not one.
    """
    bare = text[1:-1] if text.startswith("{") and text.endswith("}") else text
    try:
        if len(bare) != 36:
            raise ValueError
        return uuid.UUID(bare)
    except ValueError:
        raise FieldOutOfRange(
            "a text is not a GUID", expected="{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}", actual=repr(text[:64])
        ) from None


def braced(guid: uuid.UUID) -> str:
    """Return `guid` in lower case with braces, as locators and Hyper-V spell it."""
    return f"{{{guid}}}"
