"""Resizing: what is where afterwards, what is refused, and what other programs make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.check import check_disk
from hvreplica.disk.resize import resize_disk
from hvreplica.errors import FieldOutOfRange, Locked, ParentMismatch
from hvreplica.files import OS_FILES
from hvreplica.formats.vhd_footer import Footer, unpack_footer
from hvreplica.formats.vhdx_region import BAT_REGION
from hvreplica.units import GIB, KIB, MIB, TIB
from tests.support.tools import run_tool
from tests.support.vhdx_surgery import Patient

if TYPE_CHECKING:
    from pathlib import Path


def made(path: Path, size: int, **options: object) -> Path:
    """Make a disk of the format that its name ends with, whose first and last sectors hold something."""
    create_disk(OS_FILES, path, virtual_bytes=size, format=path.suffix[1:], clock=SYSTEM, **options)  # type: ignore[arg-type]
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"first".ljust(4096), 0)
        disk.write(b"last".ljust(4096), size - 4096)
    return path


def resize(path: Path, size: int, **options: object) -> int:
    """Resize and return the length of the file."""
    return resize_disk(OS_FILES, path, size, clock=SYSTEM, **options).file_bytes  # type: ignore[arg-type]


def footer_of(path: Path) -> Footer:
    content = path.read_bytes()[-512:]
    return unpack_footer(content, file_offset=0)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("name", ["a.vhdx", "a.vhd"])
def test_other_programs_see_the_new_size_and_zeros(tmp_path: Path, name: str, kind: str) -> None:
    path, truth = tmp_path / name, tmp_path / "truth.raw"
    made(path, 5 * MIB + 4096, type=kind)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        before = bytearray(disk.virtual_bytes)
        disk.read_into(before, 0)
    shown = "vhdx" if name == "a.vhdx" else "vpc"
    for size in (40 * MIB, 300 * GIB if kind == "dynamic" else 50 * MIB, 5 * MIB + 8192, 5 * MIB + 4096):
        resize(path, size)
        info = json.loads(run_tool("qemu-img", "info", "-f", shown, "--output=json", path).stdout)
        assert info["virtual-size"] == size
        if shown == "vhdx" and size > GIB:
            continue  # takes qemu a minute
        truth.write_bytes(before)
        with truth.open("r+b") as file:
            file.truncate(size)
        run_tool("qemu-img", "compare", "-f", shown, "-F", "raw", path, truth)
        if shown == "vhdx":
            run_tool("qemu-img", "check", "-f", shown, path)
            assert check_disk(OS_FILES, path, clock=SYSTEM).verdict == "clean"


def test_table_of_a_vhdx_stays_where_it_has_room_and_goes_to_the_end_where_not(tmp_path: Path) -> None:
    path = made(tmp_path / "a.vhdx", 8 * MIB, block_bytes=MIB)
    patient = Patient(path)
    before = patient.region(BAT_REGION)
    resize(path, 100 * GIB)
    assert patient.region(BAT_REGION) == before
    resize(path, 4 * TIB)
    region = patient.region(BAT_REGION)
    assert region.length >= 4 * TIB // MIB * 8
    assert region.file_offset + region.length == patient.size
    assert patient.read(192 * KIB, 64 * KIB) == patient.read(256 * KIB, 64 * KIB)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"far".ljust(4096), 4 * TIB - 4096)
        disk.write(b"near".ljust(4096), 4096)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        for word, offset in (("first", 0), ("near", 4096), ("last", 8 * MIB - 4096), ("far", 4 * TIB - 4096)):
            buffer = bytearray(4096)
            disk.read_into(buffer, offset)
            assert buffer.rstrip() == word.encode()


def test_entries_that_another_program_left_behind_the_last_block_are_cleared(tmp_path: Path) -> None:
    path = made(tmp_path / "a.vhdx", 8 * MIB, block_bytes=MIB)
    patient = Patient(path)
    garbage = patient.entry(0)
    for index in range(8, 2000):
        patient.set_entry(index, garbage)
    resize(path, GIB)
    assert [patient.entry(index) for index in range(8, 1024)] == [0] * 1016
    vhd = made(tmp_path / "a.vhd", 8 * 512 * KIB, block_bytes=512 * KIB)
    content = bytearray(vhd.read_bytes())
    content[1536 + 4 * 8 : 2048] = content[1536:1540] * ((2048 - 1536) // 4 - 8)
    vhd.write_bytes(content)
    resize(vhd, 60 * 512 * KIB)
    with open_disk(OS_FILES, vhd, clock=SYSTEM) as disk:
        assert disk.extents(4 * MIB, disk.virtual_bytes).tolist() == []


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.vhdx", 64 * TIB + MIB),
        ("a.vhd", 2040 * GIB + 512),
        ("a.vhdx", 0),
        ("a.vhd", 5 * MIB + 1),
        ("a.vhdx", -512),
        ("a.raw", 511),
    ],
)
def test_sizes_that_cannot_be_are_refused_and_nothing_is_touched(
    tmp_path: Path, name: str, size: int
) -> None:
    path = made(tmp_path / name, 5 * MIB)
    before = path.read_bytes()
    with pytest.raises(FieldOutOfRange) as caught:
        resize(path, size)
    assert caught.value.field == "size"
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["a.vhdx", "a.vhd", "a.raw"])
def test_limits_are_reached(tmp_path: Path, name: str) -> None:
    size = {"a.vhdx": 64 * TIB, "a.vhd": 2040 * GIB, "a.raw": 10 * GIB}[name]
    path = made(tmp_path / name, 5 * MIB)
    resize(path, size)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        assert disk.virtual_bytes == size
        disk.write(b"end".ljust(4096), size - 4096)
    with pytest.raises(FieldOutOfRange) as caught:
        resize(path, 5 * MIB)
    assert str(size - 4096 + 3) not in (caught.value.hint or "")
    assert str(size) in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["a.vhdx", "a.vhd", "a.raw"])
def test_shrinking_names_the_smallest_size_that_loses_nothing(tmp_path: Path, name: str) -> None:
    path = made(tmp_path / name, 20 * MIB)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(bytes(4096), 20 * MIB - 4096)
        disk.write(b"x", 7 * MIB + 700)
        disk.write(b"y", 6 * MIB)
    before = path.read_bytes()
    with pytest.raises(FieldOutOfRange) as caught:
        resize(path, 5 * MIB)
    smallest = 7 * MIB + 1024
    assert caught.value.expected == f"at least {smallest}"
    assert str(smallest) in (caught.value.hint or "")
    assert path.read_bytes() == before
    resize(path, smallest)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.virtual_bytes == smallest


@pytest.mark.parametrize(
    ("creator", "size", "expected"),
    [
        (b"vpc ", 41 * MIB, b"win "),  # its geometry is smaller than the disk, and qemu believes it
        (b"vpc ", 40960 * 17 * 4 * 5, b"vpc "),  # a product of the geometry
        (b"vbox", 200 * GIB, b"vbox"),  # the largest geometry, which nobody believes
        (b"qem2", 41 * MIB, b"qem2"),
        (b"d2v ", 41 * MIB, b"d2v "),
    ],
)
def test_creator_stays_where_qemu_sees_the_size_all_the_same(
    tmp_path: Path, creator: bytes, size: int, expected: bytes
) -> None:
    path = made(tmp_path / "a.vhd", 5 * MIB)
    content = bytearray(path.read_bytes())
    for at in (0, len(content) - 512):
        footer = unpack_footer(content[at : at + 512], file_offset=at)
        content[at : at + 512] = _with_creator(footer, creator).pack()
    path.write_bytes(content)
    resize(path, size)
    assert footer_of(path).creator_application == expected
    info = json.loads(run_tool("qemu-img", "info", "-f", "vpc", "--output=json", path).stdout)
    assert info["virtual-size"] == size


def _with_creator(footer: Footer, creator: bytes) -> Footer:
    return replace(footer, creator_application=creator)


def test_fixed_vhd_keeps_identity_and_permissions(tmp_path: Path) -> None:
    path = made(tmp_path / "a.vhd", 5 * MIB, type="fixed")
    path.chmod(0o640)
    before = footer_of(path)
    resize(path, 9 * MIB)
    after = footer_of(path)
    assert (after.unique_id, after.time_stamp, after.original_size) == (
        before.unique_id,
        before.time_stamp,
        before.original_size,
    )
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["a.vhd"]
    assert path.read_bytes()[5 * MIB : 9 * MIB] == bytes(4 * MIB)


def test_children_of_a_resized_vhdx_refuse_it(tmp_path: Path) -> None:
    base, child = made(tmp_path / "base.vhdx", 5 * MIB), tmp_path / "child.vhdx"
    create_disk(OS_FILES, child, parent=base, clock=SYSTEM)
    resize_disk(OS_FILES, base, 6 * MIB, force=True, clock=SYSTEM)
    with pytest.raises(ParentMismatch):
        open_disk(OS_FILES, child, clock=SYSTEM)


def test_parent_of_an_open_disk_is_not_resized(tmp_path: Path) -> None:
    base, child = made(tmp_path / "base.vhdx", 5 * MIB), tmp_path / "child.vhdx"
    create_disk(OS_FILES, child, parent=base, clock=SYSTEM)
    with open_disk(OS_FILES, child, clock=SYSTEM), pytest.raises(Locked):
        resize(base, 6 * MIB)


def test_last_block_that_the_file_has_only_in_part_gets_a_whole_place(tmp_path: Path) -> None:
    """Writers leave out of the last block what the disk does not have; its footer stands there then."""
    path = made(tmp_path / "a.vhd", 5 * 512 * KIB + 4096, block_bytes=512 * KIB)
    content = path.read_bytes()
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        last = list(disk.stretches(5 * 512 * KIB, disk.virtual_bytes))[-1]
    assert last.file_offset is not None
    cut = last.file_offset + 4096
    path.write_bytes(content[:cut] + content[-512:])
    resize(path, 6 * 512 * KIB)
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        buffer = bytearray(512 * KIB)
        disk.read_into(buffer, 5 * 512 * KIB)
    assert buffer == b"last".ljust(4096) + bytes(512 * KIB - 4096)


def test_same_size_changes_nothing(tmp_path: Path) -> None:
    for name in ("a.vhdx", "a.vhd", "a.raw"):
        path = made(tmp_path / name, 5 * MIB)
        before = path.read_bytes()
        resize(path, 5 * MIB)
        assert path.read_bytes() == before


def test_random_sizes_keep_the_disk(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in ("a.vhdx", "a.vhd"):
        path = tmp_path / name
        block = MIB if name == "a.vhdx" else 512 * KIB
        create_disk(
            OS_FILES, path, virtual_bytes=4 * MIB, format=path.suffix[1:], block_bytes=block, clock=SYSTEM
        )
        truth = bytearray(4 * MIB)
        for number in range(1, 25):
            with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
                start = int(rng.integers(0, len(truth) // 512)) * 512
                data = bytes([number]) * min(int(rng.choice([512, 70000, MIB])), len(truth) - start)
                disk.write(data, start)
                truth[start : start + len(data)] = data
                keep = int(rng.integers(1, len(truth) // 512 + 1)) * 512
                disk.write_zeroes(keep, len(truth) - keep)
                truth[keep:] = bytes(len(truth) - keep)
            size = int(rng.integers(keep // 512, 12 * MIB // 512)) * 512
            resize(path, size)
            truth = truth[:size] + bytearray(max(size - len(truth), 0))
            with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
                found = bytearray(disk.virtual_bytes)
                disk.read_into(found, 0)
            assert found == truth
