"""GUIDs keep the order of bytes that Windows writes."""

from __future__ import annotations

import uuid

import pytest

from hvreplica.errors import FieldOutOfRange, Truncated
from hvreplica.formats.guid import braced, pack_guid, parse_guid, unpack_guid

BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
ON_DISK = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")


def test_bytes_are_mixed_endian() -> None:
    assert pack_guid(BAT) == ON_DISK
    assert unpack_guid(b"xx" + ON_DISK, 2) == BAT


@pytest.mark.parametrize("at", [-1, 1, 17])
def test_short_buffer_is_truncated(at: int) -> None:
    with pytest.raises(Truncated):
        unpack_guid(ON_DISK, at)


@pytest.mark.parametrize("text", [str(BAT), braced(BAT), braced(BAT).upper()])
def test_text_is_read_in_any_case_with_or_without_braces(text: str) -> None:
    assert parse_guid(text) == BAT


@pytest.mark.parametrize(
    "text", ["", "{}", "2dc27766f62342009d64115e9bfd4a08", "{" + str(BAT), "z" * 36, "9" * 999]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FieldOutOfRange):
        parse_guid(text)
