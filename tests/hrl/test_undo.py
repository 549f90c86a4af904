"""An undo part is a log in all but its type, and is durable by one sync at its end."""

from __future__ import annotations

import pytest

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.hrl import FILE_TYPE_HRL, FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, LogWriter, verify_log
from tests.hrl.support import LOG, LOG_ID, PREVIOUS_ID, many_writes, new_files, rows
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

HEADER_FIELDS_BYTES = 126


def new_part(files: FaultFiles) -> LogWriter:
    return LogWriter.create_undo(
        files, LOG, part_id=LOG_ID, log_id=PREVIOUS_ID, data_write_guid=None, clock=FakeClock(seed=1)
    )


def new_log(files: FaultFiles) -> LogWriter:
    ids = {"log_id": LOG_ID, "previous_log_id": PREVIOUS_ID}
    return LogWriter.create(files, LOG, **ids, data_write_guid=None, clock=FakeClock(seed=1))


def fill(writer: LogWriter, files: FaultFiles) -> bytes:
    for disk_offset, data in many_writes(300):
        writer.append(rows((disk_offset, len(data))), data)
    writer.append_zeroes(64 << 20, 5 << 20)
    writer.close()
    return files.content_of(LOG)


def test_part_differs_from_a_log_by_its_type_alone() -> None:
    first, second = new_files(), new_files()
    log, part = fill(new_log(first), first), fill(new_part(second), second)
    assert log[4096:] == part[4096:]
    different = {at for at in range(4096) if log[at] != part[at]}
    assert different <= {*range(40, 44), *range(104, 108)}, "checksum and type"
    assert part[104:108] == b"hru\0"


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
