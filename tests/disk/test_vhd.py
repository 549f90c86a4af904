"""VHDs that are unusual and legal, those that are damaged, parents, and what a new one looks like."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.vhd.image import read_footer, read_image
from hvreplica.disk.vhd.table import VhdTable
from hvreplica.errors import (
    FieldOutOfRange,
    FormatError,
    HvReplicaError,
    Overlap,
    ParentMismatch,
    ParentMissing,
    Truncated,
)
from hvreplica.files import OS_FILES
from hvreplica.formats.vhd_bat import NO_OFFSET, pack_bat, unpack_bat
from hvreplica.formats.vhd_batmap import BATMAP_HEADER
from hvreplica.formats.vhd_footer import NO_DATA_OFFSET, VIRTUAL_BYTES_MAX, Footer, unpack_footer
from hvreplica.formats.vhd_header import DynamicHeader, unpack_dynamic_header
from hvreplica.units import GIB, KIB, MIB
from tests.disk.contract import everything
from tests.support.build import random_bytes
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from hvreplica.disk import Disk

FOOTER = Footer(
    data_offset=512,
    time_stamp=7,
    creator_application=b"win ",
    creator_version=0xA0000,
    creator_host_os=b"Wi2k",
    original_size=0,
    current_size=0,
    cylinders=0,
    heads=0,
    sectors_per_track=0,
    disk_type=3,
    unique_id=FakeClock(seed=77).guid(),
)


def opened(path: Path, *, writable: bool = False, **more: Any) -> Disk:
    return open_disk(OS_FILES, path, writable=writable, clock=FakeClock(seed=8), **more)


def created(path: Path, size: int | None = None, **more: Any) -> Path:
    clock = FakeClock(seed=len(str(path)))
    create_disk(OS_FILES, path, virtual_bytes=size, format="vhd", clock=clock, **more)
    return path


def content(path: Path, **more: Any) -> bytes:
    with opened(path, **more) as disk:
        return everything(disk)


def handmade(
    path: Path,
    *,
    size: int,
    block_bytes: int,
    blocks: dict[int, tuple[bytes, bytes]],
    footer: Footer = FOOTER,
    footer_bytes: int = 512,
    extra_entries: int = 0,
    gap: int = 0,
) -> Path:
    """Write a VHD with the given blocks: bitmap and data, each as long as it shall be in the file."""
    footer = replace(footer, current_size=size, original_size=size)
    count = -(-size // block_bytes) + extra_entries
    table_end = -(-(0x600 + 4 * count) // 512) * 512
    header = DynamicHeader(table_offset=0x600, max_table_entries=count, block_size=block_bytes)
    offsets = np.full(count, NO_OFFSET, np.int64)
    image = bytearray(table_end)
    for block, (bitmap, data) in blocks.items():
        image += bytes(gap)
        offsets[block] = len(image)
        image += bitmap + data
    image[:512] = footer.pack()
    image[512:1536] = header.pack()
    image[0x600 : 0x600 + 4 * count] = pack_bat(offsets)
    path.write_bytes(image + footer.pack()[:footer_bytes])
    return path


# ---- what may be


def test_unset_sectors_of_a_dynamic_disk_are_zeros_until_they_are_written(tmp_path: Path) -> None:
    data = random_bytes(512 * KIB, seed=1)
    bitmap = (b"\x81" + bytes(127)).ljust(512, b"\0")
    path = handmade(
        tmp_path / "a.vhd", size=MIB, block_bytes=512 * KIB, blocks={1: (bitmap, data)}, gap=7 * 512
    )
    expected = bytearray(MIB)
    for sector in (0, 7):
        at = 512 * KIB + sector * 512
        expected[at : at + 512] = data[sector * 512 : sector * 512 + 512]
    assert content(path) == expected
    with opened(path, writable=True) as disk:
        disk.write(b"new", 512 * KIB + 3 * 512 + 5)
        disk.write(bytes(512), 512 * KIB)
    expected[512 * KIB + 3 * 512 + 5 : 512 * KIB + 3 * 512 + 8] = b"new"
    expected[512 * KIB : 512 * KIB + 512] = bytes(512)
    assert content(path) == expected


@pytest.mark.parametrize("block_bytes", [512, 1024, 4096, 64 * KIB, 4 * MIB])
def test_blocks_of_any_power_of_two_are_read_and_written(tmp_path: Path, block_bytes: int) -> None:
    size = 3 * block_bytes - 512 if block_bytes > 512 else 1536
    bitmap_bytes = max(-(-block_bytes // 4096 // 512) * 512, 512)
    data = random_bytes(block_bytes, seed=2)
    path = handmade(
        tmp_path / "a.vhd",
        size=size,
        block_bytes=block_bytes,
        blocks={1: (b"\xff" * bitmap_bytes, data)},
        extra_entries=2,
    )
    expected = bytearray(size)
    expected[block_bytes : 2 * block_bytes] = data
    assert content(path) == expected
    with opened(path, writable=True) as disk:
        disk.write(b"\x77" * 512, size - 512)
        disk.write(b"\x66" * 300, 100)
        disk.flush()
        disk.write_zeroes(block_bytes, block_bytes)
    expected[size - 512 :] = b"\x77" * 512
    expected[100:400] = b"\x66" * 300
    expected[block_bytes : 2 * block_bytes] = bytes(block_bytes)
    assert content(path) == expected


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_footer_of_511_bytes_is_read_and_written_behind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.vhd"
    data = random_bytes(512 * KIB, seed=3)
    if kind == "fixed":
        footer = replace(FOOTER, disk_type=2, data_offset=NO_DATA_OFFSET, current_size=len(data))
        path.write_bytes(data + footer.pack()[:511])
    else:
        handmade(
            path,
            size=MIB,
            block_bytes=512 * KIB,
            blocks={0: (b"\xff" * 512, data)},
            footer_bytes=511,
        )
    assert content(path)[: len(data)] == data
    with opened(path, writable=True) as disk:
        disk.write(b"x", disk.virtual_bytes - 1)
    expected = bytearray(content(path))
    assert expected[-1:] == b"x"
    assert expected[: len(data) - 1] == data[:-1]
    assert path.stat().st_size % 512 == (511 if kind == "fixed" else 0)


@pytest.mark.parametrize("cut", [0, 1])
def test_last_block_may_end_with_the_disk_and_not_before(tmp_path: Path, cut: int) -> None:
    data = random_bytes(5 * 512, seed=4)
    path = handmade(
        tmp_path / "a.vhd",
        size=512 * KIB + len(data),
        block_bytes=512 * KIB,
        blocks={1: (b"\xff" * 512, data[: len(data) - 512 * cut])},
    )
    if cut:
        with pytest.raises(Overlap, match="footer") as caught:
            opened(path)
        assert caught.value.offset == 0x604
        path.write_bytes(path.read_bytes()[:-512])
        with pytest.raises(Truncated, match="block 1 ends") as truncated:
            opened(path)
        assert truncated.value.offset == 0x604
        assert truncated.value.path == path
        return
    assert content(path)[512 * KIB :] == data
    with opened(path, writable=True) as disk:
        disk.write(b"y" * 512, 512 * KIB + len(data) - 512)
        disk.write(b"z" * 512, 0)
    expected = b"z" * 512 + bytes(512 * KIB - 512) + data[:-512] + b"y" * 512
    assert content(path) == expected


def test_largest_disk_is_made_read_and_written(tmp_path: Path) -> None:
    path = created(tmp_path / "a.vhd", VIRTUAL_BYTES_MAX)
    with opened(path, writable=True) as disk:
        disk.write(b"end", VIRTUAL_BYTES_MAX - 3)
        disk.write(b"middle", GIB * 1000 + 5)
        disk.write_zeroes(GIB * 1000, GIB)
    with opened(path) as disk:
        buffer = bytearray(6)
        disk.read_into(buffer, VIRTUAL_BYTES_MAX - 6)
        assert buffer == b"\0\0\0end"
        assert disk.info().allocated_bytes == 2 * MIB
        assert disk.virtual_bytes == VIRTUAL_BYTES_MAX


# ---- after a crash


def test_lost_footer_is_the_copys_and_written_again(tmp_path: Path) -> None:
    path = created(tmp_path / "a.vhd", 4 * MIB)
    with opened(path, writable=True) as disk:
        disk.write(b"kept", MIB)
    whole = path.read_bytes()
    for damaged in (whole[:-512], whole[:-512] + bytes(512), whole[:-512] + bytes(3 * MIB + 100)):
        path.write_bytes(damaged)
        assert content(path)[MIB : MIB + 4] == b"kept"
        assert path.read_bytes() == damaged
        opened(path, writable=True).close()
        assert path.read_bytes() == whole


def test_damaged_copy_is_no_harm_and_made_right_by_the_first_change(tmp_path: Path) -> None:
    path = created(tmp_path / "a.vhd", 4 * MIB)
    whole = path.read_bytes()
    path.write_bytes(b"x" * 512 + whole[512:])
    opened(path, writable=True).close()
    assert path.read_bytes()[:512] == b"x" * 512
    with opened(path, writable=True) as disk:
        disk.write(b"kept", MIB)
    after = path.read_bytes()
    assert after[:512] == after[-512:] == whole[-512:]


def test_places_that_nobody_names_are_zeroed_before_use(tmp_path: Path) -> None:
    """What a crash or another program left between blocks must not be seen in the block that gets the place."""
    data = random_bytes(512 * KIB, seed=5)
    blocks = dict.fromkeys(range(3), (b"\xff" * 512, data))
    path = handmade(tmp_path / "a.vhd", size=4 * MIB, block_bytes=512 * KIB, blocks=blocks, gap=7 * 512)
    image = bytearray(path.read_bytes())
    image[0x604:0x608] = b"\xff" * 4  # block 1 is forgotten
    path.write_bytes(image)
    with opened(path, writable=True) as disk:
        disk.write(b"one sector".ljust(512, b"\0"), 6 * 512 * KIB)
    assert path.stat().st_size == len(image)
    expected = bytearray(4 * MIB)
    expected[: 512 * KIB] = expected[2 * 512 * KIB : 3 * 512 * KIB] = data
    expected[6 * 512 * KIB : 6 * 512 * KIB + 10] = b"one sector"
    assert content(path) == expected


def test_place_that_fits_only_unaligned_is_left_alone(tmp_path: Path) -> None:
    """Qemu puts blocks end to end: one that is given back leaves no room for one with its data on 4 KiB."""
    data = random_bytes(512 * KIB, seed=5)
    blocks = dict.fromkeys(range(3), (b"\xff" * 512, data))
    path = handmade(tmp_path / "a.vhd", size=2 * MIB, block_bytes=512 * KIB, blocks=blocks)
    with opened(path, writable=True) as disk:
        disk.write_zeroes(512 * KIB, 512 * KIB)
    with opened(path, writable=True) as disk:
        disk.write(b"\7" * (512 * KIB), 3 * 512 * KIB)
    assert content(path) == data + bytes(512 * KIB) + data + b"\7" * (512 * KIB)


def test_nothing_before_the_first_block_is_given_away(tmp_path: Path) -> None:
    """Between BAT and first block others keep what no specification names."""
    size = 6 * 512 * KIB
    path = handmade(
        tmp_path / "a.vhd",
        size=size,
        block_bytes=512 * KIB,
        blocks={0: (b"\xff" * 512, random_bytes(512 * KIB))},
        gap=MIB,
    )
    before = path.read_bytes()
    with opened(path, writable=True) as disk:
        disk.write(b"\1" * (size - MIB), MIB)
    assert path.read_bytes()[0x800 : 0x800 + MIB] == before[0x800 : 0x800 + MIB]


# ---- XenServer


def test_block_of_a_file_with_a_batmap_is_never_given_back(tmp_path: Path) -> None:
    footer = replace(FOOTER, creator_application=b"tap\0", creator_version=0x10003)
    data = random_bytes(512 * KIB, seed=6)
    for with_batmap in (True, False):
        path = handmade(
            tmp_path / f"{with_batmap}.vhd",
            size=MIB,
            block_bytes=512 * KIB,
            blocks={0: (b"\xff" * 512, data)},
            footer=footer,
            gap=1024,
        )
        if with_batmap:
            image = bytearray(path.read_bytes())
            header = BATMAP_HEADER.pack(cookie=b"tdbatmap", batmap_offset=0xA00, batmap_size=1)
            image[0x800:0xC00] = header + b"\x80".ljust(512, b"\0")
            path.write_bytes(image)
        before = path.read_bytes()
        with opened(path, writable=True) as disk:
            disk.write_zeroes(0, MIB)
        after = path.read_bytes()
        assert after[:0xC00] == before[:0xC00] if with_batmap else after[0x600:0x604] == b"\xff" * 4
        assert content(path) == bytes(MIB)


# ---- parents


def chain(folder: Path, depth: int, *, size: int = 4 * MIB) -> tuple[list[Path], bytearray]:
    """Make a chain whose members write over each other in part; return the paths, base first, and the content."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(depth)
    expected = bytearray(size)
    paths: list[Path] = []
    for number in range(depth):
        path = folder / f"disk {number}.vhd"
        more = {"parent": paths[-1]} if paths else {"type": "fixed"}
        block_bytes = rng.choice([512 * KIB, 2 * MIB]) if paths else None
        created(path, size, block_bytes=block_bytes, **more)
        with opened(path, writable=True) as disk:
            for _ in range(6):
                length = rng.randrange(1, 40_000)
                offset = rng.randrange(size - length)
                data = bytes(length) if rng.random() < 0.3 else rng.randbytes(length)
                disk.write(data, offset)
                expected[offset : offset + length] = data
            disk.write_zeroes(number * 300 * KIB, 100 * KIB)
            expected[number * 300 * KIB : number * 300 * KIB + 100 * KIB] = bytes(100 * KIB)
        paths.append(path)
    return paths, expected


def test_chain_of_any_depth_reads_from_all_its_members(tmp_path: Path) -> None:
    paths, expected = chain(tmp_path, 7)
    before = [path.read_bytes() for path in paths[:-1]]
    assert content(paths[-1]) == expected
    with opened(paths[-1], writable=True) as disk:
        assert disk.info().type == "differencing"
        assert disk.info().parent == str(paths[-2])
        disk.write(b"top", 2 * MIB)
    expected[2 * MIB : 2 * MIB + 3] = b"top"
    assert content(paths[-1]) == expected
    assert [path.read_bytes() for path in paths[:-1]] == before


def test_moved_chain_is_found_by_its_relative_names(tmp_path: Path) -> None:
    paths, expected = chain(tmp_path / "here", 3)
    (tmp_path / "here").rename(tmp_path / "there")
    assert content(tmp_path / "there" / paths[-1].name) == expected


def test_parent_in_another_folder_is_found_by_either_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base = created(tmp_path / "a" / "b\u00e4se.vhd", MIB)
    with opened(base, writable=True) as disk:
        disk.write(b"base", 0)
    child = created(tmp_path / "b" / "child.vhd", parent=base)
    assert content(child)[:4] == b"base"
    moved = tmp_path / "child.vhd"  # the relative name leads nowhere from here
    child.rename(moved)
    assert content(moved)[:4] == b"base"
    header = unpack_dynamic_header(moved.read_bytes()[512:1536], file_offset=512)
    assert header.parent_name == base.name
    assert [entry.platform_code for entry in header.locators[:3]] == [b"W2ku", b"W2ru", bytes(4)]
    base.unlink()
    with pytest.raises(ParentMissing, match=r"\.\.\\\\a"):
        opened(moved)


def test_child_may_be_longer_or_shorter_than_its_parent(tmp_path: Path) -> None:
    base = created(tmp_path / "base.vhd", MIB)
    with opened(base, writable=True) as disk:
        disk.write(b"\1" * MIB, 0)
    longer = created(tmp_path / "longer.vhd", 3 * MIB + 512, parent=base)
    shorter = created(tmp_path / "shorter.vhd", 512 * KIB, parent=base)
    assert content(longer) == b"\1" * MIB + bytes(2 * MIB + 512)
    assert content(shorter) == b"\1" * (512 * KIB)
    with opened(longer, writable=True) as disk:
        disk.write(b"\2" * 1024, MIB - 512)
    assert content(longer) == b"\1" * (MIB - 512) + b"\2" * 1024 + bytes(2 * MIB)


def test_another_vhd_under_the_name_of_the_parent_is_refused(tmp_path: Path) -> None:
    base = created(tmp_path / "base.vhd", MIB)
    child = created(tmp_path / "child.vhd", parent=base)
    other = created(tmp_path / "other one.vhd", MIB)
    other.replace(base)
    with pytest.raises(ParentMismatch) as caught:
        opened(child)
    assert caught.value.path == base
    assert caught.value.field == "parent_unique_id"
    assert caught.value.hint


def test_parent_of_another_format_is_refused(tmp_path: Path) -> None:
    vhdx, raw = tmp_path / "a.vhdx", tmp_path / "a.raw"
    create_disk(OS_FILES, vhdx, virtual_bytes=MIB, clock=FakeClock())
    create_disk(OS_FILES, raw, virtual_bytes=MIB, format="raw", clock=FakeClock())
    base = created(tmp_path / "base.vhd", MIB)
    child = created(tmp_path / "child.vhd", parent=base)
    for other in (vhdx, raw):
        with pytest.raises(ParentMismatch):
            opened(child, parent=other)
        with pytest.raises(ParentMismatch, match="must be a VHD"):
            created(tmp_path / "new.vhd", parent=other)
        assert not (tmp_path / "new.vhd").exists()


def test_raw_parent_of_xenserver_is_believed_only_beside_its_child(tmp_path: Path) -> None:
    base = created(tmp_path / "base.raw", MIB)
    child = created(tmp_path / "child.vhd", parent=base)
    image = bytearray(child.read_bytes())
    header = unpack_dynamic_header(image[512:1536], file_offset=512)
    image[512:1536] = replace(header, parent_unique_id=type(FOOTER.unique_id)(int=0)).pack()
    child.write_bytes(image)
    with pytest.raises(ParentMismatch):
        opened(child)
    base.write_bytes(b"raw!" + bytes(MIB - 4))
    assert content(child)[:4] == b"raw!"
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "base.raw"
    base.rename(other)
    with pytest.raises(ParentMismatch, match="beside its child"):
        opened(child, parent=other)


def test_damaged_locator_does_not_hide_what_others_name(tmp_path: Path) -> None:
    base = created(tmp_path / "base.vhd", MIB)
    child = created(tmp_path / "child.vhd", parent=base)
    image = bytearray(child.read_bytes())
    header = unpack_dynamic_header(image[512:1536], file_offset=512)
    entries = [replace(entry, platform_data_offset=1 << 60) for entry in header.locators[:2]]
    for good in range(3):
        locators = [*entries, *header.locators[2:]]
        if good < 2:
            locators[good] = header.locators[good]
        image[512:1536] = replace(header, locators=tuple(locators)).pack()
        child.write_bytes(image)
        assert content(child) == bytes(MIB)  # good 2: by the header's own name, beside the child


# ---- new disks


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"size": 1000},
        {"size": VIRTUAL_BYTES_MAX + 512},
        {"size": MIB, "block_bytes": MIB},
        {"size": MIB, "block_bytes": 256},
        {"size": MIB, "logical_sector_bytes": 4096},
    ],
)
def test_what_a_vhd_cannot_be_is_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        created(tmp_path / "a.vhd", **arguments)
    assert caught.value.field
    assert not list(tmp_path.iterdir())


def test_new_disk_looks_like_one_of_windows(tmp_path: Path) -> None:
    path = created(tmp_path / "a.vhd", 40 * MIB)
    image = path.read_bytes()
    assert len(image) == 0x1000
    assert image[:512] == image[-512:]
    footer = unpack_footer(image[:512], file_offset=0)
    assert (footer.creator_application, footer.creator_host_os) == (b"win ", b"Wi2k")
    assert (footer.cylinders, footer.heads, footer.sectors_per_track) == (963, 5, 17)
    header = unpack_dynamic_header(image[512:1536], file_offset=512)
    assert (header.table_offset, header.max_table_entries, header.block_size) == (0x600, 20, 2 * MIB)
    assert image[0x600:0x800] == b"\xff" * 512
    with opened(path, writable=True) as disk:
        disk.write(b"\1" * (6 * MIB), 0)
    offsets = unpack_bat(path.read_bytes()[0x600:], 3)
    assert offsets.tolist() == [0xE00, 0x201E00, 0x402E00]


def test_fixed_disk_keeps_its_footer_whatever_is_written(tmp_path: Path) -> None:
    path = created(tmp_path / "a.vhd", MIB + 512, type="fixed")
    footer = path.read_bytes()[-512:]
    with opened(path, writable=True) as disk:
        disk.write(b"\1" * (MIB + 512), 0)
        disk.write_zeroes(512, MIB)
        with pytest.raises(FieldOutOfRange):
            disk.write(b"x", MIB + 512)
        info = disk.info()
    assert (info.type, info.virtual_bytes, info.file_bytes) == ("fixed", MIB + 512, MIB + 1024)
    assert info.creator == "win 10.0"
    assert path.read_bytes() == b"\1" * 512 + bytes(MIB) + footer
    assert unpack_footer(footer, file_offset=0).data_offset == NO_DATA_OFFSET


@pytest.mark.parametrize(
    ("block_bytes", "size", "bitmap", "full"),
    [
        (512 * KIB, MIB, b"\xff" * 128, True),
        (512 * KIB, MIB, b"\xff" * 127 + b"\xfe", False),
        (512 * KIB, 512 * KIB + 1024, b"\xc0", True),  # of the last block what the disk has
        (512 * KIB, 512 * KIB + 1536, b"\xc0", False),
        (1024, 2048, b"\xc0", True),
        (1024, 2048, b"\x80", False),
        (1024, 1536, b"\x80", True),
    ],
)
def test_block_is_present_where_all_its_sectors_count(
    tmp_path: Path, block_bytes: int, size: int, bitmap: bytes, *, full: bool
) -> None:
    blocks = {1: (bitmap.ljust(512, b"\0"), bytes(block_bytes))}
    path = handmade(tmp_path / "a.vhd", size=size, block_bytes=block_bytes, blocks=blocks)
    with OS_FILES.open(path) as file:
        table = VhdTable(file, read_image(file, read_footer(file)))
        assert table.placed(np.array([0, 1])).tolist() == [False, True]
        table.ensure_checked(np.array([0, 1]))
        assert table.present(np.array([0, 1])).tolist() == [False, full]


def test_many_blocks_have_their_bitmaps_read_when_they_are_used(tmp_path: Path) -> None:
    """Full bitmaps are found in batches, and one in the middle that is not full is seen."""
    block_bytes = 4 * KIB
    full, part = b"\xff" * 512, b"\x80".ljust(512, b"\0")
    blocks = {n: (part if n == 2500 else full, bytes([n % 255 + 1]) * block_bytes) for n in range(3000)}
    path = handmade(tmp_path / "a.vhd", size=3000 * block_bytes, block_bytes=block_bytes, blocks=blocks)
    expected = b"".join(data for _, data in blocks.values())
    at = 2500 * block_bytes + 512
    expected = expected[:at] + bytes(block_bytes - 512) + expected[at + block_bytes - 512 :]
    assert content(path) == expected
    with opened(path) as disk:
        assert sum(entry.length for entry in disk.stretches(0, disk.virtual_bytes)) == disk.virtual_bytes
        rows = disk.extents(0, disk.virtual_bytes)
    assert int(rows[:, 1].sum()) >= len(expected) - block_bytes


# ---- anything


def test_mutated_structures_give_a_value_or_a_refusal(seed: int) -> None:
    """Random damage to footers, header, BAT, locators and bitmaps: opened, read and written, or refused."""
    path, base = Path("/vm/disk.vhd"), Path("/vm/base.vhd")
    files = FaultFiles("/vm")
    clock = FakeClock()
    create_disk(files, base, virtual_bytes=2 * MIB, format="vhd", block_bytes=512 * KIB, clock=clock)
    create_disk(files, path, format="vhd", block_bytes=512 * KIB, parent=base, clock=clock)
    with open_disk(files, path, writable=True, clock=clock) as disk:
        disk.write(b"\1" * MIB, 0)
        disk.write(b"\2" * 4096, MIB + 8192)
    good = files.content_of(path)
    parent = files.content_of(base)
    place = int(unpack_bat(good[0x600:], 1)[0])
    areas = ((0, 90), (512, 100), (512 + 576, 60), (0x600, 16), (0x800, 64), (place, 512))
    areas += ((len(good) - 512, 90),)
    rng = random.Random(seed)
    refused = opened_count = 0
    for _ in range(400):
        image = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            start, length = rng.choice(areas)
            at = start + rng.randrange(length)
            image[at] = rng.choice([0, 0xFF, image[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
        if rng.random() < 0.7:
            _make_sums_right(image)
        if rng.random() < 0.1:
            del image[rng.randrange(len(image)) :]
        world = FaultFiles("/vm")
        world.load(path, bytes(image))
        world.load(base, parent)
        for writable in (False, True):
            try:
                with open_disk(world, path, writable=writable, format="vhd", clock=clock) as disk:
                    disk.read_into(bytearray(min(disk.virtual_bytes, MIB)), 0)
                    disk.extents(0, min(disk.virtual_bytes, 1 << 30))
                    if writable:
                        disk.write(b"\2" * 512, 0)
                        disk.write_zeroes(0, min(disk.virtual_bytes, 8 * MIB))
                opened_count += 1
            except HvReplicaError as error:
                refused += 1
                assert error.path in {path, base}
                assert isinstance(error, FormatError | ParentMismatch | ParentMissing)
    assert refused > 100
    assert opened_count > 100


def _make_sums_right(image: bytearray) -> None:
    for at in (0, len(image) - 512):
        if image[at : at + 8] == b"conectix":
            image[at : at + 512] = unpack_footer(image[at : at + 512], file_offset=at).pack()
    if image[512:520] == b"cxsparse":
        image[512:1536] = unpack_dynamic_header(image[512:1536], file_offset=512).pack()
