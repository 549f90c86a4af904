"""Take an acknowledged log into the fingerprint table of its disk.

The log is the only record of what was sent: hashing its data again gives the fingerprints. Entries of a
comparison are whole fingerprint blocks; a guest's own writes may cover some in part, and what such a block
holds then counts as not known: the next comparison sends it. Done again after a cut, it gives the same table.
"""

from __future__ import annotations

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

_WINDOW_BYTES = 4 * MIB
_TABLE_WINDOW_BLOCKS = 1 << 16  # rows of the table that are read, changed and written as one: 1 MiB


def follow_log(files: FileSystem, path: Path, table: FingerprintTable) -> None:
    """Make `table` say what a disk holds once the log at `path` is applied. Not durable until table.sync().

    Raises: FormatError for a damaged log; the table may then hold a part of it.
    """
    with LogReader(files, path) as log:
        holes = HoleFinder(log.file)
        for entries in log.blocks():
            for group in _contiguous(entries):
                _follow_group(log.file, group, table, holes)


def _contiguous(entries: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Cut a metadata block's entries into groups of at most _WINDOW_BYTES; their data stands in one piece."""
    ends = np.cumsum(entries["data_length"].astype(np.int64))
    cuts = np.flatnonzero(np.diff(ends // _WINDOW_BYTES)) + 1
    return [group for group in np.split(entries, cuts) if len(group)]


def _follow_group(
    file: BlockFile, group: npt.NDArray[Any], table: FingerprintTable, holes: HoleFinder
) -> None:
    firsts = group["byte_offset"].astype(np.int64)
    lengths = group["data_length"].astype(np.int64)
    start, total_bytes = int(group["log_offset"][0]), int(lengths.sum())
    data = None
    if holes.find_under(group)[:, 1].sum() != total_bytes:
        data = np.empty(total_bytes, np.uint8)
        file.read_into(data, start)
    ends = firsts + lengths
    whole = (ends % table.block_bytes == 0) | (ends == table.header.virtual_bytes)
    whole &= firsts % table.block_bytes == 0
    if whole.all():
        _follow_blocks(firsts, lengths, data, table)
        return
    at = np.concatenate(([0], np.cumsum(lengths)))
    for index, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
        _follow_entry(first, length, None if data is None else data[at[index] : at[index + 1]], table)


def _follow_entry(
    disk_offset: int, length: int, data: npt.NDArray[np.uint8] | None, table: FingerprintTable
) -> None:
    """Follow one entry of any sectors. Of a block that it covers in part the log does not hold the rest."""
    block_bytes, end = table.block_bytes, disk_offset + length
    first = -(-disk_offset // block_bytes)
    last = -(-end // block_bytes) if end == table.header.virtual_bytes else end // block_bytes
    if disk_offset % block_bytes:
        _forget(table, disk_offset // block_bytes)
    if last < -(-end // block_bytes):
        _forget(table, last)
    if first < last:
        skipped = first * block_bytes - disk_offset
        whole_bytes = min(last * block_bytes, end) - first * block_bytes
        whole = None if data is None else data[skipped : skipped + whole_bytes]
        _follow_blocks(np.array([first * block_bytes]), np.array([whole_bytes]), whole, table)


def _forget(table: FingerprintTable, block: int) -> None:
    table.write(block, np.frombuffer(UNKNOWN, np.uint8).reshape(1, FINGERPRINT_BYTES))


def _follow_blocks(
    offsets: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    data: npt.NDArray[np.uint8] | None,
    table: FingerprintTable,
) -> None:
    """Follow entries of whole blocks, the disk's short last one included; data: None where all is zero."""
    firsts = offsets // table.block_bytes
    counts = -(-lengths // table.block_bytes)
    if data is None:
        for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            table.clear(first, count)
        return
    # Only a disk's last block is short, so within a group a short one can only stand at the end of an entry:
    # entries are hashed together as long as they are whole blocks.
    if (lengths % table.block_bytes == 0).all():
        rows = native.fingerprints(data, table.block_bytes)
    else:
        pieces = np.split(data, np.cumsum(lengths)[:-1])
        rows = np.concatenate([native.fingerprints(piece, table.block_bytes) for piece in pieces])
    blocks = np.repeat(firsts - np.concatenate(([0], np.cumsum(counts)[:-1])), counts) + np.arange(
        counts.sum()
    )
    _scatter(table, blocks, rows)


def _scatter(table: FingerprintTable, blocks: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8]) -> None:
    """Store rows at their block numbers; of a block that comes twice the later row stands."""
    order = np.argsort(blocks, kind="stable")
    blocks, rows = blocks[order], rows[order]
    for chosen in np.split(
        np.arange(len(blocks)), np.flatnonzero(np.diff(blocks // _TABLE_WINDOW_BLOCKS)) + 1
    ):
        first, last = int(blocks[chosen[0]]), int(blocks[chosen[-1]])
        window = table.read(first, last - first + 1)
        window[blocks[chosen] - first] = rows[chosen]
        table.write(first, window.reshape(-1, FINGERPRINT_BYTES))
