"""A pressed undo part: a log in frames that are compressed one by one, with a table of them behind.

    0             header, 64 bytes
    64            the stored bytes of the frames, one after another
    table_offset  a row of 16 bytes for each frame

The frames follow each other in the log too, so a row says lengths alone: no two frames can overlap, none can
lie outside, and sums over the rows must end at log_bytes and table_offset exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.errors import BadSignature, ChecksumMismatch, FieldOutOfRange, Truncated, UnsupportedVersion
from hvreplica.formats.layout import GUID, Field, Layout

if TYPE_CHECKING:
    import uuid

    from numpy.typing import NDArray
    from typing_extensions import Buffer

SPEC = "docs/formats/pressed.md"
SIGNATURE = b"HVRPRESS"
VERSION = 1
ROW_BYTES = 16
FRAME_BYTES_MAX = 128 << 10  # what one random read may cost; bounds what a reader allocates for a frame
HOLE_BYTES_MAX = 1 << 30
FRAMES_MAX = 1 << 22  # a table of 64 MiB
LOG_BYTES_MAX = 1 << 48  # as far as an index of a point reaches


class FrameKind(IntEnum):
    """How the bytes of a frame are stored."""

    HOLE = 0
    PLAIN = 1
    ZSTD = 2


HEADER = Layout(
    "pressed part header",
    spec=SPEC,
    size=64,
    fields=(
        Field("signature", "8s", "HVRPRESS"),
        Field("version", "I", "1"),
        Field("checksum", "I", "CRC-32C over these 64 bytes with this field 0, and the table"),
        Field("part_id", GUID, "the part's id, also the UniqueId of the log"),
        Field("log_bytes", "Q", "length of the log, which is what the frames hold"),
        Field("table_offset", "Q", "where the table begins: behind the last frame"),
        Field("frame_count", "I", "rows of the table, 1 to 4194304; nothing follows them"),
        Field("reserved", "12s", "0"),
    ),
)
ROW = Layout(
    "frame of a pressed part",
    spec=SPEC,
    size=ROW_BYTES,
    fields=(
        Field("log_bytes", "I", "what it holds: 1 to 131072 bytes, of a hole up to 2^30"),
        Field("stored_bytes", "I", "hole: 0; plain: log_bytes; zstd: 1 to log_bytes - 1"),
        Field("checksum", "I", "CRC-32C of the stored bytes; 0 for a hole"),
        Field("kind", "I", "0: a hole, which reads as zeros; 1: plain; 2: one zstd frame"),
    ),
)
LAYOUTS = (HEADER, ROW)


@dataclass(frozen=True, slots=True, eq=False)
class FrameTable:
    """The frames of a part. starts, places: of frame i in the log and in the file; both end with the end.

    checksums: of what is stored. kinds: see FrameKind.
    """

    part_id: uuid.UUID
    starts: NDArray[np.int64]
    places: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    kinds: NDArray[np.uint32]

    @property
    def log_bytes(self) -> int:
        """The length of the log."""
        return int(self.starts[-1])


@dataclass(frozen=True, slots=True)
class PressedHeader:
    """The header, its own fields checked."""

    part_id: uuid.UUID
    log_bytes: int
    table_offset: int
    frame_count: int
    checksum: int

    @property
    def table_bytes(self) -> int:
        """The length of the table."""
        return self.frame_count * ROW_BYTES


def is_pressed(head: Buffer) -> bool:
    """Return whether a file that begins with `head`, at least 8 bytes, is a pressed part."""
    return bytes(memoryview(head)[: len(SIGNATURE)]) == SIGNATURE


def unpack_header(buffer: Buffer, *, file_bytes: int) -> PressedHeader:
    """Return the header; its table lies in a file of `file_bytes`. Raises: FormatError."""
    values = HEADER.unpack(buffer)
    if values["signature"] != SIGNATURE:
        raise BadSignature(
            "not a pressed undo part",
            field="signature",
            expected=SIGNATURE,
            actual=values["signature"],
            spec=SPEC,
        )
    if values["version"] != VERSION:
        raise UnsupportedVersion(
            "unknown version of a pressed undo part",
            field="version",
            expected=VERSION,
            actual=values["version"],
            hint="use the hvreplica that wrote it",
            spec=SPEC,
        )
    if any(values["reserved"]):
        _refuse("reserved", "zeros", values["reserved"])
    _require("frame_count", values["frame_count"], 1, FRAMES_MAX)
    _require("log_bytes", values["log_bytes"], 1, LOG_BYTES_MAX)
    end = values["table_offset"] + values["frame_count"] * ROW_BYTES
    if values["table_offset"] < HEADER.size or end != file_bytes:
        raise Truncated(
            "the table of a pressed undo part does not end where the file does",
            field="table_offset",
            offset=HEADER.offset_of("table_offset"),
            expected=file_bytes,
            actual=end,
            spec=SPEC,
        )
    return PressedHeader(
        values["part_id"],
        values["log_bytes"],
        values["table_offset"],
        values["frame_count"],
        values["checksum"],
    )


def unpack_table(header: PressedHeader, table: Buffer) -> FrameTable:
    """Return the table, wholly checked. table: header.table_bytes. Raises: FormatError."""
    computed = _checksum(header.part_id, header.log_bytes, header.table_offset, table)
    if computed != header.checksum:
        raise ChecksumMismatch(
            "header or table of a pressed undo part are damaged",
            field="checksum",
            offset=HEADER.offset_of("checksum"),
            expected=f"{computed:#010x}",
            actual=f"{header.checksum:#010x}",
            spec=SPEC,
        )
    rows = np.frombuffer(memoryview(table), "<u4").reshape(-1, 4)
    lengths, stored, kinds = (rows[:, column].astype(np.int64) for column in (0, 1, 3))
    is_hole, is_plain, is_zstd = (kinds == kind for kind in FrameKind)
    longest = np.where(is_hole, HOLE_BYTES_MAX, FRAME_BYTES_MAX)
    fits = (
        (is_hole & (stored == 0) & (rows[:, 2] == 0))
        | (is_plain & (stored == lengths))
        | (is_zstd & (stored > 0) & (stored < lengths))
    )
    bad = np.flatnonzero(~fits | (lengths < 1) | (lengths > longest))
    if len(bad):
        first = int(bad[0])
        raise FieldOutOfRange(
            "a frame of a pressed undo part is not possible",
            field="frame",
            offset=header.table_offset + first * ROW_BYTES,
            actual=rows[first].tolist(),
            spec=SPEC,
        )
    starts = np.concatenate(([0], np.cumsum(lengths)))
    places = np.concatenate(([0], np.cumsum(stored))) + HEADER.size
    for field, expected, actual in (
        ("log_bytes", header.log_bytes, int(starts[-1])),
        ("table_offset", header.table_offset, int(places[-1])),
    ):
        if expected != actual:
            _refuse(field, expected, actual)
    return FrameTable(header.part_id, starts, places, rows[:, 2].copy(), rows[:, 3].copy())


def pack_table(part_id: uuid.UUID, rows: Buffer) -> tuple[bytes, int]:
    """Return the header of a part with this table, and where the table begins.

    rows: of uint32, four for each frame, as ROW says.
    """
    table = np.frombuffer(memoryview(rows), np.uint32).reshape(-1, 4)
    log_bytes = int(table[:, 0].sum(dtype=np.int64))
    table_offset = HEADER.size + int(table[:, 1].sum(dtype=np.int64))
    checksum = _checksum(part_id, log_bytes, table_offset, rows)
    return _pack(part_id, log_bytes, table_offset, len(table), checksum), table_offset


def _checksum(part_id: uuid.UUID, log_bytes: int, table_offset: int, table: Buffer) -> int:
    count = memoryview(table).nbytes // ROW_BYTES
    return native.crc32c(table, native.crc32c(_pack(part_id, log_bytes, table_offset, count, 0)))


def _pack(part_id: uuid.UUID, log_bytes: int, table_offset: int, count: int, checksum: int) -> bytes:
    return HEADER.pack(
        signature=SIGNATURE,
        version=VERSION,
        checksum=checksum,
        part_id=part_id,
        log_bytes=log_bytes,
        table_offset=table_offset,
        frame_count=count,
    )


def _require(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        _refuse(field, f"{low} to {high}", value)


def _refuse(field: str, expected: object, actual: object) -> None:
    raise FieldOutOfRange(
        "the header of a pressed undo part is not possible",
        offset=HEADER.offset_of(field),
        field=field,
        expected=expected,
        actual=actual,
        spec=SPEC,
    )
