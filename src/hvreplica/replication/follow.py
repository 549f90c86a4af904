"""Take an acknowledged log into the fingerprint table of its disk.

The log is the only record of what was sent: hashing its data again gives the fingerprints. Entries of a
comparison are whole fingerprint blocks; a guest's own writes may cover some in part, and what such a block
holds then counts as not known: the next comparison sends it. Done again after a cut, it gives the same table.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.formats.fingerprint import FINGERPRINT_BYTES, UNKNOWN
from hvreplica.hrl import HoleFinder, LogReader
from hvreplica.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from hvreplica.files import BlockFile, FileSystem
    from hvreplica.tracking.fingerprints import FingerprintTable

_GROUP_BYTES = 4 * MIB  # of log data, read and hashed together
_TABLE_WINDOW_BLOCKS = 1 << 16  # rows of the table that are read, changed and written as one: 1 MiB
_GAP_BLOCKS = (
    1 << 10
)  # a longer gap costs more to rewrite than to leave out, and would fill a hole with zeros
_ROWS_MAX = 1 << 17  # rows that are held before they are stored: 2 MiB
_UNKNOWN_ROW = np.frombuffer(UNKNOWN, np.uint8).reshape(1, FINGERPRINT_BYTES)


def follow_log(files: FileSystem, path: Path, table: FingerprintTable) -> None:
    """Make `table` say what a disk holds once the log at `path` is applied. Not durable until table.sync().

    Raises: FormatError for a damaged log; the table may then hold a part of it.
    """
    rows = _Rows(table)
    with LogReader(files, path) as log:
        holes = HoleFinder(log.file)
        for entries in log.blocks():
            for group in _contiguous(entries):
                _follow_group(log.file, group, rows, holes)
    rows.store()


class _Rows:
    """Rows on their way into a table, in order: a random write costs one row, storing one costs a window."""

    def __init__(self, table: FingerprintTable) -> None:
        self.table = table
        self.block_bytes = table.block_bytes
        self.virtual_bytes = table.header.virtual_bytes
        self._blocks: list[npt.NDArray[np.int64]] = []
        self._rows: list[npt.NDArray[np.uint8]] = []
        self._count = 0

    def add(self, blocks: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8]) -> None:
        """Take rows of blocks; of a block that comes twice the later one counts."""
        self._blocks.append(blocks)
        self._rows.append(rows)
        self._count += len(blocks)
        if self._count >= _ROWS_MAX:
            self.store()

    def clear(self, first_block: int, block_count: int) -> None:
        """Take note that a range is zero, however large."""
        self.store()
        self.table.clear(first_block, block_count)

    def forget(self, block: int) -> None:
        """Take note that it is not known what a block holds."""
        self.add(np.array([block]), _UNKNOWN_ROW)

    def store(self) -> None:
        """Put everything into the table."""
        if self._count:
            _scatter(self.table, np.concatenate(self._blocks), np.concatenate(self._rows))
            self._blocks, self._rows, self._count = [], [], 0


def _contiguous(entries: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Cut a metadata block's entries into groups of at most _GROUP_BYTES; their data stands in one piece."""
    ends = np.cumsum(entries["data_length"].astype(np.int64))
    cuts = np.flatnonzero(np.diff(ends // _GROUP_BYTES)) + 1
    return [group for group in np.split(entries, cuts) if len(group)]


def _follow_group(file: BlockFile, group: npt.NDArray[Any], rows: _Rows, holes: HoleFinder) -> None:
    firsts = group["byte_offset"].astype(np.int64)
    lengths = group["data_length"].astype(np.int64)
    start, total_bytes = int(group["log_offset"][0]), int(lengths.sum())
    data = None
    if holes.find_under(group)[:, 1].sum() != total_bytes:
        data = np.empty(total_bytes, np.uint8)
        file.read_into(data, start)
    ends = firsts + lengths
    whole = (ends % rows.block_bytes == 0) | (ends == rows.virtual_bytes)
    whole &= firsts % rows.block_bytes == 0
    if whole.all():
        _follow_blocks(firsts, lengths, data, rows)
        return
    at = np.concatenate(([0], np.cumsum(lengths)))
    for index, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
        _follow_entry(first, length, None if data is None else data[at[index] : at[index + 1]], rows)


def _follow_entry(disk_offset: int, length: int, data: npt.NDArray[np.uint8] | None, rows: _Rows) -> None:
    """Follow one entry of any sectors. Of a block that it covers in part the log does not hold the rest."""
    block_bytes, end = rows.block_bytes, disk_offset + length
    first = -(-disk_offset // block_bytes)
    last = -(-end // block_bytes) if end == rows.virtual_bytes else end // block_bytes
    if disk_offset % block_bytes:
        rows.forget(disk_offset // block_bytes)
    if last < -(-end // block_bytes):
        rows.forget(last)
    if first < last:
        skipped = first * block_bytes - disk_offset
        whole_bytes = min(last * block_bytes, end) - first * block_bytes
        whole = None if data is None else data[skipped : skipped + whole_bytes]
        _follow_blocks(np.array([first * block_bytes]), np.array([whole_bytes]), whole, rows)


def _follow_blocks(
    offsets: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    data: npt.NDArray[np.uint8] | None,
    rows: _Rows,
) -> None:
    """Follow entries of whole blocks, the disk's short last one included; data: None where all is zero."""
    block_bytes = rows.block_bytes
    firsts = offsets // block_bytes
    counts = -(-lengths // block_bytes)
    if data is None:
        for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            rows.clear(first, count)
        return
    # Only a disk's last block is short, so within a group a short one can only stand at the end of an entry:
    # entries are hashed together as long as they are whole blocks.
    if (lengths % block_bytes == 0).all():
        hashed = native.fingerprints(data, block_bytes)
    else:
        pieces = np.split(data, np.cumsum(lengths)[:-1])
        hashed = np.concatenate([native.fingerprints(piece, block_bytes) for piece in pieces])
    blocks = np.repeat(firsts - np.concatenate(([0], np.cumsum(counts)[:-1])), counts) + np.arange(
        counts.sum()
    )
    rows.add(blocks, hashed)


def _scatter(table: FingerprintTable, blocks: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8]) -> None:
    """Store rows at their block numbers; of a block that comes twice the later row stands."""
    order = np.argsort(blocks, kind="stable")
    order = order[np.append(np.diff(blocks[order]) != 0, True)]
    blocks, rows = blocks[order], rows[order]
    is_far = np.diff(blocks) > _GAP_BLOCKS
    is_next_window = np.diff(blocks // _TABLE_WINDOW_BLOCKS) > 0
    edges = [0, *(np.flatnonzero(is_far | is_next_window) + 1).tolist(), len(blocks)]
    for start, stop in pairwise(edges):
        first, last = int(blocks[start]), int(blocks[stop - 1])
        if last - first + 1 == stop - start:
            table.write(first, rows[start:stop])
            continue
        window = table.read(first, last - first + 1)
        window[blocks[start:stop] - first] = rows[start:stop]
        table.write(first, window)
