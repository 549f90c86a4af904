"""Where a cycle to a further site has to look: all that differs from the point that was shipped last, and no more."""

from __future__ import annotations

import contextlib
import random
import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvreplica.replication.extended import changed_since
from hvreplica.replication.origin import Origin
from hvreplica.replication.shape import follow_point
from hvreplica.replication.state import PrimaryState
from hvreplica.store.open_point import open_point
from tests.store.point_world import MIB, PAGE, PointWorld, random_writes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 3 * MIB


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PointWorld]:
    with contextlib.closing(PointWorld(tmp_path / "s", {0: SIZE})) as made:
        yield made


def ranges(world: PointWorld, shipped: uuid.UUID, point_id: uuid.UUID) -> list[list[int]] | None:
    with open_point(world.home, point_id) as point:
        rows = changed_since(world.home, point, shipped, 0)
    return None if rows is None else rows.tolist()


def page(number: int) -> tuple[int, bytes]:
    return number * PAGE + 512, b"x" * 512


@settings(max_examples=max(settings.default.max_examples // 6, 1))
@given(seed=st.integers(0, 1 << 32))
def test_nothing_outside_of_the_ranges_differs(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    with contextlib.closing(PointWorld(tmp_path_factory.mktemp("store") / "s", {0: SIZE})) as world:
        known = list(world.ids)
        for _ in range(rng.randrange(2, 7)):
            step = rng.random()
            if step < 0.1:
                world.replace_disk(0, rng.randbytes(PAGE) + bytes(SIZE - PAGE))
            elif step < 0.35 and len(world.ids) > 2:
                world.drop(rng.choice(world.ids[:-1]))
            else:
                size = rng.choice([None, None, 2 * MIB + 512, 4 * MIB])
                end = min(size or len(world.disks[0]), len(world.disks[0]))
                world.cut({0: random_writes(rng, end, 4)}, sizes={} if size is None else {0: size})
            known += world.ids[-1:]
        shipped, newer = rng.choice(known), rng.choice(world.ids)
        found = ranges(world, shipped, newer)
        if shipped not in world.ids or world.ids.index(shipped) > world.ids.index(newer):
            assert found is None
            return
        if found is None:
            assert world.catalog.undo_rows(world.home.vm_id), "nothing told of the disk's being replaced"
            return
        before, now = bytearray(world.points[shipped][0]), world.points[newer][0]
        before = before[: len(now)] + bytes(max(len(now) - len(before), 0))
        for start, length in found:
            assert start % PAGE == 0
            assert start + length <= len(now)
            before[start : start + length] = now[start : start + length]
        assert before == now


def test_only_what_was_written_between_is_looked_at(world: PointWorld) -> None:
    world.cut({0: [page(1)]})
    shipped = world.ids[-1]
    world.cut({0: [page(5), page(9)]})
    world.cut({0: [page(9), page(10)]})
    newer = world.ids[-1]
    world.cut({0: [page(20)]})
    assert ranges(world, shipped, newer) == [[5 * PAGE, PAGE], [9 * PAGE, 2 * PAGE]]
    assert ranges(world, newer, newer) == []


def test_a_point_dropped_in_between_changes_nothing(world: PointWorld) -> None:
    shipped = world.ids[-1]
    between = world.cut({0: [page(5)]})
    newer = world.cut({0: [page(9)]})
    world.drop(between)
    assert ranges(world, shipped, newer) == [[5 * PAGE, PAGE], [9 * PAGE, PAGE]]


def test_what_a_disk_has_grown_by_is_looked_at(world: PointWorld) -> None:
    shipped = world.ids[-1]
    newer = world.cut({0: [page(0)]}, sizes={0: SIZE + 512})
    assert ranges(world, shipped, newer) == [[0, PAGE], [SIZE, 512]]


def test_what_a_disk_lost_and_got_back_is_looked_at(world: PointWorld) -> None:
    shipped = world.ids[-1]
    world.cut({0: []}, sizes={0: 2 * MIB})
    newer = world.cut({0: []}, sizes={0: SIZE})
    assert ranges(world, shipped, newer) == [[2 * MIB, MIB]]


def test_where_nothing_tells_all_is_looked_at(world: PointWorld) -> None:
    first = world.ids[-1]
    second = world.cut({0: [page(1)]})
    third = world.cut({0: [page(2)]})
    assert ranges(world, third, second) is None, "not back"
    assert ranges(world, uuid.uuid4(), third) is None
    world.replace_disk(0, b"y" * PAGE + bytes(SIZE - PAGE))
    assert ranges(world, third, world.ids[-1]) is None
    world.drop(first)
    assert ranges(world, first, third) is None


def test_a_damaged_part_does_not_stand_in_the_way(world: PointWorld) -> None:
    shipped = world.ids[-1]
    newer = world.cut({0: [page(1)]})
    (part,) = world.catalog.undo_rows(world.home.vm_id, point_id=shipped)
    world.home.paths.undo(part.id).write_bytes(b"not a log")
    assert ranges(world, shipped, newer) is None


def test_a_disk_that_joins_is_compared_as_a_whole(world: PointWorld) -> None:
    """Its copy may be of several points: the fingerprints say what was sent, and no point has that."""
    rows = np.array([[0, PAGE]], np.int64)
    origin = Origin(uuid.uuid4(), 1.0, "crash", lambda _, index: rows if index == 0 else None)
    with open_point(world.home, "latest") as point:
        disk = point.disks[0]
        state = PrimaryState(4, "web01", uuid.uuid4(), 1, "new", [])
        follow_point(state, {0: disk, 1: disk, 2: disk}, world.root)
    state.phase, state.source_point = "ready", uuid.uuid4()
    assert list(origin.within(state)) == [0]
    state.disks[0].stage = "joined"
    assert origin.within(state) == {}
    state.disks[0].stage, state.phase = "protected", "initial"
    assert origin.within(state) == {}
    state.phase, state.source_point = "ready", None
    assert origin.within(state) == {}
