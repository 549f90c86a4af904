"""The VHDX's own rules: identity, allocation, giving back, size, and what stays untouched."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, map_disk, open_disk
from hvreplica.disk.vhdx.create import default_block_bytes
from hvreplica.disk.vhdx.headers import Headers
from hvreplica.errors import FieldOutOfRange, Overlap, UnsupportedVersion
from hvreplica.files import OS_FILES
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhdx_header import HEADER_OFFSETS, unpack_header
from hvreplica.units import GIB, KIB, MIB, TIB
from tests.disk.contract import SIZE, everything, make_disk, reopen
from tests.support.build import random_bytes
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

EMPTY_BYTES = 4 * MIB  # header section, log, metadata, BAT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.vhdx"


def headers(path: Path) -> list[object]:
    content = path.read_bytes()[: 256 * KIB]
    return [unpack_header(content[at : at + 4096], file_offset=at) for at in HEADER_OFFSETS]


def test_opening_and_closing_changes_nothing(path: Path) -> None:
    make_disk(path, "dynamic").close()
    before = path.read_bytes()
    for writable in (False, True):
        with open_disk(OS_FILES, path, writable=writable, clock=FakeClock(seed=5)) as disk:
            everything(disk)
            disk.info()
            disk.flush()
    assert path.read_bytes() == before


def test_first_write_changes_both_identities_in_both_headers_once(path: Path) -> None:
    make_disk(path, "dynamic").close()
    old = headers(path)[0]
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=5)) as disk:
        assert disk.data_write_guid == old.data_write_guid
        disk.write(b"x", 0)
        first = headers(path)
        for header in first:
            assert header.data_write_guid not in {old.data_write_guid, NIL}
            assert header.file_write_guid not in {old.file_write_guid, NIL}
            assert header.data_write_guid == disk.data_write_guid
        disk.write(b"y", 5 * MIB)
        disk.flush()
        disk.write(b"z", 7 * MIB)
    for header in headers(path):
        assert header.data_write_guid == first[0].data_write_guid
        assert header.file_write_guid == first[0].file_write_guid
        assert header.log_guid == NIL
        header.validate()
    numbers = [header.sequence_number for header in headers(path)]
    assert abs(numbers[0] - numbers[1]) == 1


def test_replay_changes_the_file_identity_but_not_that_of_the_data(path: Path) -> None:
    disk = make_disk(path, "dynamic")
    disk.write(b"x", 0)
    disk.flush()
    disk.abandon()
    before = max(headers(path), key=lambda header: header.sequence_number)
    assert before.log_guid != NIL
    open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=6)).abandon()
    for after in headers(path):
        assert after.log_guid == NIL
        assert after.data_write_guid == before.data_write_guid
        assert after.file_write_guid != before.file_write_guid


def test_reading_a_dirty_file_replays_in_memory_and_leaves_it_alone(path: Path) -> None:
    disk = make_disk(path, "dynamic")
    disk.write(b"hello" * 1000, 3 * MIB)
    disk.flush()
    disk.abandon()
    dirty = bytearray(path.read_bytes())
    dirty[3 * MIB : 3 * MIB + 4096] = bytes(4096)  # the BAT sector had not reached its place
    path.write_bytes(dirty)
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        assert disk.info().log == "replayed"
        assert everything(disk)[3 * MIB : 3 * MIB + 5000] == b"hello" * 1000
        assert len(disk.extents(0, SIZE))
    assert path.read_bytes() == dirty


def test_zeros_allocate_nothing(path: Path) -> None:
    with make_disk(path, "dynamic") as disk:
        disk.write(bytes(5 * MIB), 100)
        disk.write_zeroes(0, SIZE)
        assert path.stat().st_size == EMPTY_BYTES
        data = bytes(MIB) + b"\0" * 700_000 + b"x" + bytes(2 * MIB)
        disk.write(data, MIB)
        assert path.stat().st_size == EMPTY_BYTES + MIB
        assert everything(disk)[MIB : MIB + len(data)] == data
        assert disk.info().allocated_bytes == MIB


def test_sequential_fill_lies_sequentially_in_the_file(path: Path) -> None:
    with make_disk(path, "dynamic") as disk:
        disk.write(random_bytes(3 * MIB + 77), 4 * MIB)
        entries = [entry for entry in map_disk(disk) if entry.offset is not None]
        assert entries[0].offset == EMPTY_BYTES
        assert sum(entry.length for entry in entries) == 4 * MIB
        for one, two in pairwise(entries):
            assert one.offset + one.length == two.offset


def test_freed_space_is_used_again_after_the_flush_and_reads_as_zeros(path: Path) -> None:
    with make_disk(path, "dynamic") as disk:
        disk.write(b"\xff" * (4 * MIB), 0)
        disk.flush()
        full = path.stat().st_size
        disk.write_zeroes(MIB, 2 * MIB)
        disk.write(b"\xee" * 10, 5 * MIB)  # not yet reusable: a power cut would bring the old blocks back
        assert path.stat().st_size == full + MIB
        disk.flush()
        disk.write(b"\xdd" * 10, 6 * MIB)
        disk.write(b"\xcc" * 10, 7 * MIB)
        assert path.stat().st_size == full + MIB
        expected = bytearray(SIZE)
        expected[:MIB] = expected[3 * MIB : 4 * MIB] = b"\xff" * MIB
        for offset, value in ((5, 0xEE), (6, 0xDD), (7, 0xCC)):
            expected[offset * MIB : offset * MIB + 10] = bytes([value]) * 10
        assert everything(disk) == expected
    with reopen(disk) as again:
        assert everything(again) == expected


def test_freed_space_is_given_back_to_the_file_system(path: Path) -> None:
    with make_disk(path, "dynamic", size=64 * MIB) as disk:
        disk.write(b"\xff" * (32 * MIB), 0)
        disk.flush()
        held = path.stat().st_blocks
        disk.write_zeroes(0, 30 * MIB)
        disk.flush()
        assert path.stat().st_blocks < held // 4


def test_gaps_of_an_older_session_are_used_and_the_tail_is_cut(path: Path) -> None:
    with make_disk(path, "dynamic") as disk:
        disk.write(b"\xff" * (6 * MIB), 0)
        disk.flush()
        disk.write_zeroes(2 * MIB, MIB)
        disk.write_zeroes(5 * MIB, MIB)
    with path.open("r+b") as file:  # stale bytes where no block is, as another program may leave them
        for at in (EMPTY_BYTES + 2 * MIB, EMPTY_BYTES + 5 * MIB):
            file.seek(at)
            file.write(b"\xaa" * MIB)
        file.seek(0, 2)
        file.write(b"\xaa" * 12345)
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=3)) as disk:
        disk.write(b"1", 7 * MIB)
        assert path.stat().st_size == EMPTY_BYTES + 5 * MIB
        disk.write(b"2", 8 * MIB)
        assert path.stat().st_size == EMPTY_BYTES + 6 * MIB
        content = everything(disk)
        assert content[7 * MIB : 8 * MIB] == b"1".ljust(MIB, b"\0")
        assert content[8 * MIB : 9 * MIB] == b"2".ljust(MIB, b"\0")


def test_fixed_disk_keeps_its_blocks_and_its_length(path: Path) -> None:
    with make_disk(path, "fixed") as disk:
        length = path.stat().st_size
        assert disk.info().type == "fixed"
        assert disk.info().allocated_bytes == 10 * MIB
        disk.write(b"\xff" * SIZE, 0)
        disk.write_zeroes(0, SIZE)
        assert disk.info().allocated_bytes == 10 * MIB
    assert path.stat().st_size == length


def test_default_block_size_keeps_the_table_small() -> None:
    assert default_block_bytes(1 * GIB) == 2 * MIB
    assert default_block_bytes(2 * TIB) == 2 * MIB
    assert default_block_bytes(2 * TIB + 512) == 4 * MIB
    assert default_block_bytes(64 * TIB) == 64 * MIB


@pytest.mark.parametrize("block_bytes", [None, MIB])
def test_largest_disk_opens_at_once_and_zeroes_at_once(path: Path, block_bytes: int | None) -> None:
    create_disk(OS_FILES, path, virtual_bytes=64 * TIB, block_bytes=block_bytes, clock=FakeClock())
    started = time.perf_counter()
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        disk.write(b"end", 64 * TIB - 3)
        disk.write_zeroes(0, 64 * TIB - MIB)
        buffer = bytearray(3)
        disk.read_into(buffer, 64 * TIB - 3)
        assert buffer == b"end"
        assert len(disk.extents(0, 64 * TIB)) == 1
    assert time.perf_counter() - started < 5  # a walk over 2**26 blocks one by one would take minutes
    assert path.stat().st_blocks * 512 < 8 * MIB


def test_large_full_table_is_mapped_and_checked_on_use(path: Path) -> None:
    """A table with more data than is loaded: the entry that is bad is found when it is used, or by info()."""
    create_disk(OS_FILES, path, virtual_bytes=4 * TIB, block_bytes=MIB, clock=FakeClock())
    with path.open("r+b") as file:
        file.seek(3 * MIB)
        entries = np.full(4 * MIB + 1024, 2, "<u8")
        entries[3_000_000 + 3_000_000 // 4096] = 4
        file.write(entries.tobytes())
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        buffer = bytearray(4096)
        disk.read_into(buffer, 5 * GIB)
        assert not any(buffer)
        for use in (
            lambda: disk.read_into(buffer, 3_000_000 * MIB),
            lambda: disk.extents(2_999_990 * MIB, 3_000_010 * MIB),
            disk.info,
        ):
            with pytest.raises(FieldOutOfRange) as caught:
                use()
            assert (caught.value.field, caught.value.path) == ("state", path)
    before = [header.sequence_number for header in headers(path)]
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk, pytest.raises(FieldOutOfRange):
        disk.write(b"x", 0)
    assert [header.sequence_number for header in headers(path)] == before
    # The closed disk is still in reach here, and its table still mapped: neither may keep the lock.
    open_disk(OS_FILES, path, writable=True, clock=FakeClock()).close()


def test_file_without_a_log_gets_one_when_it_is_written(path: Path) -> None:
    make_disk(path, "dynamic").close()
    file = OS_FILES.open(path, writable=True)
    Headers(file).update(log_length=0, log_offset=0)
    file.close()
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=2)) as disk:
        disk.write(b"x" * 100, MIB)
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        assert everything(disk)[MIB : MIB + 100] == b"x" * 100
    assert headers(path)[0].log_length == MIB


def test_create_refuses_what_cannot_be_and_keeps_what_is_there(path: Path) -> None:
    for size in (0, 513, 64 * TIB + 512):
        with pytest.raises(FieldOutOfRange):
            create_disk(OS_FILES, path, virtual_bytes=size, clock=FakeClock())
    with pytest.raises(FieldOutOfRange):
        create_disk(OS_FILES, path, virtual_bytes=GIB, block_bytes=3 * MIB, clock=FakeClock())
    assert not path.exists()
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        create_disk(OS_FILES, path, virtual_bytes=GIB, clock=FakeClock())
    assert path.read_bytes() == b"mine"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    create_disk(OS_FILES, path, virtual_bytes=GIB, clock=FakeClock(), overwrite=True)
    assert path.stat().st_size == EMPTY_BYTES


@pytest.mark.parametrize(
    ("name", "at", "signature"),
    [
        ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
        ("VMDK", 0, b"KDMV\1\0\0\0"),
        ("VMDK", 0, b"COWD\1\0\0\0"),
        ("VMDK", 0, b"# Disk DescriptorFile\nversion=1\n"),
        ("VDI", 0x40, (0x7F10DABE).to_bytes(4, "little")),
        ("QED", 0, b"QED\0"),
    ],
)
def test_other_formats_are_refused_by_name_unless_raw_is_asked_for(
    path: Path, name: str, at: int, signature: bytes
) -> None:
    for size in (at + len(signature), MIB):
        path.write_bytes((bytes(at) + signature).ljust(size, b"\0"))
        with pytest.raises(UnsupportedVersion, match=name) as caught:
            open_disk(OS_FILES, path, clock=FakeClock())
        assert "qemu-img convert -O vhdx" in str(caught.value.hint)
        assert caught.value.path == path
        with open_disk(OS_FILES, path, format="raw", clock=FakeClock()) as disk:
            assert disk.virtual_bytes == size


@pytest.mark.parametrize("start", [b"", b"QFI", b"QED\1", bytes(0x40) + b"\xbe\xda\x10", b"# Disk Desc"])
def test_part_of_a_signature_is_raw(path: Path, start: bytes) -> None:
    path = path.with_suffix(".raw")
    path.write_bytes(start)
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        assert disk.format == "raw"


def test_two_blocks_in_one_place_are_found_before_the_first_change_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.vhdx"
    create_disk(OS_FILES, path, virtual_bytes=8 * MIB, block_bytes=MIB, clock=FakeClock())
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        disk.write(b"a" * (2 * MIB), 0)
    with path.open("r+b") as file:
        file.seek(3 * MIB)
        entry = file.read(8)
        file.write(entry)
    before = path.read_bytes()
    monkeypatch.setattr("hvreplica.disk.vhdx.bat._APART_COUNT_MAX", 0)
    disk = open_disk(OS_FILES, path, writable=True, clock=FakeClock())
    with disk, pytest.raises(Overlap):
        disk.write(b"b" * 512, 0)
    assert path.read_bytes() == before
