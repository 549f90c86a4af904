"""Power cuts and kills at every step of a store whose disks grow, shrink, come and go.

As test_store_crash.py, over a life that begins with a copy that is no point: nothing acknowledged is lost, and no listed
point shows a disk of another size, a disk that it does not have, or several instants. Every point is kept, so that
older ones are read from undo parts over all those changes of shape.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.store.history import open_store, put_catalog
from tests.store.shape_history import ShapeHistory
from tests.store.world import EVERY, ram_folder
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IS_DEEP = settings().max_examples > 1000
WORLDS_MAX, KILLS_MAX = (None, 200) if IS_DEEP else (70, 12)


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


def record(history: ShapeHistory, root: Path) -> FaultFiles:
    files = FaultFiles(root)
    with open_store(files, root, history.clock) as store:
        history.run(files, store)
        history.check_end(files, root)
    return files


def check_world(world: FaultFiles, history: ShapeHistory, root: Path) -> None:
    """Restart on what a cut left, and go on to the end."""
    with open_store(world, root, FakeClock(seed=77)) as store:
        history.check_listed(world, root, store)
        found = store.recover()
        assert [vm.error for vm in found if vm.error] == [], world.story
        history.check_listed(world, root, store)
        history.last_acknowledged(world, store)
        history.run(world, store)
        history.check_end(world, root)
        leftovers = [path for path in world.files() if path.suffix in {".hrl", ".partial", ".tmp"}]
        assert leftovers == [], world.story


def test_power_cut_anywhere_loses_nothing_acknowledged(root: Path, seed: int) -> None:
    history = ShapeHistory(seed, policy=EVERY)
    trace = record(history, root).trace()
    count = 0
    for _, world in crash_states(trace, seed=seed, subsets_per_prefix=4, limit=WORLDS_MAX, distinct=True):
        put_catalog(root, world.last_note("catalog"))
        check_world(world, history, root)
        count += 1
    assert count > 35


def test_kill_anywhere_is_continued(root: Path, seed: int) -> None:
    history = ShapeHistory(seed + 2, policy=EVERY)
    steps = len(record(history, root).trace())
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(1, steps), KILLS_MAX)):
        put_catalog(root, None)
        files = FaultFiles(root)
        files.kill_at(step)
        with pytest.raises(Killed):
            history.run(files, open_store(files, root, FakeClock(seed=step)))
        check_world(files.after_kill(), history, root)
