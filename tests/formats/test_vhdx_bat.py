"""The BAT's arithmetic against the formulas of [MS-VHDX] 2.4 and 2.5, and what its entries may say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import FieldOutOfRange, FormatError, Overlap, Truncated
from hvreplica.formats.vhdx_bat import (
    BatGeometry,
    PayloadState,
    is_anchored,
    is_present,
    offsets_of,
    present_entry,
    validate_apart,
    validate_entries,
    validate_entries_within,
)
from hvreplica.units import MIB, TIB

sizes = st.integers(1, 64 * TIB // 4096).map(lambda sectors: sectors * 4096)
blocks = st.sampled_from([MIB << n for n in range(9)])


def test_states_have_the_numbers_of_the_specification() -> None:
    assert PayloadState.PAYLOAD_BLOCK_UNMAPPED == 3
    assert PayloadState.PAYLOAD_BLOCK_ZERO == 2
    assert PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT == 6


@pytest.mark.parametrize(
    ("block_bytes", "sector_bytes", "ratio"),
    [
        (MIB, 512, 4096),
        (2 * MIB, 512, 2048),
        (32 * MIB, 512, 128),
        (256 * MIB, 512, 16),
        (2 * MIB, 4096, 16384),
    ],
)
def test_chunk_ratio_is_that_of_the_specification(block_bytes: int, sector_bytes: int, ratio: int) -> None:
    geometry = BatGeometry.of(virtual_bytes=TIB, block_bytes=block_bytes, logical_sector_bytes=sector_bytes)
    assert geometry.chunk_ratio == ratio


@given(sizes, blocks, st.sampled_from([512, 4096]), st.data())
def test_every_block_has_an_entry_of_its_own(size: int, block: int, sector: int, data: st.DataObject) -> None:
    geometry = BatGeometry.of(virtual_bytes=size, block_bytes=block, logical_sector_bytes=sector)
    last = geometry.block_count - 1
    some = np.array([0, last, *data.draw(st.lists(st.integers(0, last), max_size=20))], np.int64)
    indices = geometry.index_of(some)
    assert indices.max() == geometry.entry_count - 1
    assert geometry.is_payload(indices).all()
    assert (geometry.block_of(indices) == some).all()
    assert not geometry.is_payload(np.array([geometry.entry_count, geometry.chunk_ratio])).any()


def entries(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def check(*values: int, size: int = 100 * MIB) -> None:
    table = entries(*values)
    indices = np.arange(len(table))
    validate_entries(table, file_offset=3 * MIB, indices=indices)
    validate_entries_within(
        table,
        file_offset=3 * MIB,
        indices=indices,
        block_bytes=2 * MIB,
        file_size_bytes=size,
        structures=[(0, MIB, "header section"), (10 * MIB, MIB, "log")],
    )


def test_states_without_data_may_point_anywhere() -> None:
    check(0, 1, 2, 3, 5, (1 << 63) | 3, (5 << 20) | 1, 0xFFFFFFFF_FFF00000)


@pytest.mark.parametrize(
    ("entry", "error", "field"),
    [
        (4, FieldOutOfRange, "state"),
        (7 | (20 << 20), FieldOutOfRange, "state"),
        (6 | (20 << 20) | 8, FieldOutOfRange, "reserved"),
        (6, Overlap, "file_offset_mb"),
        (6 | (9 << 20), Overlap, "file_offset_mb"),
        (6 | (10 << 20), Overlap, "file_offset_mb"),
        (6 | (99 << 20), Truncated, "file_offset_mb"),
        (6 | (1 << 63), Truncated, "file_offset_mb"),
        (6 | (0xFFFFFFFFFFF << 20), Truncated, "file_offset_mb"),
    ],
)
def test_entry_that_cannot_be_is_refused_at_its_place(
    entry: int, error: type[FormatError], field: str
) -> None:
    with pytest.raises(error) as caught:
        check(0, 6 | (20 << 20), entry)
    assert caught.value.field == field
    assert caught.value.offset == 3 * MIB + 16


@pytest.mark.parametrize("entry", [6 | (8 << 20), 6 | (11 << 20), 6 | (98 << 20), 6 | (1 << 20)])
def test_entry_next_to_a_structure_is_fine(entry: int) -> None:
    check(entry)


def test_blocks_on_one_place_are_seen() -> None:
    validate_apart(np.array([(0, 2), (2, 1), (3, 2), (5, 2)]) * MIB)
    for ranges in ([(4, 2), (4, 2)], [(4, 2), (5, 2)], [(4, 2), (5, 1)]):
        with pytest.raises(Overlap):
            validate_apart(np.array(ranges) * MIB)


def test_entries_are_made_and_read_alike() -> None:
    offsets = np.array([4, 1 << 23], np.int64) * MIB
    made = present_entry(offsets)
    assert is_present(made).all()
    assert (offsets_of(made) == offsets).all()
    assert is_anchored(entries(3, 3 | (4 << 20), 2 | (4 << 20), (4 << 20), 1 | (4 << 20))).tolist() == [
        False,
        True,
        False,
        False,
        True,
    ]
