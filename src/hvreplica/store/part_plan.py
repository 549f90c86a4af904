"""Which undo parts of a point and disk are written anew, so that neither dead bytes nor files pile up. Pure.

Parts are read in order and the first that covers a byte counts, so what an earlier part covers is dead in a
later one. Parts may be written as one only where they follow each other.

    gone      a part without a live byte is forgotten; nothing is written
    merged    MERGE_MIN or more parts in a row become one where none has more than 1/GROWTH of their bytes
    trimmed   a part of which more than DEAD_SHARE is dead is written without it

What is written is paid for: trimming writes less than twice what dies there, and a byte dies once; merging
makes the part that a byte is in GROWTH times as large, so that n bytes that arrived in any pieces are written
O(log n) times. Where nothing is left to merge, the number of parts is O(log n) too: of any MERGE_MIN in a row
one has more than 1/GROWTH of all.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MERGE_MIN = 8
GROWTH = 4
DEAD_SHARE = 1 / 3


class Rewrite(NamedTuple):
    """Parts first..last, without last, become one part of live_bytes; none, where that is 0."""

    first: int
    last: int
    live_bytes: int


def choose_merge(sizes: Sequence[int]) -> tuple[int, int] | None:
    """Return the cheapest run (first, last), without last, of parts that are to become one; None if none is.

    sizes: the live bytes of the parts, in order.
    """
    best: tuple[int, int] | None = None
    best_bytes = 0
    for first in range(len(sizes) - MERGE_MIN + 1):
        total = largest = 0
        for last in range(first, len(sizes)):
            total += sizes[last]
            largest = max(largest, sizes[last])
            if best is not None and total >= best_bytes:
                break
            if last + 1 - first >= MERGE_MIN and GROWTH * largest <= total:
                best, best_bytes = (first, last + 1), total
                break
    return best


def plan_rewrites(
    covered: Sequence[int], live: Sequence[int], *, bytes_max: int | None = None
) -> list[Rewrite]:
    """Return what is to be done, as runs that do not touch each other's parts, in order.

    covered: the bytes that each part covers. live: those of them that no earlier part covers. bytes_max:
    write no more than this, and so merge nothing: what merging would write is not bounded by what came last.
    """
    runs = [Rewrite(place, place + 1, size) for place, size in enumerate(live) if size]
    while bytes_max is None and (chosen := choose_merge([run.live_bytes for run in runs])) is not None:
        first, last = chosen
        whole = Rewrite(
            runs[first].first, runs[last - 1].last, sum(run.live_bytes for run in runs[first:last])
        )
        runs[first:last] = [whole]
    wanted = [
        run for run in runs if run.last - run.first > 1 or _is_wasteful(covered[run.first], run.live_bytes)
    ]
    if bytes_max is not None:
        total = accumulate(run.live_bytes for run in wanted)
        wanted = [run for run, written in zip(wanted, total, strict=True) if written <= bytes_max]
    kept = {place for run in wanted for place in range(run.first, run.last)}
    gone = [Rewrite(place, place + 1, 0) for place, size in enumerate(live) if not size and place not in kept]
    return sorted(wanted + gone)


def _is_wasteful(covered_bytes: int, live_bytes: int) -> bool:
    return covered_bytes - live_bytes > DEAD_SHARE * covered_bytes
