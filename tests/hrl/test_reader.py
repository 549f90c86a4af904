"""The two-pass walk ends, stays in bounds, and gives what was written or names what is wrong."""

from __future__ import annotations

import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    HvReplicaError,
    LogError,
    NotClosed,
    Truncated,
)
from hvreplica.formats.hrl import MetadataHeader, checksum
from hvreplica.hrl import LogReader, verify_log
from hvreplica.hrl import reader as reader_module
from tests.hrl.support import LOG, many_writes, new_files, patch, rewrite_header, write_log

if TYPE_CHECKING:
    from tests.support.faultfile import FaultFiles


def log_of(count: int, **options: Any) -> FaultFiles:
    files = new_files()
    write_log(files, many_writes(count), **options)
    return files


def last_block(files: FaultFiles) -> int:
    with LogReader(files, LOG) as reader:
        return reader.log_bytes - reader.header.metadata_size


def set_metadata_header(files: FaultFiles, location: int, *, distance: int, count: int) -> None:
    header = MetadataHeader.sealed(previous_metadata_location=distance, valid_metadata_entries=count)
    patch(files, location, header.pack())


def set_entry(files: FaultFiles, location: int, **changes: int) -> None:
    """Change fields of the first entry of a block and seal it anew."""
    packed = files.content_of(LOG)[location + 32 : location + 64]
    names = ("offset", "checksum", "length", "time", "operation", "data", "where")
    values = dict(zip(names, struct.unpack("<QIIIBIB6x", packed), strict=True))
    values.update(changes, checksum=0)
    draft = struct.pack("<QIIIBIB6x", *values.values())
    values["checksum"] = checksum(draft)
    patch(files, location + 32, struct.pack("<QIIIBIB6x", *values.values()))


@pytest.mark.parametrize("max_count", [1, 127, 128, 1000, 1 << 20])
def test_batches_hold_every_entry_once_and_keep_their_bound(max_count: int) -> None:
    files = log_of(500)
    with LogReader(files, LOG) as reader:
        batches = list(reader.entries(max_count))
        assert all(0 < len(batch) <= max(max_count, 127) for batch in batches)
        assert np.concatenate(batches)["byte_offset"].tolist() == [1024 * index for index in range(500)]
        assert reader.entry_count == sum(len(block) for block in reader.blocks()) == 500


def test_two_iterators_do_not_disturb_each_other() -> None:
    with LogReader(log_of(300), LOG) as reader:
        first, second = reader.blocks(), reader.blocks()
        for one, other in zip(first, second, strict=True):
            assert (one == other).all()


def test_bytes_behind_the_end_do_not_matter() -> None:
    files = log_of(3)
    end = len(files.content_of(LOG))
    patch(files, end, b"junk" * 1000)
    report = verify_log(files, LOG)
    assert (report.log_bytes, report.dropped_bytes) == (end, 4000)


def test_reader_refuses_an_unclosed_log() -> None:
    files = log_of(3)
    rewrite_header(files, eol_location=0)
    with pytest.raises(NotClosed) as caught:
        LogReader(files, LOG)
    assert caught.value.path == LOG


def test_reader_refuses_a_log_with_an_error_code() -> None:
    files = log_of(3)
    rewrite_header(files, error_code=-1)
    with pytest.raises(NotClosed) as caught:
        LogReader(files, LOG)
    assert caught.value.field == "error_code"


def test_reader_takes_reserved_bytes_that_are_sealed() -> None:
    files = log_of(3)
    rewrite_header(files, reserved=b"\x01" * 3970)
    assert verify_log(files, LOG).entries == 3


@pytest.mark.parametrize("content", [b"", b"msctlog", b"not a log at all" * 300])
def test_reader_refuses_what_is_not_a_log(content: bytes) -> None:
    files = new_files()
    files.load(LOG, content)
    with pytest.raises((Truncated, BadSignature)) as caught:
        LogReader(files, LOG)
    assert caught.value.path == LOG


def test_missing_file_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        LogReader(new_files(), LOG)


@pytest.mark.parametrize("distance", [512, 3584, 4097, 1 << 20, 1 << 63, (1 << 64) - 4096])
def test_distance_that_leads_nowhere_is_refused(distance: int) -> None:
    files = log_of(300)
    location = last_block(files)
    set_metadata_header(files, location, distance=distance, count=46)
    with pytest.raises(FieldOutOfRange) as caught:
        LogReader(files, LOG)
    assert caught.value.field == "previous_metadata_location"
    assert caught.value.offset == location


def test_distance_of_zero_too_early_is_refused() -> None:
    """A chain that ends early would drop the oldest writes."""
    files = log_of(300)
    set_metadata_header(files, last_block(files), distance=0, count=46)
    with pytest.raises(FieldOutOfRange) as caught:
        LogReader(files, LOG)
    assert caught.value.field == "total_metadata_entries"
    rewrite_header(files, total_metadata_entries=46)
    with LogReader(files, LOG) as reader, pytest.raises(FieldOutOfRange, match="fill"):
        list(reader.blocks())


def test_total_that_disagrees_is_refused() -> None:
    files = log_of(300)
    rewrite_header(files, total_metadata_entries=299)
    with pytest.raises(FieldOutOfRange) as caught:
        LogReader(files, LOG)
    assert (caught.value.expected, caught.value.actual) == (300, 299)


def test_more_blocks_than_can_be_held_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    files = log_of(300)
    monkeypatch.setattr(reader_module, "METADATA_BLOCKS_MAX", 3)
    with pytest.raises(FieldOutOfRange, match="more metadata blocks"):
        LogReader(files, LOG)
    monkeypatch.setattr(reader_module, "METADATA_BLOCKS_MAX", 4)
    LogReader(files, LOG).close()


@pytest.mark.parametrize(
    ("changes", "field", "shift"),
    [
        ({"length": 0}, "data_length", 12),
        ({"length": 1024}, "data_length", 0),
        ({"length": 511}, "data_length", 0),
        ({"length": 0xFFFFFFFF}, "data_length", 0),
        ({"operation": 2}, "meta_operation", 20),
        ({"operation": 0}, "meta_operation", 20),
        ({"offset": 1}, "byte_offset", 0),
        ({"offset": (1 << 64) - 512}, "byte_offset", 0),
    ],
)
def test_entry_that_breaks_a_rule_is_named_with_its_place(
    changes: dict[str, int], field: str, shift: int
) -> None:
    files = log_of(1)
    location = last_block(files)
    set_entry(files, location, **changes)
    with pytest.raises(FieldOutOfRange) as caught:
        verify_log(files, LOG)
    assert caught.value.field == field
    assert caught.value.path == LOG
    assert caught.value.spec is not None
    if "fill" not in caught.value.message:
        assert caught.value.offset == location + 32 + shift


def test_faulty_entry_of_a_later_block_is_named_with_its_place() -> None:
    files = log_of(300)
    location = last_block(files)
    set_entry(files, location, offset=513)
    with LogReader(files, LOG) as reader, pytest.raises(FieldOutOfRange) as caught:
        list(reader.entries())
    assert caught.value.offset == location + 32
    assert caught.value.actual == 513


def test_entry_beyond_the_disk_is_refused_where_the_disk_is_known() -> None:
    files = log_of(300)
    end = 299 * 1024 + 512
    with LogReader(files, LOG) as reader:
        assert sum(len(batch) for batch in reader.entries(disk_bytes=end)) == 300
        with pytest.raises(FieldOutOfRange) as caught:
            list(reader.entries(disk_bytes=end - 1))
    assert caught.value.field == "byte_offset"
    assert caught.value.offset == last_block(files) + 32 + 45 * 32


def test_file_that_ends_early_is_truncated() -> None:
    files = log_of(3)
    whole = files.content_of(LOG)
    for length in (0, 1, 4095, 4096, 8192, len(whole) - 1):
        cut = new_files()
        cut.load(LOG, whole[:length])
        with pytest.raises(FormatError) as caught:
            verify_log(cut, LOG)
        assert isinstance(caught.value, Truncated)


def test_hostile_sizes_allocate_nothing() -> None:
    """A header may claim any length; only the length of the file, which is real, bounds what is held."""
    files = log_of(3)
    tracemalloc.start()
    try:
        for changes in (
            {"eol_location": 1 << 61, "current_size": 1 << 61},
            {"metadata_size": 1 << 31},
            {"total_metadata_entries": 1 << 60},
        ):
            hostile = new_files()
            hostile.load(LOG, files.content_of(LOG))
            rewrite_header(hostile, **changes)
            with pytest.raises(FormatError):
                verify_log(hostile, LOG)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def outcome(log: bytes) -> list[tuple[int, ...]] | None:
    """Return what a log holds, None where it is refused as it should be."""
    files = new_files()
    files.load(LOG, log)
    try:
        verify_log(files, LOG)
        with LogReader(files, LOG) as reader:
            return [tuple(row) for batch in reader.entries() for row in batch.tolist()]
    except HvReplicaError as error:
        assert isinstance(error, (FormatError, LogError))
        assert error.path == LOG
        return None


def meaningful_bytes(files: FaultFiles) -> list[int]:
    """Return the offsets of all header and metadata bytes, of used and of unused entries."""
    with LogReader(files, LOG) as reader:
        size = reader.header.metadata_size
        return [*range(126), *range(126, 4096, 97)] + [
            location + at for location in reader._locations for at in range(size)
        ]


def test_any_bit_flipped_in_header_or_metadata_is_refused_or_means_nothing() -> None:
    files = log_of(20, metadata_bytes=512)
    whole = files.content_of(LOG)
    entries = outcome(whole)
    assert entries is not None
    refused = 0
    for at in meaningful_bytes(files):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        found = outcome(bytes(damaged))
        assert found in (None, entries)
        refused += found is None
    assert refused > 126 + 20 * 32


def test_any_data_bit_flipped_is_refused() -> None:
    files = log_of(20)
    whole = files.content_of(LOG)
    for at in range(8192, 8192 + 20 * 512, 101):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        cracked = new_files()
        cracked.load(LOG, bytes(damaged))
        with pytest.raises(ChecksumMismatch) as caught:
            verify_log(cracked, LOG)
        assert caught.value.offset == at // 512 * 512
        assert verify_log(cracked, LOG, data=False).entries == 20


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=40)), max_size=4),
    st.integers(0, 100),
)
def test_any_damage_is_an_error_of_ours_or_the_same_entries(
    patches: list[tuple[int, bytes]], cut: int
) -> None:
    files = log_of(20, metadata_bytes=512)
    whole = bytearray(files.content_of(LOG))
    entries = outcome(bytes(whole))
    for at, octets in patches:
        at %= len(whole)
        whole[at : at + len(octets)] = octets[: len(whole) - at]
    found = outcome(bytes(whole[: len(whole) - cut]))
    if not patches:
        assert found == (entries if cut == 0 else None)


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 17)), min_size=1, max_size=12),
    st.integers(0, 64),
    st.integers(0, 40),
)
def test_any_sealed_structure_is_an_error_of_ours_or_a_value(
    blocks: list[tuple[int, int]], end: int, total: int
) -> None:
    """Checksums are no shield: whoever makes a hostile log seals it too."""
    files = log_of(20, metadata_bytes=512)
    whole = files.content_of(LOG)
    hostile = new_files()
    hostile.load(LOG, whole)
    for index, (distance, count) in enumerate(blocks):
        set_metadata_header(hostile, 4096 + index * 1024, distance=distance * 512, count=count)
    rewrite_header(hostile, eol_location=4096 + end * 512, current_size=1 << 20, total_metadata_entries=total)
    outcome(hostile.content_of(LOG))
