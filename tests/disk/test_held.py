"""What a file holds of a disk's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.disk.held import held_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 8


class Held:
    """Stands for a file: only `octets` are data. asked: the questions that it was asked."""

    def __init__(self, octets: set[int]) -> None:
        self._octets = octets
        self.asked: list[tuple[int, int]] = []

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        self.asked.append((start, end))
        position = start
        while position < end:
            stop = position
            while stop < end and stop in self._octets:
                stop += 1
            if stop > position:
                yield position, stop - position
            position = stop + 1


@given(
    places=st.permutations(range(8)).flatmap(lambda all_: st.integers(0, 8).map(lambda count: all_[:count])),
    holes=st.sets(st.integers(0, 8 * BLOCK - 1)),
)
def test_held_parts_are_the_octets_that_the_file_holds(places: list[int], holes: set[int]) -> None:
    octets = set(range(8 * BLOCK)) - holes
    ranges = np.array([(1000 + i * BLOCK, BLOCK, place * BLOCK) for i, place in enumerate(places)], np.int64)
    found = held_parts(Held(octets), ranges.reshape(-1, 3))  # type: ignore[arg-type]
    seen = [
        (disk_offset + i, file_offset + i)
        for disk_offset, length, file_offset in found.tolist()
        for i in range(length)
    ]
    wanted = [
        (1000 + i * BLOCK + at, place * BLOCK + at)
        for i, place in enumerate(places)
        for at in range(BLOCK)
        if place * BLOCK + at in octets
    ]
    assert sorted(seen) == sorted(wanted)
    assert len(set(seen)) == len(seen)


def test_blocks_that_are_neighbours_in_the_file_are_asked_for_once() -> None:
    size = 16384
    file = Held(set())
    places = [3, 1, 2, 7]
    rows = [
        (i * size, size, place * size + 512 * place) for i, place in enumerate(places)
    ]  # bitmaps between them
    held_parts(file, np.array(rows))  # type: ignore[arg-type]
    gap = 4096
    assert file.asked == [(size + 512, 4 * size + 1536 + gap), (7 * size + 3584, 8 * size + 3584 + gap)]
