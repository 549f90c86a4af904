"""A replica that feeds a further one: what arrives there, what is looked at, and what stands in the way."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica import errors
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.replication import initial
from hvreplica.replication.state import VERSION, load_state
from hvreplica.store import Store
from hvreplica.store.failover import Failover
from hvreplica.store.feeds import Feed, read_feed, write_feed
from tests.replication.two_sites import MIB, VM, TwoSites

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.progress import Progress
    from hvreplica.store.home import VmHome


EACH = hvreplica.PointPolicy(recovery_points=24, recovery_point_every_s=0)


class Chain(TwoSites):
    """The primary replicates to site B, which feeds site C. looked_at: bytes that the last call compared."""

    def __init__(self, folder: Path, tls: Path, rng: random.Random, **options: Any) -> None:
        super().__init__(folder, tls, rng, **options)
        self.c = folder / "c"
        self.looked_at = 0

    def cycle(self, count: int = 4) -> str:
        """Write, and bring a point to B; return its id."""
        self.write(count)
        return self.replicate(self.b).point

    def extend(self, **options: Any) -> hvreplica.ReplicateResult:
        self.looked_at = 0

        def note(report: Progress) -> None:
            if report.phase == "compare":
                self.looked_at = report.done_bytes

        return hvreplica.extend(self.b, VM, **{"progress": note, **self.link(self.c), **options})

    def instants(self, store: Path) -> list[float]:
        return [point.instant_s for point in hvreplica.point_list(store, VM) if point.state == "complete"]

    @contextlib.contextmanager
    def home(self, store: Path) -> Iterator[VmHome]:
        with contextlib.closing(Store.open_reading(OS_FILES, store, clock=SYSTEM)) as opened:
            yield opened.home(VM)

    def feed(self) -> Feed:
        with self.home(self.b) as home:
            (path,) = home.paths.feeds.iterdir()
            state = load_state(OS_FILES, home.paths.folder / "extended")
            assert state is not None
            found = read_feed(home, state.relationship_id)
            assert found is not None
            assert path.stem == str(state.relationship_id)
            return found


@pytest.fixture
def chain(tmp_path: Path, tls: Path, rng: random.Random) -> Iterator[Chain]:
    made = Chain(tmp_path, tls, rng, sizes=(6 * MIB, 3 * MIB))
    with made.closing:
        yield made


def test_newest_point_is_shipped_and_shows_its_own_instant(chain: Chain) -> None:
    chain.cycle()
    first = chain.extend()
    assert (first.kind, chain.replica_equals(chain.c)) == ("initial", True)
    chain.cycle()
    models = [bytes(model) for model in chain.models]
    chain.cycle()  # this one alone goes on
    second = chain.extend()
    assert second.kind == "delta"
    assert chain.replica_equals(chain.c)
    assert 0 < chain.looked_at <= 16 * 8192, "only what two cycles have written"
    assert models != chain.models
    b = chain.instants(chain.b)
    assert chain.instants(chain.c)[-1] == b[-1]
    third = chain.extend()
    assert (third.kind, third.point, chain.looked_at) == ("none", second.point, 0)
    assert third.wire_bytes < 8192


def test_consistency_goes_on_with_the_point(chain: Chain) -> None:
    chain.cycle()
    chain.extend()
    chain.write(2)
    hvreplica.cut(chain.state, app_consistent=True)
    chain.replicate(chain.b)
    chain.extend()
    assert hvreplica.point_list(chain.c, VM)[-1].consistency == "app"
    other = chain.folder / "d"
    chain.extend(**chain.link(other), state=chain.folder / "to-d")
    assert [(point.kind, point.consistency) for point in hvreplica.point_list(other, VM)] == [
        ("initial", "app")
    ]


def test_a_point_without_a_difference_makes_a_point_too(chain: Chain) -> None:
    chain.cycle()
    chain.extend(points=EACH)
    before = [bytes(model) for model in chain.models]
    chain.cycle()
    for path, content, model in zip(chain.disks, before, chain.models, strict=True):
        with contextlib.closing(open_disk(OS_FILES, path, writable=True, clock=SYSTEM)) as disk:
            disk.write(content, 0)
            disk.flush()
        model[:] = content
    chain.replicate(chain.b)
    found = chain.extend()
    assert (found.kind, sum(disk.changed_bytes for disk in found.disks)) == ("delta", 0)
    assert len(chain.instants(chain.c)) == 2
    assert chain.instants(chain.c)[-1] == chain.instants(chain.b)[-1]
    assert chain.replica_equals(chain.c)


def test_what_was_shipped_last_is_held_though_no_rule_keeps_it(chain: Chain) -> None:
    chain.cycle()
    hvreplica.store_policy(chain.b, VM, recovery_points=0)
    shipped = chain.cycle()
    chain.extend()
    for _ in range(3):
        newest = chain.cycle()
    kept = [point.id for point in hvreplica.point_list(chain.b, VM)]
    assert kept == [shipped, newest]
    chain.extend()
    assert chain.looked_at <= 2 * 12 * 8192
    assert chain.replica_equals(chain.c)
    chain.cycle()
    assert shipped not in [point.id for point in hvreplica.point_list(chain.b, VM)], (
        "let go with the next cycle"
    )


def test_without_the_point_shipped_last_all_is_compared(chain: Chain) -> None:
    chain.cycle()
    hvreplica.store_policy(chain.b, VM, recovery_points=0)
    shipped = chain.cycle()
    chain.extend(hold_s=0)
    chain.cycle()
    chain.cycle()
    assert shipped not in [point.id for point in hvreplica.point_list(chain.b, VM)]
    found = chain.extend(hold_s=0)
    assert (found.kind, chain.replica_equals(chain.c)) == ("delta", True)
    assert chain.looked_at > 2 * MIB


def test_a_dead_site_holds_nothing_for_ever(chain: Chain) -> None:
    chain.cycle()
    hvreplica.store_policy(chain.b, VM, recovery_points=0)
    shipped = chain.cycle()
    chain.extend()
    feed = chain.feed()
    assert [str(point) for point in feed.points] == [shipped]
    with chain.home(chain.b) as home:
        state = load_state(OS_FILES, home.paths.folder / "extended")
        assert state is not None
        old = Feed(feed.to, feed.points, feed.renewed_s - feed.hold_s - 1, feed.hold_s)
        write_feed(home, state.relationship_id, old)
    newest = chain.cycle()
    assert [point.id for point in hvreplica.point_list(chain.b, VM)] == [newest]
    chain.extend()
    assert chain.replica_equals(chain.c)


def test_disks_that_come_go_and_change_their_size_follow(chain: Chain) -> None:
    chain.cycle()
    chain.extend()
    grown, added = chain.disks[1], chain.folder / "added.vhdx"
    hvreplica.disk_resize(grown, 4 * MIB)
    chain.models[1] += bytes(MIB)
    hvreplica.disk_create(added, 2 * MIB, block_bytes=MIB)
    chain.disks.append(added)
    chain.models.append(bytearray(2 * MIB))
    chain.cycle()
    chain.extend()
    assert chain.replica_equals(chain.c)
    removed, chain.disks[:1], chain.models[:1] = chain.disks[0], [], []
    chain.write(4)
    chain.replicate(chain.b, remove_disks=[removed])
    chain.extend()
    assert [chain.serve(chain.c).content(VM, index) for index in (1, 2)] == [
        bytes(model) for model in chain.models
    ]
    with chain.home(chain.c) as home:
        newest = home.catalog.points(home.vm_id)[-1]
        assert home.catalog.members(home.vm_id, newest.id) == {1: 4 * MIB, 2: 2 * MIB}
    chain.cycle()
    assert chain.extend().kind == "delta"
    assert chain.looked_at < MIB


def test_a_first_point_with_a_gap_in_its_indexes(chain: Chain) -> None:
    chain.cycle()
    removed, chain.disks[:1], chain.models[:1] = chain.disks[0], [], []
    chain.write(2)
    chain.replicate(chain.b, remove_disks=[removed])
    assert chain.extend().kind == "initial"
    chain.cycle()
    assert chain.extend().kind == "delta"
    assert chain.serve(chain.c).content(VM, 1) == chain.models[0]


def test_a_first_copy_whose_end_was_not_heard_of(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call opens another point: what the further site has is that of before."""
    chain.cycle()
    with monkeypatch.context() as patched:

        def lost(*_: object) -> None:
            raise OSError("no answer")

        patched.setattr(initial, "settle_initial", lost)
        with pytest.raises(OSError, match="no answer"):
            chain.extend()
    before = chain.instants(chain.b)
    chain.cycle()
    assert chain.extend(points=EACH).kind == "delta"
    assert chain.replica_equals(chain.c)
    assert chain.instants(chain.c) == [before[-1], chain.instants(chain.b)[-1]]


def test_a_replica_that_runs_here_is_not_shipped_on(chain: Chain) -> None:
    chain.cycle()
    chain.extend()
    chain.cycle()
    hvreplica.failover_unplanned(chain.b, VM)
    with pytest.raises(errors.InvalidTransition, match="FailedOverWaitingCompletion at this site") as raised:
        chain.extend()
    assert "failover cancel" in (raised.value.hint or "")
    hvreplica.failover_cancel(chain.b, VM)
    assert chain.extend().kind == "delta"
    with chain.home(chain.b) as home, home.catalog.transaction():
        home.set_failover(Failover(mode="Primary"))
    with pytest.raises(errors.InvalidTransition) as raised:
        chain.extend()
    assert "--takeover" in (raised.value.hint or "")


@pytest.mark.parametrize("site", ["b", "c"])
def test_a_feed_that_stays_waits_for_a_failover_to_be_taken_back(chain: Chain, site: str) -> None:
    store: Path = getattr(chain, site)
    chain.cycle()
    with hvreplica.Extender(chain.b, VM, **chain.link(chain.c), interval_s=1e6) as feeding:
        loop = feeding._resident._loop
        assert loop is not None
        loop.step()
        chain.cycle()
        hvreplica.failover_unplanned(store, VM)
        loop.resume()
        wait_s = loop.step()
        assert wait_s is not None, "it does not stop for good"
        assert 0 < wait_s <= 60
        hvreplica.failover_cancel(store, VM)
        loop.resume()
        loop.step()
    assert chain.replica_equals(chain.c)


def test_failover_to_the_further_site_fences_its_feed(chain: Chain) -> None:
    chain.cycle()
    chain.extend()
    models = [bytearray(model) for model in chain.models]
    chain.cycle()
    hvreplica.failover_unplanned(chain.c, VM)
    for index, model in enumerate(models):
        assert chain.content(chain.c / VM / "active" / f"{index}.vhdx") == model
    with pytest.raises(errors.Fenced) as raised:
        chain.extend()
    assert "failover cancel" in (raised.value.hint or "")
    assert chain.cycle(), "the first replica and its primary go on"
    hvreplica.failover_cancel(chain.c, VM)
    chain.extend()
    assert chain.replica_equals(chain.c)


def test_a_damaged_newest_point_is_waited_out(chain: Chain) -> None:
    chain.cycle()
    chain.extend()
    damaged = chain.cycle()
    with chain.home(chain.b) as home, home.catalog.transaction():
        home.catalog.damage_point(home.vm_id, home.catalog.points(home.vm_id)[-1].id, "rust")
    with pytest.raises(errors.StoreError, match="newest point of VM 'web01' is damaged: rust"):
        chain.extend()
    assert chain.cycle() != damaged
    chain.extend()
    assert chain.replica_equals(chain.c)


def test_a_lost_memory_costs_fingerprints_and_no_copy(chain: Chain) -> None:
    chain.cycle(200)
    first = chain.extend()
    shutil.rmtree(chain.b / VM / "extended")
    chain.cycle(2)
    with pytest.raises(errors.Fenced):
        chain.extend()
    found = chain.extend(takeover=True)
    assert found.kind == "delta"
    assert found.wire_bytes < first.wire_bytes / 4
    assert chain.replica_equals(chain.c)
    chain.cycle(2)
    chain.extend()
    assert chain.looked_at < 64 << 10
    assert chain.replica_equals(chain.c)


def test_folders_of_one_kind_are_refused_to_the_other(chain: Chain) -> None:
    chain.cycle()
    with pytest.raises(errors.StateError, match="of a VM that runs here"):
        chain.extend(state=chain.state)
    chain.extend()
    folder = chain.b / VM / "extended"
    for call in (
        lambda: hvreplica.replicate(VM, chain.disks, state=folder, **chain.link(chain.c)),
        lambda: hvreplica.replicate(VM, state=folder, **chain.link(chain.c)),
        lambda: hvreplica.cut(folder),
        lambda: hvreplica.store_adopt(chain.folder / "e", VM, state=folder),
    ):
        with pytest.raises(errors.StateError, match="that of an extended replication"):
            call()
    assert hvreplica.status(folder).vm == VM


def test_state_of_the_version_before_is_read(chain: Chain) -> None:
    chain.cycle()
    path = chain.state / "state.json"
    state = json.loads(path.read_text())
    del state["store"], state["source_point"]
    path.write_text(json.dumps(state | {"version": 3}))
    found = load_state(OS_FILES, chain.state)
    assert found is not None
    assert (found.version, found.store, found.source_point) == (VERSION, "", None)
    assert chain.cycle()


def test_a_replica_that_was_the_primary_for_a_while_is_shipped_on_again(chain: Chain) -> None:
    """What it wrote as the primary, and the points of its adoption, are between the point shipped last and now."""
    old_state = chain.state
    chain.cycle()
    chain.extend()
    shipped = chain.feed().points
    chain.write(3, models=[bytearray(model) for model in chain.models])  # what the replica never gets
    chain.fail_over(chain.b)
    chain.write(3)
    hvreplica.store_adopt(chain.a, VM, state=old_state)
    hvreplica.failover_reverse(chain.b, VM, **chain.link(chain.a))
    chain.write(3)
    chain.replicate(chain.a, prepare=True)
    hvreplica.failover_planned(chain.a, VM)
    at_b = chain.state
    chain.run_at(chain.a)
    chain.write(3)
    hvreplica.store_adopt(chain.b, VM, state=at_b)
    hvreplica.failover_reverse(chain.a, VM, **chain.link(chain.b))
    chain.write(3)
    chain.replicate(chain.b)
    assert shipped[0] in [uuid.UUID(point.id) for point in hvreplica.point_list(chain.b, VM)]
    assert chain.extend().kind == "delta"
    assert chain.replica_equals(chain.c)
    assert 0 < chain.looked_at < MIB, "the point shipped last still leads to the newest"
