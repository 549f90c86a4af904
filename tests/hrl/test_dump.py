"""What people are shown of a log is what stands in it."""

from __future__ import annotations

import pytest

from hvreplica.errors import ChecksumMismatch, NotClosed
from hvreplica.hrl import dump_entries, log_info
from tests.hrl.plain_reader import calculate_checksum
from tests.hrl.support import (
    DATA_WRITE_GUID,
    LOG,
    LOG_ID,
    NOW_S,
    PREVIOUS_ID,
    many_writes,
    new_files,
    new_writer,
    patch,
    write_log,
)


def test_info_of_a_closed_log() -> None:
    files = new_files()
    summary = write_log(files, many_writes(200)).close()
    info = log_info(files, LOG)
    assert info.closed
    assert (info.log_id, info.previous_log_id) == (str(LOG_ID), str(PREVIOUS_ID))
    assert info.data_write_guid == str(DATA_WRITE_GUID)
    assert (info.version, info.creator, info.error_code) == ("2.0", "hvr", 0)
    assert info.created_s == info.modified_s == NOW_S
    assert (info.entries, info.log_bytes, info.file_bytes) == (200, summary.log_bytes, summary.log_bytes)


def test_info_of_an_unclosed_log() -> None:
    files = new_files()
    new_writer(files).abort()
    info = log_info(files, LOG)
    assert not info.closed
    assert (info.log_bytes, info.file_bytes) == (0, 8192)


def test_info_of_a_damaged_header_is_refused() -> None:
    files = new_files()
    write_log(files, many_writes(2))
    patch(files, 99, b"\x55")
    with pytest.raises(ChecksumMismatch):
        log_info(files, LOG)


def test_dump_lists_every_entry_in_order() -> None:
    files = new_files()
    writes = many_writes(200)
    write_log(files, writes)
    entries = list(dump_entries(files, LOG))
    assert [(entry.index, entry.disk_offset, entry.length) for entry in entries] == [
        (index, offset, len(data)) for index, (offset, data) in enumerate(writes)
    ]
    assert [entry.data_checksum for entry in entries] == [calculate_checksum(data) for _, data in writes]
    content = files.content_of(LOG)
    assert all(
        content[entry.log_offset : entry.log_offset + entry.length] == data
        for entry, (_, data) in zip(entries, writes, strict=True)
    )
    assert {entry.time_s for entry in entries} == {int(NOW_S)}


def test_dump_of_an_unclosed_log_is_refused() -> None:
    files = new_files()
    new_writer(files).abort()
    with pytest.raises(NotClosed):
        list(dump_entries(files, LOG))
