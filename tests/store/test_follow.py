"""Digests follow every apply: of the newest point, of all older ones, and of what a scan has read."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING

import pytest

from hvreplica.native import reference
from hvreplica.store import follow
from hvreplica.store.compact_parts import compact_parts
from hvreplica.store.digest import Digest
from hvreplica.store.follow import expected_digest
from hvreplica.store.pace import Pace, Stopped
from hvreplica.store.part_plan import MERGE_MIN
from hvreplica.store.points_kept import drop_point
from hvreplica.store.policy import Policy
from hvreplica.store.scan import scan_disk
from hvreplica.store.verify import verify_vm
from tests.store.test_points_kept import EVERY, Life
from tests.store.world import guid, ram_folder, send_disks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

HOURLY = Policy()  # what comes within the hour leaves again: its parts go to the point before
NONE = Policy(recovery_points=0)


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


def digest(content: bytes) -> Digest:
    return Digest(*reference.page_digest(content, 0))


def pace(life: Life) -> Pace:
    """Return a pace without a limit."""
    return Pace(life.clock, lambda _: False)


def check_digests(life: Life) -> None:
    """Compare every digest that the catalog knows with that of what the guest wrote."""
    catalog, vm_id = life.home.catalog, life.home.vm_id
    newest = life.listed()[-1]
    for row in catalog.disks(vm_id):
        if row.removed_s is None and row.spec.index in life.images[newest]:
            assert row.digest == digest(life.images[newest][row.spec.index]).hex()
    for point_id in life.listed():
        for index, content in life.images[point_id].items():
            assert expected_digest(life.home, uuid.UUID(point_id), index) == digest(content), point_id


@pytest.mark.parametrize("policy", [EVERY, HOURLY, NONE], ids=["every", "hourly", "none"])
def test_every_digest_is_known_after_every_cycle(root: Path, policy: Policy) -> None:
    life = Life(root, policy)
    check_digests(life)
    for _ in range(6):
        life.cycle()
        check_digests(life)
    life.check()


def test_what_was_read_for_an_undo_part_is_not_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(root, EVERY)
    read: list[int] = []
    whole = follow.DigestReader.of_extents

    def of_extents(reader: follow.DigestReader, extents: np.ndarray) -> Digest:
        read.append(int(extents[:, 1].sum()))
        return whole(reader, extents)

    monkeypatch.setattr(follow.DigestReader, "of_extents", of_extents)
    life.cycle()
    disks = len(life.home.catalog.disks(life.home.vm_id))
    assert len(read) == 2 * disks, "before and after"
    assert sum(read[:disks]) == 0
    assert sum(read[disks:]) > 0
    check_digests(life)


@pytest.mark.parametrize("policy", [EVERY, HOURLY], ids=["every", "hourly"])
def test_disks_that_grow_and_shrink_have_their_digests(root: Path, policy: Policy) -> None:
    life = Life(root, policy, disks=1)
    for size in (3 << 20, (2 << 20) + 512, (2 << 20) + 1536, 1 << 20, (3 << 20) - 512, 4 << 20):
        life.primary.resize(0, size)
        life.cycle()
        check_digests(life)
    life.check()


@pytest.mark.parametrize("sizes", [(3 << 20,), ((2 << 20) + 512, 3 << 20)], ids=["pages", "within a page"])
def test_older_points_keep_their_digests_where_only_the_grown_part_is_written(
    root: Path, seed: int, sizes: tuple[int, ...]
) -> None:
    life = Life(root, EVERY, disks=1)
    data = random.Random(seed).randbytes(512)
    for size in sizes:
        life.primary.resize(0, size)
        life.primary.write(0, size - 512, data)
        life.cycle(writes=0)
        check_digests(life)
    life.check()
    assert {point.state for point in verify_vm(life.home, pace(life)).points} == {"ok"}


def test_last_page_that_was_read_for_a_part_alone_is_not_taken_out(root: Path, seed: int) -> None:
    life = Life(root, EVERY, disks=1)
    rng = random.Random(seed)
    life.primary.write(0, (2 << 20) - 4096, rng.randbytes(4096))
    life.cycle(writes=0)
    life.primary.resize(0, 3 << 20)
    life.primary.write(0, (3 << 20) - 512, rng.randbytes(512))
    life.cycle(writes=0)
    check_digests(life)
    life.check()
    assert {point.state for point in verify_vm(life.home, pace(life)).points} == {"ok"}


def test_digests_outlive_points_that_go(root: Path, seed: int) -> None:
    life = Life(root)
    older = [str(guid(100)), *[life.cycle() for _ in range(5)][:-1]]
    random.Random(seed).shuffle(older)
    for point_id in older:
        drop_point(life.home, uuid.UUID(point_id))
        check_digests(life)
        life.cycle()
        check_digests(life)


def test_digests_outlive_parts_that_are_written_anew(root: Path) -> None:
    life = Life(root, HOURLY)
    for _ in range(2 * MERGE_MIN):
        life.cycle()
        check_digests(life)
    keeper = uuid.UUID(life.listed()[0])
    compact_parts(life.home, keeper, 0, look=True)
    assert len(life.home.catalog.undo_rows(life.home.vm_id, disk_index=0)) < MERGE_MIN
    check_digests(life)
    life.cycle()
    check_digests(life)


def test_a_new_first_copy_keeps_the_digests_of_the_old_one(root: Path) -> None:
    life = Life(root)
    life.cycle()
    life.primary.scribble(life.rng, 8)
    life.replica = life.primary.replicate(life.store, 200)
    life.images[str(guid(200))] = life.primary.image()
    check_digests(life)
    life.cycle()
    check_digests(life)


def test_a_first_copy_that_was_continued_has_no_digest_before_a_scan(root: Path) -> None:
    life = Life(root)
    image = life.primary.image()
    for number in (1, 2):
        life.replica.close()
        life.replica = life.primary.claim(life.store)
        sink = life.primary.begin_initial(life.replica, 200)
        assert sink.continued == (number == 2)
        if number == 1:
            sink.flush()
    send_disks(sink, image)
    sink.commit()
    life.primary.last_point = guid(200)
    life.images[str(guid(200))] = image
    home = life.home
    assert [row.digest for row in home.catalog.disks(home.vm_id)] == [None, None]
    newer = life.cycle()
    assert expected_digest(home, guid(200), 0) is None
    for index in (0, 1):
        assert scan_disk(home, index, pace(life)).drift == Digest()
    check_digests(life)
    assert life.listed()[-2:] == [str(guid(200)), newer]


def test_a_scan_goes_on_while_points_are_applied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvreplica.store.pace.STEP_BYTES_MAX", 64 << 10)
    monkeypatch.setattr("hvreplica.store.digest._WINDOW_BYTES", 16 << 10)
    life = Life(root)
    life.primary.write(0, 0, life.rng.randbytes(1 << 20))
    life.cycle()
    positions = []

    def cycle_between(_: float) -> bool:
        positions.append(life.home.catalog.scans(life.home.vm_id)[0].position)
        if len(positions) % 3 == 0:
            life.cycle()
        return False

    found = scan_disk(life.home, 0, Pace(life.clock, cycle_between))
    assert found.drift == Digest()
    assert len({position for position in positions if position}) > 5
    check_digests(life)


def test_two_scans_of_one_disk_are_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvreplica.store.pace.STEP_BYTES_MAX", 64 << 10)
    monkeypatch.setattr("hvreplica.store.digest._WINDOW_BYTES", 16 << 10)
    life = Life(root)
    life.primary.write(0, 0, life.rng.randbytes(1 << 20))
    life.cycle()
    others = []

    def scan_too(_: float) -> bool:
        if len(others) == 0:
            others.append(scan_disk(life.home, 0, Pace(life.clock, lambda _: life.clock.advance(1) or False)))
        return False

    found = scan_disk(life.home, 0, Pace(life.clock, scan_too))
    assert found.drift == others[0].drift == Digest()
    check_digests(life)


def test_a_scan_that_was_cut_goes_on_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvreplica.store.pace.STEP_BYTES_MAX", 64 << 10)
    monkeypatch.setattr("hvreplica.store.digest._WINDOW_BYTES", 16 << 10)
    life = Life(root)
    life.primary.write(0, 0, life.rng.randbytes(1 << 20))
    life.cycle()
    reads = 0

    def cut(_: float) -> bool:
        nonlocal reads
        reads += 1
        return reads == 8

    with pytest.raises(Stopped):
        scan_disk(life.home, 0, Pace(life.clock, cut))
    before = life.home.catalog.scans(life.home.vm_id)[0]
    assert before.position > 200 << 10
    life.cycle()
    second = Pace(life.clock, lambda _: False)
    assert scan_disk(life.home, 0, second).drift == Digest()
    assert second.read_bytes < (2 << 20) - before.position + (128 << 10)


@pytest.mark.parametrize("step", ["take_out", "put_in"])
def test_an_apply_that_is_cut_and_repeated_counts_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    life = Life(root)
    point_id = life.cycle(apply=False)
    whole = getattr(follow, step)

    def cut(*arguments: object) -> None:
        whole(*arguments)
        raise OSError(5, "cut")

    monkeypatch.setattr(f"hvreplica.store.apply.{step}", cut)
    with pytest.raises(OSError, match="cut"):
        life.replica.apply()
    monkeypatch.setattr(f"hvreplica.store.apply.{step}", whole)
    assert life.listed()[-1] != point_id
    life.replica.apply()
    assert life.listed()[-1] == point_id
    check_digests(life)
