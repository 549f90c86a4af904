"""The times file beside a log (.hrt): when its entries came, and when the guest asked for flushes.

    0    header, 64 bytes
    64   ticks: (entries, time_us), two u64 each
         flushes: the same

A log's own entries carry whole seconds. Without this file, or with one that is damaged, nothing is lost but
the parts of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.errors import BadSignature, ChecksumMismatch, FieldOutOfRange, Truncated, UnsupportedVersion
from hvreplica.formats.layout import GUID, Field, Layout

if TYPE_CHECKING:
    import uuid
    from typing import Any

    import numpy.typing as npt
    from typing_extensions import Buffer

SIGNATURE = b"HVRTIMES"
VERSION = 1
ROW_BYTES = 16
TICKS_MAX = 32_768  # every 10 ms for 327 s of steady writes; with the flushes well below a control message
FLUSHES_MAX = 16_384
TIMES_BYTES_MAX = 64 + ROW_BYTES * (TICKS_MAX + FLUSHES_MAX)
SLOT_US_MIN = 1_000  # of what is written here
_SLOT_US_MAX = 10**15
_TIME_US_MAX = 1 << 62

HEADER = Layout(
    "times file header",
    spec="docs/formats/times.md",
    size=64,
    fields=(
        Field("signature", "8s", "HVRTIMES"),
        Field("version", "I", "1"),
        Field("checksum", "I", "CRC-32C over these 64 bytes with this field 0, and all rows"),
        Field("log_id", GUID, "UniqueId in the header of the log that it belongs to"),
        Field("entry_count", "Q", "the entries of that log"),
        Field("slot_us", "Q", "length of a tick's slot in microseconds: 1, 2, 10, 20, 100 and so on"),
        Field("ended_us", "Q", "the cut that ended the log; no row is later"),
        Field("tick_count", "I", "at most 32768"),
        Field("flush_count", "I", "at most 16384"),
    ),
)
LAYOUTS = (HEADER,)


@dataclass(frozen=True, slots=True)
class Times:
    """What a times file says. Times are Unix microseconds; rows are int64 (n, 2) of (entries, time_us).

    ticks: one for each slot of slot_us in which an entry came: how many came before this slot, and when the
    first of it did. flushes: how many entries had come when the guest asked for a flush.
    """

    log_id: uuid.UUID
    entry_count: int
    slot_us: int
    ended_us: int
    ticks: npt.NDArray[np.int64]
    flushes: npt.NDArray[np.int64]

    def entries_before(self, time_us: int) -> int:
        """Return how many entries are stamped before `time_us`, a multiple of slot_us."""
        place = int(np.searchsorted(self.ticks[:, 1], time_us))
        return int(self.ticks[place, 0]) if place < len(self.ticks) else self.entry_count

    def entries_at_flush(self, time_us: int) -> int:
        """Return how many entries came before the flush of this very time. Raises: KeyError without one."""
        place = int(np.searchsorted(self.flushes[:, 1], time_us))
        if place == len(self.flushes) or int(self.flushes[place, 1]) != time_us:
            raise KeyError(time_us)
        return int(self.flushes[place, 0])


def pack_times(times: Times) -> bytes:
    """Return the file. Raises: FormatError for what unpack_times() would not take."""
    body = b"".join(np.ascontiguousarray(rows, "<u8").tobytes() for rows in (times.ticks, times.flushes))
    values: dict[str, Any] = {
        "signature": SIGNATURE,
        "version": VERSION,
        "log_id": times.log_id,
        "entry_count": times.entry_count,
        "slot_us": times.slot_us,
        "ended_us": times.ended_us,
        "tick_count": len(times.ticks),
        "flush_count": len(times.flushes),
    }
    checksum = native.crc32c(HEADER.pack(**values) + body)
    packed = HEADER.pack(**values, checksum=checksum) + body
    unpack_times(packed, log_id=times.log_id)
    return packed


def unpack_times(buffer: Buffer, *, log_id: uuid.UUID) -> Times:
    """Return what a file says, wholly checked. log_id: of the log it stands beside. Raises: FormatError."""
    values = HEADER.unpack(buffer)
    _check_header(values)
    body = memoryview(buffer)[HEADER.size :]
    tick_bytes = values["tick_count"] * ROW_BYTES
    whole_bytes = tick_bytes + values["flush_count"] * ROW_BYTES
    if body.nbytes != whole_bytes:
        raise Truncated(
            "a times file has another length than its rows",
            expected=HEADER.size + whole_bytes,
            actual=HEADER.size + body.nbytes,
        )
    stored = values.pop("checksum")
    computed = native.crc32c(HEADER.pack(**values) + bytes(body))
    if stored != computed:
        raise ChecksumMismatch(
            "a times file is damaged",
            field="checksum",
            expected=f"{computed:#010x}",
            actual=f"{stored:#010x}",
        )
    if values["log_id"] != log_id:
        raise FieldOutOfRange(
            "a times file belongs to another log", field="log_id", expected=log_id, actual=values["log_id"]
        )
    times = Times(
        log_id=log_id,
        entry_count=values["entry_count"],
        slot_us=values["slot_us"],
        ended_us=values["ended_us"],
        ticks=_rows(body[:tick_bytes], "ticks", values),
        flushes=_rows(body[tick_bytes:], "flushes", values),
    )
    _check_ticks(times)
    _check_flushes(times)
    return times


def is_slot(slot_us: int) -> bool:
    """Return whether slots have this length at some time: 1, 2, 10, 20, 100 and so on."""
    if not 1 <= slot_us <= _SLOT_US_MAX:
        return False
    while slot_us % 10 == 0:
        slot_us //= 10
    return slot_us in {1, 2}


def _check_header(values: dict[str, Any]) -> None:
    if values["signature"] != SIGNATURE:
        raise BadSignature(
            "not a times file", field="signature", expected=SIGNATURE, actual=values["signature"]
        )
    if values["version"] != VERSION:
        raise UnsupportedVersion(
            "unknown version of a times file",
            field="version",
            expected=VERSION,
            actual=values["version"],
            hint="use the hvreplica that wrote it",
        )
    for field, least, most in (
        ("entry_count", 0, _TIME_US_MAX),
        ("ended_us", 0, _TIME_US_MAX),
        ("tick_count", 0, TICKS_MAX),
        ("flush_count", 0, FLUSHES_MAX),
    ):
        if not least <= values[field] <= most:
            raise FieldOutOfRange(
                "the header of a times file is not possible",
                offset=HEADER.offset_of(field),
                field=field,
                expected=f"{least} to {most}",
                actual=values[field],
            )
    if not is_slot(values["slot_us"]):
        raise FieldOutOfRange(
            "the header of a times file is not possible",
            offset=HEADER.offset_of("slot_us"),
            field="slot_us",
            expected="1, 2, 10, 20, 100 and so on",
            actual=values["slot_us"],
        )


def _rows(buffer: memoryview, what: str, values: dict[str, Any]) -> npt.NDArray[np.int64]:
    """Return rows, each within the log and not after its end."""
    rows = np.frombuffer(buffer, "<u8").reshape(-1, 2)
    limits = np.array([values["entry_count"], values["ended_us"]], np.uint64)
    _require(bool((rows <= limits).all()), what, f"at most {values['entry_count']} entries, until the cut")
    return rows.astype(np.int64)


def _check_ticks(times: Times) -> None:
    entries, slots = times.ticks[:, 0], times.ticks[:, 1] // times.slot_us
    is_first = len(entries) > 0 and int(entries[0]) == 0
    _require(is_first == (times.entry_count > 0), "ticks", "one for the first entry")
    rises = bool((np.diff(entries) > 0).all() and (np.diff(slots) > 0).all())
    _require(
        rises and bool((entries < max(times.entry_count, 1)).all()), "ticks", "ascending, each with entries"
    )


def _check_flushes(times: Times) -> None:
    entries, moments = times.flushes[:, 0], times.flushes[:, 1]
    rises = bool((np.diff(entries) >= 0).all() and (np.diff(moments) > 0).all())
    _require(rises, "flushes", "ascending")
    # A tick is the moment of one entry: it is in each later flush, and in none before.
    earlier = np.searchsorted(times.ticks[:, 1], moments)
    had = np.concatenate(([0], times.ticks[:, 0] + 1))[earlier]
    later = np.searchsorted(times.ticks[:, 1], moments, side="right")
    may = np.concatenate((times.ticks[:, 0], [times.entry_count]))[later]
    _require(bool(((had <= entries) & (entries <= may)).all()), "flushes", "in one order with the ticks")


def _require(holds: bool, what: str, rule: str) -> None:  # noqa: FBT001 - the condition itself
    if not holds:
        raise FieldOutOfRange(f"the {what} of a times file are not possible", field=what, expected=rule)
