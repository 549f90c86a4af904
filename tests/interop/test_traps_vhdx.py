"""The traps of VHDX between programs, one test each where no other test shows it; docs/formats/traps.md lists them.

Images are those of other programs where one shows the trap, and else images of qemu or ours with single fields
changed, their checksums set right again.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import FormatError, ParentMismatch, Truncated, UnsupportedVersion
from hvreplica.files import OS_FILES
from hvreplica.units import GIB, KIB, MIB
from tests.support.edit import (
    FILE_PARAMETERS,
    LOGICAL_SECTOR_SIZE,
    add_metadata,
    add_region,
    bat_entry,
    current_header,
    header_field,
    little,
    log_place,
    metadata_item,
    peek,
    poke,
    replace_in_locator,
    set_bat_entry,
    set_header,
)
from tests.support.images import Content, Nz4k, disk_content, file_content
from tests.support.matrix import OURS, QEMU_MADE, Made, QemuRecipe
from tests.support.specimens import expected_content, unpack_family

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.specimens import Shelf

UNKNOWN = uuid.UUID(int=0x1234_5678_9ABC_DEF0)
NEEDED = uuid.UUID(int=0x0FED_CBA9)  # like the item that marks a disk as not yet whole
FAT_CHILD, FAT_PARENT = "dfvfs/fat-differential.vhdx.bz2", "fat-parent.vhdx"
DATA, BLOCK = 6, MIB  # state FULLY PRESENT; block size of `small`


@pytest.fixture
def small(tmp_path: Path) -> Made:
    """Return a clean dynamic VHDX of qemu with four blocks of data."""
    return QemuRecipe(
        name="small.vhdx",
        size=8 * MIB,
        options="block_size=1M",
        writes=((0, MIB, "A"), (3 * MIB, 3 * MIB, "B")),
    ).make(tmp_path)


def ours(name: str, folder: Path) -> Made:
    return next(recipe for recipe in OURS if recipe.name == name).make(folder)


def content_of(path: Path) -> Content:
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        return disk_content(disk)


def change(path: Path) -> None:
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"x" * 512, 7 * MIB)
        disk.write_zeroes(4 * MIB, MIB)


def test_header_with_a_bad_sum_does_not_count_though_its_number_is_larger(small: Made) -> None:
    older = 1 - current_header(small.path)
    set_header(small.path, older, 8, (1 << 40).to_bytes(8, "little"))
    set_header(small.path, older, 72, (1 << 40).to_bytes(8, "little"))  # a log far beyond the end
    poke(small.path, (64 << 10) * (1 + older) + 4, b"\0\0\0\0")
    assert content_of(small.path) == small.truth.content()


def test_equal_sequence_numbers_mean_the_first_header(small: Made) -> None:
    for index in (0, 1):
        set_header(small.path, index, 8, (1).to_bytes(8, "little"))
    set_header(
        small.path, 1, 72, (1 << 40).to_bytes(8, "little")
    )  # a log beyond the end: this one would not open
    assert content_of(small.path) == small.truth.content()
    change(small.path)
    assert header_field(small.path, 0, 8, 8) != header_field(small.path, 1, 8, 8)


def test_rest_of_a_header_slot_and_one_region_table_may_be_anything(small: Made) -> None:
    for place in (64 * KIB, 128 * KIB):
        poke(small.path, place + 4096, b"\xaa" * (60 * KIB))
    poke(small.path, 192 * KIB, b"\xaa" * 100)
    assert content_of(small.path) == small.truth.content()
    change(small.path)


@pytest.mark.parametrize("what", ["region", "metadata"])
def test_unknown_optional_part_is_kept_byte_for_byte(small: Made, what: str) -> None:
    octets = b"theirs" * 1000
    if what == "region":
        offset = add_region(small.path, UNKNOWN, octets, required=False)
    else:
        offset = add_metadata(small.path, UNKNOWN, octets, flags=0)
    assert content_of(small.path) == small.truth.content()
    with open_disk(OS_FILES, small.path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"x" * (8 * MIB), 0)
        disk.flush()
        disk.write_zeroes(0, 8 * MIB)
    assert peek(small.path, offset, len(octets)) == octets
    with open_disk(OS_FILES, small.path, clock=SYSTEM) as disk:
        assert disk_content(disk) == Content(8 * MIB, Nz4k().hexdigest())


@pytest.mark.parametrize("what", ["region", "metadata"])
@pytest.mark.parametrize("writable", [False, True])
def test_unknown_required_part_is_refused(small: Made, what: str, *, writable: bool) -> None:
    if what == "region":
        add_region(small.path, UNKNOWN, b"", required=True)
    else:
        add_metadata(small.path, NEEDED, b"\1\0\0\0", flags=4)
    before = file_content(small.path)
    with pytest.raises(UnsupportedVersion) as caught:
        open_disk(OS_FILES, small.path, writable=writable, clock=SYSTEM)
    assert str(UNKNOWN if what == "region" else NEEDED) in str(caught.value)
    assert file_content(small.path) == before


def test_metadata_item_without_bytes_has_no_place(small: Made) -> None:
    add_metadata(small.path, UNKNOWN, b"", flags=1)
    assert content_of(small.path) == small.truth.content()


@pytest.mark.parametrize(
    ("octets", "text"),
    [(bytes(512), ""), ("d2v".encode("utf-16-le").ljust(512, b"\0"), "d2v"), (b"\xff\xdf" * 256, None)],
)
def test_creator_is_free_text(small: Made, octets: bytes, text: str | None) -> None:
    poke(small.path, 8, octets)
    with open_disk(OS_FILES, small.path, clock=SYSTEM) as disk:
        assert disk_content(disk) == small.truth.content()
        assert text is None or disk.info().creator == text


def test_child_has_the_disk_id_of_its_parent(tmp_path: Path, shelf: Shelf) -> None:
    with open_disk(OS_FILES, shelf.image(FAT_CHILD), clock=SYSTEM) as disk:
        assert disk.parent is not None
        assert disk.info().disk_id == disk.parent.info().disk_id
    made = ours("child.vhdx", tmp_path)
    with open_disk(OS_FILES, made.path, clock=SYSTEM) as disk:
        assert disk.parent is not None
        assert disk.info().disk_id == disk.parent.info().disk_id
        assert disk.info().data_write_guid != disk.parent.info().data_write_guid


@pytest.mark.parametrize("state", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("file_mib", [0, 5, 1 << 40])
def test_states_without_data_read_as_zeros_wherever_they_point(
    small: Made, state: int, file_mib: int
) -> None:
    assert bat_entry(small.path, 4) & 7 == DATA
    set_bat_entry(small.path, 4, state | (file_mib << 20))
    small.truth.apply((4 * MIB, MIB, "=zero"))
    assert content_of(small.path) == small.truth.content()


def test_we_write_no_place_beside_a_state_that_means_zeros(small: Made) -> None:
    with open_disk(OS_FILES, small.path, writable=True, clock=SYSTEM) as disk:
        disk.write_zeroes(3 * MIB, 2 * MIB)
        disk.flush()
    for index in (3, 4):
        assert bat_entry(small.path, index) & 7 != DATA
        assert bat_entry(small.path, index) >> 20 == 0


def test_garbage_in_bitmap_entries_of_a_whole_disk_does_not_matter(tmp_path: Path) -> None:
    """Versions of qemu left such: the entries between chunks mean nothing where no parent is."""
    made = next(recipe for recipe in QEMU_MADE if recipe.name == "chunk-256m.vhdx").make(tmp_path)
    for entry in (DATA | (4 << 20), 7 | (1 << 40), 4, 0xFFFF_FFFF_FFFF_FFFF):
        set_bat_entry(made.path, 16, entry)
        assert content_of(made.path) == made.truth.content()
    change(made.path)


def test_block_beyond_the_end_of_the_file_is_told_and_not_read(small: Made) -> None:
    places = [
        bat_entry(small.path, index) >> 20 for index in range(8) if bat_entry(small.path, index) & 7 == DATA
    ]
    with small.path.open("r+b") as file:
        file.truncate(max(places) * MIB + 4096)
    with pytest.raises(Truncated) as caught:
        content_of(small.path)
    assert caught.value.path == small.path


def test_child_with_leave_blocks_allocated_still_has_its_parent(tmp_path: Path) -> None:
    name = "openvmm/om-d512-child.vhdx.bz2"
    path = unpack_family(name, tmp_path)
    offset, _ = metadata_item(path, FILE_PARAMETERS)
    poke(path, offset + 4, (little(path, offset + 4, 4) | 1).to_bytes(4, "little"))
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert disk.info().type == "differencing"
        assert disk_content(disk) == expected_content(name)


def test_partial_block_without_its_bitmap_is_refused(tmp_path: Path) -> None:
    path = unpack_family("openvmm/om-d512-child.vhdx.bz2", tmp_path)
    ratio = (1 << 23) * 512 // little(path, metadata_item(path, FILE_PARAMETERS)[0], 4)
    assert bat_entry(path, ratio) & 7 == DATA
    set_bat_entry(path, ratio, 0)
    with pytest.raises(FormatError) as caught:
        content_of(path)
    assert caught.value.path == path


def test_full_block_of_a_child_needs_no_bitmap(tmp_path: Path) -> None:
    """Bits of a block that is fully present mean nothing, whatever they are. Spec: [MS-VHDX] 2.5.1.1."""
    made = ours("child.vhdx", tmp_path)
    with open_disk(OS_FILES, made.path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"\x77" * (2 * MIB), 8 * MIB)
        disk.flush()
    whole = content_of(made.path)
    ratio = (1 << 23) * 512 // (2 * MIB)
    bitmap = bat_entry(made.path, ratio) >> 20 << 20
    assert bat_entry(made.path, 4) & 7 == DATA
    if bitmap:
        poke(made.path, bitmap + 8 * MIB // 512 // 8, bytes(2 * MIB // 512 // 8))
    assert content_of(made.path) == whole


@pytest.mark.parametrize("known", ["parent_linkage", "parent_linkage2", "neither"])
def test_either_linkage_names_the_parent_and_zeros_name_none(tmp_path: Path, known: str) -> None:
    path = unpack_family(FAT_CHILD, tmp_path)
    linkage, zeros = "{f88d4d92-6fcc-408d-9bef-9b7c89f15c89}", "{00000000-0000-0000-0000-000000000000}"
    if known != "parent_linkage":
        replace_in_locator(path, zeros, linkage if known == "parent_linkage2" else zeros)
        offset, length = metadata_item(path, uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"))
        octets = peek(path, offset, length)
        other = str(UNKNOWN)
        poke(path, offset, octets.replace(linkage.encode("utf-16-le"), f"{{{other}}}".encode("utf-16-le"), 1))
    if known == "neither":
        with pytest.raises(ParentMismatch) as caught:
            open_disk(OS_FILES, path, clock=SYSTEM)
        assert caught.value.hint
    else:
        assert content_of(path) == expected_content(FAT_CHILD)


def test_parent_of_other_sectors_is_refused_and_a_new_child_takes_its_parents(tmp_path: Path) -> None:
    made = ours("child of fixed.vhdx", tmp_path)
    parent = tmp_path / "base fixed.vhdx"
    poke(parent, metadata_item(parent, LOGICAL_SECTOR_SIZE)[0], (4096).to_bytes(4, "little"))
    with pytest.raises(ParentMismatch) as caught:
        open_disk(OS_FILES, made.path, clock=SYSTEM)
    assert (caught.value.field, caught.value.expected, caught.value.actual) == (
        "logical_sector_size",
        512,
        4096,
    )
    create_disk(
        OS_FILES,
        tmp_path / "new.vhdx",
        virtual_bytes=None,
        type="differencing",
        parent=parent,
        clock=SYSTEM,
    )
    with open_disk(OS_FILES, tmp_path / "new.vhdx", clock=SYSTEM) as disk:
        assert disk.logical_sector_bytes == 4096


def test_child_of_a_parent_that_was_written_is_refused(tmp_path: Path) -> None:
    made = ours("child.vhdx", tmp_path)
    with open_disk(OS_FILES, tmp_path / "base.vhdx", writable=True, clock=SYSTEM) as disk:
        disk.write(b"changed", 0)
    with pytest.raises(ParentMismatch) as caught:
        open_disk(OS_FILES, made.path, clock=SYSTEM)
    assert caught.value.hint


def test_log_of_a_parent_is_replayed_in_memory_alone(tmp_path: Path) -> None:
    made = next(recipe for recipe in QEMU_MADE if recipe.name == "dirty.vhdx").make(tmp_path)
    child = tmp_path / "child.vhdx"
    before = file_content(made.path)
    create_disk(
        OS_FILES,
        child,
        virtual_bytes=made.truth.virtual_bytes,
        type="differencing",
        parent=made.path,
        clock=SYSTEM,
    )
    with open_disk(OS_FILES, child, writable=True, clock=SYSTEM) as disk:
        assert disk_content(disk) == made.truth.content()
        disk.write(b"x" * 512, 0)
    assert file_content(made.path) == before


def test_file_shorter_than_its_log_says_is_refused(tmp_path: Path) -> None:
    """FlushedFileOffset of the head entry: what lay beyond was durable, and is gone. Spec: [MS-VHDX] 2.3.3."""
    made = next(recipe for recipe in QEMU_MADE if recipe.name == "dirty.vhdx").make(tmp_path)
    entry, _ = log_place(made.path)
    flushed = little(made.path, entry + 48, 8)
    assert peek(made.path, entry, 4) == b"loge"
    assert MIB < flushed <= made.path.stat().st_size
    with made.path.open("r+b") as file:
        file.truncate(flushed - MIB)
    for writable in (False, True):
        with pytest.raises(Truncated) as caught:
            open_disk(OS_FILES, made.path, writable=writable, clock=SYSTEM)
        assert caught.value.hint


def test_stale_log_entries_of_a_clean_file_are_not_replayed(tmp_path: Path) -> None:
    made = next(recipe for recipe in QEMU_MADE if recipe.name == "shuffle.vhdx").make(tmp_path)
    entry, length = log_place(made.path)
    assert b"loge" in peek(made.path, entry, length)
    with open_disk(OS_FILES, made.path, clock=SYSTEM) as disk:
        assert disk.info().log == "clean"
        assert disk_content(disk) == made.truth.content()


def test_disk_closed_by_us_needs_no_replay_by_windows(tmp_path: Path) -> None:
    path = tmp_path / "new.vhdx"
    create_disk(OS_FILES, path, virtual_bytes=GIB, clock=SYSTEM)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"x" * 512, 700 * MIB)
        disk.flush()
    for index in (0, 1):
        assert header_field(path, index, 48, 16) == 0
    assert path.stat().st_size % MIB == 0
