"""What the writer writes is what [MS-HRL] says, as a reader of our own making and an independent one both find."""

from __future__ import annotations

import errno
import threading
import uuid
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.clock import HRL_EPOCH_S
from hvreplica.errors import FieldOutOfRange, LogError, NotClosed
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogReader, LogWriter, verify_log
from tests.hrl.plain_reader import read_plain, read_plain_header
from tests.hrl.support import (
    DATA_WRITE_GUID,
    LOG,
    LOG_ID,
    NOW_S,
    PREVIOUS_ID,
    many_writes,
    new_files,
    new_writer,
    rows,
    write_log,
)
from tests.support.build import random_bytes
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.faultfile import FaultFiles

MIB = 1 << 20


def pairs(log: bytes) -> list[tuple[int, bytes]]:
    _, writes = read_plain(log)
    return [(write.byte_offset, write.data) for write in writes]


def eol_of(files: FaultFiles) -> int:
    return read_plain_header(files.content_of(LOG)).eol_location


def test_empty_log_closes_valid() -> None:
    files = new_files()
    summary = new_writer(files).close()
    header, writes = read_plain(files.content_of(LOG))
    assert writes == []
    assert (summary.entries, summary.data_bytes, summary.log_bytes) == (0, 0, 8192)
    assert header.eol_location == header.current_size == 8192 == len(files.content_of(LOG))
    assert verify_log(files, LOG).entries == 0


def test_header_has_ids_times_and_sizes() -> None:
    files = new_files()
    summary = write_log(files, [(0, random_bytes(512))]).close()
    header, writes = read_plain(files.content_of(LOG))
    assert header.version == 0x00020000
    assert (header.unique_id, header.previous_unique_id) == (LOG_ID, PREVIOUS_ID)
    assert header.data_write_guid == DATA_WRITE_GUID
    assert header.time_stamp == header.last_modified == writes[0].time_stamp == int(NOW_S) - HRL_EPOCH_S
    assert header.original_size == 0
    assert header.error_code == 0
    assert header.eol_location == header.current_size == len(files.content_of(LOG)) == summary.log_bytes


def test_absent_ids_are_written_as_nil() -> None:
    files = new_files()
    LogWriter.create(
        files, LOG, log_id=LOG_ID, previous_log_id=None, data_write_guid=None, clock=FakeClock()
    ).close()
    header = read_plain_header(files.content_of(LOG))
    assert header.previous_unique_id == header.data_write_guid == uuid.UUID(int=0)


@pytest.mark.parametrize("count", [1, 126, 127, 128, 254, 300])
@pytest.mark.parametrize("metadata_bytes", [4096, 512])
def test_entries_come_back_in_order_across_blocks(count: int, metadata_bytes: int) -> None:
    files = new_files()
    writes = many_writes(count)
    write_log(files, writes, metadata_bytes=metadata_bytes)
    assert pairs(files.content_of(LOG)) == writes
    capacity = (metadata_bytes - 32) // 32
    with LogReader(files, LOG) as reader:
        assert reader.block_count == 1 + -(-count // capacity)
        assert reader.data_bytes == count * 512


def test_one_append_of_many_extents_is_the_same_as_many_appends() -> None:
    writes = many_writes(1000)
    one, many = new_files(), new_files()
    write_log(many, writes)
    writer = new_writer(one)
    writer.append(
        rows(*[(offset, len(data)) for offset, data in writes]), b"".join(data for _, data in writes)
    )
    writer.close()
    assert one.content_of(LOG) == many.content_of(LOG)


def test_long_extent_is_split_at_2_mib() -> None:
    files = new_files()
    data = random_bytes(5 * MIB + 512)
    writer = new_writer(files)
    writer.append(
        rows((4096, 512), (1 << 30, 5 * MIB), (8192, 0 + 512)), data[:512] + data[512:] + data[:512]
    )
    writer.close()
    assert pairs(files.content_of(LOG)) == [
        (4096, data[:512]),
        (1 << 30, data[512 : 512 + 2 * MIB]),
        ((1 << 30) + 2 * MIB, data[512 + 2 * MIB : 512 + 4 * MIB]),
        ((1 << 30) + 4 * MIB, data[512 + 4 * MIB :]),
        (8192, data[:512]),
    ]


def test_zeroes_are_entries_like_others_and_a_hole_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "zeroes.hrl"
    writer = new_writer(OS_FILES, path)
    writer.append(rows((0, 512)), random_bytes(512))
    writer.append_zeroes(MIB, 64 * MIB)
    writer.append(rows((512, 512)), random_bytes(512, 1))
    summary = writer.close()
    assert summary.data_bytes == 64 * MIB + 1024
    assert path.stat().st_size == summary.log_bytes > 64 * MIB
    assert path.stat().st_blocks * 512 < MIB
    report = verify_log(OS_FILES, path)
    assert (report.entries, report.unchecked_entries) == (34, 0)


def test_zeroes_read_as_zeros_to_others() -> None:
    files = new_files()
    writer = new_writer(files)
    writer.append_zeroes(512, 5 * MIB // 2)
    writer.close()
    assert pairs(files.content_of(LOG)) == [(512, bytes(2 * MIB)), (512 + 2 * MIB, bytes(MIB // 2))]


def test_time_of_an_append_may_be_given() -> None:
    files = new_files()
    writer = new_writer(files)
    writer.append(rows((0, 512)), bytes(512), time_s=HRL_EPOCH_S + 5)
    writer.append(rows((0, 512)), bytes(512), time_s=0)  # before the format's epoch
    writer.close()
    _, writes = read_plain(files.content_of(LOG))
    assert [write.time_stamp for write in writes] == [5, 0]


@pytest.mark.parametrize(
    "extents",
    [
        [(0, 0)],
        [(0, 513)],
        [(1, 512)],
        [(-512, 512)],
        [(1 << 62, 512)],
        [(0, 512), (0, -512)],
        [((1 << 62) - 512, 1024)],
    ],
)
def test_extents_that_no_log_can_hold_are_refused_and_nothing_is_logged(
    extents: list[tuple[int, int]],
) -> None:
    files = new_files()
    writer = new_writer(files)
    with pytest.raises(ValueError):
        writer.append(rows(*extents), bytes(max(sum(length for _, length in extents), 0)))
    writer.append(rows((0, 512)), b"x" * 512)
    writer.close()
    assert pairs(files.content_of(LOG)) == [(0, b"x" * 512)]


def test_data_of_another_length_is_refused() -> None:
    writer = new_writer(new_files())
    for length in (0, 511, 1024):
        with pytest.raises(ValueError, match="bytes"):
            writer.append(rows((0, 512)), bytes(length))
    huge = np.array([[0, 1 << 61]] * 8, np.int64)  # adds up to 0 in 64 bits
    with pytest.raises(ValueError, match="bytes"):
        writer.append(huge, b"")
    with pytest.raises(TypeError):
        writer.append(np.zeros((2, 3), np.int64), b"")


def test_unsigned_extents_and_an_empty_append_are_fine() -> None:
    files = new_files()
    writer = new_writer(files)
    writer.append(np.empty((0, 2), np.int64), b"")
    writer.append(np.array([[512, 512]], np.uint64), memoryview(b"y" * 512))
    writer.close()
    assert pairs(files.content_of(LOG)) == [(512, b"y" * 512)]


def test_existing_name_is_not_overwritten() -> None:
    files = new_files()
    write_log(files, [(0, bytes(512))])
    before = files.content_of(LOG)
    with pytest.raises(FileExistsError):
        new_writer(files)
    assert files.content_of(LOG) == before


def test_impossible_metadata_size_is_refused_before_a_file_is_made() -> None:
    files = new_files()
    with pytest.raises(FieldOutOfRange):
        new_writer(files, metadata_bytes=1000)
    assert not files.exists(LOG)


def test_log_is_unclosed_until_close() -> None:
    files = new_files()
    writer = new_writer(files)
    assert eol_of(files) == 0
    writer.append(rows((0, 512)), bytes(512))
    assert writer.flush() == writer.durable_bytes == 4096 + 4096 + 512 + 4096
    assert eol_of(files) == 0
    with pytest.raises(NotClosed) as caught:
        LogReader(files, LOG)
    assert "recover" in (caught.value.hint or "")
    assert writer.close().log_bytes == writer.durable_bytes
    assert writer.close() == writer.close()


def test_flush_without_news_writes_nothing() -> None:
    files = new_files()
    writer = new_writer(files)
    writer.append(rows((0, 512)), bytes(512))
    writer.flush()
    events = len(files.trace())
    assert writer.flush() == writer.durable_bytes
    assert len(files.trace()) == events


def test_abort_leaves_the_log_unclosed_and_ends_the_writer() -> None:
    files = new_files()
    writer = new_writer(files)

    def fail_inside() -> None:
        with writer:
            writer.append(rows((0, 512)), bytes(512))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert eol_of(files) == 0
    for call in (writer.flush, writer.close):
        with pytest.raises(LogError):
            call()
    assert eol_of(files) == 0


def test_context_manager_closes() -> None:
    files = new_files()
    with new_writer(files) as writer:
        writer.append(rows((0, 512)), bytes(512))
    assert verify_log(files, LOG).entries == 1
    writer.abort()
    assert verify_log(files, LOG).entries == 1


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_failure_anywhere_leaves_a_log_that_is_never_taken_as_closed(operation: str, error: int) -> None:
    writes = many_writes(300, length=4096)
    for at in range(1, 20):
        files = new_files()
        writer = new_writer(files)
        fault = files.fail(operation, at=at, error=error, written_bytes=512)
        try:
            for index, (offset, data) in enumerate(writes):
                writer.append(rows((offset, len(data))), data)
                if index % 100 == 50:
                    writer.flush()
            writer.close()
        except OSError as caught:
            assert caught.errno == error
        else:
            assert not fault.hits
            assert verify_log(files, LOG).entries == 300
            return
        with pytest.raises(LogError):
            writer.append(rows((0, 512)), bytes(512))
        with pytest.raises(LogError):
            writer.close()
        writer.abort()
        files.heal()
        assert eol_of(files) == 0
    pytest.fail("the fault struck every time: more operations than expected")


def test_creation_that_fails_leaves_no_name() -> None:
    files = new_files()
    files.fail("sync")
    with pytest.raises(OSError):
        new_writer(files)
    assert not files.exists(LOG)


def test_appends_from_many_threads_are_each_whole(tmp_path: Path) -> None:
    path = tmp_path / "threads.hrl"
    writer = new_writer(OS_FILES, path)

    def work(number: int) -> None:
        for index in range(50):
            offsets = [(number << 20) + index * 4096, (number << 20) + index * 4096 + 2048]
            data = bytes([number + 1]) * 512 + bytes([index + 1]) * 512
            writer.append(rows(*[(offset, 512) for offset in offsets]), data)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    found = pairs(path.read_bytes())
    assert len(found) == 400
    assert len(dict(found)) == 400
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert second[0] == first[0] + 2048
        assert second[1] == bytes([(first[0] % (1 << 20)) // 4096 + 1]) * 512


sectors = st.integers(0, 63)
step = st.one_of(
    st.tuples(st.just("append"), st.lists(st.tuples(sectors, st.integers(1, 9)), min_size=1, max_size=40)),
    st.tuples(st.just("zeroes"), st.tuples(sectors, st.integers(1, 300))),
    st.tuples(st.just("flush"), st.none()),
)


@given(st.lists(step, max_size=12), st.sampled_from([512, 1024, 4096]), st.integers(0, 1 << 32).map(Random))
def test_any_history_is_read_back_by_the_plain_reader(
    history: list[tuple[str, Any]], metadata_bytes: int, random: Random
) -> None:
    files = new_files()
    writer = new_writer(files, metadata_bytes=metadata_bytes)
    expected = []
    for verb, what in history:
        if verb == "append":
            pieces = [(sector * 512, random.randbytes(count * 512)) for sector, count in what]
            writer.append(
                rows(*[(offset, len(data)) for offset, data in pieces]), b"".join(data for _, data in pieces)
            )
            expected += pieces
        elif verb == "zeroes":
            writer.append_zeroes(what[0] * 512, what[1] * 512)
            expected.append((what[0] * 512, bytes(what[1] * 512)))
        else:
            writer.flush()
    summary = writer.close()
    assert pairs(files.content_of(LOG)) == expected
    assert summary.entries == len(expected)
    assert summary.data_bytes == sum(len(data) for _, data in expected)
    assert verify_log(files, LOG).entries == len(expected)
