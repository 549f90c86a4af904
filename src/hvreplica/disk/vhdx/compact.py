"""What compacting needs of a VHDX. Everything passes through its log; see session.WriteSession.

A BAT that stands behind blocks, where a growth has put it, goes into a gap too. Spec: [MS-VHDX] 2.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.moves import Moves, place_before, plan_moves
from hvreplica.disk.vhdx.open import open_vhdx
from hvreplica.disk.vhdx.resize import move_bat
from hvreplica.formats.vhdx_bat import BITMAP_BLOCK_BYTES, PayloadState, is_anchored, offsets_of
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.vhdx.disk import VhdxDisk
    from hvreplica.files import BlockFile

_LOOSE_STATES = (
    PayloadState.PAYLOAD_BLOCK_UNDEFINED,
    PayloadState.PAYLOAD_BLOCK_UNMAPPED,
    PayloadState.PAYLOAD_BLOCK_UNMAPPED_V095,
)


def _aligned(file_offset: int) -> int:
    return align_up(file_offset, MIB)


class VhdxFile:
    """See compact.CompactFile."""

    def __init__(self, disk: VhdxDisk, clock: Clock) -> None:
        self._clock = clock
        self._parts = disk.parts()
        self._geometry = self._parts.image.geometry
        self._indices = np.empty(0, np.int64)

    @property
    def file(self) -> BlockFile:
        return self._parts.file

    def begin(self) -> None:
        self._parts.session.begin_unseen()

    def held(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        blocks = self._parts.bat.held_blocks(first_block, last_block)
        return blocks[self._parts.bat.placed(blocks)]

    def unneeded(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        partial = PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT
        unneeded: NDArray[np.bool_] = self._parts.bat.states(blocks) == partial
        bitmaps = self._parts.bitmaps
        if bitmaps is not None:
            sectors = self._geometry.block_bytes // bitmaps.sector_bytes
            for index in np.flatnonzero(unneeded).tolist():
                unneeded[index] = bitmaps.none_set(int(blocks[index]) * sectors, sectors)
        return unneeded

    def can_be_zero(self, block: int) -> bool:  # noqa: ARG002 - PAYLOAD_BLOCK_ZERO says so over any parent
        return True

    def forget(self, blocks: NDArray[np.int64]) -> None:
        self._parts.session.forget(blocks)

    def zero(self, blocks: NDArray[np.int64]) -> None:
        self._parts.session.discard(blocks)

    def released(self) -> int:
        """Places go that absent blocks still hold, as those that a guest has trimmed do under Windows.

        And, after the blocks that need them, sector bitmaps of chunks without partially present blocks.
        """
        parts = self._parts
        count = 0
        for state in _LOOSE_STATES:
            blocks = parts.bat.blocks_in(state, 0, self._geometry.block_count - 1)
            blocks = blocks[is_anchored(parts.bat.entries_of(blocks))]
            parts.session.discard(blocks)
            count += len(blocks)
        parts.session.flush()
        if parts.bitmaps is not None:
            self._release_bitmaps()
        return count

    def _release_bitmaps(self) -> None:
        parts = self._parts
        state = PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT
        partial = parts.bat.blocks_in(state, 0, self._geometry.block_count - 1)
        chunks = parts.bat.bitmap_chunks()
        parts.session.release_bitmaps(np.setdiff1d(chunks, partial // self._geometry.chunk_ratio))
        parts.session.flush()

    def lower_table(self) -> None:
        parts, region = self._parts, self._parts.image.bat
        used = [row[:2] for row in parts.image.structures if row[0] != region.file_offset]
        target = place_before(
            region.file_offset,
            region.length,
            np.concatenate((np.array(used, np.int64), parts.bat.used_ranges())),
            floor=0,
            aligned=_aligned,
        )
        if target is None:
            return
        parts.session.clear()
        parts.file.zero(target, region.length)
        move_bat(parts, target, region.length)
        parts.session.clear()
        self._parts = open_vhdx(parts.file, clock=self._clock).parts()
        self._parts.session.begin_unseen()

    def plan(self) -> tuple[NDArray[np.int64], Moves]:
        bat = self._parts.bat
        self._indices = bat.placed_indices()
        entries = bat.entries[self._indices]
        lengths = np.where(
            self._geometry.is_payload(self._indices), self._geometry.block_bytes, BITMAP_BLOCK_BYTES
        )
        movable = np.column_stack((offsets_of(entries), lengths))
        pinned = np.array([row[:2] for row in self._parts.image.structures], np.int64)
        return movable, plan_moves(movable, pinned, floor=0, aligned=_aligned)

    def move(self, parts: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        self._parts.session.move(self._indices[parts], targets)
        self._parts.session.flush()

    def cut(self) -> None:
        self._parts.session.cut()
