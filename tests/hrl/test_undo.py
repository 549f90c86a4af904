"""An undo part is a log in all but its type, and is durable by one sync at its end."""

from __future__ import annotations

import numpy as np
import pytest

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.hrl import FILE_TYPE_HRL, FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, LogWriter, verify_log
from tests.hrl.support import LOG, LOG_ID, PREVIOUS_ID, many_writes, new_files, rows
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

HEADER_FIELDS_BYTES = 126


def new_part(files: FaultFiles, entry_count: int = 0) -> LogWriter:
    ids = {"part_id": LOG_ID, "log_id": PREVIOUS_ID, "data_write_guid": None}
    return LogWriter.create_undo(files, LOG, **ids, clock=FakeClock(seed=1), entry_count=entry_count)


def new_log(files: FaultFiles) -> LogWriter:
    ids = {"log_id": LOG_ID, "previous_log_id": PREVIOUS_ID}
    return LogWriter.create(files, LOG, **ids, data_write_guid=None, clock=FakeClock(seed=1))


def fill(writer: LogWriter, files: FaultFiles) -> bytes:
    for disk_offset, data in many_writes(300):
        writer.append(rows((disk_offset, len(data))), data)
    writer.append_zeroes(64 << 20, 5 << 20)
    writer.close()
    return files.content_of(LOG)


def test_part_is_a_log_of_another_type_without_the_empty_first_block() -> None:
    first, second = new_files(), new_files()
    log, part = fill(new_log(first), first), fill(new_part(second), second)
    assert len(part) == len(log) - 4096
    assert part[4096:8192] == log[8192:12288], "data stands where a log has its first block"
    assert part[104:108] == b"hru\0"
    read = {}
    for files, file_type, shift in ((first, FILE_TYPE_HRL, 4096), (second, FILE_TYPE_UNDO, 0)):
        with LogReader(files, LOG, file_type=file_type) as reader:
            [table] = reader.entries()
            table["log_offset"] -= shift
            read[file_type] = (table.tolist(), reader.data_bytes, reader.entry_count)
    assert read[FILE_TYPE_HRL] == read[FILE_TYPE_UNDO]


@pytest.mark.parametrize(
    ("entry_count", "metadata_bytes", "blocks"),
    [(0, 4096, 1), (127, 4096, 1), (128, 8192, 1), (8191, 256 << 10, 1), (8192, 132 << 10, 2)],
)
def test_part_is_described_by_few_blocks(entry_count: int, metadata_bytes: int, blocks: int) -> None:
    files = new_files()
    writer = new_part(files, entry_count)
    if entry_count:
        table = np.column_stack((np.arange(entry_count) * 4096, np.full(entry_count, 512)))
        writer.append(table, bytes(512 * entry_count))
    writer.close()
    with LogReader(files, LOG, file_type=FILE_TYPE_UNDO) as reader:
        assert reader.header.metadata_size == metadata_bytes
        assert reader.block_count == blocks
        assert sum(len(table) for table in reader.entries()) == entry_count


def test_part_may_get_more_entries_than_it_was_made_for() -> None:
    files = new_files()
    writer = new_part(files, 1)
    writer.append(np.column_stack((np.arange(400) * 4096, np.full(400, 512))), bytes(512 * 400))
    writer.close()
    with LogReader(files, LOG, file_type=FILE_TYPE_UNDO) as reader:
        assert reader.block_count == 4
        assert reader.entry_count == 400


def test_reader_takes_the_type_that_it_was_told() -> None:
    for written, other in ((FILE_TYPE_HRL, FILE_TYPE_UNDO), (FILE_TYPE_UNDO, FILE_TYPE_HRL)):
        files = new_files()
        fill(new_part(files) if written == FILE_TYPE_UNDO else new_log(files), files)
        with pytest.raises(FieldOutOfRange, match="file_type") as caught:
            LogReader(files, LOG, file_type=other)
        assert (caught.value.expected, caught.value.actual) == (other, written)
        assert verify_log(files, LOG, file_type=written).entries == 303
        with LogReader(files, LOG, file_type=written) as reader:
            assert sum(len(batch) for batch in reader.entries()) == 303


def test_part_is_synced_once_and_whole_then() -> None:
    files = new_files()
    fill(new_part(files), files)
    syncs = [event for event in files.trace().events if event.kind == "sync"]
    assert len(syncs) == 1
    files.sync_directory(LOG.parent)
    *_, (_, world) = crash_states(files.trace(), seed=1)
    assert world.content_of(LOG) == files.content_of(LOG)
