"""Replay of the VHDX's own log: find the active sequence, work out what it leaves, put it in or over a file.

A plan is worked out before anything is written: of all updates of one sector the newest wins, so the plan is
a set of zeroed ranges with data sectors on top. The same plan serves both ways:

- opened for writing: ReplayPlan.apply_to() writes it in place, grows the file and syncs; a crash in the
  middle is
  repaired by the next open, because the log is emptied only afterwards
- opened for reading: OverlayFile shows the file as it would be, and the file stays untouched

Spec: [MS-VHDX] 2.3.3.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk.extents import merge
from hvreplica.errors import FieldOutOfRange, FormatError, Truncated, UnsupportedVersion
from hvreplica.formats.vhdx_header import FILE_BYTES_MAX, HEADER_SECTION_BYTES
from hvreplica.formats.vhdx_log import (
    ENTRY_HEADER_BYTES,
    ENTRY_SIGNATURE,
    LOG_ENTRY_HEADER,
    LOG_SECTOR_BYTES,
    choose_active_sequence,
    raise_no_sequence,
    unpack_entry,
    unpack_entry_header,
)
from hvreplica.formats.vhdx_region import REGION_TABLE_BYTES, REGION_TABLE_OFFSETS
from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hvreplica.files import BlockFile
    from hvreplica.formats.vhdx_header import Header
    from hvreplica.formats.vhdx_log import LogEntryHeader, LogUpdates

_SCAN_WINDOW_BYTES = MIB
# What one active sequence may hold: logs of known writers have 1 MiB; the plan is kept in memory.
_REPLAY_BYTES_MAX = 256 * MIB
_REPLAY_DESCRIPTOR_COUNT_MAX = 1 << 20
_WRITABLE_HEADER_SECTION = (REGION_TABLE_OFFSETS[0], REGION_TABLE_OFFSETS[1] + REGION_TABLE_BYTES)


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What the active sequence leaves in the file.

    data_offsets: int64 (n,), sorted, unique. data: uint8 (n, 4096). zeros: int64 (m, 2) of (file_offset,
    length), sorted and disjoint, to be done before data. size_bytes: what the file must at least have
    afterwards.
    """

    data_offsets: NDArray[np.int64]
    data: NDArray[np.uint8]
    zeros: NDArray[np.int64]
    size_bytes: int

    def apply_to(self, file: BlockFile) -> None:
        """Write the plan in place and sync. Safe to repeat."""
        size = file.size()
        if self.size_bytes > size:
            file.resize(self.size_bytes)
        for file_offset, length in self.zeros.tolist():
            # What lies beyond the old end is zeros already.
            if file_offset < size:
                file.zero(file_offset, min(length, size - file_offset))
        for file_offset, sector in zip(self.data_offsets.tolist(), self.data, strict=True):
            file.write(sector.data, file_offset)
        file.sync()

    def touches_only(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return whether all changes lie inside of `ranges` of (file_offset, length)."""
        starts = np.concatenate((self.data_offsets, self.zeros[:, 0]))
        ends = np.concatenate((self.data_offsets + LOG_SECTOR_BYTES, self.zeros.sum(axis=1)))
        inside = np.zeros(len(starts), bool)
        for file_offset, length in ranges:
            inside |= (starts >= file_offset) & (ends <= file_offset + length)
        return bool(inside.all())


class LogScan(NamedTuple):
    """The entries of a ring that carry its header's LogGuid.

    valid: by their offset in the log. torn: the offsets of those that are not whole.
    """

    valid: dict[int, LogEntryHeader]
    torn: list[int]


def plan_replay(file: BlockFile, header: Header) -> ReplayPlan:
    """Return what the log of `header`, whose LogGuid is not zero, asks to be done.

    Raises: FormatError without a valid sequence; Truncated if the file is shorter than it was when the
    sequence was written; FieldOutOfRange for an update of what the log may not touch. Spec: [MS-VHDX] 2.3.3.
    """
    entries = scan_log(file, header).valid
    active = choose_active_sequence(entries, log_length=header.log_length)
    if not active:
        raise_no_sequence(log_offset=header.log_offset)
    head = active[-1]
    size = file.size()
    if size < head.flushed_file_offset:
        raise Truncated(
            "the file is shorter than it was when its own log was written",
            offset=header.log_offset + head.log_offset + LOG_ENTRY_HEADER.offset_of("flushed_file_offset"),
            field="flushed_file_offset",
            expected=f"at least {head.flushed_file_offset} bytes",
            actual=f"{size} bytes",
            spec="[MS-VHDX] 2.3.3",
            hint="the file was cut off; restore it from a copy",
        )
    _check_amount(active, header)
    updates = [_read_updates(file, header, entry) for entry in active]
    return _merge_updates(updates, header=header, last_file_offset=head.last_file_offset)


def _check_amount(active: Sequence[LogEntryHeader], header: Header) -> None:
    length = sum(entry.entry_length for entry in active)
    count = sum(entry.descriptor_count for entry in active)
    if length > _REPLAY_BYTES_MAX or count > _REPLAY_DESCRIPTOR_COUNT_MAX:
        raise UnsupportedVersion(
            "the file's own log holds more than can be replayed here",
            offset=header.log_offset,
            field="entry_length, descriptor_count",
            expected=f"at most {_REPLAY_BYTES_MAX} bytes in {_REPLAY_DESCRIPTOR_COUNT_MAX} descriptors",
            actual=f"{length} bytes in {count}",
            hint="attach and detach the disk once with the program that wrote it",
        )


def scan_log(file: BlockFile, header: Header) -> LogScan:
    """Return what stands in the ring of `header`, a log inside of `file`.

    Whatever the ring holds, this reads it about twice: inside an entry no other sector starts with the
    signature of one, so a claimed length that reaches over the next start is refused before the entry is
    read.
    """
    starts = _entry_starts(file, header)
    scan = LogScan({}, [])
    for position, log_offset in enumerate(starts):
        following = starts[(position + 1) % len(starts)]
        room = (following - log_offset) % header.log_length or header.log_length
        entry = None
        try:
            row = file.read(header.log_offset + log_offset, ENTRY_HEADER_BYTES)
            entry = unpack_entry_header(row, log_offset=log_offset)
            entry.validate(log_guid=header.log_guid, log_length=header.log_length)
            if entry.entry_length <= room:
                scan.valid[log_offset] = _read_updates(file, header, entry).header
                continue
        except FormatError:
            pass  # dead entries are a normal part of a ring
        if entry is not None and entry.log_guid == header.log_guid:
            scan.torn.append(log_offset)
    return scan


def _entry_starts(file: BlockFile, header: Header) -> list[int]:
    signature = int.from_bytes(ENTRY_SIGNATURE, "little")
    start, end = header.log_offset, header.log_offset + header.log_length
    found: list[int] = []
    for file_offset, length in file.data_extents(start, end):
        stop = file_offset + length
        position = max(start, file_offset // LOG_SECTOR_BYTES * LOG_SECTOR_BYTES)
        while position < stop:
            window = file.read(position, min(_SCAN_WINDOW_BYTES, end - position))
            words = np.frombuffer(window, "<u4").reshape(-1, LOG_SECTOR_BYTES // 4)[:, 0]
            sectors = np.flatnonzero(words == signature)
            found.extend((position - start + sectors * LOG_SECTOR_BYTES).tolist())
            position += len(window)
    return sorted(set(found))


def _read_updates(file: BlockFile, header: Header, entry: LogEntryHeader) -> LogUpdates:
    first = min(entry.entry_length, header.log_length - entry.log_offset)
    octets = file.read(header.log_offset + entry.log_offset, first)
    if first < entry.entry_length:
        octets += file.read(header.log_offset, entry.entry_length - first)
    return unpack_entry(
        octets, log_offset=entry.log_offset, log_guid=header.log_guid, log_length=header.log_length
    )


def _merge_updates(updates: Sequence[LogUpdates], *, header: Header, last_file_offset: int) -> ReplayPlan:
    counts = np.array([0, *(update.header.descriptor_count for update in updates)], np.int64)
    bases = np.cumsum(counts).tolist()
    orders = [update.data_positions + base for update, base in zip(updates, bases, strict=False)]
    zero_orders = [update.zero_positions + base for update, base in zip(updates, bases, strict=False)]
    offsets = np.concatenate([update.data_offsets for update in updates])
    order = np.concatenate(orders)
    data = np.concatenate([update.data for update in updates])
    zeros = np.concatenate([np.column_stack((u.zero_offsets, u.zero_lengths)) for u in updates])
    zero_order = np.concatenate(zero_orders)
    lengths = np.full(len(offsets), LOG_SECTOR_BYTES, np.int64)
    everything = np.concatenate((np.column_stack((offsets, lengths)), zeros))
    _check_targets(everything, header)
    # np.unique names the first of equals: reversed, that is the newest.
    unique, newest = np.unique(offsets[::-1], return_index=True)
    newest = len(offsets) - 1 - newest
    alive = ~_covered_later(unique, order[newest], zeros, zero_order)
    end = int(everything.sum(axis=1).max()) if len(everything) else 0
    return ReplayPlan(unique[alive], data[newest[alive]], merge(zeros), max(last_file_offset, end))


def _covered_later(
    offsets: NDArray[np.int64],
    order: NDArray[np.int64],
    zeros: NDArray[np.int64],
    zero_order: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return which data sectors, sorted by offset, a newer zero descriptor wipes out again."""
    covered = np.zeros(len(offsets), bool)
    if not len(zeros):
        return covered
    by_start = np.argsort(zeros[:, 0], kind="stable")
    waiting = zip(
        zeros[by_start, 0].tolist(),
        zeros[by_start].sum(axis=1).tolist(),
        zero_order[by_start].tolist(),
        strict=True,
    )
    following = next(waiting, None)
    newest_first: list[tuple[int, int]] = []
    for index, offset in enumerate(offsets.tolist()):
        while following is not None and following[0] <= offset:
            heapq.heappush(newest_first, (-following[2], following[1]))
            following = next(waiting, None)
        while newest_first and newest_first[0][1] <= offset:
            heapq.heappop(newest_first)
        covered[index] = bool(newest_first) and -newest_first[0][0] > order[index]
    return covered


def _check_targets(everything: NDArray[np.int64], header: Header) -> None:
    """Check that no update reaches the headers, the log itself, or an absurd place."""
    starts, ends = everything[:, 0], everything.sum(axis=1)
    low, high = _WRITABLE_HEADER_SECTION
    in_headers = (starts < HEADER_SECTION_BYTES) & ~((starts >= low) & (ends <= high))
    in_log = (starts < header.log_offset + header.log_length) & (ends > header.log_offset)
    bad = (in_headers | in_log | (ends > FILE_BYTES_MAX)) & (ends > starts)
    if bad.any():
        at = int(np.argmax(bad))
        raise FieldOutOfRange(
            "the file's own log wants to change what a log may not change",
            offset=header.log_offset,
            field="file_offset",
            expected="BAT, metadata, region tables or blocks",
            actual=f"{int(ends[at] - starts[at])} bytes at {int(starts[at])}",
            spec="[MS-VHDX] 2.2.2, 2.3",
        )
