"""The tables that kernels read and write, and the errors they raise: shared by the facade and its reference.

Extents are C-contiguous int64 or uint64 arrays of shape (n, 2) with rows (offset, length), both in bytes.
Kernels that find runs return int64; coalesce() returns uint64 as the log's own fields are. Never mix the two
in one numpy expression: numpy would make floats of them, and offsets above 2**53 would lose bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

Array: TypeAlias = "NDArray[Any]"
Octets: TypeAlias = "Buffer | NDArray[Any]"  # numpy arrays are no Buffer to mypy before Python 3.12

HRL_ENTRY_BYTES = 32  # [MS-HRL] 2.4
HRL_METADATA_HEADER_BYTES = 32  # [MS-HRL] 2.3
HRL_META_OPERATION_WRITE = 1  # [MS-HRL] 2.4: "Only write operation (value:1) is supported"

PAGE_BYTES = 4096  # what page_digest() takes as one

# Aligned to 32 bytes per row, so that numpy reads every field with one load.
HRL_ENTRY = np.dtype(
    [
        ("byte_offset", "<u8"),
        ("log_offset", "<u8"),
        ("data_length", "<u4"),
        ("time_stamp", "<u4"),
        ("data_checksum", "<u4"),
        ("meta_operation", "u1"),
    ],
    align=True,
)

PAYLOAD_BLOCK_FULLY_PRESENT = 6  # [MS-VHDX] 2.5.1.1
PAYLOAD_BLOCK_PARTIALLY_PRESENT = 7
BAT_STATE_MASK = 0x7
BAT_FILE_OFFSET_MASK = 0xFFFF_FFFF_FFF0_0000  # FileOffsetMB is in whole MiB, [MS-VHDX] 2.5.1
FILE_OFFSET_MAX = (1 << 63) - 1  # off_t


class BadEntry(Exception):
    """Tell which metadata entry of a block is damaged; the HRL layer turns it into a FormatError with its
    place.

    index: of the entry in its block. reason: "checksum" or "meta_operation".
    """

    def __init__(self, index: int, reason: str, expected: int, actual: int) -> None:
        super().__init__(f"entry {index}: {reason} is {actual}, expected {expected}")
        self.index = index
        self.reason = reason
        self.expected = expected
        self.actual = actual


class BlockAbsent(Exception):
    """Tell that a write touches a block without a place in the file; nothing was written."""

    def __init__(self, block: int) -> None:
        super().__init__(f"block {block} has no place in the file yet")
        self.block = block


class BlockMap:
    """Where each block of the guest's disk stands in its file: raw VHDX BAT entries, read in place by the
    kernels.

    entries: one-dimensional C-contiguous native uint64 array; kept and not copied, so that a change by its
    owner is seen by the next call. Guest block b is entries[b + b // chunk_ratio], or entries[b] where
    chunk_ratio is 0. A block is present where entry & 7 == 6, and then stands at file offset entry &
    offset_mask. One in state 7 has a place that is written, and is read as absent: only a sector bitmap knows
    what of it counts. Thread rule: an entry may change while a call runs only for blocks that the call does
    not touch.
    """

    __slots__ = ("block_bytes", "chunk_ratio", "entries", "offset_mask")

    def __init__(
        self, entries: Array, block_bytes: int, chunk_ratio: int, offset_mask: int = BAT_FILE_OFFSET_MASK
    ) -> None:
        if entries.dtype != np.dtype(np.uint64) or entries.ndim != 1:
            message = "entries must be a one-dimensional array of native uint64"
            raise TypeError(message)
        if not entries.flags.c_contiguous:
            message = "entries must be C-contiguous: they are read in place"
            raise TypeError(message)
        if block_bytes <= 0 or chunk_ratio < 0:
            message = (
                f"a block map needs block_bytes > 0 and chunk_ratio >= 0, not {block_bytes} and {chunk_ratio}"
            )
            raise ValueError(message)
        self.entries = entries
        self.block_bytes = block_bytes
        self.chunk_ratio = chunk_ratio
        self.offset_mask = offset_mask

    def file_offset(self, block: int, *, for_write: bool = False) -> int | None:
        """Return where `block` stands in the file, None where it is absent.

        for_write: a block in state 7 has a place too. Raises: IndexError outside of the map.
        """
        index = block + (block // self.chunk_ratio if self.chunk_ratio else 0)
        if not 0 <= block <= index < len(self.entries):
            message = f"block {block} is outside of the block map"
            raise IndexError(message)
        entry = int(self.entries[index])
        state = entry & BAT_STATE_MASK
        if state == PAYLOAD_BLOCK_FULLY_PRESENT or (for_write and state == PAYLOAD_BLOCK_PARTIALLY_PRESENT):
            return entry & self.offset_mask
        return None


def view_of(buffer: Octets) -> memoryview:
    """Return the bytes of a C-contiguous buffer, writable where it is, as a one-dimensional view."""
    view = memoryview(cast("Any", buffer))
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def checked_extents(extents: Array) -> Array:
    """Return `extents` as a C-contiguous uint64 array of shape (n, 2), a view where it can be one.

    A negative int64 becomes a number above 2**63, which every kernel refuses as out of range.
    """
    array = np.asarray(extents)
    if array.size == 0:
        return np.empty((0, 2), np.uint64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu" or array.dtype.itemsize != 8:
        message = f"extents must be int64 or uint64 of shape (n, 2), not {array.dtype} of shape {array.shape}"
        raise TypeError(message)
    return np.ascontiguousarray(array).view(np.uint64)


def checked_pieces(pieces: Array) -> Array:
    """Return `pieces` as a C-contiguous uint64 array of shape (n, 3); -1 becomes 2**64 - 1."""
    array = np.asarray(pieces)
    if array.size == 0:
        return np.empty((0, 3), np.uint64)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu" or array.dtype.itemsize != 8:
        message = f"pieces must be int64 or uint64 of shape (n, 3), not {array.dtype} of shape {array.shape}"
        raise TypeError(message)
    return np.ascontiguousarray(array).view(np.uint64)


def checked_column(values: Array) -> Array:
    """Return `values` as a C-contiguous one-dimensional uint64 array, a view where it can be one."""
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.uint64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        message = f"expected a one-dimensional array of integers, not {array.dtype} of shape {array.shape}"
        raise TypeError(message)
    if array.dtype.itemsize == 8:
        return np.ascontiguousarray(array).view(np.uint64)
    return array.astype(np.uint64)
