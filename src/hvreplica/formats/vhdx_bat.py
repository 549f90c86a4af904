"""The block allocation table of a VHDX: how its entries are counted, found and checked.

The table is one array of u64. After every `chunk_ratio` payload entries stands one sector-bitmap entry, also
in files without a parent, where it is unused:

    entry    63..20 FileOffsetMB    19..3 reserved, 0    2..0 state
    index    block + block // chunk_ratio

Entries stay a numpy array; nothing here makes an object per block. Spec: [MS-VHDX] 2.4, 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.errors import FieldOutOfRange, FormatError, Overlap, Truncated
from hvreplica.formats.layout import Field, Layout
from hvreplica.formats.vhdx_header import ALIGNMENT_BYTES
from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BAT_ENTRY_BYTES = 8
BAT_ENTRY = Layout(
    "BAT entry",
    spec="[MS-VHDX] 2.5.1",
    size=BAT_ENTRY_BYTES,
    fields=(Field("entry", "Q", "bits 0-2 state, bits 3-19 reserved (0), bits 20-63 file offset in MiB"),),
)
STATE_MASK = 0x7
RESERVED_MASK = 0xFFFF8
OFFSET_MASK = 0xFFFF_FFFF_FFF0_0000
SECTORS_PER_BITMAP_BLOCK = 1 << 23


class PayloadState(IntEnum):
    """States of a payload block. Spec: [MS-VHDX] 2.5.1.1."""

    PAYLOAD_BLOCK_NOT_PRESENT = 0
    PAYLOAD_BLOCK_UNDEFINED = 1
    PAYLOAD_BLOCK_ZERO = 2
    PAYLOAD_BLOCK_UNMAPPED = 3
    # Deviates from [MS-VHDX] 2.5.1.1, where 5 is reserved: it was UNMAPPED before the format was final, and
    # files with it exist; it reads as zeros.
    PAYLOAD_BLOCK_UNMAPPED_V095 = 5
    PAYLOAD_BLOCK_FULLY_PRESENT = 6
    PAYLOAD_BLOCK_PARTIALLY_PRESENT = 7


class BitmapState(IntEnum):
    """States of a sector bitmap block. Spec: [MS-VHDX] 2.5.1.2."""

    SB_BLOCK_NOT_PRESENT = 0
    SB_BLOCK_PRESENT = 6
    # Deviates from [MS-VHDX] 2.5.1.2, where 7 is reserved: files with it exist, and it can mean nothing else.
    SB_BLOCK_PARTIALLY_PRESENT = 7


# 4 is reserved; 7 needs a sector bitmap, and so a parent.
_STATE_ALLOWED = np.array([True, True, True, True, False, True, True, False])
_STATE_ALLOWED_WITH_PARENT = np.array([True, True, True, True, False, True, True, True])
_STATE_HAS_PLACE = np.array([False] * 6 + [True] * 2)
_BITMAP_STATE_ALLOWED = np.array([True, False, False, False, False, False, True, True])
BITMAP_BLOCK_BYTES = MIB
# FileOffsetMB may hold a place that must keep its contents ("soft anchor"): no other block may get it.
_STATE_ANCHORS = np.array([False, True, False, True, False, True, False, False])


@dataclass(frozen=True, slots=True)
class BatGeometry:
    """How many entries a disk has, and where each stands."""

    block_bytes: int
    chunk_ratio: int  # payload blocks per sector-bitmap entry
    block_count: int
    entry_count: int

    @staticmethod
    def of(
        *, virtual_bytes: int, block_bytes: int, logical_sector_bytes: int, has_parent: bool = False
    ) -> BatGeometry:
        """Return the geometry of a disk with validated parameters.

        A differencing disk has the sector-bitmap entry of its last chunk too. Spec: [MS-VHDX] 2.4, 2.5.
        """
        chunk_ratio = SECTORS_PER_BITMAP_BLOCK * logical_sector_bytes // block_bytes
        block_count = -(-virtual_bytes // block_bytes)
        entry_count = block_count + (block_count - 1) // chunk_ratio
        if has_parent:
            entry_count = -(-block_count // chunk_ratio) * (chunk_ratio + 1)
        return BatGeometry(block_bytes, chunk_ratio, block_count, entry_count)

    @property
    def chunk_count(self) -> int:
        """How many chunks, each with a sector-bitmap entry where there is a parent, hold the disk."""
        return -(-self.block_count // self.chunk_ratio)

    def bitmap_index_of(self, chunk: int) -> int:
        """Return the index of the entry of a chunk's sector-bitmap block."""
        return (chunk + 1) * (self.chunk_ratio + 1) - 1

    def index_of(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """Return the entries' indices of `blocks`."""
        indices: NDArray[Any] = blocks + blocks // self.chunk_ratio
        return indices

    def block_of(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Return the blocks of payload entries; for a sector-bitmap entry the block after it."""
        blocks: NDArray[Any] = indices - indices // (self.chunk_ratio + 1)
        return blocks

    def is_payload(self, indices: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which of `indices` are payload entries of this disk."""
        payload: NDArray[np.bool_] = (indices % (self.chunk_ratio + 1) != self.chunk_ratio) & (
            self.block_of(indices) < self.block_count
        )
        return payload

    def is_used(self, indices: NDArray[Any], *, has_parent: bool) -> NDArray[np.bool_]:
        """Return which of `indices` are entries that the disk needs: payload, and bitmaps with a parent."""
        used = self.is_payload(indices)
        if has_parent:
            used |= (indices % (self.chunk_ratio + 1) == self.chunk_ratio) & (indices < self.entry_count)
        return used


def states_of(entries: NDArray[Any]) -> NDArray[Any]:
    """Return the state of each entry."""
    return entries & np.uint64(STATE_MASK)


def is_present(entries: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which entries have their data in the file."""
    present: NDArray[np.bool_] = states_of(entries) == np.uint64(PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT)
    return present


def has_place(entries: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which entries have a place in the file that holds all of their data or some of it."""
    placed: NDArray[np.bool_] = _STATE_HAS_PLACE[states_of(entries).astype(np.intp)]
    return placed


def offsets_of(entries: NDArray[Any]) -> NDArray[np.int64]:
    """Return the file offset of each entry; a place beyond 2**63 becomes negative and fails every bound."""
    return (entries & np.uint64(OFFSET_MASK)).view(np.int64)


def is_anchored(entries: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which entries without data still hold a place in the file that no other block may get."""
    anchored: NDArray[np.bool_] = _STATE_ANCHORS[states_of(entries).astype(np.intp)] & (
        offsets_of(entries) != 0
    )
    return anchored


def present_entry(file_offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the entries of blocks whose data stands at `file_offsets`, multiples of 1 MiB."""
    return file_offsets.view(np.uint64) | np.uint64(PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT)


def validate_entries(
    entries: NDArray[Any], *, file_offset: int, indices: NDArray[Any], has_parent: bool = False
) -> None:
    """Check state and reserved bits of payload entries by themselves.

    indices: of `entries` in the table; file_offset: of the table, both for messages. Raises: FieldOutOfRange.
    """
    states = _STATE_ALLOWED_WITH_PARENT if has_parent else _STATE_ALLOWED
    allowed = states[states_of(entries).astype(np.intp)]
    if not allowed.all():
        at = int(np.argmin(allowed))
        raise _entry_error(
            FieldOutOfRange,
            f"a BAT entry has a state that a disk {'with' if has_parent else 'without'} a parent cannot have",
            at=file_offset + int(indices[at]) * BAT_ENTRY_BYTES,
            field="state",
            expected="0, 1, 2, 3, 6 or 7" if has_parent else "0, 1, 2, 3 or 6",
            actual=int(entries[at]) & STATE_MASK,
        )
    dirty = has_place(entries) & ((entries & np.uint64(RESERVED_MASK)) != 0)
    if dirty.any():
        at = int(np.argmax(dirty))
        raise _entry_error(
            FieldOutOfRange,
            "a BAT entry has reserved bits set",
            at=file_offset + int(indices[at]) * BAT_ENTRY_BYTES,
            field="reserved",
            expected=0,
            actual=f"0x{int(entries[at]) & RESERVED_MASK:x}",
        )


def validate_bitmap_entries(entries: NDArray[Any], *, file_offset: int, indices: NDArray[Any]) -> None:
    """Check the state of sector-bitmap entries of a differencing disk. Raises: FieldOutOfRange."""
    allowed = _BITMAP_STATE_ALLOWED[states_of(entries).astype(np.intp)]
    if not allowed.all():
        at = int(np.argmin(allowed))
        raise FieldOutOfRange(
            "the BAT entry of a sector bitmap has a state that it cannot have",
            offset=file_offset + int(indices[at]) * BAT_ENTRY_BYTES,
            field="state",
            expected="0 or 6",
            actual=int(entries[at]) & STATE_MASK,
            spec="[MS-VHDX] 2.5.1.2",
        )


def validate_entries_within(
    entries: NDArray[Any],
    *,
    file_offset: int,
    indices: NDArray[Any],
    block_bytes: int,
    file_size_bytes: int,
    structures: Sequence[tuple[int, int, str]],
) -> None:
    """Check that blocks with a place lie in the file and outside of its structures.

    block_bytes: of these blocks; 1 MiB for sector bitmaps. structures: (file_offset, length, name), the
    header section among them. Raises: Truncated, Overlap.
    """
    chosen = np.flatnonzero(has_place(entries))
    offsets = offsets_of(entries[chosen])
    outside = (offsets < 0) | (offsets > file_size_bytes - block_bytes)
    if outside.any():
        at = int(np.argmax(outside))
        raise _entry_error(
            Truncated,
            "a BAT entry points beyond the end of the file",
            at=file_offset + int(indices[chosen[at]]) * BAT_ENTRY_BYTES,
            field="file_offset_mb",
            expected=f"a block of {block_bytes} bytes within {file_size_bytes}",
            actual=int(entries[chosen[at]]) >> 20,
        )
    for start, length, name in structures:
        inside = (offsets < start + length) & (offsets + block_bytes > start)
        if inside.any():
            at = int(np.argmax(inside))
            raise _entry_error(
                Overlap,
                f"a BAT entry points into the {name}",
                at=file_offset + int(indices[chosen[at]]) * BAT_ENTRY_BYTES,
                field="file_offset_mb",
                expected=f"outside of {start // ALIGNMENT_BYTES} to {(start + length) // ALIGNMENT_BYTES}",
                actual=int(entries[chosen[at]]) >> 20,
            )


def validate_apart(ranges: NDArray[np.int64]) -> None:
    """Check that no two blocks share bytes of the file.

    ranges: (file_offset, length), sorted. Raises: Overlap.
    """
    shared = ranges[1:, 0] < ranges[:-1].sum(axis=1)
    if shared.any():
        at = int(np.argmax(shared))
        first, second = ranges[at].tolist(), ranges[at + 1].tolist()
        raise Overlap(
            "two BAT entries point to the same place",
            offset=second[0],
            field="file_offset_mb",
            expected=f"a block of {second[1]} bytes behind one of {first[1]}",
            actual=f"{second[0] >> 20} and {first[0] >> 20}",
            spec=BAT_ENTRY.spec,
            hint="the disk is damaged: of two blocks one overwrote the other; restore it from a copy",
        )


def _entry_error(
    kind: type[FormatError], message: str, *, at: int, field: str, expected: object, actual: object
) -> FormatError:
    spec = "[MS-VHDX] 2.5.1.1" if field == "state" else BAT_ENTRY.spec
    return kind(message, offset=at, field=field, expected=expected, actual=actual, spec=spec)
