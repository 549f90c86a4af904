"""Close a log that its writer left open: keep everything up to the last metadata block that is whole.

    header | block #1 | data | block #2 | data | block #3 | data without its block, or a block that is torn
                                                 ^ the new end

Forward from block #1 every 512 bytes may start the next block. It is the next one if its distance is exactly
the way back to the block before, its header and entries carry good checksums, its entries' data fills the gap
exactly, and that data matches its checksums.

A torn tail is a value, damage an error. They are told apart by what the caller knows to be durable; without
that knowledge by whether a whole block stands behind the break. Guest data may imitate a metadata block: the
end is certain only where `durable_bytes` is given, see docs/formats/hrl.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hvreplica.errors import FormatError, LogError, NotClosed
from hvreplica.formats.hrl import (
    HEADER_BYTES,
    METADATA_HEADER_BYTES,
    SECTOR_BYTES,
    LogHeader,
    entry_capacity,
)
from hvreplica.formats.hrl_entries import find_entry_fault, parse_entries
from hvreplica.hrl.data import DataChecker, HoleFinder
from hvreplica.hrl.reader import naming, read_header
from hvreplica.hrl.report import LogEnd, LogReport
from hvreplica.hrl.verify import verify_log
from hvreplica.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.files import BlockFile, FileSystem

_WINDOW_BYTES = 1 << 20
_WORDS_PER_SECTOR = SECTOR_BYTES // 8
# A guest that fills its disk with imitations must not cost more than reading the log some times over.
_IMITATIONS_MAX = 256
_UNPLACED_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A sector that starts with a metadata header whose own checksum holds."""

    location: int
    distance: int
    count: int


@dataclass(slots=True)
class _Chain:
    """What was found so far.

    end: behind the last whole block. ends_at_durable: some block ended at durable_bytes.
    """

    location: int = 0
    end: int = HEADER_BYTES
    blocks: int = 0
    entries: int = 0
    last_time_stamp: int = 0
    ends_at_durable: bool = False


def recover_log(files: FileSystem, path: Path, *, durable_bytes: int | None = None) -> LogReport:
    """Close an unclosed log at its last whole metadata block and report what it then holds; durable on
    return.

    durable_bytes: what LogWriter.flush() returned last, where it is known from elsewhere: the log is then
    refused unless a block ends exactly there, and everything behind may be a torn tail. A log that is closed
    is only checked. The tail is left in the file, behind the log's end. Nothing is changed where an error is
    raised. Raises: FormatError if the header is damaged; LogError if what was durable is damaged, or may be.
    """
    file = files.open(path, writable=True)
    try:
        header = read_header(file)
        if header.error_code:
            raise NotClosed("the writer of the log recorded an error", path=path, actual=header.error_code)
        torn = False
        if not header.is_closed:
            with naming(file.path):
                chain = _Recovery(file, header, durable_bytes).run()
            torn = file.size() > chain.end
            _close(file, header, chain)
        elif durable_bytes is not None and header.eol_location < durable_bytes:
            raise _damaged("the log ends before what was durable", path, header.eol_location, durable_bytes)
    finally:
        file.close()
    report = verify_log(files, path)
    return msgspec.structs.replace(report, end=LogEnd.TORN_TAIL) if torn else report


def _close(file: BlockFile, header: LogHeader, chain: _Chain) -> None:
    # Only the page cache may hold what was just read: the end must not become durable before it.
    file.sync()
    closed = header.sealed(
        current_size=chain.end,
        eol_location=chain.end,
        total_metadata_entries=chain.entries,
        last_modified_time_stamp=max(header.last_modified_time_stamp, chain.last_time_stamp),
    )
    file.write(closed.pack(), 0)
    file.sync()


class _Recovery:
    """One forward scan of one file."""

    def __init__(self, file: BlockFile, header: LogHeader, durable_bytes: int | None) -> None:
        self._file = file
        self._metadata_size = header.metadata_size
        self._durable_bytes = durable_bytes
        self._checker = DataChecker(file)
        self._holes = HoleFinder(file)
        self._chain = _Chain(last_time_stamp=header.time_stamp)
        self._unplaced: list[_Candidate] = []
        self._imitations = 0

    def run(self) -> _Chain:
        """Return the chain of whole blocks, judged. Raises: LogError."""
        chain = self._chain
        for candidate in _candidates(self._file, self._metadata_size):
            if candidate.distance == (candidate.location - chain.location if chain.blocks else 0):
                entries = self._entries_of(candidate, chain.end)
                if entries is not None:
                    self._follow(candidate, entries)
                    continue
            self._unplaced.append(candidate)
            if len(self._unplaced) > _UNPLACED_MAX:
                raise _damaged("too many metadata blocks do not follow on each other", None, chain.end)
        self._judge()
        return chain

    def _follow(self, candidate: _Candidate, entries: NDArray[Any]) -> None:
        chain = self._chain
        chain.location = candidate.location
        chain.end = candidate.location + self._metadata_size
        chain.blocks += 1
        chain.entries += len(entries)
        if len(entries):
            chain.last_time_stamp = max(chain.last_time_stamp, int(entries["time_stamp"].max()))
        chain.ends_at_durable |= chain.end == self._durable_bytes
        self._unplaced.clear()

    def _entries_of(self, candidate: _Candidate, data_offset: int) -> NDArray[Any] | None:
        """Return the entries of a block whose data starts at `data_offset`; None if anything is not whole."""
        block = self._file.read(candidate.location, self._metadata_size)
        try:
            entries = parse_entries(
                block, count=candidate.count, data_offset=data_offset, block_offset=candidate.location
            )
        except FormatError:
            return None
        if find_entry_fault(entries) is not None:
            return None
        if self._checker.find_fault(entries, self._holes.find_under(entries)) is not None:
            self._imitations += 1
            if self._imitations > _IMITATIONS_MAX:
                raise _damaged("too many metadata blocks whose data is damaged", None, candidate.location)
            return None
        return entries

    def _judge(self) -> None:
        """Raise unless the chain holds all that was durable."""
        chain = self._chain
        if not chain.blocks:
            raise _damaged("the log has no whole metadata block", None, HEADER_BYTES)
        if self._durable_bytes is not None:
            if not chain.ends_at_durable:
                message = "the log is damaged within what was durable"
                raise _damaged(message, None, chain.end, self._durable_bytes)
            return
        for candidate in self._unplaced:
            before = candidate.location - candidate.distance
            # A block that follows on the chain's last one is that block's successor, torn; nothing of it was
            # durable unless something whole stands behind it.
            if candidate.distance and before >= chain.end:
                entries = self._entries_of(candidate, before + self._metadata_size)
                if entries is not None:
                    message = "the log is damaged before a whole metadata block"
                    raise _damaged(message, None, chain.end, candidate.location)


def _damaged(message: str, path: Path | None, break_offset: int, expected: int | None = None) -> LogError:
    return LogError(
        message,
        path=path,
        offset=break_offset,
        expected=None if expected is None else f"whole blocks up to {expected}",
        actual=None if expected is None else f"the last whole block ends at {break_offset}",
        spec="[MS-HRL] 2.5",
        hint="the log cannot be closed with certainty; a comparison of the disks finds what changed",
    )


def _candidates(file: BlockFile, metadata_size: int) -> Iterator[_Candidate]:
    """Yield, ascending, every sector with a good metadata header whose block fits the file."""
    size = file.size()
    window = bytearray(_WINDOW_BYTES)
    position = HEADER_BYTES
    for run_start, run_length in file.data_extents(HEADER_BYTES, size):
        # A header lies within one sector, and that sector is never a hole: it is not all zeros.
        position = max(position, run_start // SECTOR_BYTES * SECTOR_BYTES)
        end = min(align_up(run_start + run_length, SECTOR_BYTES), size // SECTOR_BYTES * SECTOR_BYTES)
        while position < end:
            view = memoryview(window)[: min(len(window), end - position)]
            file.read_into(view, position)
            for location, distance, count in _find_headers(view, position, metadata_size):
                if location + metadata_size <= size:
                    yield _Candidate(location, distance, count)
            position += len(view)


def _find_headers(view: memoryview, position: int, metadata_size: int) -> list[list[int]]:
    """Return (location, distance, count) of the sectors in `view` that start with a good metadata header."""
    octets = np.frombuffer(view, np.uint8).reshape(-1, SECTOR_BYTES)
    words = octets.view("<u8")
    # The sum over 28 bytes is below 2**13, so its complement has 19 ones on top: random data hardly ever
    # passes.
    likely = np.flatnonzero((words[:, 1] >> np.uint64(32 + 13)) == np.uint64((1 << 19) - 1))
    if not len(likely):
        return []
    words = words[likely]
    distances = words[:, 0].astype(np.uint64)
    counts = words[:, 1] & np.uint64(0xFFFFFFFF)
    stored = words[:, 1] >> np.uint64(32)
    heads = octets[likely, :METADATA_HEADER_BYTES].astype(np.uint32)
    sums = heads.sum(axis=1) - heads[:, 12:16].sum(axis=1)
    locations = position + likely * SECTOR_BYTES
    good = (
        (stored == (~sums.astype(np.uint32)).astype(np.uint64))
        & (counts <= np.uint64(entry_capacity(metadata_size)))
        & (distances % np.uint64(SECTOR_BYTES) == 0)
        & ((distances == 0) | (distances >= np.uint64(metadata_size)))
        & (distances <= (locations - HEADER_BYTES).astype(np.uint64))
        & (words[:, 2] == 0)
        & (words[:, 3] == 0)
    )
    rows = np.flatnonzero(good)
    return [[int(locations[row]), int(distances[row]), int(counts[row])] for row in rows]
