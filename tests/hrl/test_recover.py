"""Recovery keeps every whole block, calls a torn tail a value and damage an error, and says when it cannot know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.errors import FormatError, LogError, NotClosed
from hvreplica.files import OS_FILES
from hvreplica.formats.hrl import checksum
from hvreplica.formats.hrl_entries import pack_metadata_block
from hvreplica.hrl import LogEnd, recover, recover_log, verify_log
from tests.hrl.plain_reader import read_plain
from tests.hrl.support import (
    LOG,
    many_writes,
    new_files,
    new_writer,
    patch,
    reopen_as_unclosed,
    rewrite_header,
    rows,
    write_log,
)
from tests.support.build import random_bytes

MIB = 1 << 20

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.faultfile import FaultFiles


def unclosed(count: int = 300, *, metadata_bytes: int = 4096) -> tuple[FaultFiles, list[int], bytes]:
    """Return an unclosed log, where each of its blocks ends, and its bytes when it was closed."""
    files = new_files()
    writer = new_writer(files, metadata_bytes=metadata_bytes)
    ends = [writer.durable_bytes]
    for index, (offset, data) in enumerate(many_writes(count)):
        writer.append(rows((offset, len(data))), data)
        if index % 50 == 49:
            ends.append(writer.flush())
    writer.close()
    closed = files.content_of(LOG)
    reopen_as_unclosed(files)
    return files, ends, closed


def entries_of(files: FaultFiles) -> list[tuple[int, bytes]]:
    return [(write.byte_offset, write.data) for write in read_plain(files.content_of(LOG))[1]]


def test_unclosed_log_that_is_whole_is_closed_as_its_writer_would() -> None:
    files, _, closed = unclosed()
    report = recover_log(files, LOG)
    assert report.end is LogEnd.CLEAN
    assert report.entries == 300
    assert files.content_of(LOG) == closed


def test_empty_unclosed_log_becomes_an_empty_log() -> None:
    files = new_files()
    new_writer(files).abort()
    report = recover_log(files, LOG, durable_bytes=8192)
    assert (report.entries, report.end) == (0, LogEnd.CLEAN)


def test_second_recovery_changes_nothing() -> None:
    files, ends, _ = unclosed()
    patch(files, ends[-1], b"torn" * 300)
    recover_log(files, LOG)
    before = files.content_of(LOG)
    report = recover_log(files, LOG, durable_bytes=ends[-1])
    assert files.content_of(LOG) == before
    assert report.entries == 300


def test_closed_log_is_only_checked() -> None:
    files = new_files()
    write_log(files, many_writes(10))
    before = files.content_of(LOG)
    assert recover_log(files, LOG).entries == 10
    assert files.content_of(LOG) == before
    with pytest.raises(LogError, match="ends before"):
        recover_log(files, LOG, durable_bytes=len(before) + 512)


@pytest.mark.parametrize("metadata_bytes", [512, 4096])
def test_log_cut_anywhere_keeps_the_whole_blocks_before(metadata_bytes: int) -> None:
    files, ends, closed = unclosed(200, metadata_bytes=metadata_bytes)
    expected = many_writes(200)
    whole = files.content_of(LOG)
    for length in range(8192, len(closed), 1536 + 7):
        cut = new_files()
        cut.load(LOG, whole[:length])
        durable = max((end for end in ends if end <= length), default=None)
        if length < 4096 + metadata_bytes:
            continue
        report = recover_log(cut, LOG, durable_bytes=durable)
        found = entries_of(cut)
        assert found == expected[: len(found)]
        assert report.entries == len(found) >= 50 * (len([end for end in ends if end <= length]) - 1)
        torn = report.log_bytes < length
        assert report.end is (LogEnd.TORN_TAIL if torn else LogEnd.CLEAN)
        assert report.dropped_bytes == length - report.log_bytes


def test_torn_last_block_is_a_value() -> None:
    for at in (-4096, -4096 + 32, -4096 + 40, -4096 - 100):
        files, ends, closed = unclosed()
        patch(files, len(closed) + at, bytes([closed[at] ^ 1]))
        report = recover_log(files, LOG, durable_bytes=ends[-2])
        assert report.end is LogEnd.TORN_TAIL
        assert (report.log_bytes, report.entries) == (ends[-2], 250)
        again, _, _ = unclosed()
        patch(again, len(closed) + at, bytes([closed[at] ^ 1]))
        assert recover_log(again, LOG) == report


@pytest.mark.parametrize("place", ["data", "header", "entry"])
def test_damage_before_a_whole_block_is_an_error_and_changes_nothing(place: str) -> None:
    files, ends, closed = unclosed()
    at = {"data": ends[2] + 5, "header": ends[3] - 4096, "entry": ends[3] - 4096 + 33}[place]
    patch(files, at, bytes([closed[at] ^ 1]))
    before = files.content_of(LOG)
    with pytest.raises(LogError, match="damaged") as caught:
        recover_log(files, LOG)
    assert caught.value.path == LOG
    assert caught.value.offset == ends[2]
    assert files.content_of(LOG) == before


def test_damage_within_what_was_durable_is_an_error_even_at_the_very_end() -> None:
    files, ends, closed = unclosed()
    patch(files, len(closed) - 4096, b"\xff")
    with pytest.raises(LogError, match="durable") as caught:
        recover_log(files, LOG, durable_bytes=ends[-1])
    assert caught.value.offset == ends[-2]


def test_later_blocks_that_were_never_durable_are_a_torn_tail_where_that_is_known() -> None:
    """A disk may keep the last write and lose the one before: without a bound this looks like damage."""
    files, ends, closed = unclosed()
    patch(files, ends[3] + 5, bytes([closed[ends[3] + 5] ^ 1]))
    with pytest.raises(LogError):
        recover_log(files, LOG)
    report = recover_log(files, LOG, durable_bytes=ends[3])
    assert report.end is LogEnd.TORN_TAIL
    assert report.entries == 150


def test_header_that_is_damaged_is_a_format_error() -> None:
    files, _, _ = unclosed()
    patch(files, 60, b"\xff")
    with pytest.raises(FormatError):
        recover_log(files, LOG)


def test_first_block_that_is_lost_is_an_error() -> None:
    files = new_files()
    new_writer(files).abort()
    patch(files, 4096, bytes(4096))
    with pytest.raises(LogError, match="no whole"):
        recover_log(files, LOG)


def test_error_code_is_respected() -> None:
    files, _, _ = unclosed()
    rewrite_header(files, error_code=5)
    with pytest.raises(NotClosed):
        recover_log(files, LOG)


def test_log_whose_first_block_has_entries_is_recovered() -> None:
    """Others need not begin with an empty block."""
    files, _, _ = unclosed(40)
    data = random_bytes(1024)
    packed = native.pack_hrl_entries(
        rows((0, 512), (4096, 512)), 1, ~native.byte_sums(data, np.array([512, 512]))
    )
    block = pack_metadata_block(packed, previous_metadata_location=0, metadata_size=4096)
    foreign = new_files()
    foreign.load(LOG, files.content_of(LOG)[:4096] + data + block)
    assert recover_log(foreign, LOG).entries == 2
    assert entries_of(foreign) == [(0, data[:512]), (4096, data[512:])]


def test_data_full_of_metadata_blocks_of_other_logs_does_not_mislead() -> None:
    """A guest may store .hrl files: their blocks stand in our data, but point elsewhere."""
    inner, _, _ = unclosed(300)
    content = inner.content_of(LOG)
    content += bytes(-len(content) % 512)
    files = new_files()
    writer = new_writer(files)
    writer.append(rows((0, 512)), random_bytes(512))
    durable = writer.flush()
    writer.append(rows((4096, len(content))), content)
    writer.close()
    reopen_as_unclosed(files)
    report = recover_log(files, LOG)
    assert (report.entries, report.data_bytes) == (2, 512 + len(content))
    # With our own last block gone, what is left looks like damage, unless it is known that it was not durable.
    reopen_as_unclosed(files)
    patch(files, report.log_bytes - 4096, b"\xff")
    with pytest.raises(LogError):
        recover_log(files, LOG)
    assert recover_log(files, LOG, durable_bytes=durable).entries == 1


def test_block_imitated_by_a_guest_is_taken_unless_the_durable_end_is_known() -> None:
    """The documented limit of recovery without a bound, and that the bound closes it."""
    files = new_files()
    writer = new_writer(files)
    payload = random_bytes(512)
    sums = np.array([checksum(payload)], np.uint32)
    fake = pack_metadata_block(
        native.pack_hrl_entries(rows((1 << 30, 512)), 1, sums),
        previous_metadata_location=4096 + 512,
        metadata_size=4096,
    )
    writer.append(rows((0, 8192)), (payload + fake).ljust(8192, b"\0"))
    durable = writer.flush()
    writer.close()
    truth = files.content_of(LOG)
    reopen_as_unclosed(files)
    with pytest.raises(LogError, match="durable"):
        recover_log(files, LOG, durable_bytes=durable)
    report = recover_log(files, LOG)
    assert report.entries == 1
    assert report.disk_end == (1 << 30) + 512
    assert read_plain(truth)[1][0].byte_offset == 0


def test_many_imitations_are_an_error_and_not_a_burden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "_IMITATIONS_MAX", 8)
    files = new_files()
    writer = new_writer(files)
    sector_count = 64
    content = bytearray(random_bytes(sector_count * 512))
    for sector in range(9, sector_count - 8, 8):
        wrong = np.array([12345], np.uint32)  # of data that starts right behind the first block
        content[sector * 512 : sector * 512 + 4096] = pack_metadata_block(
            native.pack_hrl_entries(rows((0, sector * 512)), 1, wrong),
            previous_metadata_location=4096 + sector * 512,
            metadata_size=4096,
        )
    writer.append(rows((0, len(content))), content)
    writer.abort()
    with files.open(LOG, writable=True) as file:
        file.write(content, 8192)
    if len(range(9, sector_count - 8, 8)) > 8:
        pytest.fail("the test means to stay below the bound")
    monkeypatch.setattr(recover, "_IMITATIONS_MAX", 3)
    with pytest.raises(LogError, match="too many"):
        recover_log(files, LOG)
    monkeypatch.setattr(recover, "_IMITATIONS_MAX", 8)
    assert recover_log(files, LOG).entries == 0


def test_block_whose_entry_no_disk_can_take_is_not_followed() -> None:
    files, _, _ = unclosed(0)
    data = random_bytes(512)
    packed = native.pack_hrl_entries(rows((100, 512)), 1, ~native.byte_sums(data, np.array([512])))
    block = pack_metadata_block(packed, previous_metadata_location=4096 + 512, metadata_size=4096)
    patch(files, 8192, data + block)
    report = recover_log(files, LOG)
    assert (report.entries, report.end) == (0, LogEnd.TORN_TAIL)


def test_chain_that_jumps_over_the_durable_end_is_refused() -> None:
    """With the block that was durable lost, one that claims its place and more must not stand in for it."""
    files, ends, _ = unclosed(50)
    content = files.content_of(LOG)
    patch(files, ends[-1] - 4096, b"\xff")
    content = files.content_of(LOG)
    sums = native.byte_sums(content[8192:], np.array([len(content) - 8192]))
    packed = native.pack_hrl_entries(rows((0, len(content) - 8192)), 1, ~sums)
    fake = pack_metadata_block(packed, previous_metadata_location=len(content) - 4096, metadata_size=4096)
    patch(files, len(content), fake)
    with pytest.raises(LogError, match="durable"):
        recover_log(files, LOG, durable_bytes=ends[-1])


def test_blocks_out_of_place_do_not_add_up_over_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "_UNPLACED_MAX", 4)
    inner = new_files()
    write_log(inner, many_writes(200, length=512), metadata_bytes=4096)
    content = inner.content_of(LOG)
    assert len(content) % 512 == 0
    files = new_files()
    writer = new_writer(files)
    for index in range(4):
        writer.append(rows((index * MIB, len(content))), content)
        writer.flush()
    writer.abort()
    assert recover_log(files, LOG).entries == 4


def test_many_blocks_out_of_place_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    files, ends, _ = unclosed()
    patch(files, ends[1] - 4096, b"\xff")
    monkeypatch.setattr(recover, "_UNPLACED_MAX", 2)
    with pytest.raises(LogError, match="do not follow"):
        recover_log(files, LOG)


def test_huge_hole_is_not_scanned(tmp_path: Path) -> None:
    path = tmp_path / "zeroes.hrl"
    writer = new_writer(OS_FILES, path)
    writer.append_zeroes(0, 1 << 38)  # reading it would take a minute
    durable = writer.flush()
    writer.abort()
    report = recover_log(OS_FILES, path, durable_bytes=durable)
    assert report.data_bytes == 1 << 38


@given(
    st.integers(0, 1 << 30),
    st.binary(min_size=1, max_size=64),
    st.integers(0, 4096),
    st.sampled_from(["bounded", "unbounded"]),
)
def test_any_damage_is_an_error_of_ours_or_a_prefix(at: int, octets: bytes, cut: int, kind: str) -> None:
    files, ends, closed = unclosed(120, metadata_bytes=512)
    at = 4096 + at % (len(closed) - 4096)
    # Bits are only set: then every sum that changes grows, while a sum of bytes misses changes that cancel out.
    before = files.content_of(LOG)[at : at + len(octets)]
    patch(files, at, bytes(old | new for old, new in zip(before, octets, strict=False)))
    content = files.content_of(LOG)
    files = new_files()
    files.load(LOG, content[: len(content) - cut])
    expected = many_writes(120)
    try:
        recover_log(files, LOG, durable_bytes=ends[1] if kind == "bounded" else None)
    except (LogError, FormatError) as error:
        assert error.path == LOG
        return
    found = entries_of(files)
    assert found == expected[: len(found)]
    assert verify_log(files, LOG).entries == len(found)
    if kind == "bounded":
        assert len(found) >= 50
