"""Kernels over bytes and bitmaps: checksums, digests, runs of data or of change, sets of bits.

Each call costs about 1 us beside its work, so below some 200 bytes plain Python is as fast. The GIL is
released: buffers must not change during a call, and a bitmap has one writer at a time. Buffers are
C-contiguous; nothing is copied and nothing kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.native.library import (
    CHOSEN_VARIANT,
    VARIANTS,
    ffi,
    lib,
    octets,
    u32s,
    u64s,
    writable_i64s,
    writable_octets,
)
from hvreplica.native.tables import PAGE_BYTES, Array, checked_column, checked_extents

if TYPE_CHECKING:
    from hvreplica.native.tables import Octets

DIGEST_BYTES = 16
_RUNS_FIRST_COUNT = 1024
_RUNS_COUNT_MAX = 1 << 20


def _positive(name: str, value: int) -> int:
    if value <= 0:
        message = f"{name} must be above 0, not {value}"
        raise ValueError(message)
    return value


def _check_equal_length(first: int, second: int) -> None:
    if first != second:
        message = f"buffers of equal length are needed, not {first} and {second} bytes"
        raise ValueError(message)


class Kernels:
    """One variant of the kernels; all variants give the same answers. Holds no state, so any thread may use
    it.
    """

    __slots__ = ("_variant", "variant")

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self._variant = VARIANTS[variant]

    def crc32c(self, buffer: Octets, value: int = 0) -> int:
        """Return the CRC-32C of `buffer`, continuing from an earlier result `value`. Spec: RFC 3720 12.1."""
        view = octets(buffer)
        return int(lib.hvr_crc32c(self._variant, view, len(view), value))

    def byte_sum(self, buffer: Octets) -> int:
        """Return the sum of all bytes modulo 2**32. Spec: [MS-HRL] 2.6, before the complement."""
        view = octets(buffer)
        return int(lib.hvr_byte_sum(self._variant, view, len(view)))

    def byte_sums(self, buffer: Octets, lengths: Array) -> Array:
        """Return byte_sum() of each consecutive piece of `buffer` as uint32.

        lengths: bytes of each piece. Raises: ValueError unless they add up to the length of the buffer.
        """
        view, sizes = octets(buffer), checked_column(lengths)
        sums = np.empty(len(sizes), np.uint32)
        if (
            lib.hvr_byte_sums(self._variant, view, len(view), u64s(sizes), len(sizes), u32s(sums))
            != lib.HVR_OK
        ):
            message = f"the lengths add up to {sum(sizes.tolist())}, the buffer has {len(view)} bytes"
            raise ValueError(message)
        return sums

    def is_zero(self, buffer: Octets) -> bool:
        """Return whether all bytes are 0; True for an empty buffer."""
        view = octets(buffer)
        return bool(lib.hvr_zero_prefix(self._variant, view, len(view)) == len(view))

    def data_runs(self, buffer: Octets, grain_bytes: int = 4096) -> Array:
        """Return the runs of grains that hold any non-zero byte as int64 rows (offset, length) in bytes.

        Grains begin at the start of the buffer; the last one may be short, and then so is its run.
        """
        view = octets(buffer)
        runs = np.empty((len(view) // _positive("grain_bytes", grain_bytes) // 2 + 1, 2), np.int64)
        count = lib.hvr_data_runs(self._variant, view, len(view), grain_bytes, writable_i64s(runs), len(runs))
        return runs[:count].copy()

    def first_difference(self, a: Octets, b: Octets) -> int:
        """Return the offset of the first byte that differs, -1 where none does. Raises: ValueError on unequal
        length.
        """
        first, second = octets(a), octets(b)
        _check_equal_length(len(first), len(second))
        equal_bytes = int(lib.hvr_equal_prefix(self._variant, first, second, len(first)))
        return -1 if equal_bytes == len(first) else equal_bytes

    def changed_runs(self, a: Octets, b: Octets, grain_bytes: int) -> Array:
        """Return the runs of grains that differ as int64 rows (offset, length) in bytes, as data_runs() does.

        Raises: ValueError on unequal length.
        """
        first, second = octets(a), octets(b)
        _check_equal_length(len(first), len(second))
        runs = np.empty((len(first) // _positive("grain_bytes", grain_bytes) // 2 + 1, 2), np.int64)
        target = writable_i64s(runs)
        count = lib.hvr_changed_runs(self._variant, first, second, len(first), grain_bytes, target, len(runs))
        return runs[:count].copy()

    def fingerprints(self, buffer: Octets, block_bytes: int, out: Array | None = None) -> Array:
        """Return a digest of each block as uint8 rows of 16 bytes.

        A row is the canonical XXH3-128 of its block, or 16 zero bytes for a block of zeros; the last block
        may be short. out: a C-contiguous array to fill instead of a new one, of exactly as many rows as there
        are blocks.
        """
        view = octets(buffer)
        count = -(-len(view) // _positive("block_bytes", block_bytes))
        target = np.empty((count, DIGEST_BYTES), np.uint8) if out is None else out
        if target.shape != (count, DIGEST_BYTES) or target.dtype != np.uint8 or not target.flags.c_contiguous:
            message = f"out must be C-contiguous uint8 of shape ({count}, {DIGEST_BYTES})"
            raise ValueError(message)
        lib.hvr_fingerprints(self._variant, view, len(view), block_bytes, writable_octets(target), count)
        return target

    def page_digest(self, buffer: Octets, first_page: int) -> tuple[int, int]:
        """Return the two sums, modulo 2**64, of what the 4096-byte pages in `buffer` count at their place.

        first_page: number on its disk of the page that begins the buffer. The last page may be short and is
        taken as if zeros followed; a page of zeros counts nothing. So the sums of a disk are those of its
        parts, and do not depend on its size. Raises: OverflowError beyond 64 bits.
        """
        view = octets(buffer)
        sums = ffi.new("uint64_t[2]")
        lib.hvr_page_digest(self._variant, view, len(view), first_page, sums)
        return int(sums[0]), int(sums[1])

    def extents_digest(self, buffer: Octets, extents: Array) -> tuple[int, int]:
        """Return page_digest() of what the extents hold: their bytes, one after another, in `buffer`.

        A short last page of an extent is taken as if zeros followed. Raises: ValueError unless the extents
        begin with a page and add up to the length of the buffer.
        """
        view, rows = octets(buffer), checked_extents(extents)
        sums = ffi.new("uint64_t[2]")
        status = lib.hvr_extents_digest(self._variant, view, len(view), u64s(rows), len(rows), sums)
        if status != lib.HVR_OK:
            message = (
                f"an extent does not begin with a page of {PAGE_BYTES} bytes"
                if status == lib.HVR_OUT_OF_RANGE
                else f"the extents do not add up to the {len(view)} bytes of the buffer"
            )
            raise ValueError(message)
        return int(sums[0]), int(sums[1])

    def bitmap_set(self, bitmap: Octets, first: int, count: int) -> None:
        """Set bits [first, first + count), least significant first. Raises: IndexError if one is outside."""
        _change_bits(bitmap, first, count, 1)

    def bitmap_clear(self, bitmap: Octets, first: int, count: int) -> None:
        """Clear bits [first, first + count). Raises: IndexError if one is outside."""
        _change_bits(bitmap, first, count, 0)

    def bitmap_runs(self, bitmap: Octets, bit_count: int) -> Array:
        """Return the runs of set bits among the first `bit_count` as int64 rows (first, count), in bits.

        Raises: IndexError if the bitmap has fewer bits.
        """
        view = octets(bitmap)
        if not 0 <= bit_count <= len(view) * 8:
            message = f"{bit_count} bits were asked of a bitmap of {len(view) * 8}"
            raise IndexError(message)
        parts = []
        position = ffi.new("uint64_t *", 0)
        capacity = _RUNS_FIRST_COUNT
        while position[0] < bit_count:
            runs = np.empty((capacity, 2), np.int64)
            target = writable_i64s(runs)
            count = lib.hvr_bitmap_runs(self._variant, view, len(view), position, bit_count, target, capacity)
            parts.append(runs[:count])
            capacity = min(capacity * 2, _RUNS_COUNT_MAX)
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def bitmap_merge(self, target: Octets, other: Octets) -> None:
        """Set in `target` every bit that is set in `other`. Raises: ValueError on unequal length."""
        first, second = writable_octets(target), octets(other)
        _check_equal_length(len(first), len(second))
        lib.hvr_bitmap_merge(self._variant, first, second, len(first))

    def bitmap_count(self, bitmap: Octets) -> int:
        """Return how many bits are set."""
        view = octets(bitmap)
        return int(lib.hvr_bitmap_count(self._variant, view, len(view)))


def _change_bits(bitmap: Octets, first: int, count: int, value: int) -> None:
    view = writable_octets(bitmap)
    inside = first >= 0 and count >= 0 and first + count <= len(view) * 8
    if not inside or lib.hvr_bitmap_change(view, len(view), first, count, value) != lib.HVR_OK:
        message = f"bits {first}..{first + count} are outside of a bitmap of {len(view) * 8}"
        raise IndexError(message)


KERNELS = Kernels(CHOSEN_VARIANT)
