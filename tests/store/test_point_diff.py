"""What two points differ in, against the bytes of both."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvreplica.errors import NoSuchPoint
from hvreplica.store.point_diff import diff_points
from tests.store.point_world import MIB, PAGE, PointWorld, random_writes

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.store.point_diff import DiskDiff

SECTOR = 512


def different_sectors(a: bytes, b: bytes) -> list[tuple[int, int]]:
    """Return the runs of sectors that differ; what only the longer one has is one of them."""
    length = max(len(a), len(b))
    flags = np.ones(length // SECTOR, bool)
    common = min(len(a), len(b)) // SECTOR
    tables = [np.frombuffer(each, np.uint8)[: common * SECTOR].reshape(common, SECTOR) for each in (a, b)]
    flags[:common] = (tables[0] != tables[1]).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [
        (start * SECTOR, (stop - start) * SECTOR)
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ]


@settings(max_examples=max(settings.default.max_examples // 3, 1))
@given(seed=st.integers(0, 1 << 32))
def test_diff_is_what_differs(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    world = PointWorld(tmp_path_factory.mktemp("store") / "s", {0: 3 * MIB})
    try:
        for _ in range(rng.randrange(2, 6)):
            step = rng.random()
            if step < 0.15:
                world.replace_disk(0, rng.randbytes(PAGE) + bytes(3 * MIB - PAGE))
            elif step < 0.3 and len(world.ids) > 2:
                world.drop(rng.choice(world.ids[:-1]))
            else:
                size = rng.choice([None, None, 2 * MIB + SECTOR, 4 * MIB])
                end = min(size or len(world.disks[0]), len(world.disks[0]))
                world.cut({0: random_writes(rng, end, 4)}, sizes={} if size is None else {0: size})
        a, b = rng.choice(world.ids), rng.choice(world.ids)
        found = diff_points(world.home, a, b)
        expected = different_sectors(world.points[a][0], world.points[b][0])
        assert (found.a, found.b, found.exact) == (str(a), str(b), True)
        assert found.disks[0].ranges == expected
        assert found.disks[0].changed_bytes == sum(length for _, length in expected)
        assert diff_points(world.home, b, a).disks[0].ranges == expected
        coarse = diff_points(world.home, a, b, coarse=True)
        assert not coarse.exact
        assert_covers(coarse.disks[0], expected)
    finally:
        world.close()


def assert_covers(coarse: DiskDiff, expected: list[tuple[int, int]]) -> None:
    at = 0
    for offset, length in expected:
        while coarse.ranges[at][0] + coarse.ranges[at][1] < offset + length:
            at += 1
        assert coarse.ranges[at][0] <= offset


def test_coarse_diff_is_what_was_written_between(tmp_path: Path) -> None:
    """And nothing of what was written before or after, nor what a whole disk holds."""
    world = PointWorld(tmp_path / "s", {0: 4 * MIB, 5: MIB})
    world.cut({0: [(0, b"a" * MIB)]})
    first = world.cut({0: [(0, b"b" * PAGE)]})
    world.cut({0: [(MIB, b"c" * SECTOR)]})
    second = world.cut({0: [(2 * MIB, bytes(PAGE))], 5: [(PAGE, b"d" * PAGE)]})
    world.cut({0: [(3 * MIB, b"e" * PAGE)]})
    found = diff_points(world.home, first, second, coarse=True)
    assert [disk.ranges for disk in found.disks] == [[(MIB, PAGE), (2 * MIB, PAGE)], [(PAGE, PAGE)]]
    exact = diff_points(world.home, first, second)
    assert [disk.ranges for disk in exact.disks] == [[(MIB, SECTOR)], [(PAGE, PAGE)]]
    assert diff_points(world.home, second, second).disks[0].ranges == []
    with pytest.raises(NoSuchPoint):
        diff_points(world.home, "latest", "yesterday")
    world.close()
