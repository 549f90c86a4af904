"""The block allocation table and the sector bitmaps of a VHD, as numpy arrays.

    BAT entry     u32: sector number of the block's bitmap, 0xFFFFFFFF where the block has no place
    block         bitmap, padded to whole sectors | data
    bitmap        one bit for each sector of the data, most significant bit first; 1: the sector is here

A sector whose bit is 0 is the parent's in a differencing disk, and zeros in a dynamic one.
Spec: VHD 1.0 (2006), Block Allocation Table and Data Blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.errors import FieldOutOfRange, Overlap, Truncated
from hvreplica.formats.layout import Field, Layout
from hvreplica.formats.vhd_footer import SECTOR_BYTES
from hvreplica.formats.vhd_header import BAT_ENTRY_BYTES
from hvreplica.units import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Buffer

ABSENT = 0xFFFF_FFFF
NO_OFFSET = -1

VHD_BAT_ENTRY = Layout(
    "VHD BAT entry",
    spec="VHD 1.0 Block Allocation Table and Data Blocks",
    size=BAT_ENTRY_BYTES,
    endian=">",
    fields=(Field("entry", "I", "sector number of the block's bitmap; 0xFFFFFFFF: the block is absent"),),
)


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """How many blocks a disk has and how long each is in the file.

    bitmap_bytes: whole sectors. last_block_bytes: of the guest's disk in its last block.
    """

    virtual_bytes: int
    block_bytes: int
    block_count: int
    bitmap_bytes: int
    last_block_bytes: int
    chunk_ratio: int = 0  # no entries of another kind stand between those of blocks

    @staticmethod
    def of(*, virtual_bytes: int, block_bytes: int) -> BlockGeometry:
        """Return the geometry of a disk with validated parameters."""
        block_count = -(-virtual_bytes // block_bytes)
        return BlockGeometry(
            virtual_bytes=virtual_bytes,
            block_bytes=block_bytes,
            block_count=block_count,
            bitmap_bytes=align_up(-(-block_bytes // SECTOR_BYTES // 8), SECTOR_BYTES),
            last_block_bytes=virtual_bytes - (block_count - 1) * block_bytes,
        )

    @property
    def place_bytes(self) -> int:
        """Bytes of the file that a block takes, its bitmap included."""
        return self.bitmap_bytes + self.block_bytes

    @property
    def sectors_per_block(self) -> int:
        """Sectors of a block's data."""
        return self.block_bytes // SECTOR_BYTES

    def index_of(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """Return the entries' indices of `blocks`."""
        return blocks

    def block_of(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Return the blocks of entries."""
        return indices

    def is_payload(self, indices: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which of `indices` are entries of this disk."""
        inside: NDArray[np.bool_] = indices < self.block_count
        return inside


def unpack_bat(buffer: Buffer, count: int) -> NDArray[np.int64]:
    """Return where the bitmaps of the first `count` blocks stand in the file, NO_OFFSET where absent.

    Raises: Truncated if `buffer` has fewer entries.
    """
    entries = np.frombuffer(buffer, ">u4", count=min(count, memoryview(buffer).nbytes // BAT_ENTRY_BYTES))
    if len(entries) < count:
        raise Truncated(
            "the BAT ends before its last entry",
            offset=len(entries) * BAT_ENTRY_BYTES,
            expected=f"{count} entries",
            actual=f"{len(entries)} entries",
            spec=VHD_BAT_ENTRY.spec,
        )
    offsets = entries.astype(np.int64)
    offsets *= SECTOR_BYTES
    offsets[entries == ABSENT] = NO_OFFSET
    return offsets


def pack_bat(offsets: NDArray[np.int64]) -> bytes:
    """Return the entries of blocks whose bitmaps stand at `offsets`: multiples of 512, or NO_OFFSET."""
    entries = np.where(offsets == NO_OFFSET, ABSENT, offsets // SECTOR_BYTES)
    return entries.astype(">u4").tobytes()


def validate_bat(
    offsets: NDArray[np.int64],
    geometry: BlockGeometry,
    *,
    table_offset: int,
    file_size_bytes: int,
    structures: Sequence[tuple[int, int, str]],
) -> None:
    """Check that each block lies in the file, outside of the structures, and apart from the others.

    offsets: as unpack_bat() gives them, the whole table. structures: (file_offset, length, name) of all that
    is no block. Of the last block only what the disk has of it must be there: writers leave out the rest.
    Raises: Overlap, Truncated, each with the place of the entry.
    """
    blocks = np.flatnonzero(offsets != NO_OFFSET)
    starts = offsets[blocks]
    lengths = np.full(len(blocks), geometry.place_bytes, np.int64)
    lengths[blocks == geometry.block_count - 1] = geometry.bitmap_bytes + geometry.last_block_bytes
    outside = starts + lengths > file_size_bytes
    if outside.any():
        block = int(blocks[np.argmax(outside)])
        raise Truncated(
            f"block {block} ends behind the end of the file",
            offset=table_offset + block * BAT_ENTRY_BYTES,
            field="entry",
            expected=f"a block of {int(lengths[np.argmax(outside)])} bytes within {file_size_bytes}",
            actual=int(offsets[block]) // SECTOR_BYTES,
            spec=VHD_BAT_ENTRY.spec,
            hint="the file was cut off; restore it from a copy",
        )
    for start, length, name in structures:
        inside = (starts < start + length) & (starts + lengths > start)
        if inside.any():
            block = int(blocks[np.argmax(inside)])
            first, last = start // SECTOR_BYTES, -(-(start + length) // SECTOR_BYTES)
            raise Overlap(
                f"block {block} overlaps the {name}",
                offset=table_offset + block * BAT_ENTRY_BYTES,
                field="entry",
                expected=f"outside of sectors {first} to {last}",
                actual=int(offsets[block]) // SECTOR_BYTES,
                spec=VHD_BAT_ENTRY.spec,
            )
    _validate_apart(blocks, starts, lengths, table_offset=table_offset)


def _validate_apart(
    blocks: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    table_offset: int,
) -> None:
    order = np.argsort(starts, kind="stable")
    ends = (starts + lengths)[order]
    shared = starts[order][1:] < ends[:-1]
    if shared.any():
        at = int(np.argmax(shared))
        first, second = int(blocks[order[at]]), int(blocks[order[at + 1]])
        raise Overlap(
            f"blocks {first} and {second} share bytes of the file",
            offset=table_offset + second * BAT_ENTRY_BYTES,
            field="entry",
            expected=f"at least sector {int(ends[at]) // SECTOR_BYTES}",
            actual=int(starts[order[at + 1]]) // SECTOR_BYTES,
            spec=VHD_BAT_ENTRY.spec,
            hint="the disk is damaged: of two blocks one overwrote the other; restore it from a copy",
        )


def unpack_bitmap(buffer: Buffer, sector_count: int) -> NDArray[np.bool_]:
    """Return the first `sector_count` bits of a bitmap. Raises: Truncated if it has fewer."""
    octets = np.frombuffer(buffer, np.uint8)
    if len(octets) * 8 < sector_count:
        raise Truncated(
            "a sector bitmap is too short",
            expected=f"{sector_count} bits",
            actual=f"{len(octets) * 8} bits",
            spec=VHD_BAT_ENTRY.spec,
        )
    return np.unpackbits(octets, count=sector_count).astype(bool)


def pack_bitmap(bits: NDArray[Any], bitmap_bytes: int) -> bytes:
    """Return a bitmap of `bitmap_bytes` for `bits`; what is padding is 0. Raises: FieldOutOfRange."""
    packed = np.packbits(bits).tobytes()
    if len(packed) > bitmap_bytes:
        raise FieldOutOfRange(
            "more bits than the bitmap has", field="bitmap", expected=bitmap_bytes * 8, actual=len(bits)
        )
    return packed.ljust(bitmap_bytes, b"\0")
