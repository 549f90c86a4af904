"""The traps of VHD between programs, one test each where no other test shows it; docs/formats/traps.md lists them.

Images are those of other programs where one shows the trap, and else images of qemu with single fields changed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import Locked, ParentMismatch, ParentMissing
from hvreplica.files import OS_FILES
from hvreplica.units import GIB, KIB, MIB
from tests.support.edit import (
    big,
    bitmap_offset,
    dynamic_header_offset,
    footer_offset,
    peek,
    poke,
    set_dynamic_header,
    set_footer,
    vhd_table_offset,
)
from tests.support.images import disk_content
from tests.support.matrix import OURS, Made, QemuRecipe
from tests.support.specimens import unpack_family
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.specimens import Shelf

CHILD, PARENT = "dfvfs/ntfs-differential.vhd.bz2", "ntfs-parent.vhd"
TAIL = 3584  # guest bytes in the last block of `odd`


@pytest.fixture
def odd(tmp_path: Path) -> Made:
    """Return a dynamic VHD of qemu whose size is no product of its geometry, the last block not full."""
    return QemuRecipe(
        name="odd.vhd",
        size=10 * MIB + TAIL,
        options="subformat=dynamic,force_size=on",
        writes=((0, 4096, "A"), (2 * MIB, 4096, "B"), (10 * MIB, TAIL, "TAIL")),
    ).make(tmp_path)


def assert_reads_as(path: Path, made: Made) -> None:
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert (disk.format, disk_content(disk)) == ("vhd", made.truth.content())


def read(path: Path, offset: int, length: int) -> bytes:
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        buffer = bytearray(length)
        disk.read_into(buffer, offset)
        return bytes(buffer)


@pytest.mark.parametrize(
    "name", ["go-vhd/win8.vhd", "dissect/fixed.vhd.gz", "virtualbox/vbm-dynamic.vhd.bz2"]
)
def test_size_is_the_footers_and_not_that_of_the_geometry(shelf: Shelf, name: str) -> None:
    path = shelf.image(name)
    at = footer_offset(path)
    product = big(path, at + 56, 2) * big(path, at + 58, 1) * big(path, at + 59, 1) * 512
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.virtual_bytes == big(path, at + 48, 8) > product


@pytest.mark.parametrize(
    "creator", [b"win ", b"qem2", b"d2v\0", b"d2v ", b"tap\0", b"CTXS", b"vpc ", b"qemu", b"vbox", bytes(4)]
)
def test_size_does_not_depend_on_the_creator(odd: Made, creator: bytes) -> None:
    set_footer(odd.path, 28, creator)
    set_footer(odd.path, 56, (301).to_bytes(2, "big") + bytes((4, 17)))  # 10479616 bytes
    assert_reads_as(odd.path, odd)
    answer = json.loads(run_tool("qemu-img", "info", "-f", "vpc", "--output=json", odd.path).stdout)
    loses = creator not in {b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"}
    assert answer["virtual-size"] == (10479616 if loses else odd.truth.virtual_bytes)


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        (10 * MIB, (301, 4, 17)),
        (40 * MIB, (963, 5, 17)),
        (32 * GIB, (16448, 16, 255)),
        (100 * GIB, (51400, 16, 255)),
        (127 * GIB, (65278, 16, 255)),
        (128 * GIB, (65535, 16, 255)),
    ],
)
def test_geometry_of_new_disks_is_that_of_windows(
    tmp_path: Path, size: int, geometry: tuple[int, int, int]
) -> None:
    path = tmp_path / "new.vhd"
    create_disk(OS_FILES, path, virtual_bytes=size, format="vhd", clock=SYSTEM)
    at = footer_offset(path)
    assert (big(path, at + 56, 2), big(path, at + 58, 1), big(path, at + 59, 1)) == geometry
    assert big(path, at + 40, 8) == big(path, at + 48, 8) == size


@pytest.mark.parametrize(
    ("at", "octets"),
    [
        (40, (5 * MIB).to_bytes(8, "big")),  # original size
        (24, bytes(4)),  # time stamp
        (24, b"\xff" * 4),
        (32, (0x0006_0003).to_bytes(4, "big")),  # creator version
        (36, bytes(4)),  # creator host OS
        (36, b"Mac "),
        (84, b"\1"),  # saved state
    ],
)
def test_fields_that_are_advice_change_nothing(odd: Made, at: int, octets: bytes) -> None:
    set_footer(odd.path, at, octets)
    assert_reads_as(odd.path, odd)


def test_footer_of_511_bytes_is_read(tmp_path: Path) -> None:
    made = QemuRecipe(
        name="old.vhd",
        size=5 * MIB,
        options="subformat=fixed,force_size=on",
        writes=((0, 4096, "A"), (5 * MIB - 512, 512, "LAST")),
        type="fixed",
    ).make(tmp_path)
    with made.path.open("r+b") as file:
        file.truncate(5 * MIB + 511)
    assert_reads_as(made.path, made)


@pytest.mark.parametrize("where", ["footer", "copy"])
def test_either_footer_serves_where_the_other_is_bad(odd: Made, where: str) -> None:
    poke(odd.path, 0 if where == "copy" else footer_offset(odd.path), b"\xff" * 512)
    assert_reads_as(odd.path, odd)


def test_footer_at_the_end_counts_where_the_copy_is_another_one(odd: Made) -> None:
    set_footer(odd.path, 48, (11 * MIB).to_bytes(8, "big"))
    set_footer(odd.path, 48, (10 * MIB + TAIL).to_bytes(8, "big"), copies=False)
    assert_reads_as(odd.path, odd)


def test_fixed_disk_is_told_by_its_end(shelf: Shelf) -> None:
    path = shelf.image("dissect/fixed.vhd.gz")
    assert peek(path, 0, 8) != b"conectix"
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert (disk.format, disk.info().type) == ("vhd", "fixed")
        assert disk.virtual_bytes == path.stat().st_size - 512


def test_table_with_more_entries_than_the_size_needs_adds_nothing(odd: Made) -> None:
    set_dynamic_header(
        odd.path, 28, (7).to_bytes(4, "big")
    )  # max table entries; the sector is full of absent ones
    assert_reads_as(odd.path, odd)


def test_new_blocks_have_their_data_on_4_kib(tmp_path: Path) -> None:
    path = tmp_path / "new.vhd"
    create_disk(OS_FILES, path, virtual_bytes=20 * MIB, format="vhd", clock=SYSTEM)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        for offset in (9 * MIB, 0, 5 * MIB):
            disk.write(b"x" * 512, offset)
    entries = [big(path, vhd_table_offset(path) + 4 * block, 4) for block in range(10)]
    places = [entry * 512 + 512 for entry in entries if entry != 0xFFFF_FFFF]
    assert len(places) == 3
    assert all(place % 4096 == 0 for place in places)
    assert peek(path, bitmap_offset(path, 4) + 512 + MIB, 1) == b"x"


def test_bitmap_counts_from_the_highest_bit_and_unset_sectors_are_zeros(odd: Made) -> None:
    """XenServer sets the bits of written sectors alone; other writers set all. Spec: VHD 1.0, Block Bitmap."""
    poke(odd.path, bitmap_offset(odd.path, 0), b"\xef")  # the fourth sector
    octets = read(odd.path, 0, 4096)
    expected = odd.truth.read(0, 4096)
    expected[3 * 512 : 4 * 512] = bytes(512)
    assert octets == expected


def test_batmap_is_right_or_gone_after_a_write(tmp_path: Path) -> None:
    path = unpack_family("go-vhd/xapi.vhd", tmp_path)
    batmap = dynamic_header_offset(path) + 1024 + 512
    assert peek(path, batmap, 8) == b"tdbatmap"
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"\x11" * (2 * MIB), 4 * MIB)
        disk.write(b"\x22" * 512, 9 * MIB)
    if peek(path, footer_offset(path) + 28, 3) != b"tap" or peek(path, batmap, 8) != b"tdbatmap":
        return  # nobody looks for it
    bits = peek(path, big(path, batmap + 8, 8), 4096)
    octets = peek(path, big(path, batmap + 8, 8), 512 * big(path, batmap + 16, 4))
    assert big(path, batmap + 24, 4) == ~sum(octets) & 0xFFFF_FFFF
    for block in (2, 4):
        full = peek(path, bitmap_offset(path, block), 512) == b"\xff" * 512
        assert full or not bits[block // 8] & (0x80 >> block % 8)


def test_last_block_may_be_cut_short_where_the_disk_ends(odd: Made) -> None:
    footer = peek(odd.path, footer_offset(odd.path), 512)
    end = bitmap_offset(odd.path, 5) + 512 + TAIL
    assert end < footer_offset(odd.path)
    with odd.path.open("r+b") as file:
        file.truncate(end)
    poke(odd.path, end, footer)
    assert_reads_as(odd.path, odd)


def test_child_alone_is_refused_and_not_read_over_zeros(tmp_path: Path) -> None:
    path = unpack_family(CHILD, tmp_path)
    (tmp_path / PARENT).rename(tmp_path / "elsewhere.vhd")
    with pytest.raises(ParentMissing, match="ntfs-parent") as caught:
        open_disk(OS_FILES, path, clock=SYSTEM)
    assert caught.value.hint
    with open_disk(OS_FILES, path, parent=tmp_path / "elsewhere.vhd", clock=SYSTEM) as disk:
        assert disk.info().parent == str(tmp_path / "elsewhere.vhd")


def test_zeros_over_data_of_the_parent_stay_zeros(tmp_path: Path) -> None:
    child = next(recipe for recipe in OURS if recipe.name == "untouched.vhd").make(tmp_path)
    with open_disk(OS_FILES, child.path, writable=True, clock=SYSTEM) as disk:
        disk.write(bytes(4096), 3 * MIB)
        disk.write_zeroes(6 * MIB, 4096)
    assert read(child.path, 3 * MIB, 4096) == read(child.path, 6 * MIB, 4096) == bytes(4096)
    assert (
        read(child.path, 3 * MIB + 256 * KIB, 512) == child.truth.read(3 * MIB + 256 * KIB, 512) != bytes(512)
    )


def test_parent_is_known_by_its_id_and_not_by_its_time(tmp_path: Path, shelf: Shelf) -> None:
    path = unpack_family(CHILD, tmp_path)
    truth = disk_of(shelf.image(CHILD))
    set_footer(tmp_path / PARENT, 24, b"\x12\x34\x56\x78")
    set_dynamic_header(path, 56, b"\x01\x02\x03\x04")
    assert disk_of(path) == truth
    unique_id = peek(tmp_path / PARENT, footer_offset(tmp_path / PARENT) + 68, 16)
    other = (
        unique_id[3::-1] + unique_id[5:3:-1] + unique_id[7:5:-1] + unique_id[8:]
    )  # as its text in the other order
    set_footer(tmp_path / PARENT, 68, other)
    with pytest.raises(ParentMismatch) as caught:
        open_disk(OS_FILES, path, clock=SYSTEM)
    assert caught.value.hint


def test_parent_may_be_shorter_than_its_child(tmp_path: Path) -> None:
    path = unpack_family(CHILD, tmp_path)
    parent = tmp_path / PARENT
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        whole = bytearray(disk.virtual_bytes)
        disk.read_into(whole, 0)
    parent_whole = peek(parent, 0, len(whole))
    with parent.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(peek(parent, footer_offset(parent), 512))
        file.truncate(2 * MIB + 512)
    set_footer(parent, 48, (2 * MIB).to_bytes(8, "big"))
    octets = read(path, 0, len(whole))
    assert octets[: 2 * MIB] == whole[: 2 * MIB]
    for at in range(2 * MIB, len(whole), 512):
        sector = bytes(whole[at : at + 512])
        from_child = sector != parent_whole[at : at + 512]
        assert octets[at : at + 512] in ((sector,) if from_child else (sector, bytes(512)))


def test_raw_parent_is_read_under_its_child(shelf: Shelf) -> None:
    path = shelf.image("blktap/blktap-onraw.vhd.bz2")
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.parent is not None
        assert disk.parent.format == "raw"
        assert not disk.parent.writable


def test_parent_stays_locked_against_writers_while_its_child_is_open(tmp_path: Path) -> None:
    path = unpack_family(CHILD, tmp_path)
    with open_disk(OS_FILES, path, clock=SYSTEM):
        open_disk(OS_FILES, tmp_path / PARENT, clock=SYSTEM).close()
        with pytest.raises(Locked):
            open_disk(OS_FILES, tmp_path / PARENT, writable=True, clock=SYSTEM)
    open_disk(OS_FILES, tmp_path / PARENT, writable=True, clock=SYSTEM).close()


def disk_of(path: Path) -> object:
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        return disk_content(disk)
