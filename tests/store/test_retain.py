"""Points that the policy lets go leave all others as they were, are told, and make room by the budget's order."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hvreplica.errors import InvalidTransition, PointInUse, StoreFull
from hvreplica.store.budget import WARNING_SHARE, budget_limit, budget_warning, used_bytes
from hvreplica.store.failover import Failover, Firedrill, pack_failover
from hvreplica.store.part_plan import MERGE_MIN
from hvreplica.store.policy import Policy, pack_policy
from hvreplica.store.retain import compact_many, let_go, retain
from hvreplica.store.verdicts import next_to_go, verdicts
from tests.store.parts import GRAIN_BYTES, Disk, opened_home
from tests.store.world import ram_folder
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    import random
    import uuid
    from collections.abc import Iterator
    from pathlib import Path

NEWEST_ONLY = Policy(recovery_points=0)


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def disk(root: Path, seed: int) -> Iterator[Disk]:
    home = opened_home(root)
    yield Disk(home, seed)
    home.catalog.close()


def set_policy(disk: Disk, policy: Policy) -> None:
    with disk.home.catalog.transaction():
        disk.home.catalog.set_policy(disk.home.vm_id, pack_policy(policy))


def warning(disk: Disk, policy: Policy) -> str | None:
    return budget_warning(disk.home, policy, next_to_go(verdicts(disk.home, policy)))


def test_points_that_no_rule_keeps_go_and_are_told(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    ids = [disk.cycle(range(number, number + 10)) for number in range(6)]
    set_policy(disk, Policy(recovery_points=None, keep="last 2"))
    with caplog.at_level(logging.INFO):
        gone = retain(disk.home).gone
    assert [point.id for point in gone] == [str(point_id) for point_id in ids[:4]]
    assert {point.reason for point in gone} == {"no rule keeps it"}
    for point_id in ids[:4]:
        assert f"point {point_id} of 2023-11-1" in caplog.text
    assert disk.kept() == ids[4:]
    disk.check()
    assert retain(disk.home).gone == []


def test_points_between_kept_ones_leave_their_parts_to_the_older(disk: Disk) -> None:
    for number in range(24):
        disk.cycle(range(number % 5, number % 5 + 8), after_s=900)
    set_policy(disk, Policy(recovery_points=5))
    retain(disk.home)
    assert len(disk.kept()) == 6
    disk.check()


def test_point_in_use_stays_until_nobody_reads_it(disk: Disk) -> None:
    ids = [disk.cycle(range(number, number + 10)) for number in range(3)]
    set_policy(disk, NEWEST_ONLY)
    lock = disk.home.files.lock(disk.home.paths.use(ids[1]), shared=True)
    assert [point.id for point in retain(disk.home).gone] == [str(ids[0])]
    assert disk.kept() == ids[1:]
    with pytest.raises(PointInUse):
        let_go(disk.home, ids[1])
    [verdict, _] = verdicts(disk.home, NEWEST_ONLY)
    assert verdict.reasons == ("in use",)
    disk.check()
    lock.release()
    assert [point.id for point in retain(disk.home).gone] == [str(ids[1])]
    disk.check()


def test_newest_point_never_goes(disk: Disk) -> None:
    point_id = disk.cycle(range(4))
    with pytest.raises(InvalidTransition, match="newest"):
        let_go(disk.home, point_id)
    set_policy(disk, Policy(recovery_points=0, budget_bytes=0))
    assert retain(disk.home).gone == []
    assert disk.kept() == [point_id]


def test_damaged_part_does_not_keep_its_point(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    ids = [disk.cycle(range(200)) for _ in range(4)]
    [row] = disk.home.catalog.undo_rows(disk.home.vm_id, point_id=ids[1])
    files = disk.home.files
    assert isinstance(files, FaultFiles)
    path = disk.home.paths.undo(row.id)
    files.load(path, files.content_of(path)[:8000])
    set_policy(disk, Policy(recovery_points=None, keep="last 2"))
    lock = files.lock(disk.home.paths.use(ids[0]), shared=True)
    assert [point.id for point in retain(disk.home).gone] == [str(ids[1])]
    assert "stay as they are" in caplog.text
    assert disk.kept() == [ids[0], *ids[2:]]
    lock.release()


def test_parts_of_a_point_become_one_where_they_are_many(disk: Disk) -> None:
    point_id = disk.cycle(range(4))
    for number in range(MERGE_MIN):
        disk.cycle(range(10 * number, 10 * number + 10))
    set_policy(disk, Policy(recovery_points=None, keep="app-consistent 1"))
    with disk.home.catalog.transaction():
        disk.home.catalog.change("UPDATE point SET consistency = 'app' WHERE id = ?", (str(point_id),))
    retain(disk.home)
    assert len(disk.home.catalog.undo_rows(disk.home.vm_id, point_id=point_id)) == 1
    disk.check()


def test_a_drop_writes_no_more_than_its_own_and_the_rest_comes_after_the_next_cycle(disk: Disk) -> None:
    ids = [disk.cycle(range(20 * n, 20 * n + 20)) for n in range(MERGE_MIN + 2)]
    for point_id in ids[1:-1]:
        assert let_go(disk.home, point_id).written_bytes <= 20 * GRAIN_BYTES
    assert disk.kept() == [ids[0], ids[-1]]
    assert len(disk.home.catalog.undo_rows(disk.home.vm_id)) == MERGE_MIN + 1
    disk.check()
    assert compact_many(disk.home).parts == MERGE_MIN - 1
    assert len(disk.home.catalog.undo_rows(disk.home.vm_id)) == 2
    disk.check()


def test_budget_lets_go_in_order_until_it_is_held(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.content = {number: disk.rng.randbytes(GRAIN_BYTES) for number in range(200)}
    kinds = ["app", "crash", "crash", "crash", "app", "crash"]
    ids = [disk.cycle(range(25 * n, 25 * n + 25), consistency=kind) for n, kind in enumerate(kinds)]
    assert used_bytes(disk.home) > 5 * 25 * GRAIN_BYTES
    # None of the first four drops frees a byte of the oldest point's: it is application-consistent.
    set_policy(disk, Policy(recovery_points=None, keep="last 100", budget_bytes=40 * GRAIN_BYTES))
    with caplog.at_level(logging.INFO):
        gone = retain(disk.home).gone
    assert [point.id for point in gone] == [str(ids[place]) for place in (1, 2, 3, 0)]
    assert "the budget is 160.0 KiB" in gone[0].reason
    assert disk.kept() == ids[4:]
    assert used_bytes(disk.home) <= 40 * GRAIN_BYTES
    disk.check()


def test_manual_points_and_the_newest_stay_whatever_the_budget_is(disk: Disk) -> None:
    ids = [disk.cycle(range(5), kind=kind) for kind in ("manual", "standard", "manual", "standard")]
    set_policy(disk, Policy(budget_bytes=0))
    assert [point.id for point in retain(disk.home).gone] == [str(ids[1])]
    assert disk.kept() == [ids[0], *ids[2:]]
    told = warning(disk, Policy(budget_bytes=0))
    assert told is not None
    assert told.endswith("none may go: they are the newest, manual or in use")
    disk.check()


def test_budget_warns_before_a_point_goes(disk: Disk) -> None:
    policy = Policy(recovery_points=None, keep="last 100", budget_bytes=300 * GRAIN_BYTES)
    set_policy(disk, policy)
    told: list[str | None] = []
    gone: list[str] = []
    first = disk.cycle(range(10))
    while not gone:
        told.append(warning(disk, policy))
        disk.cycle(range(10))
        gone = [point.id for point in retain(disk.home).gone]
    assert told[-1] is not None
    assert f"the next to go is {first} of 2023-11-14T22:13:20.000Z" in told[-1]
    assert gone == [str(first)]
    quiet = next(place for place, sentence in enumerate(told) if sentence is not None)
    assert None not in told[quiet:]
    assert 0.6 < quiet * 11 / 300 < WARNING_SHARE


def test_budget_in_percent_follows_the_disks(disk: Disk) -> None:
    from hvreplica.store.records import DiskSpec  # noqa: PLC0415

    home = disk.home
    assert budget_limit(home, Policy(budget_percent=10)) == 0
    with home.catalog.transaction():
        home.catalog.insert_disk(home.vm_id, DiskSpec(0, 1 << 30))
        home.catalog.change("UPDATE disk SET file_bytes = ?", (1_000_000,))
    assert budget_limit(home, Policy()) is None
    assert budget_limit(home, Policy(budget_percent=10)) == 100_000
    assert budget_limit(home, Policy(budget_percent=10, budget_bytes=500)) == 500
    assert budget_limit(home, Policy(budget_percent=250)) == 2_500_000


def test_zeros_take_no_room_of_the_budget(disk: Disk) -> None:
    disk.cycle(range(1))
    disk.cycle(range(1000))
    assert used_bytes(disk.home) < 20 * GRAIN_BYTES
    disk.cycle(range(1000))
    assert used_bytes(disk.home) > 1000 * GRAIN_BYTES


def test_warning_is_logged_once_for_each_point(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.content = {number: disk.rng.randbytes(GRAIN_BYTES) for number in range(200)}
    set_policy(disk, Policy(recovery_points=None, keep="last 100", budget_bytes=30 * GRAIN_BYTES))
    first, second = disk.cycle(range(5)), disk.cycle(range(25))
    for _ in range(3):
        assert retain(disk.home).warning is not None
    assert caplog.text.count(f"the next to go is {first}") == 1
    let_go(disk.home, first)
    disk.cycle(range(5))
    assert disk.kept()[0] == second
    disk.cycle(range(25))
    assert [point.id for point in retain(disk.home).gone] == [str(second)]


def test_point_that_cannot_go_for_want_of_room_fails_nothing(
    disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [disk.cycle(range(5)) for _ in range(2)]
    set_policy(disk, NEWEST_ONLY)

    def full(*_: object) -> None:
        raise StoreFull("no room left for the catalog")

    with monkeypatch.context() as patch:
        patch.setattr(disk.home.catalog, "supersede_point", full)
        assert retain(disk.home).gone == []
    assert f"point {ids[0]} stays for now: no room left" in caplog.text
    assert disk.kept() == ids
    assert [point.id for point in retain(disk.home).gone] == [str(ids[0])]


def test_point_that_a_test_failover_rests_on_stays(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    first, second, _ = [disk.cycle(range(number, number + 10)) for number in range(3)]
    test = Firedrill(first, [0], 0.0)
    with disk.home.catalog.transaction():
        disk.home.catalog.set_failover(disk.home.vm_id, pack_failover(Failover(test=test)))
    set_policy(disk, Policy(recovery_points=0, budget_bytes=0))
    assert [point.id for point in retain(disk.home).gone] == [str(second)]
    assert disk.kept()[0] == first
    assert "stays for now" not in caplog.text
    disk.check()


class Retaining(RuleBasedStateMachine):
    """Cycles, drops, policies, budgets and compactions against a dictionary of snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        root = self.stack.enter_context(ram_folder())
        self.disk = Disk(opened_home(root), 1)
        self.stack.callback(self.disk.home.catalog.close)
        self.disk.cycle(range(8))
        self.locks: dict[uuid.UUID, object] = {}

    def teardown(self) -> None:
        self.stack.close()

    @rule(
        start=st.integers(0, 30),
        count=st.integers(1, 12),
        consistency=st.sampled_from(["crash", "crash", "app"]),
        kind=st.sampled_from(["standard", "standard", "standard", "manual", "planned"]),
        after_s=st.sampled_from([60, 900, 3600, 86400]),
        zeros=st.booleans(),
    )
    def cycle(
        self, start: int, count: int, consistency: str, kind: str, after_s: float, *, zeros: bool
    ) -> None:
        self.disk.cycle(
            range(start, start + count), after_s=after_s, kind=kind, consistency=consistency, zeros=zeros
        )

    @precondition(lambda self: len(self.disk.kept()) > 1)
    @rule(random=st.randoms(use_true_random=False))
    def drop(self, random: random.Random) -> None:
        point_id = random.choice(self.disk.kept()[:-1])
        if point_id in self.locks:
            with pytest.raises(PointInUse):
                let_go(self.disk.home, point_id)
        else:
            let_go(self.disk.home, point_id)
            assert point_id not in self.disk.kept()

    @precondition(lambda self: len(self.disk.kept()) > 1)
    @rule(random=st.randoms(use_true_random=False))
    def use_or_leave(self, random: random.Random) -> None:
        point_id = random.choice(self.disk.kept())
        lock = self.locks.pop(point_id, None)
        if lock is None:
            path = self.disk.home.paths.use(point_id)
            self.locks[point_id] = self.disk.home.files.lock(path, shared=True)
        else:
            lock.release()  # type: ignore[attr-defined]

    @rule(
        points=st.none() | st.integers(0, 4),
        keep=st.sampled_from([None, "last 3", "hourly 2, daily 2", "app-consistent 1"]),
        budget=st.sampled_from([None, 0, 40 * GRAIN_BYTES]),
    )
    def retain(self, points: int | None, keep: str | None, budget: int | None) -> None:
        policy = Policy(recovery_points=points, keep=keep, budget_bytes=budget)
        set_policy(self.disk, policy)
        before = self.disk.kept()
        gone = [point.id for point in retain(self.disk.home).gone]
        assert sorted(gone) == sorted(
            str(point_id) for point_id in before if point_id not in self.disk.kept()
        )
        assert self.locks.keys() <= set(self.disk.kept())
        assert retain(self.disk.home).gone == []
        if budget is not None and used_bytes(self.disk.home) > budget:
            assert next_to_go(verdicts(self.disk.home, policy)) is None

    @rule()
    def compact(self) -> None:
        compact_many(self.disk.home)

    @invariant()
    def each_point_is_what_it_was(self) -> None:
        self.disk.check()


TestRetaining = Retaining.TestCase
TestRetaining.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
