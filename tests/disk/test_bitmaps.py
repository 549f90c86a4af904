"""Sector bitmaps against a plain array of bits, in both bit orders, with pages that are and are not whole bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvreplica.disk.bitmaps as module
from hvreplica.disk import map_disk, open_disk
from hvreplica.disk.bitmaps import SectorBitmaps
from hvreplica.disk.extents import Pieces, cut_at_blocks
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.support.disks import create_kind
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

SECTORS = 300
ranges = st.lists(st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 90)), max_size=8)


def make(page_sectors: int, *, msb_first: bool, sector_bytes: int = 512) -> SectorBitmaps:
    return SectorBitmaps(
        sector_bytes=sector_bytes,
        page_sectors=page_sectors,
        msb_first=msb_first,
        load=lambda _: np.zeros(-(-page_sectors // 8), np.uint8),
    )


@given(
    steps=st.lists(st.tuples(st.sampled_from(["mark", "clear", "mark all"]), ranges), max_size=6),
    page_sectors=st.sampled_from([4, 8, 64, 1024]),
    msb_first=st.booleans(),
)
def test_bits_are_those_of_a_plain_array(
    steps: list[tuple[str, list[tuple[int, int]]]], page_sectors: int, *, msb_first: bool
) -> None:
    bitmaps = make(page_sectors, msb_first=msb_first)
    model = np.zeros(SECTORS + 100, bool)
    for verb, rows in steps:
        for first, count in rows:
            model[first : first + count] = verb != "clear"
            if verb != "mark all":
                (bitmaps.mark if verb == "mark" else bitmaps.clear)(first, count)
        if verb == "mark all" and rows:
            columns = np.array(rows, np.int64)
            bitmaps.mark_all(columns[:, 0], columns[:, 1])
    assert (bitmaps.lookup(np.arange(len(model))) == model).all()
    for first, count in [
        (0, 1),
        (3, 9),
        (8, 16),
        (0, len(model)),
        *(row for _, rows in steps for row in rows),
    ]:
        assert bitmaps.all_set(first, count) == model[first : first + count].all()
        assert bitmaps.none_set(first, count) == (not model[first : first + count].any())
    octets = np.zeros(len(model) // page_sectors * page_sectors + page_sectors, bool)
    for number, page in bitmaps.take_dirty():
        bits = np.unpackbits(page, bitorder="big" if msb_first else "little")[:page_sectors]
        octets[number * page_sectors : (number + 1) * page_sectors] = bits
    assert (octets[: len(model)] == model).all()
    assert not bitmaps.take_dirty()


@given(
    rows=st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 30_000)), min_size=1, max_size=5),
    marked=ranges,
)
def test_pieces_are_cut_where_the_bit_changes(
    rows: list[tuple[int, int]], marked: list[tuple[int, int]]
) -> None:
    bitmaps = make(64, msb_first=False)
    model = np.zeros(1000, bool)
    for first, count in marked:
        bitmaps.mark(first, count)
        model[first : first + count] = True
    extents = np.array(rows, np.int64)
    parts, counts = bitmaps.split(cut_at_blocks(extents, 16384))
    octets = model.repeat(512)
    shown = np.zeros(int(extents[:, 1].sum()), bool)
    for offset, length, at, flag in zip(
        parts.disk_offset, parts.length, parts.data_offset, counts, strict=True
    ):
        assert (octets[offset : offset + length] == flag).all()
        shown[at : at + length] = flag
    assert (shown == np.concatenate([octets[offset : offset + length] for offset, length in rows])).all()


def test_clean_pages_are_dropped_and_changed_ones_kept() -> None:
    loads = []

    def load(page: int) -> np.ndarray:
        loads.append(page)
        return np.zeros(8, np.uint8)

    bitmaps = SectorBitmaps(sector_bytes=512, page_sectors=64, msb_first=False, load=load)
    bitmaps.mark(0, 1)
    for page in range(1, 20_000):
        bitmaps.lookup(np.array([page * 64]))
    assert len(bitmaps._pages) <= 5000
    assert bitmaps.lookup(np.array([0, 1])).tolist() == [True, False]
    assert loads.count(0) == 1
    assert [page for page, _ in bitmaps.take_dirty()] == [0]


def test_a_page_that_was_taken_is_not_loaded_again_before_it_is_written() -> None:
    bitmaps = make(64, msb_first=False)  # loads zeros: what the file has until the flush has written
    bitmaps.mark(0, 1)
    taken = bitmaps.take_dirty()
    for page in range(1, 10_000):
        bitmaps.lookup(np.array([page * 64]))
    assert bitmaps.lookup(np.array([0])).tolist() == [True]
    bitmaps.written()
    assert len(bitmaps._pages) <= 5000
    assert [page for page, _ in taken] == [0]


@pytest.mark.parametrize("kind", ["differencing", "vhd-differencing"])
def test_what_is_read_and_written_while_a_flush_is_on_its_way_meets_the_bits_of_that_flush(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads ask for more pages than are kept, before the flush has written those that it took."""
    monkeypatch.setattr(module, "_CLEAN_PAGE_COUNT_MAX", 4)
    path, step, count = tmp_path / "a", 16 * MIB, 8
    create_kind(OS_FILES, path, kind, virtual_bytes=count * step, clock=FakeClock())
    disk = open_disk(OS_FILES, path, writable=True, clock=FakeClock())
    file = disk._file
    sync = file.sync

    def shown(at: int) -> bytes:
        buffer = bytearray(4096)
        disk.read_into(buffer, at)
        return bytes(buffer)

    def sync_late() -> None:
        file.sync = sync
        assert [shown(at) for at in range(8192, count * step, step)] == [b"b" * 4096] * count
        for at in range(0, count * step, step):
            disk.write(b"c" * 4096, at + 16384)
        sync()

    for letter, place in ((b"a", 0), (b"b", 8192)):
        for at in range(0, count * step, step):
            disk.write(letter * 4096, at + place)
        if letter == b"a":
            disk.flush()
    file.sync = sync_late
    disk.flush()
    disk.close()
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        for letter, place in ((b"a", 0), (b"b", 8192), (b"c", 16384)):
            assert [shown(at) for at in range(place, count * step, step)] == [letter * 4096] * count


@pytest.mark.parametrize("kind", ["differencing", "vhd-differencing"])
def test_only_so_many_sectors_are_looked_at_together(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an image of a few MiB, in which every other sector counts, would take the memory of millions."""
    path, size = tmp_path / "a", 8 * MIB
    create_kind(OS_FILES, path, kind, virtual_bytes=size, clock=FakeClock())
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        offsets = np.arange(0, size, 64 * 1024)
        extents = np.column_stack((offsets, np.full(len(offsets), 512)))
        disk.write_extents(extents, b"a" * int(extents[:, 1].sum()))
        whole = disk.extents(0, size).tolist()
        tiles = list(map_disk(disk))
    monkeypatch.setattr("hvreplica.disk.block_reader._PARTIAL_BYTES_MAX", MIB)
    asked: list[int] = []
    split = SectorBitmaps.split

    def counted(self: SectorBitmaps, pieces: Pieces) -> tuple[Pieces, np.ndarray]:
        asked.append(int(pieces.length.sum()))
        return split(self, pieces)

    monkeypatch.setattr(SectorBitmaps, "split", counted)
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        assert disk.extents(0, size).tolist() == whole
        assert list(map_disk(disk)) == tiles
    assert max(asked) <= MIB
    assert sum(asked) >= size
