"""Power cuts and kills at every step of a failover, of its cancel and commit: called again, each ends as one that
was not cut, and in between neither the replica nor its newest point is ever lost.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import settings

from hvreplica.errors import Fenced
from hvreplica.store import Store
from hvreplica.store.failover import AT_WORK, is_frozen
from hvreplica.store.open_point import LATEST
from hvreplica.store.promotion import Wish, cancel, commit, fail_over
from tests.store.failover_world import World
from tests.store.history import put_catalog
from tests.store.world import ram_folder, read_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.store.failover import Failover
    from hvreplica.store.home import VmHome

IS_DEEP = settings().max_examples > 1000
WORLDS_MAX = 400 if IS_DEEP else 32
KILLS_MAX = 100 if IS_DEEP else 10


class Call(NamedTuple):
    """A verb. point: the place of the point among all, None for none."""

    verb: str
    point: int | None = None

    def __str__(self) -> str:
        return self.verb if self.point is None else f"{self.verb}{self.point}"

    def run(self, home: VmHome, world: World) -> Failover:
        chosen = (
            None if self.point is None else LATEST if self.point == -1 else list(world.images)[self.point]
        )
        wish = Wish(chosen, force=True, wait_s=0.0)
        verbs: dict[str, Callable[[], Failover]] = {
            "unplanned": lambda: fail_over(home, "unplanned", wish),
            "cancel": lambda: cancel(home, wish),
            "commit": lambda: commit(home, wish),
            "commit-delete": lambda: commit(home, wish._replace(delete_points=True)),
        }
        return verbs[self.verb]()


class Scene(NamedTuple):
    """A verb, what comes before it, and the point that the active disks show after it."""

    before: tuple[Call, ...]
    call: Call
    shown: int | None = -1

    def __str__(self) -> str:
        return "-".join(map(str, (*self.before, self.call)))


NEWEST, OLD = Call("unplanned", -1), Call("unplanned", 0)
SCENES = (
    Scene((), NEWEST),
    Scene((), OLD, 0),
    Scene((NEWEST,), Call("cancel"), None),
    Scene((OLD,), Call("cancel"), None),
    Scene((OLD,), Call("cancel", 1), 1),
    Scene((NEWEST,), Call("commit")),
    Scene((OLD,), Call("commit-delete"), 0),
)


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


def prepare(scene: Scene, root: Path, seed: int) -> World:
    """Bring a world to where the verb of the scene begins; its trace begins there too."""
    world = World(root, random.Random(seed), record=True)
    for call in scene.before:
        call.run(world.home, world)
    world.files.settle()
    return world


def reopen(files: FaultFiles, root: Path, seed: int) -> Store:
    return Store.create_or_open(
        files, root, clock=FakeClock(seed=seed), on_commit=lambda data: files.note("catalog", data)
    )


def shape(record: Failover) -> tuple[object, ...]:
    """Return what two runs of one verb must agree on: not the ids that each makes for itself."""
    return (record.mode, record.state, record.intent, record.generation, record.point, record.active)


def look(home: VmHome, files: FaultFiles, world: World) -> Failover:
    """Refuse what must never be seen, at whatever step the cut came; return the record."""
    record = home.failover()
    if is_frozen(record):
        world.primary.generation += 1
        with pytest.raises(Fenced):
            world.primary.claim(world.store)
    world.check_kept()
    if record.intent is None:
        assert world.active().keys() == {disk.disk for disk in record.active}, files.story
    return record


def check(files: FaultFiles, root: Path, scene: Scene, world: World, wanted: Failover) -> None:
    """Restart after a cut, look, and call the verb again: it ends as one that was not cut."""
    with reopen(files, root, 99) as store:
        world.files, world.store = files, store
        assert [vm.error for vm in store.recover() if vm.error] == [], files.story
        assert store.status().vms[0].damage == [], files.story
        home = store.home("web01")
        record = look(home, files, world)
        was_done = record.intent is None and shape(record) == shape(wanted)
        done = record if was_done else scene.call.run(home, world)
        assert shape(done) == shape(wanted), files.story
        check_end(home, files, scene, world)


def check_end(home: VmHome, files: FaultFiles, scene: Scene, world: World) -> None:
    world.check_kept()
    if scene.shown is None:
        assert world.active() == {}, files.story
        for index, content in world.latest.items():
            assert read_disk(files, home.paths.disk(index), world.clock) == content, files.story
    else:
        assert world.active() == list(world.images.values())[scene.shown], files.story
    leftovers = [path for path in files.files() if path.suffix in {".hrl", ".partial", ".tmp"}]
    assert leftovers == [], files.story


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_power_cut_at_any_step_the_same_call_ends_as_one_that_was_not(
    scene: Scene, root: Path, seed: int
) -> None:
    world = prepare(scene, root, seed)
    snapshot = world.files.last_note("catalog")
    wanted = scene.call.run(world.home, world)
    trace = world.files.trace()
    world.store.close()
    count = 0
    for _, files in crash_states(trace, seed=seed, subsets_per_prefix=4, limit=WORLDS_MAX, distinct=True):
        put_catalog(root, files.last_note("catalog", snapshot))
        check(files, root, scene, world, wanted)
        count += 1
    assert count > 2


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_kill_at_every_step_the_same_call_ends_as_one_that_was_not(
    scene: Scene, root: Path, seed: int
) -> None:
    world = prepare(scene, root, seed)
    snapshot = world.files.last_note("catalog")
    start = world.files.after_kill()
    wanted = scene.call.run(world.home, world)
    steps = len(world.files.trace())
    world.store.close()
    for step in range(1, steps, max(1, steps // KILLS_MAX)):
        put_catalog(root, snapshot)
        files = start.after_kill()
        store = reopen(files, root, 5)
        files.kill_at(step)
        with pytest.raises(Killed):
            scene.call.run(store.home("web01"), world)
        store._parts.catalog.close()
        check(files.after_kill(), root, scene, world, wanted)


@pytest.mark.parametrize("scene", SCENES[:2], ids=str)
def test_failover_killed_at_every_step_can_be_cancelled(scene: Scene, root: Path, seed: int) -> None:
    world = prepare(scene, root, seed)
    snapshot = world.files.last_note("catalog")
    start = world.files.after_kill()
    scene.call.run(world.home, world)
    steps = len(world.files.trace())
    world.store.close()
    for step in range(1, steps, max(1, steps // KILLS_MAX)):
        put_catalog(root, snapshot)
        files = start.after_kill()
        store = reopen(files, root, 5)
        files.kill_at(step)
        with pytest.raises(Killed):
            scene.call.run(store.home("web01"), world)
        store._parts.catalog.close()
        files = files.after_kill()
        with reopen(files, root, 99) as store:
            world.files, world.store = files, store
            store.recover()
            home = store.home("web01")
            if is_frozen(home.failover()):
                cancel(home, Wish(wait_s=0.0))
            assert home.failover() == AT_WORK, files.story
            world.primary.claim(store).apply()
            check_end(home, files, Scene((), Call("cancel"), None), world)
