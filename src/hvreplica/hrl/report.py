"""What the log verbs return; the JSON of the command line is these structures, field by field."""

from __future__ import annotations

import enum

import msgspec


class LogEnd(enum.StrEnum):
    """How a log ends. TORN_TAIL: what follows its last whole block was not made durable and is left out."""

    CLEAN = "clean"
    TORN_TAIL = "torn_tail"


class LogSummary(msgspec.Struct, frozen=True):
    """A log that was just closed. data_bytes: guest bytes in it, zeros included. log_bytes: its length."""

    log_id: str
    previous_log_id: str
    path: str
    entries: int
    metadata_blocks: int
    data_bytes: int
    log_bytes: int


class LogInfo(msgspec.Struct, frozen=True):
    """What the header of a log says, whether closed or not. Times are Unix seconds.

    data_write_guid is None in a log of version 1. file_bytes: the length of its file; what stands behind
    log_bytes does not belong to the log. log_bytes is 0 in a log that is not closed.
    """

    path: str
    closed: bool
    version: str
    log_id: str
    previous_log_id: str
    data_write_guid: str | None
    creator: str
    created_s: int
    modified_s: int
    error_code: int
    metadata_bytes: int
    entries: int
    log_bytes: int
    file_bytes: int


class LogReport(msgspec.Struct, frozen=True):
    """A log that was checked from end to end.

    unchecked_entries: entries whose writer computed no data checksum. data_checked: whether data was read at
    all. disk_end: the highest guest offset that it writes up to. dropped_bytes: what stands in the file
    behind the log. first_time_s and last_time_s: Unix seconds of the oldest and the newest entry, None
    without entries.
    """

    path: str
    log_id: str
    previous_log_id: str
    end: LogEnd
    entries: int
    metadata_blocks: int
    data_bytes: int
    log_bytes: int
    dropped_bytes: int
    data_checked: bool
    unchecked_entries: int
    disk_end: int
    first_time_s: int | None
    last_time_s: int | None


class LogEntry(msgspec.Struct, frozen=True):
    """One entry, for people. data_checksum is None where its writer computed none. time_s: Unix seconds."""

    index: int
    disk_offset: int
    length: int
    log_offset: int
    time_s: int
    data_checksum: int | None


class ApplyReport(msgspec.Struct, frozen=True):
    """A log that was applied; nothing is durable before the disk is flushed.

    entries: of the log. extents: what was written after newer data had replaced older. bytes_logged: data in
    the log. bytes_written: what reached the disk, bytes_zeroed of it as zeros without reading the log.
    passes: see apply_log.
    """

    entries: int
    extents: int
    bytes_logged: int
    bytes_written: int
    bytes_zeroed: int
    passes: int
