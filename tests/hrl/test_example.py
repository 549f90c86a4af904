"""The log that Hyper-V wrote ([MS-HRL] 3) reads as printed; its data, which is not printed, is made up here."""

from __future__ import annotations

import json
import struct
import uuid
from pathlib import Path

import pytest

from hvreplica.errors import ChecksumMismatch
from hvreplica.formats.hrl import LogHeader
from hvreplica.hrl import LogReader, apply_log, dump_entries, log_info, verify_log
from tests.hrl.support import LOG, MemoryDisk, new_files, patch
from tests.support.build import random_bytes

EXAMPLE = json.loads((Path(__file__).parent / "ms_hrl_example.json").read_text())
DATA = random_bytes(320000)


def example_log() -> bytes:
    """Lay the printed numbers out as section 2 says, by hand; only the header's checksum is computed."""
    fields = EXAMPLE["header"]
    header = struct.pack(
        "<8sII4sIQQIQiI16s16sIQIH16s",
        b"msctlog\0",
        fields["LogFormatVersion"],
        fields["TimeStamp"],
        fields["CreatorApplication"].encode(),
        fields["CreatorVersion"],
        fields["OriginalSize"],
        fields["CurrentSize"],
        0,
        fields["EOLLocation"],
        fields["ErrorCode"],
        fields["MetadataSize"],
        uuid.UUID(fields["UniqueId"]).bytes_le,
        uuid.UUID(fields["PreviousUniqueId"]).bytes_le,
        fields["LastModifiedTimeStamp"],
        fields["TotalMetadataEntries"],
        fields["FileType"],
        fields["Flags"],
        uuid.UUID(fields["Vhd2DataWriteGuid"]).bytes_le,
    )
    log = bytearray(fields["EOLLocation"])
    log[0:4096] = LogHeader.unpack(header.ljust(4096, b"\0")).sealed().pack()
    log[8192:328192] = DATA
    for block in EXAMPLE["metadata_blocks"]:
        struct.pack_into(
            "<QII",
            log,
            block["offset"],
            block["PreviousMetadataLocation"],
            block["ValidMetadataEntries"],
            block["Checksum"],
        )
    for index, length, offset, time_stamp, checksum in EXAMPLE["entries"]:
        at = 328192 + 32 * index  # the first, index 1, stands right behind the block's header
        struct.pack_into("<QIIIBIB", log, at, offset, checksum, length, time_stamp, 1, 0, 0)
    return bytes(log)


def test_example_reads_as_printed() -> None:
    files = new_files()
    files.load(LOG, example_log())
    with LogReader(files, LOG) as reader:
        assert reader.header.unique_id == uuid.UUID("572fc7ff-1f03-49ab-b3c5-30a665b8e20c")
        assert reader.header.creator_application == b"ct\0\0"
        assert reader.log_bytes == 332288
        assert reader.data_bytes == 320000
        blocks = list(reader.blocks())
    assert [len(block) for block in blocks] == [0, 58]
    expected = [(offset, length, time_stamp) for _, length, offset, time_stamp, _ in EXAMPLE["entries"]]
    entries = blocks[1]
    columns = (entries["byte_offset"], entries["data_length"], entries["time_stamp"])
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert entries["log_offset"][0] == 8192


def test_example_verifies_with_unchecked_data() -> None:
    files = new_files()
    files.load(LOG, example_log())
    report = verify_log(files, LOG)
    assert (report.entries, report.metadata_blocks, report.data_bytes) == (58, 2, 320000)
    assert report.unchecked_entries == 58
    assert report.disk_end == 10188185600 + 4096
    assert report.last_time_s == 539842382 + 946684800


def test_example_shows_its_times() -> None:
    files = new_files()
    files.load(LOG, example_log())
    info = log_info(files, LOG)
    assert (info.version, info.creator, info.closed) == ("2.0", "ct", True)
    assert info.created_s == 1486527180  # 2017-02-08 04:13:00 UTC
    entries = list(dump_entries(files, LOG))
    assert [entry.index for entry in entries] == list(range(58))
    assert entries[0].data_checksum is None


def test_example_applies_with_the_newest_write_winning() -> None:
    files = new_files()
    log = example_log()
    files.load(LOG, log)
    written: dict[int, bytes] = {}
    at = 8192
    for _, length, offset, _, _ in EXAMPLE["entries"]:
        for sector in range(0, length, 512):
            written[offset + sector] = log[at + sector : at + sector + 512]
        at += length

    class SparseDisk(MemoryDisk):
        def copy_extents(self, source_file: object, source_offsets: object, extents: object) -> None:
            for source_offset, (offset, length) in zip(
                source_offsets.tolist(), extents.tolist(), strict=True
            ):
                data = source_file.read(source_offset, length)
                for sector in range(0, length, 512):
                    assert offset + sector not in applied
                    applied[offset + sector] = data[sector : sector + 512]

    applied: dict[int, bytes] = {}
    disk = SparseDisk(0)
    disk.virtual_bytes = 16 << 30
    report = apply_log(files, LOG, disk)
    assert applied == written
    assert report.entries == 58
    assert report.bytes_written == 512 * len(written)


@pytest.mark.parametrize("entry", [1, 29, 58])
def test_example_with_a_changed_entry_is_refused(entry: int) -> None:
    files = new_files()
    files.load(LOG, example_log())
    patch(files, 328192 + 32 * entry + 1, b"\x01")
    with pytest.raises(ChecksumMismatch) as caught:
        verify_log(files, LOG)
    assert caught.value.path == LOG
    assert caught.value.offset == 328192 + 32 * entry + 8
