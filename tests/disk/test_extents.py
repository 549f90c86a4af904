"""Extent arithmetic against sets of bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.disk.extents import (
    batches,
    checked_rows,
    cut_at_blocks,
    merge,
    select_runs,
    touched_blocks,
    union,
    widened,
)
from hvreplica.errors import FieldOutOfRange

PATH = Path("/x")
rows_of = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), max_size=12).map(
    lambda rows: np.array(rows, np.int64).reshape(-1, 2)
)


def covered(rows: np.ndarray) -> set[int]:
    return {at for offset, length in rows.tolist() for at in range(offset, offset + length)}


def byte_list(rows: np.ndarray) -> list[int]:
    return [at for offset, length in rows.tolist() for at in range(offset, offset + length)]


def assert_tidy(rows: np.ndarray) -> None:
    assert (rows[:, 1] > 0).all()
    assert (rows[1:, 0] > rows[:-1].sum(axis=1)).all()


@given(rows_of, rows_of)
def test_union_covers_both_and_is_sorted_and_disjoint(a: np.ndarray, b: np.ndarray) -> None:
    result = union(a, b)
    assert covered(result) == covered(a) | covered(b)
    assert_tidy(result)
    assert (merge(result) == result).all()


@given(rows_of, st.integers(1, 50))
def test_pieces_keep_order_bytes_and_block(rows: np.ndarray, block_bytes: int) -> None:
    pieces = cut_at_blocks(rows, block_bytes)
    table = np.column_stack((pieces.disk_offset, pieces.length))
    assert byte_list(table) == byte_list(rows)
    assert (pieces.data_offset == np.cumsum(pieces.length) - pieces.length).all()
    assert (pieces.disk_offset // block_bytes == pieces.block).all()
    assert ((pieces.disk_offset + pieces.length - 1) // block_bytes == pieces.block).all()
    some = rows[rows[:, 1] > 0]
    assert set(touched_blocks(some, block_bytes).tolist()) == set(pieces.block.tolist())


@given(rows_of, st.integers(1, 60))
def test_batches_keep_the_bytes_and_the_bound(rows: np.ndarray, batch_bytes: int) -> None:
    groups = list(batches(rows, batch_bytes))
    assert byte_list(np.concatenate([rows[:0], *groups])) == byte_list(rows)
    assert all(0 < group[:, 1].sum() <= batch_bytes for group in groups)


@given(rows_of, st.data())
def test_selected_runs_are_the_bytes_at_those_places(rows: np.ndarray, data: st.DataObject) -> None:
    everything = byte_list(rows)
    flags = data.draw(st.lists(st.booleans(), min_size=len(everything), max_size=len(everything)))
    places = [index for index, flag in enumerate(flags) if flag]
    if not places:
        return
    runs = merge(np.array([[place, 1] for place in places], np.int64))
    assert byte_list(select_runs(rows, runs)) == [everything[place] for place in places]


@given(rows_of)
def test_widened_covers_and_stays_inside(rows: np.ndarray) -> None:
    result = widened(rows * 1000, start=0, end=130_001)
    assert (result.sum(axis=1) <= 130_001).all()
    for offset, length in (rows * 1000).tolist():
        if length:
            assert any(a <= offset and offset + length <= a + b for a, b in result.tolist())


@pytest.mark.parametrize(
    "row", [(-1, 5), (0, -1), (0, 101), (100, 1), (101, 0), (1 << 63 - 1, 5), ((1 << 63) - 1, (1 << 63) - 1)]
)
def test_rows_beyond_the_end_are_refused(row: tuple[int, int]) -> None:
    with pytest.raises(FieldOutOfRange):
        checked_rows(np.array([[0, 1], row], np.int64), virtual_bytes=100, path=PATH)


def test_rows_of_u64_beyond_63_bits_are_refused() -> None:
    with pytest.raises(FieldOutOfRange):
        checked_rows(np.array([[(1 << 64) - 5, 10]], np.uint64), virtual_bytes=100, path=PATH)
    for bad in (np.zeros((2, 3), np.int64), np.zeros((2, 2), np.int32), np.zeros((2, 2))):
        with pytest.raises(TypeError):
            checked_rows(bad, virtual_bytes=100, path=PATH)
