"""Bytes and writes for tests: the same seed gives the same data on every machine."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORDS = (
    b"replica",
    b"guest",
    b"block",
    b"extent",
    b"sector",
    b"the",
    b"of",
    b"a",
    b"log",
    b"point",
    b"write",
    b"\n",
)


def random_bytes(length: int, seed: int = 0) -> bytes:
    """Return bytes that no codec can shrink."""
    return random.Random(seed).randbytes(length)


def text_bytes(length: int, seed: int = 0) -> bytes:
    """Return bytes that shrink about as text does."""
    rng = random.Random(seed)
    words = b" ".join(rng.choices(_WORDS, k=min(length, 1 << 16) // 3 + 1))
    return (words * (length // len(words) + 1))[:length]


def mixed_bytes(length: int, seed: int = 0, *, block_bytes: int = 4096) -> bytes:
    """Return blocks that are each zero, random, text-like, or zero but for a few bytes."""
    rng = random.Random(seed)
    text = text_bytes(block_bytes * 4, seed)
    pieces = []
    for _ in range(-(-length // block_bytes)):
        kind = rng.randrange(4)
        if kind == 0:
            pieces.append(bytes(block_bytes))
        elif kind == 1:
            pieces.append(rng.randbytes(block_bytes))
        elif kind == 2:
            at = rng.randrange(len(text) - block_bytes + 1)
            pieces.append(text[at : at + block_bytes])
        else:
            piece = bytearray(block_bytes)
            piece[rng.randrange(block_bytes)] = rng.randrange(1, 256)
            pieces.append(bytes(piece))
    return b"".join(pieces)[:length]


def random_extents(
    count: int,
    *,
    disk_bytes: int,
    seed: int = 0,
    sector_bytes: int = 512,
    length_bytes_max: int = 64 << 10,
    disjoint: bool = False,
) -> NDArray[np.uint64]:
    """Return up to `count` sector-aligned (offset, length) inside the disk, shape (n, 2).

    disjoint: sorted, not overlapping, and then fewer where the disk is too small. Otherwise in the order
    drawn, and overlaps are likely on a small disk.
    """
    rng = random.Random(seed)
    sectors = disk_bytes // sector_bytes
    rows = []
    for _ in range(count):
        length = min(rng.randint(1, max(length_bytes_max // sector_bytes, 1)), sectors)
        rows.append((rng.randint(0, sectors - length), length))
    if disjoint:
        kept: list[tuple[int, int]] = []
        for offset, length in sorted(rows):
            if not kept or offset >= sum(kept[-1]):
                kept.append((offset, length))
        rows = kept
    return np.array(rows, dtype=np.uint64).reshape(-1, 2) * np.uint64(sector_bytes)


def flip_bits(data: bytes, count: int, seed: int = 0) -> bytes:
    """Return `data` with `count` bits changed, drawn with repetition."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
