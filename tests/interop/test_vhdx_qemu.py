"""qemu-img and qemu-io agree with us: on what we write, and on what we read of theirs.

qemu refuses 4096-byte logical sectors, and cannot replay a log entry of more than 126 descriptors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import compare_disks, convert_disk, create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.formats.guid import unpack_guid
from hvreplica.formats.vhdx_header import HEADER_OFFSETS, unpack_header
from hvreplica.formats.vhdx_region import BAT_REGION, unpack_region_table
from hvreplica.units import GIB, KIB, MIB, TIB
from tests.support.build import mixed_bytes, random_bytes
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path


def check(path: Path) -> None:
    run_tool("qemu-img", "check", "-f", "vhdx", path)


def equal(a: Path, a_format: str, b: Path, b_format: str) -> None:
    run_tool("qemu-img", "compare", "-f", a_format, "-F", b_format, a, b)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("block_bytes", [MIB, 2 * MIB, 32 * MIB, 256 * MIB])
def test_what_we_write_is_what_qemu_reads(tmp_path: Path, kind: str, block_bytes: int) -> None:
    path, truth = tmp_path / "a.vhdx", tmp_path / "a.raw"
    size = 70 * MIB + 512
    create_disk(OS_FILES, path, virtual_bytes=size, type=kind, block_bytes=block_bytes, clock=SYSTEM)
    check(path)
    expected = bytearray(size)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        for offset, length in ((0, 4096), (MIB - 512, 1024), (40 * MIB + 3, 3 * MIB), (size - 700, 700)):
            data = mixed_bytes(length, seed=offset)
            disk.write(data, offset)
            expected[offset : offset + length] = data
        disk.flush()
        disk.write_zeroes(41 * MIB, 2 * MIB)
        expected[41 * MIB : 43 * MIB] = bytes(2 * MIB)
        disk.write(b"again", 41 * MIB)
        expected[41 * MIB : 41 * MIB + 5] = b"again"
    truth.write_bytes(expected)
    check(path)
    equal(path, "vhdx", truth, "raw")


@pytest.mark.parametrize("options", ["block_size=1M", "block_size=16M,log_size=16M", "subformat=fixed", ""])
def test_what_qemu_writes_is_what_we_read_and_change(tmp_path: Path, options: str) -> None:
    path, truth = tmp_path / "q.vhdx", tmp_path / "q.raw"
    data = mixed_bytes(24 * MIB + 1024, seed=3, block_bytes=65536)
    truth.write_bytes(data)
    run_tool("qemu-img", "convert", "-O", "vhdx", *(["-o", options] if options else []), truth, path)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        buffer = bytearray(disk.virtual_bytes)
        disk.read_into(buffer, 0)
        assert buffer[: len(data)] == data
        before = disk.data_write_guid
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"ours" * 1000, 5 * MIB + 17)
        disk.write_zeroes(9 * MIB, 7 * MIB)
        assert disk.data_write_guid != before
    changed = bytearray(data)
    changed[5 * MIB + 17 : 5 * MIB + 4017] = b"ours" * 1000
    changed[9 * MIB : 16 * MIB] = bytes(7 * MIB)
    truth.write_bytes(changed)
    check(path)
    equal(path, "vhdx", truth, "raw")


def test_log_that_qemu_wrote_is_replayed_alike(tmp_path: Path) -> None:
    """An image is put back to where qemu had logged its last BAT update and not yet written it in place.

    qemu empties its log at once, but the entry stays in the ring: with its LogGuid in the header it counts again.
    """
    ours, theirs = tmp_path / "ours.vhdx", tmp_path / "theirs.vhdx"
    run_tool("qemu-img", "create", "-f", "vhdx", "-o", "block_size=1M", ours, "64M")
    run_tool("qemu-io", "-f", "vhdx", "-c", "write -P 17 17M 64k", ours)
    image = bytearray(ours.read_bytes())
    assert image[MIB : MIB + 4] == b"loge"
    log_guid = unpack_guid(image, MIB + 32)
    for at in HEADER_OFFSETS:
        header = unpack_header(image[at : at + 4096], file_offset=at)
        image[at : at + 4096] = replace(header, log_guid=log_guid).pack()
    bat_offset = unpack_region_table(image[192 * KIB : 256 * KIB], file_offset=0).find(BAT_REGION).file_offset
    image[bat_offset : bat_offset + 4096] = bytes(4096)
    ours.write_bytes(image)
    theirs.write_bytes(image)
    run_tool("qemu-img", "check", "-f", "vhdx", "-r", "all", theirs)
    run_tool("qemu-io", "-f", "vhdx", "-r", "-c", "read -P 17 17M 64k", theirs)
    with open_disk(OS_FILES, ours, clock=SYSTEM) as disk:
        assert disk.info().log == "replayed"
    assert ours.read_bytes() == image
    assert compare_disks(OS_FILES, ours, theirs, clock=SYSTEM).equal
    with open_disk(OS_FILES, ours, writable=True, clock=SYSTEM) as disk:
        disk.write(b"x", 50 * MIB)
    check(ours)
    report = compare_disks(OS_FILES, ours, theirs, clock=SYSTEM)
    assert report.first_difference == 50 * MIB


def test_log_that_we_left_is_replayed_by_qemu(tmp_path: Path) -> None:
    """More BAT sectors than one entry holds, and the blocks in place lost: qemu finds them through our log."""
    path = tmp_path / "dirty.vhdx"
    create_disk(OS_FILES, path, virtual_bytes=TIB, block_bytes=MIB, clock=SYSTEM)
    disk = open_disk(OS_FILES, path, writable=True, clock=SYSTEM)
    places = np.arange(100, dtype=np.int64) * 700 * MIB
    disk.write_extents(np.column_stack((places, np.full(100, 4096))), random_bytes(100 * 4096))
    disk.flush()
    disk.abandon()
    with path.open("r+b") as file:  # as if the BAT had not reached the file
        file.seek(3 * MIB)
        file.write(bytes(8 * MIB))
    run_tool("qemu-img", "check", "-f", "vhdx", "-r", "all", path)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.info().log == "clean"
        buffer = bytearray(100 * 4096)
        disk.read_extents(np.column_stack((places, np.full(100, 4096))), buffer)
        assert buffer == random_bytes(100 * 4096)


@pytest.mark.parametrize(
    ("format_name", "kind"), [("vhdx", "dynamic"), ("vhdx", "fixed"), ("raw", "dynamic")]
)
def test_convert_gives_what_qemu_finds_equal(tmp_path: Path, format_name: str, kind: str) -> None:
    source, target, back = tmp_path / "s.vhdx", tmp_path / "t", tmp_path / "back.vhdx"
    raw = tmp_path / "s.raw"
    raw.write_bytes(mixed_bytes(20 * MIB, seed=8) + bytes(30 * MIB) + mixed_bytes(MIB + 512, seed=9))
    run_tool("qemu-img", "convert", "-O", "vhdx", raw, source)
    report = convert_disk(OS_FILES, source, target, format=format_name, type=kind, clock=SYSTEM)
    assert report.written_bytes <= report.read_bytes
    equal(source, "vhdx", target, format_name)
    run_tool("qemu-img", "convert", "-f", format_name, "-O", "vhdx", target, back)
    assert compare_disks(OS_FILES, back, raw, clock=SYSTEM).equal


@pytest.mark.parametrize("size", [512, 2 * MIB, 2 * MIB + 512, 3 * TIB, 64 * TIB])
def test_sizes_up_to_the_limit_open_in_qemu(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.vhdx"
    create_disk(OS_FILES, path, virtual_bytes=size, clock=SYSTEM)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"\x5a" * 512, size - 512)
    check(path)
    assert json.loads(run_tool("qemu-img", "info", "--output=json", path).stdout)["virtual-size"] == size
    run_tool("qemu-io", "-f", "vhdx", "-r", "-c", f"read -P 0x5a {size - 512} 512", path)


def test_differing_disks_are_told_with_the_same_offset(tmp_path: Path) -> None:
    a, b = tmp_path / "a.raw", tmp_path / "b.raw"
    data = bytearray(random_bytes(8 * MIB))
    a.write_bytes(data)
    data[5 * MIB + 12345] ^= 1
    b.write_bytes(data + bytes(GIB // 256))
    report = compare_disks(OS_FILES, a, b, clock=SYSTEM)
    assert (report.equal, report.first_difference) == (False, 5 * MIB + 12345)
    run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", a, b, expected=(1,))
