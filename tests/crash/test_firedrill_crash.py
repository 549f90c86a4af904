"""Power cuts and kills at every step of a test failover and of its cleanup: the replica does not care, the point is
held for as long as the test is there, what a test VM had flushed is there again, and the same call goes on.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import settings

from hvreplica.errors import InvalidTransition, PointInUse
from hvreplica.store import Store
from hvreplica.store.failover import AT_WORK
from hvreplica.store.firedrill import begin_firedrill, end_firedrill, firedrill_lock
from hvreplica.store.open_point import open_point
from hvreplica.store.point_child import kept_child
from hvreplica.store.points_kept import drop_point
from tests.store.failover_world import World
from tests.store.history import put_catalog
from tests.store.world import ram_folder, read_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.store.home import VmHome

IS_DEEP = settings().max_examples > 1000
WORLDS_MAX = 400 if IS_DEEP else 12
KILLS_MAX = 200 if IS_DEEP else 12
PAGE_BYTES = 4096
WRITES = ((0, 8192, b"a"), (1, 1 << 20, b"b"), (0, 12288, b"c"))


class Writes(NamedTuple):
    """What a test VM had flushed, and the write that was under way: (disk, offset, byte)."""

    flushed: int
    begun: int


def serve(home: VmHome, point: uuid.UUID, *, writes: bool = True) -> dict[int, bytes]:
    """Do what `failover test` does, with a client that writes and flushes; return what the disks showed."""
    with firedrill_lock(home):
        test = begin_firedrill(home, point)
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(open_point(home, test.point))
            children = {}
            for index, below in opened.disks.items():
                child = kept_child(home.files, home.paths.test(index), below, clock=home.clock)
                stack.callback(child.close)
                children[index] = child
            shown = {}
            for index, child in children.items():
                content = bytearray(child.virtual_bytes)
                child.read_into(content, 0)
                shown[index] = bytes(content)
            for place, (index, offset, letter) in enumerate(WRITES if writes else ()):
                home.files.note("writes", Writes(place, place + 1))  # type: ignore[attr-defined]
                children[index].write(letter * PAGE_BYTES, offset)
                children[index].flush()
                home.files.note("writes", Writes(place + 1, place + 1))  # type: ignore[attr-defined]
    return shown


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def world(root: Path, seed: int) -> World:
    """Return a world with three points; the trace begins here."""
    world = World(root, random.Random(seed), record=True)
    world.replica.apply()
    world.files.settle()
    return world


def reopen(files: FaultFiles, root: Path, seed: int = 99) -> Store:
    return Store.create_or_open(
        files, root, clock=FakeClock(seed=seed), on_commit=lambda data: files.note("catalog", data)
    )


def look(files: FaultFiles, home: VmHome, world: World, point: uuid.UUID) -> None:
    """Refuse what must never be seen, whatever was cut: the replica is untouched, the tested point is held."""
    world.check_kept()
    assert set(world.kept()) == set(world.images), files.story
    for index, content in world.latest.items():
        assert read_disk(files, home.paths.disk(index), world.clock) == content, files.story
    if home.failover().test is not None:
        with pytest.raises(PointInUse):
            drop_point(home, point)


def require_written(shown: dict[int, bytes], base: dict[int, bytes], writes: Writes, story: str) -> None:
    """Refuse an overlay without what was flushed, or with what nobody wrote; one write may be there or not."""
    held = {index: bytearray(content) for index, content in base.items()}
    for index, offset, letter in WRITES[: writes.flushed]:
        held[index][offset : offset + PAGE_BYTES] = letter * PAGE_BYTES
    for index, offset, letter in WRITES[writes.flushed : writes.begun]:
        found = shown[index][offset : offset + PAGE_BYTES]
        sectors = {found[at : at + 512] for at in range(0, PAGE_BYTES, 512)}
        was = held[index][offset : offset + PAGE_BYTES]
        assert sectors <= {letter * 512, *(bytes(was[at : at + 512]) for at in range(0, PAGE_BYTES, 512))}, (
            story
        )
        held[index][offset : offset + PAGE_BYTES] = found
    assert shown == {index: bytes(content) for index, content in held.items()}, story


def check_end(files: FaultFiles, home: VmHome, world: World) -> None:
    """Nothing of the test is left, and another point can be tested."""
    assert home.failover() == AT_WORK, files.story
    assert [path.name for path in files.files() if path.parent.name == "test"] in ([], ["lock"]), files.story
    other = list(world.images)[1]
    assert serve(home, other, writes=False) == world.images[other], files.story
    assert end_firedrill(home)


def check_test(files: FaultFiles, root: Path, world: World, point: uuid.UUID) -> None:
    """Restart after a cut of a test: it goes on with what was written, and ends."""
    with reopen(files, root) as store:
        world.files, world.store = files, store
        assert [vm.error for vm in store.recover() if vm.error] == [], files.story
        home = store.home("web01")
        look(files, home, world, point)
        writes = files.last_note("writes", Writes(0, 0))
        shown = serve(home, point, writes=False)
        require_written(shown, world.images[point], writes, files.story)
        assert end_firedrill(home)
        check_end(files, home, world)


def check_cleanup(files: FaultFiles, root: Path, world: World, point: uuid.UUID) -> None:
    """Restart after a cut of a cleanup: the test is whole, or on its way out, or gone; the same call ends it."""
    with reopen(files, root) as store:
        world.files, world.store = files, store
        assert [vm.error for vm in store.recover() if vm.error] == [], files.story
        home = store.home("web01")
        look(files, home, world, point)
        test = home.failover().test
        if test is not None and test.removing:
            with pytest.raises(InvalidTransition, match="being removed"):
                begin_firedrill(home, point)
        elif test is not None:
            whole = Writes(len(WRITES), len(WRITES))
            require_written(serve(home, point, writes=False), world.images[point], whole, files.story)
        assert end_firedrill(home) == (test is not None), files.story
        assert not end_firedrill(home)
        check_end(files, home, world)


def verb_of(name: str, world: World) -> tuple[Callable[[VmHome, uuid.UUID], object], Callable[..., None]]:
    """Return a verb and what is to hold after its cut; a cleanup finds a test that was served."""
    if name == "test":
        return serve, check_test
    serve(world.home, next(iter(world.images)))
    world.files.settle()
    return lambda home, _: end_firedrill(home), check_cleanup


@pytest.mark.parametrize("name", ["test", "cleanup"])
def test_power_cut_at_any_step_the_same_call_goes_on(name: str, root: Path, world: World, seed: int) -> None:
    point = next(iter(world.images))
    verb, check = verb_of(name, world)
    snapshot = world.files.last_note("catalog")
    verb(world.home, point)
    trace = world.files.trace()
    world.store.close()
    count = 0
    for _, files in crash_states(trace, seed=seed, subsets_per_prefix=4, limit=WORLDS_MAX):
        put_catalog(root, files.last_note("catalog", snapshot))
        check(files, root, world, point)
        count += 1
    assert count > 2


@pytest.mark.parametrize("name", ["test", "cleanup"])
def test_kill_at_every_step_the_same_call_goes_on(name: str, root: Path, world: World) -> None:
    point = next(iter(world.images))
    verb, check = verb_of(name, world)
    snapshot = world.files.last_note("catalog")
    start = world.files.after_kill()
    verb(world.home, point)
    steps = len(world.files.trace())
    world.store.close()
    for step in range(1, steps, max(1, steps // KILLS_MAX)):
        put_catalog(root, snapshot)
        files = start.after_kill()
        store = reopen(files, root, 5)
        files.kill_at(step)
        with pytest.raises(Killed):
            verb(store.home("web01"), point)
        store._parts.catalog.close()
        check(files.after_kill(), root, world, point)
