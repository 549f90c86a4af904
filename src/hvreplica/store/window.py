"""Check a window of a transfer before any of its bytes is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.errors import FieldOutOfRange

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

OFFSET_MAX = (1 << 62) - 1


def validate_window(window_offset: int, window_bytes: int, *, total_bytes: int, grain_bytes: int) -> None:
    """Refuse a window outside of [0, total_bytes) or not in whole grains. Raises: FieldOutOfRange."""
    if not (0 <= window_offset < total_bytes and 0 < window_bytes <= total_bytes - window_offset):
        raise FieldOutOfRange(
            "a window lies outside of its target",
            field="window_offset",
            expected=f"within {total_bytes} bytes",
            actual=f"{window_offset}, {window_bytes} bytes long",
        )
    if window_offset % grain_bytes or window_bytes % grain_bytes:
        raise FieldOutOfRange(
            "a window does not consist of whole sectors",
            field="window_offset",
            expected=f"multiples of {grain_bytes}",
            actual=f"{window_offset}, {window_bytes} bytes long",
        )


def validated_extents(
    extents: NDArray[Any], data: Buffer, *, window_offset: int, window_bytes: int, grain_bytes: int
) -> NDArray[np.int64]:
    """Return `extents` as int64 (n, 2): sorted, apart, inside the window, as long together as `data`.

    window_offset and window_bytes were validated before. Raises: FieldOutOfRange.
    """
    table = np.asarray(extents)
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype.kind not in "iu":
        raise FieldOutOfRange("a window's extents are no table of offsets and lengths", field="extents")
    if len(table) and (table.min() < 0 or table.max() > OFFSET_MAX):
        raise FieldOutOfRange(
            "an extent is beyond every disk", field="extents", expected=f"0 to {OFFSET_MAX}"
        )
    table = np.ascontiguousarray(table, dtype=np.int64)
    data_bytes = memoryview(data).nbytes
    if not _fits(table, data_bytes, start=window_offset, end=window_offset + window_bytes):
        raise FieldOutOfRange(
            "a window's extents do not fit it or its data",
            field="extents",
            offset=window_offset,
            expected=f"sorted, within {window_bytes} bytes, {data_bytes} bytes together",
        )
    if (table % grain_bytes).any():
        raise FieldOutOfRange(
            "an extent does not consist of whole sectors",
            field="extents",
            expected=f"multiples of {grain_bytes}",
        )
    return table


def _fits(table: NDArray[np.int64], data_bytes: int, *, start: int, end: int) -> bool:
    """Return whether non-empty extents stand in order between start and end, and make up the data."""
    if not len(table):
        return data_bytes == 0
    ends = table[:, 0] + table[:, 1]  # below 2**63 by OFFSET_MAX
    in_order = (table[:, 1] > 0).all() and (table[1:, 0] >= ends[:-1]).all()
    if not (in_order and table[0, 0] >= start and ends[-1] <= end):
        return False
    return int(table[:, 1].sum()) == data_bytes  # cannot overflow: apart and inside, so at most end - start


def gaps(table: NDArray[np.int64], *, window_offset: int, window_bytes: int) -> NDArray[np.int64]:
    """Return the (offset, length) of the window that validated extents leave out: what must read as zeros."""
    starts = np.concatenate(([window_offset], table[:, 0] + table[:, 1]))
    ends = np.concatenate((table[:, 0], [window_offset + window_bytes]))
    rows = np.stack((starts, ends - starts), axis=1)
    return rows[rows[:, 1] > 0]
