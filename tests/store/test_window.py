"""A window's numbers come from outside: every one is checked before it is used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import FieldOutOfRange
from hvreplica.store.window import gaps, validate_window, validated_extents

BIG = (1 << 63) - 1


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-512, 512),
        (0, 0),
        (0, -512),
        (0, 4608),
        (4096, 512),
        (3584, 1024),
        (1 << 63, 512),
        (512, 1 << 63),
        (BIG, BIG),
    ],
)
def test_window_outside_of_the_target_is_refused(offset: int, length: int) -> None:
    with pytest.raises(FieldOutOfRange, match="outside"):
        validate_window(offset, length, total_bytes=4096, grain_bytes=512)


@pytest.mark.parametrize(("offset", "length"), [(1, 511), (0, 100), (511, 1)])
def test_window_of_broken_sectors_is_refused(offset: int, length: int) -> None:
    with pytest.raises(FieldOutOfRange, match="whole sectors"):
        validate_window(offset, length, total_bytes=4096, grain_bytes=512)


@pytest.mark.parametrize(
    ("rows", "data_bytes"),
    [
        ([[0, 512]], 511),
        ([[0, 512]], 1024),
        ([[0, 0]], 0),
        ([[512, 512], [0, 512]], 1024),
        ([[0, 1024], [512, 512]], 1536),
        ([[0, 4608]], 4608),
        ([[4096, 512]], 512),
        ([], 512),
        ([[0, 1 << 62], [1 << 62, 1 << 62]], 0),
        ([[1 << 62, 1 << 62]], 0),
        ([[BIG, 512]], 512),
        ([[0, BIG]], 0),
        ([[-512, 512]], 512),
        ([[100, 512]], 512),
    ],
)
@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_extents_that_do_not_fit_are_refused(rows: list[list[int]], data_bytes: int, kind: type) -> None:
    table = np.array(rows, object).reshape(-1, 2).astype(np.int64).astype(kind)
    with pytest.raises(FieldOutOfRange):
        validated_extents(table, bytes(data_bytes), window_offset=0, window_bytes=4096, grain_bytes=512)


@pytest.mark.parametrize(
    "table", [np.zeros(4, np.int64), np.zeros((2, 3), np.int64), np.zeros((1, 2), np.float64)]
)
def test_extents_of_another_shape_are_refused(table: np.ndarray) -> None:
    with pytest.raises(FieldOutOfRange, match="no table"):
        validated_extents(table, b"", window_offset=0, window_bytes=4096, grain_bytes=512)


@given(st.lists(st.integers(0, 15), unique=True, max_size=16))
def test_gaps_are_what_extents_leave(sectors: list[int]) -> None:
    table = np.array([[1024 + sector * 512, 512] for sector in sorted(sectors)], np.uint64).reshape(-1, 2)
    window = {"window_offset": 1024, "window_bytes": 8192}
    checked = validated_extents(table, bytes(512 * len(sectors)), **window, grain_bytes=512)
    left = {
        byte
        for start, length in gaps(checked, **window).tolist()
        for byte in range(start, start + length, 512)
    }
    assert left == {1024 + sector * 512 for sector in range(16) if sector not in sectors}
