"""A file of ranges of one disk: what an old primary wrote after the last cut that its replica has.

    0    header, 64 bytes
    64   (disk_offset, length), two u64 each: ascending, apart from each other, within the disk

Also how such rows travel in a control message: the same 16 bytes each, without the header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.errors import BadSignature, ChecksumMismatch, FieldOutOfRange, Truncated, UnsupportedVersion
from hvreplica.formats.layout import Field, Layout

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

SIGNATURE = b"HVRRANGE"
VERSION = 1
ROW_BYTES = 16
RANGES_MAX = 1 << 22  # 64 MiB of them; more are joined to fewer, which covers some bytes too many
_DISK_BYTES_MAX = 64 << 40

HEADER = Layout(
    "range file header",
    spec="docs/formats/ranges.md",
    size=64,
    fields=(
        Field("signature", "8s", "HVRRANGE"),
        Field("version", "I", "1"),
        Field("checksum", "I", "CRC-32C over these 64 bytes with this field 0, and all rows"),
        Field("virtual_bytes", "Q", "the disk's size, in which the ranges lie"),
        Field("range_count", "Q", "how many rows follow, at most 4194304"),
        Field("disk_index", "I", "the disk's place in its VM"),
        Field("reserved", "28s", "0"),
    ),
)
LAYOUTS = (HEADER,)


def pack_ranges(rows: npt.NDArray[np.int64], *, disk_index: int, virtual_bytes: int) -> bytes:
    """Return the file with `rows`, int64 (n, 2), sorted and disjoint; joined to fewer where they are many."""
    rows = coarsened(rows, RANGES_MAX)
    body = pack_rows(rows)
    values = {
        "signature": SIGNATURE,
        "version": VERSION,
        "virtual_bytes": virtual_bytes,
        "range_count": len(rows),
        "disk_index": disk_index,
    }
    checksum = native.crc32c(HEADER.pack(**values) + body)
    return HEADER.pack(**values, checksum=checksum) + body


def unpack_ranges(buffer: Buffer, *, disk_index: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return the rows of a file and the size of its disk, wholly checked. Raises: FormatError."""
    values = HEADER.unpack(buffer)
    if values["signature"] != SIGNATURE:
        raise BadSignature(
            "not a file of ranges", field="signature", expected=SIGNATURE, actual=values["signature"]
        )
    if values["version"] != VERSION:
        raise UnsupportedVersion(
            "unknown version of a file of ranges",
            field="version",
            expected=VERSION,
            actual=values["version"],
            hint="use the hvreplica that wrote it",
        )
    count, virtual_bytes = values["range_count"], values["virtual_bytes"]
    _require("range_count", count, 0, RANGES_MAX)
    _require("virtual_bytes", virtual_bytes, 512, _DISK_BYTES_MAX)
    body = memoryview(buffer)[HEADER.size :]
    if body.nbytes < count * ROW_BYTES:
        raise Truncated(
            "a file of ranges is too short",
            expected=HEADER.size + count * ROW_BYTES,
            actual=HEADER.size + body.nbytes,
        )
    body = body[: count * ROW_BYTES]
    stored = values.pop("checksum")
    computed = native.crc32c(HEADER.pack(**values) + bytes(body))
    if stored != computed:
        raise ChecksumMismatch(
            "a file of ranges is damaged",
            field="checksum",
            expected=f"{computed:#010x}",
            actual=f"{stored:#010x}",
        )
    _require("disk_index", values["disk_index"], disk_index, disk_index)
    return unpack_rows(body, virtual_bytes=virtual_bytes), virtual_bytes


def pack_rows(rows: npt.NDArray[np.int64]) -> bytes:
    """Return the rows' bytes."""
    return np.ascontiguousarray(rows, "<u8").tobytes()


def unpack_rows(buffer: Buffer, *, virtual_bytes: int, start: int = 0) -> npt.NDArray[np.int64]:
    """Return rows of ranges, checked: ascending, disjoint, within [start, virtual_bytes).

    Raises: FieldOutOfRange.
    """
    view = memoryview(buffer)
    if view.nbytes % ROW_BYTES:
        raise FieldOutOfRange(
            "ranges are no whole rows",
            field="ranges",
            expected=f"a multiple of {ROW_BYTES} bytes",
            actual=view.nbytes,
        )
    rows = np.frombuffer(view, "<u8").reshape(-1, 2)
    if len(rows) and int(rows.max()) > _DISK_BYTES_MAX:
        raise FieldOutOfRange("a range is beyond every disk", field="ranges", actual=int(rows.max()))
    table = rows.astype(np.int64)
    ends = table[:, 0] + table[:, 1]
    is_sorted = bool((table[1:, 0] >= ends[:-1]).all() and (table[:, 1] > 0).all())
    if len(table) and not (is_sorted and table[0, 0] >= start and ends[-1] <= virtual_bytes):
        raise FieldOutOfRange(
            "ranges are not in order, or not within the disk",
            field="ranges",
            expected=f"ascending, from {start} to {virtual_bytes}",
        )
    return table


def coarsened(rows: npt.NDArray[np.int64], count_max: int) -> npt.NDArray[np.int64]:
    """Return at most `count_max` ranges that cover `rows`, sorted and disjoint: the nearest are joined."""
    if len(rows) <= count_max:
        return rows
    ends = rows[:, 0] + rows[:, 1]
    gaps = rows[1:, 0] - ends[:-1]
    kept = np.sort(np.argsort(gaps, kind="stable")[len(gaps) - count_max + 1 :])  # the widest gaps stay
    starts = rows[np.concatenate(([0], kept + 1)), 0]
    stops = ends[np.concatenate((kept, [len(rows) - 1]))]
    return np.column_stack((starts, stops - starts))


def _require(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise FieldOutOfRange(
            "the header of a file of ranges is not possible",
            offset=HEADER.offset_of(field),
            field=field,
            expected=low if low == high else f"{low} to {high}",
            actual=value,
        )
