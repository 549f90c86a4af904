"""Power cuts and kills at every step of a failover to an instant: called again, it ends as one that was not cut.

Wherever the cut comes, every listed point is what it was, and the instant has one point or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from hvreplica.errors import Fenced
from hvreplica.store import Store
from hvreplica.store.at_instant import Instant
from hvreplica.store.failover import is_frozen
from hvreplica.store.promotion import Wish, cancel, fail_over
from tests.store.history import put_catalog
from tests.store.instant_world import InstantWorld
from tests.store.world import INSTANT_S, ram_folder
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store.failover import Failover
    from hvreplica.store.home import VmHome

IS_DEEP = settings().max_examples > 1000
WORLDS_MAX = 400 if IS_DEEP else 5
KILLS_MAX = 200 if IS_DEEP else 4
VERBS = ("unplanned", "cancel")


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


class Scene:
    """A cycle that is applied and one that waits; the instant is in the one that waits."""

    def __init__(self, root: Path, seed: int, verb: str) -> None:
        self.root, self.verb = root, verb
        self.world = InstantWorld(root, seed, record=True)
        first = self.world.points[self.world.cycle(4)]
        second = self.world.points[self.world.cycle(4, apply=False)]
        self.instant_s = float((first + second) // 2)
        if verb == "cancel":  # from an instant in the first cycle
            fail_over(self.world.home, "unplanned", self.wish(float((INSTANT_S + first) // 2)))
        self.world.files.settle()
        self.snapshot = self.world.files.last_note("catalog")
        self.start = self.world.files.after_kill()

    def wish(self, instant_s: float) -> Wish:
        return Wish(Instant(instant_s), wait_s=0.0)

    def call(self, home: VmHome) -> Failover:
        """Do the verb, or the rest of it."""
        if self.verb == "cancel":
            return cancel(home, self.wish(self.instant_s))
        return fail_over(home, "unplanned", self.wish(self.instant_s))

    def reopen(self, files: FaultFiles, seed: int) -> Store:
        return Store.create_or_open(
            files,
            self.root,
            clock=FakeClock(now_s=self.world.clock.now_s(), seed=seed),
            on_commit=lambda data: files.note("catalog", data),
        )

    def check(self, files: FaultFiles) -> None:
        """Restart after a cut, look, and call the verb again."""
        world = self.world
        with self.reopen(files, 99) as store:
            world.files, world.store = files, store
            assert [vm.error for vm in store.recover() if vm.error] == [], files.story
            home = store.home("web01")
            world.check()
            assert len(self.made(home)) <= 1, files.story
            if is_frozen(home.failover()):
                with pytest.raises(Fenced):
                    world.primary.claim(store)
            done = self.call(home)
            assert done.state == "FailedOverWaitingCompletion", files.story
            assert world.active() == world.at(self.instant_s), files.story
            assert [done.point] == self.made(home), files.story
            leftovers = [path for path in files.files() if path.suffix in {".partial", ".tmp"}]
            assert leftovers == [], files.story
            assert files.names(home.paths.spool) == [], files.story

    def made(self, home: VmHome) -> list[object]:
        """Return the points that show the instant, but for the newest one that was made equal to one."""
        reverted = home.failover().reverted
        return [
            point.id
            for point in home.catalog.points(home.vm_id)
            if point.instant_s == self.instant_s and (reverted is None or point.id != reverted.id)
        ]


@pytest.mark.parametrize("verb", VERBS)
def test_power_cut_at_any_step_the_same_call_ends_it(verb: str, root: Path, seed: int) -> None:
    scene = Scene(root, seed, verb)
    scene.call(scene.world.home)
    trace = scene.world.files.trace()
    scene.world.store.close()
    count = 0
    for _, files in crash_states(trace, seed=seed, subsets_per_prefix=4, limit=WORLDS_MAX):
        put_catalog(root, files.last_note("catalog", scene.snapshot))
        scene.check(files)
        count += 1
    assert count > 2


@pytest.mark.parametrize("verb", VERBS)
def test_kill_at_every_step_the_same_call_ends_it(verb: str, root: Path, seed: int) -> None:
    scene = Scene(root, seed, verb)
    scene.call(scene.world.home)
    steps = len(scene.world.files.trace())
    scene.world.store.close()
    for step in range(1, steps, max(1, steps // KILLS_MAX)):
        put_catalog(root, scene.snapshot)
        files = scene.start.after_kill()
        store = scene.reopen(files, 5)
        files.kill_at(step)
        with pytest.raises(Killed):
            scene.call(store.home("web01"))
        store._parts.catalog.close()
        scene.check(files.after_kill())
