"""Plan which parts of a file to move from its end into gaps, so that it can be cut. Pure.

A target is a gap that is there at the start, never a place that an earlier move has left: so no move waits
for another to be durable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk.extents import merge

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


class Moves(NamedTuple):
    """What to move: which of the parts, and to which file offset each; parts of one length in file order."""

    parts: NDArray[np.int64]
    targets: NDArray[np.int64]


def plan_moves(
    movable: NDArray[np.int64],
    pinned: NDArray[np.int64],
    *,
    floor: int,
    aligned: Callable[[int], int],
) -> Moves:
    """Return the moves that make the end of the last part the smallest, from the last part down.

    movable, pinned: int64 (n, 2) of (file_offset, length) of all that is in use, disjoint. floor: nothing
    goes below. aligned: returns the first place from an offset on. It stops where a part does not fit into
    any gap before it: then the file ends there, whatever lies before.
    """
    gaps = _gaps(np.concatenate((movable, pinned)), floor)
    end = int(pinned.sum(axis=1).max(initial=0))
    first_gap: dict[int, int] = {}
    found: dict[int, list[tuple[int, int]]] = {}
    for part in np.argsort(movable[:, 0], kind="stable")[::-1].tolist():
        start, length = movable[part].tolist()
        if start + length <= end:
            break
        place = _take(gaps, first_gap, length, aligned)
        if place is None or place >= start:
            break
        end = max(end, place + length)
        found.setdefault(length, []).append((part, place))
    # Parts and gaps both in the order of the file: what was read in order still is.
    moved = [part for pairs in found.values() for part, _ in reversed(pairs)]
    targets = [place for pairs in found.values() for _, place in pairs]
    return Moves(np.array(moved, np.int64), np.array(targets, np.int64))


def place_before(
    start: int, length: int, used: NDArray[np.int64], *, floor: int, aligned: Callable[[int], int]
) -> int | None:
    """Return the first place for `length` bytes in a gap before `start` of what is `used`, else None."""
    gaps = _gaps(np.concatenate((used[used[:, 0] < start], [[start, 1]])), floor)
    return _take(gaps, {}, length, aligned)


def _gaps(used: NDArray[np.int64], floor: int) -> list[list[int]]:
    busy = merge(used)
    gaps = np.column_stack((busy.sum(axis=1)[:-1], busy[1:, 0]))
    gaps[:, 0] = np.maximum(gaps[:, 0], floor)
    found: list[list[int]] = gaps[gaps[:, 0] < gaps[:, 1]].tolist()
    return found


def _take(
    gaps: list[list[int]], first_gap: dict[int, int], length: int, aligned: Callable[[int], int]
) -> int | None:
    """Take the first place of `length` bytes out of the gaps. first_gap: by length, where to look first."""
    for at in range(first_gap.get(length, 0), len(gaps)):
        place = aligned(gaps[at][0])
        first_gap[length] = at  # gaps only become smaller: those before never fit again
        if place + length <= gaps[at][1]:
            gaps[at][0] = place + length
            return place
    return None
