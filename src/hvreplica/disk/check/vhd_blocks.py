"""Levels "bat" and "leaks" of a VHD: each block in the file, alone in its place; what nothing uses.

The table has at most 2**24 entries and is judged as one array.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.disk.check.findings import LIST_MAX
from hvreplica.disk.extents import merge
from hvreplica.formats.vhd_bat import ABSENT, NO_OFFSET, VHD_BAT_ENTRY, unpack_bat
from hvreplica.formats.vhd_footer import SECTOR_BYTES
from hvreplica.formats.vhd_header import BAT_ENTRY_BYTES, BLOCK_COUNT_MAX
from hvreplica.units import KIB, align_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.disk.check.findings import Findings, Statistics
    from hvreplica.disk.vhd.image import Image
    from hvreplica.files import BlockFile

_ALIGNMENT_BYTES = 4 * KIB


class _Teller:
    """Tells of blocks by their entries, a bounded number of each kind."""

    def __init__(self, image: Image, findings: Findings) -> None:
        self._table_offset = image.header.table_offset
        self._findings = findings

    def tell(self, code: str, blocks: NDArray[np.int64], words: Any, starts: NDArray[np.int64]) -> None:
        """words: makes a message of the row's number."""
        for row in range(min(len(blocks), LIST_MAX)):
            self._findings.add(
                code,
                words(row),
                offset=self._table_offset + int(blocks[row]) * BAT_ENTRY_BYTES,
                field="entry",
                actual=int(starts[row]) // SECTOR_BYTES,
                spec=VHD_BAT_ENTRY.spec,
            )
        self._findings.count_more(code, len(blocks) - LIST_MAX)


def check_blocks(
    file: BlockFile, image: Image, findings: Findings, statistics: Statistics
) -> NDArray[np.int64]:
    """Check every entry of the table, and return where the bitmaps of blocks stand."""
    geometry, table_offset = image.geometry, image.header.table_offset
    count = geometry.block_count
    offsets = unpack_bat(file.read(table_offset, count * BAT_ENTRY_BYTES), count)
    blocks = np.flatnonzero(offsets != NO_OFFSET)
    starts = offsets[blocks]
    ends = starts + _lengths(image, blocks)
    teller = _Teller(image, findings)
    outside = ends > file.size()
    teller.tell(
        "bat-block-outside-file",
        blocks[outside],
        lambda row: f"block {blocks[outside][row]} ends behind the end of the file",
        starts[outside],
    )
    blocks, starts, ends = blocks[~outside], starts[~outside], ends[~outside]
    for low, length, name in image.structures:
        inside = (starts < low + length) & (ends > low)
        _tell_inside(teller, blocks[inside], starts[inside], name)
    _tell_shared(teller, blocks, starts, ends)
    _note(file, image, starts, findings)
    statistics.allocated_blocks = int((offsets != NO_OFFSET).sum())
    return offsets


def _tell_inside(teller: _Teller, blocks: NDArray[np.int64], starts: NDArray[np.int64], name: str) -> None:
    teller.tell(
        "bat-block-in-structure", blocks, lambda row: f"block {blocks[row]} lies in the {name}", starts
    )


def _tell_shared(
    teller: _Teller, blocks: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> None:
    order = np.argsort(starts, kind="stable")
    blocks, starts, ends = blocks[order], starts[order], ends[order]
    reached = np.maximum.accumulate(ends)
    shared = 1 + np.flatnonzero(starts[1:] < reached[:-1])
    teller.tell(
        "bat-block-overlap",
        blocks[shared],
        lambda row: f"block {blocks[shared][row]} lies in the place of block {blocks[shared - 1][row]}",
        starts[shared],
    )


def _note(file: BlockFile, image: Image, starts: NDArray[np.int64], findings: Findings) -> None:
    unaligned = int(((starts + image.geometry.bitmap_bytes) % _ALIGNMENT_BYTES != 0).sum())
    if unaligned:
        findings.add(
            "bat-blocks-unaligned",
            f"the data of {unaligned} blocks is not on a boundary of 4 KiB, which Windows calls slow",
            offset=image.header.table_offset,
        )
    first = image.header.table_offset + image.geometry.block_count * BAT_ENTRY_BYTES
    count = min(image.header.max_table_entries, BLOCK_COUNT_MAX) - image.geometry.block_count
    count = min(count, max(file.size() - first, 0) // BAT_ENTRY_BYTES)
    if count > 0:
        held = np.flatnonzero(np.frombuffer(file.read(first, count * BAT_ENTRY_BYTES), ">u4") != ABSENT)
        if len(held):
            findings.add(
                "bat-entry-beyond-disk",
                f"{len(held)} entries behind those of the disk's blocks say that there is a block",
                offset=first + int(held[0]) * BAT_ENTRY_BYTES,
                field="entry",
                expected="0xffffffff",
                spec=VHD_BAT_ENTRY.spec,
            )


def _lengths(image: Image, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what of each block's place must be in the file: of the last one what the disk has of it."""
    geometry = image.geometry
    lengths = np.full(len(blocks), geometry.place_bytes, np.int64)
    lengths[blocks == geometry.block_count - 1] = geometry.bitmap_bytes + geometry.last_block_bytes
    return lengths


def check_space(
    file: BlockFile, image: Image, offsets: NDArray[np.int64], findings: Findings, statistics: Statistics
) -> int:
    """Find what the file holds and does not use; return where its last use ends, the footer apart.

    Sectors between structures and blocks are normal, for alignment; room for a whole block is told.
    """
    size, geometry = file.size(), image.geometry
    end = image.footer.at if image.has_tail else size
    blocks = np.flatnonzero(offsets != NO_OFFSET)
    # The last block may be whole in the file, or end where the disk does.
    lengths = np.minimum(geometry.place_bytes, np.maximum(end - offsets[blocks], 0))
    rows = [np.column_stack((offsets[blocks], lengths))]
    inside = [(low, length) for low, length, name in image.structures if name != "footer"]
    inside.append(image.table_place(end))
    used = merge(np.concatenate([np.array(inside, np.int64), *rows]))
    used_end = align_up(int(used.sum(axis=1).max()), SECTOR_BYTES)
    gaps = used[1:, 0] - used[:-1].sum(axis=1)
    tail_bytes = max(end - used_end, 0)
    statistics.used_bytes = int(used[:, 1].sum()) + (size - end)
    statistics.tail_bytes = tail_bytes
    statistics.leaked_bytes = int(gaps.sum()) + tail_bytes
    wide = np.flatnonzero(gaps >= geometry.place_bytes)
    if len(wide):
        findings.add(
            "space-unused",
            f"{int(gaps[wide].sum())} bytes inside of the file are in no use; new blocks go there first",
            offset=int(used[wide[0]].sum()),
        )
    if image.has_tail and tail_bytes >= geometry.place_bytes:
        findings.add(
            "file-tail-unused",
            f"{tail_bytes} bytes behind the last use of the file",
            offset=used_end,
            expected=f"the footer at {used_end}",
            actual=f"the footer at {end}",
        )
    return used_end
