"""Sector bitmaps against a plain array of bits, in both bit orders, with pages that are and are not whole bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.disk.bitmaps import SectorBitmaps
from hvreplica.disk.extents import cut_at_blocks

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
