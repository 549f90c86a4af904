"""A damage is found wherever it is, is named, and counts for those points that show it and for no others."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import open_disk
from hvreplica.errors import HvReplicaError
from hvreplica.store.judge import disk_at
from hvreplica.store.pace import Pace
from hvreplica.store.points_kept import chain, part_path
from hvreplica.store.verify import VmVerdict, verify_point, verify_vm
from tests.store.test_points_kept import Life
from tests.store.world import guid, ram_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def life(root: Path) -> Life:
    made = Life(root)
    for _ in range(4):
        made.cycle()
    return made


def verify(life: Life) -> VmVerdict:
    return verify_vm(life.home, Pace(life.clock, lambda _: False))


def flip(life: Life, path: Path, offset: int, mask: int = 0x10) -> None:
    file = life.files.open(path, writable=True)
    byte = file.read(offset, 1)[0]
    file.write(bytes([byte ^ mask]), offset)
    file.sync()
    file.close()


def kept(life: Life) -> list[str]:
    return [str(point.id) for point in life.home.catalog.points(life.home.vm_id) if point.is_kept]


def spoiled(life: Life) -> set[str]:
    """Return the points that show something else than the primary had, or cannot be read."""
    found = set()
    for point_id in kept(life):
        for index, content in life.images[point_id].items():
            buffer = bytearray(len(content))
            try:
                with disk_at(life.home, uuid.UUID(point_id), index, len(content)) as disk:
                    disk.read_into(buffer, 0)
            except (HvReplicaError, OSError):
                found.add(point_id)
            if buffer != content:
                found.add(point_id)
    return found


def damaged(verdict: VmVerdict) -> set[str]:
    return {point.id for point in verdict.points if point.state == "damaged"}


def states(life: Life) -> dict[str, str]:
    return {str(point.id): point.state for point in life.home.catalog.points(life.home.vm_id)}


def payload_offset(life: Life, disk_index: int, disk_offset: int) -> tuple[Path, int]:
    """Return where a byte of the newest disk stands in its file."""
    path = life.home.paths.disk(disk_index)
    with open_disk(life.files, path, format="vhdx", clock=life.clock) as disk:
        stretch = next(iter(disk.stretches(disk_offset, disk_offset + 512)))
        assert stretch.kind == "data"
        assert stretch.file_offset is not None
        return path, stretch.file_offset


def test_a_sound_replica_is_sound(life: Life) -> None:
    verdict = verify(life)
    assert [point.id for point in verdict.points] == kept(life)
    assert {point.state for point in verdict.points} == {"ok"}
    assert (verdict.damage, verdict.unknown_files, verdict.is_damaged) == ([], [], False)
    assert set(states(life).values()) == {"complete"}


def test_a_flipped_byte_of_the_disk_spoils_the_points_that_share_it(life: Life) -> None:
    life.primary.write(0, 64 << 10, b"a" * 8192)
    life.cycle(0)
    life.primary.write(0, 64 << 10, b"b" * 4096)
    life.cycle(0)
    path, offset = payload_offset(life, 0, 68 << 10)
    flip(life, path, offset)
    verdict = verify(life)
    shared = set(kept(life)[-2:])
    assert damaged(verdict) == spoiled(life) == shared
    assert all(str(path) in (point.reason or "") for point in verdict.points if point.id in shared)
    assert verdict.damage == [f"{path} does not hold what was written to it"]
    assert {point_id for point_id, state in states(life).items() if state == "damaged"} == shared


def test_a_point_that_is_applied_on_a_damaged_disk_is_damaged_too(life: Life) -> None:
    life.primary.write(0, 0, b"a" * 8192)
    life.cycle(0)
    path, offset = payload_offset(life, 0, 4096)
    flip(life, path, offset)
    verify(life)
    life.primary.write(0, 0, b"c" * 4096)
    newest = life.cycle(0)
    assert states(life)[newest] == "damaged"
    assert newest in damaged(verify(life)) == spoiled(life)


def test_a_damaged_part_spoils_the_points_that_read_it(life: Life) -> None:
    life.primary.write(0, 0, b"x" * 4096)
    first = life.cycle(0)
    life.primary.write(0, 0, b"y" * 4096)
    second = life.cycle(0)
    life.primary.write(0, 0, b"z" * 4096)
    third = life.cycle(0)
    part = chain(life.home, uuid.UUID(second), 0)[0]
    content = life.files.content_of(part_path(life.home, part))
    flip(life, part_path(life.home, part), content.index(b"y" * 4096))
    verdict = verify(life)
    assert damaged(verdict) == spoiled(life) == {second}
    reason = next(point.reason for point in verdict.points if point.id == second)
    assert reason is not None
    assert str(part.id) in reason
    assert third not in damaged(verdict)
    assert first not in damaged(verdict)


@pytest.mark.parametrize("victim", range(3))
def test_a_part_that_cannot_be_read_spoils_its_point_and_older_ones(life: Life, victim: int) -> None:
    points = kept(life)
    part = next(part for part in chain(life.home, uuid.UUID(points[victim]), 0))
    flip(life, part_path(life.home, part), part.file_bytes - 4096 + 40)  # in an entry of the last block
    verdict = verify(life)
    assert damaged(verdict) == spoiled(life)
    assert damaged(verdict) <= set(points[: victim + 1])
    assert points[-1] not in damaged(verdict)
    assert any(str(part.id) in sentence for sentence in verdict.damage)


def test_a_missing_part_is_named_and_spoils_the_points_that_need_it(life: Life) -> None:
    points = kept(life)
    part = chain(life.home, uuid.UUID(points[1]), 0)[0]
    life.files.unlink(part_path(life.home, part))
    verdict = verify(life)
    assert damaged(verdict) == spoiled(life) == set(points[:2])
    assert any(str(part.id) in sentence for sentence in verdict.damage)


def test_a_file_that_nothing_speaks_of_is_named_and_is_no_damage(life: Life) -> None:
    path = life.home.paths.undo(uuid.UUID(int=7))
    life.files.open(path, create=True).close()
    verdict = verify(life)
    assert verdict.unknown_files == [str(path)]
    assert not verdict.is_damaged


def test_a_damaged_log_that_waits_spoils_only_the_point_that_needs_it(life: Life) -> None:
    waiting = life.cycle(apply=False)
    log = life.home.catalog.logs(life.home.vm_id, uuid.UUID(waiting))[0]
    path = life.home.paths.log(log.log_id)
    flip(life, path, life.files.open(path).size() // 2)
    verdict = verify(life)
    assert damaged(verdict) == {waiting}
    assert any(str(log.log_id) in sentence for sentence in verdict.damage)
    assert spoiled(life) == set()


def test_a_whole_disk_that_is_kept_is_read_again(life: Life) -> None:
    older = kept(life)
    life.primary.scribble(life.rng, 8)
    life.replica = life.primary.replicate(life.store, 200)
    life.images[str(guid(200))] = life.primary.image()
    life.cycle()
    assert not verify(life).is_damaged
    whole = next(part for part in life.home.catalog.undo_rows(life.home.vm_id) if part.kind == "whole")
    path = part_path(life.home, whole)
    with open_disk(life.files, path, format="vhdx", clock=life.clock) as disk:
        last = list(disk.stretches(0, disk.virtual_bytes))
        offset = next(s.file_offset for s in reversed(last) if s.kind == "data" and s.file_offset)
    flip(life, path, offset)
    verdict = verify(life)
    assert damaged(verdict) == spoiled(life)
    assert damaged(verdict)
    assert damaged(verdict) <= set(older)
    assert all(
        str(whole.id) in (point.reason or "") for point in verdict.points if point.id in damaged(verdict)
    )


@pytest.mark.parametrize("number", range(24))
def test_a_flipped_byte_anywhere_is_found_or_means_nothing(root: Path, seed: int, number: int) -> None:
    rng = random.Random(f"{seed} {number}")
    life = Life(root)
    life.rng = rng
    for _ in range(rng.randrange(1, 4)):
        life.cycle(rng.randrange(1, 8))
    if rng.random() < 0.3:
        life.cycle(apply=False)
    paths = sorted(path for path in life.files.files() if path.suffix in {".hru", ".hrl", ".vhdx"})
    path = rng.choice(paths)
    content = np.frombuffer(life.files.content_of(path), np.uint8)
    used = np.flatnonzero(content) if rng.random() < 0.8 else np.arange(len(content))
    offset = int(rng.choice(used.tolist()))
    flip(life, path, offset, 1 << rng.randrange(8))
    verdict = verify(life)
    story = f"seed {seed} {number}: {path.name} at {offset}"
    wrong = spoiled(life)
    found = damaged(verdict) & set(kept(life))
    assert wrong <= found, story
    if path.suffix == ".hru":
        assert not verdict.is_damaged or any(path.name in sentence for sentence in verdict.damage), story
        assert kept(life)[-1] not in found, story
    else:
        assert found == wrong, story
    if wrong:
        assert any(path.name in sentence for sentence in verdict.damage), story
    if path.suffix == ".hrl" and verdict.is_damaged:
        assert any(path.name in sentence for sentence in verdict.damage), story


def test_points_that_come_and_go_meanwhile_are_judged_rightly(life: Life) -> None:
    life.primary.write(0, 0, b"a" * 8192)
    life.cycle(0)
    path, offset = payload_offset(life, 0, 4096)
    flip(life, path, offset)
    reads = 0

    def cycle_between(_: float) -> bool:
        nonlocal reads
        reads += 1
        if reads % 4 == 0 and reads < 40:
            life.cycle(2)
        return False

    verdict = verify_vm(life.home, Pace(life.clock, cycle_between))
    assert reads > 8
    judged = {point.id for point in verdict.points}
    assert damaged(verdict) == spoiled(life) & judged
    wrong = {point_id for point_id, state in states(life).items() if state == "damaged"}
    assert spoiled(life) <= wrong  # those that came since inherit what is known of their disk


def test_points_that_are_whole_again_can_be_had_again(life: Life) -> None:
    path, offset = payload_offset(life, 0, first_data(life))
    flip(life, path, offset)
    assert verify(life).is_damaged
    flip(life, path, offset)
    verdict = verify(life)
    assert not verdict.is_damaged
    assert set(states(life).values()) == {"complete"}


def first_data(life: Life) -> int:
    path = life.home.paths.disk(0)
    with open_disk(life.files, path, format="vhdx", clock=life.clock) as disk:
        return next(s.start for s in disk.stretches(0, disk.virtual_bytes) if s.kind == "data")


def test_one_point_is_verified_alone(life: Life) -> None:
    life.primary.write(0, 0, b"x" * 4096)
    life.cycle(0)
    life.primary.write(0, 0, b"y" * 4096)
    life.cycle(0)
    pace = Pace(life.clock, lambda _: False)
    points = {str(point.id): point for point in life.home.catalog.points(life.home.vm_id)}
    for point in points.values():
        assert verify_point(life.home, point, pace).points[0].state == "ok"
    path, offset = payload_offset(life, 0, 0)
    flip(life, path, offset)
    newest, before = kept(life)[-1], kept(life)[-2]
    assert verify_point(life.home, points[before], pace).points[0].state == "ok"
    verdict = verify_point(life.home, points[newest], pace)
    assert damaged(verdict) == {newest}
    assert states(life)[newest] == "damaged"
