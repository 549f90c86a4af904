"""Power cuts and kills at every step of a store's life: nothing acknowledged is lost, no listed point is wrong.

One trace holds an initial replication of two disks, some cycles, and the applying of them, with older points kept in
several ways. Beside each step of the file system stands the catalog as it was committed then, so that every prefix and every subset of unsynced writes
is met by the catalog that survives with it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from hvreplica.formats.messages import PointPolicy
from tests.store.history import History, check_world, open_store, put_catalog
from tests.store.world import EVERY, NO_OLDER, ram_folder, read_replica
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORLDS_MAX = 240
HOURLY = PointPolicy(
    recovery_point_every_s=3600
)  # the first point stays, and those behind it give it their parts
POLICIES = (EVERY, HOURLY, NO_OLDER)


@pytest.fixture
def root() -> Iterator[Path]:
    """Give the store a place: in the fault file system, and in a real folder for the catalog alone."""
    with ram_folder() as folder:
        yield folder


def record(history: History, root: Path) -> FaultFiles:
    """Return the file system after a whole run."""
    files = FaultFiles(root)
    with open_store(files, root, history.clock) as store:
        history.run(files, store)
        assert read_replica(files, root, history.primary) == history.primary.image()
    return files


def worlds(history: History, root: Path, seed: int, limit: int) -> Iterator[FaultFiles]:
    trace = record(history, root).trace()
    for _, world in crash_states(trace, seed=seed, subsets_per_prefix=4, limit=limit, distinct=True):
        put_catalog(root, world.last_note("catalog"))
        yield world


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_power_cut_anywhere_loses_nothing_acknowledged(root: Path, seed: int, policy: PointPolicy) -> None:
    history = History(seed, cycles=3, policy=policy)
    count = 0
    for world in worlds(history, root, seed, WORLDS_MAX):
        check_world(world, history, root)
        count += 1
    assert count > 100


def test_power_cut_during_recovery_is_recovered_again(root: Path, seed: int) -> None:
    history = History(seed + 1, cycles=3, policy=EVERY)
    for index, world in enumerate(worlds(history, root, seed, 60)):
        if index % 6:
            continue
        snapshot = world.last_note("catalog")
        with open_store(world, root, FakeClock(seed=5)) as store:
            store.recover()
        for _, second in crash_states(
            world.trace(), seed=index, subsets_per_prefix=2, limit=6, distinct=True
        ):
            put_catalog(root, second.last_note("catalog", snapshot))
            check_world(second, history, root)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_kill_anywhere_is_continued(root: Path, seed: int, policy: PointPolicy) -> None:
    history = History(seed + 2, cycles=3, policy=policy)
    steps = len(record(history, root).trace())
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(1, steps), 40)):
        put_catalog(root, None)
        files = FaultFiles(root)
        files.kill_at(step)
        with pytest.raises(Killed):
            history.run(files, open_store(files, root, FakeClock(seed=step)))
        check_world(files.after_kill(), history, root)
