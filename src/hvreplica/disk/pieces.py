"""Pieces of extents, each in one block: choose, join, order and look at them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk.extents import Pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray


def chosen(pieces: Pieces, flags: NDArray[np.bool_]) -> Pieces:
    """Return the pieces whose flag is set."""
    return Pieces(*(column[flags] for column in pieces))


def joined_runs(pieces: Pieces, file_offsets: NDArray[np.int64] | None) -> list[tuple[int, int, int]]:
    """Return (disk_offset, length, file_offset) of pieces, joined where both continue; -1 where not given."""
    if not len(pieces.block):
        return []
    breaks = pieces.disk_offset[1:] != (pieces.disk_offset + pieces.length)[:-1]
    offsets = np.full(len(pieces.block), -1, np.int64)
    if file_offsets is not None:
        offsets = file_offsets
        breaks |= offsets[1:] != (offsets + pieces.length)[:-1]
    heads = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    lengths = np.add.reduceat(pieces.length, heads)
    return list(
        zip(pieces.disk_offset[heads].tolist(), lengths.tolist(), offsets[heads].tolist(), strict=True)
    )


def joined(a: Pieces, b: Pieces) -> Pieces:
    """Return the pieces of both in the order of their data, so that neighbours are read with one call."""
    both = Pieces(*(np.concatenate(columns) for columns in zip(a, b, strict=True)))
    order = np.argsort(both.data_offset, kind="stable")
    return Pieces(*(column[order] for column in both))


def in_order(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each of `blocks` once, in the order of first use: a fill in order lies in order in the file."""
    unique, first_seen = np.unique(blocks, return_index=True)
    ordered: NDArray[np.int64] = unique[np.argsort(first_seen)]
    return ordered


def are_zero(view: memoryview, pieces: Pieces, wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of all pieces are among `wanted` and hold zeros only."""
    octets = np.frombuffer(view, np.uint8)
    zero = np.zeros(len(pieces.block), bool)
    starts, lengths = pieces.data_offset[wanted], pieces.length[wanted]
    # One byte of each settles most pieces of real data in one step; the rest is looked at one by one.
    likely = wanted[(octets[starts] | octets[starts + lengths // 2]) == 0]
    for index in likely.tolist():
        start = int(pieces.data_offset[index])
        zero[index] = native.is_zero(view[start : start + int(pieces.length[index])])
    return zero
