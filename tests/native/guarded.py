"""Run in a process of its own: buffers that end where the address space does, so that a byte too far is a fault."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import xxhash

from hvreplica.native import reference
from hvreplica.native.kernels import Kernels
from hvreplica.native.library import available_variants

PAGE = mmap.PAGESIZE
LENGTHS = [*range(700), 1023, 1024, 1025, 2047, 2303, 4095, 4096]


class Guarded:
    """A page whose neighbours on both sides cannot be touched."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 3 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for page in (0, 2):
            assert protect(start + page * PAGE, PAGE, 0) == 0
        self._page = np.frombuffer(self._map, np.uint8, PAGE, PAGE)

    def at_end(self, data: bytes) -> np.ndarray:
        """Return a copy of `data` that ends at the end of the page."""
        view = self._page[PAGE - len(data) :]
        view[:] = np.frombuffer(data, np.uint8)
        return view

    def at_start(self, data: bytes) -> np.ndarray:
        """Return a copy of `data` that begins at the start of the page."""
        view = self._page[: len(data)]
        view[:] = np.frombuffer(data, np.uint8)
        return view


def check(kernels: Kernels, first: np.ndarray, second: np.ndarray) -> None:
    """Call what reads or writes a buffer with buffers at the edge."""
    data = first.tobytes()
    assert kernels.crc32c(first) == reference.crc32c(data)
    assert kernels.byte_sum(first) == reference.byte_sum(data)
    assert not kernels.is_zero(first) or not data.strip(b"\0")
    assert kernels.first_difference(first, second) == -1
    assert kernels.bitmap_count(first) == reference.bitmap_count(data)
    kernels.bitmap_runs(first, len(first) * 8)
    kernels.bitmap_merge(first, second)
    kernels.data_runs(first, 64)
    kernels.changed_runs(first, second, 64)
    assert kernels.page_digest(first, 7) == reference.page_digest(data, 7)
    if data.strip(b"\0"):
        assert kernels.fingerprints(first, len(first)).tobytes() == xxhash.xxh3_128_digest(data)
    zeros = np.zeros_like(first)
    first[:] = second[:] = zeros
    assert kernels.is_zero(first)
    assert kernels.first_difference(first, second) == -1
    kernels.bitmap_set(first, 0, len(first) * 8)
    assert kernels.bitmap_runs(first, len(first) * 8).tolist() == (
        [[0, len(first) * 8]] if len(first) else []
    )


def main() -> None:
    """Run all variants over all lengths."""
    rng = np.random.default_rng(42)
    one, two = Guarded(), Guarded()
    for variant in available_variants():
        kernels = Kernels(variant)
        for length in LENGTHS:
            data = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
            check(kernels, one.at_end(data), two.at_end(data))
            check(kernels, one.at_start(data), two.at_start(data))


if __name__ == "__main__":
    main()
