"""Show a log to people: its header, whether closed or not, and its entries one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.clock import HRL_EPOCH_S
from hvreplica.formats.hrl import DATA_CHECKSUM_ABSENT
from hvreplica.hrl.reader import LogReader, read_header
from hvreplica.hrl.report import LogEntry, LogInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.files import FileSystem


def log_info(files: FileSystem, path: Path) -> LogInfo:
    """Return what the header of a log says; its blocks are not read. Raises: FormatError if it is damaged."""
    file = files.open(path)
    try:
        header = read_header(file)
        file_bytes = file.size()
    finally:
        file.close()
    major, minor = divmod(header.log_format_version, 1 << 16)
    guid = header.vhd2_data_write_guid
    return LogInfo(
        path=str(path),
        closed=header.is_closed,
        version=f"{major}.{minor}",
        log_id=str(header.unique_id),
        previous_log_id=str(header.previous_unique_id),
        data_write_guid=None if guid is None else str(guid),
        creator="".join(chr(code) if 32 <= code < 127 else "" for code in header.creator_application).strip(),
        created_s=header.time_stamp + HRL_EPOCH_S,
        modified_s=header.last_modified_time_stamp + HRL_EPOCH_S,
        error_code=header.error_code,
        metadata_bytes=header.metadata_size,
        entries=header.total_metadata_entries,
        log_bytes=header.eol_location,
        file_bytes=file_bytes,
    )


def dump_entries(files: FileSystem, path: Path) -> Iterator[LogEntry]:
    """Yield the entries of a closed log, oldest first. Raises: NotClosed, FormatError."""
    with LogReader(files, path) as reader:
        index = 0
        for entries in reader.blocks():
            for disk_offset, log_offset, length, time_stamp, checksum, _ in entries.tolist():
                yield LogEntry(
                    index=index,
                    disk_offset=disk_offset,
                    length=length,
                    log_offset=log_offset,
                    time_s=time_stamp + HRL_EPOCH_S,
                    data_checksum=None if checksum == DATA_CHECKSUM_ABSENT else checksum,
                )
                index += 1
