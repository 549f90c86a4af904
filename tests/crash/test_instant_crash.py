"""Power cuts and kills at every step of `point at`: called again it ends as one that was not cut.

At every cut each listed point shows what the guest had written by its instant, with the digest of that, and what
was half made leaves no file behind once the store has recovered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.store.history import open_store, put_catalog
from tests.store.instant_world import InstantWorld
from tests.store.world import ram_folder
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IS_DEEP = settings().max_examples > 1000
WORLDS_MAX = 2000 if IS_DEEP else 20
KILLS_MAX = 200 if IS_DEEP else 5


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


class Cutting:
    """A world with kept logs of three cycles, and three instants within two of them."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.world = InstantWorld(root, seed)
        for _ in range(3):
            self.world.cycle()
        first, second, third = self.world.points.values()
        self.instants = [(first + second) // 2, (second + third) // 2, (first + second) // 2 + 2]
        self.world.store.close()
        self.snapshot = (root / "catalog.db").read_bytes()
        self.files = self.world.files

    def start(self, seed: int) -> FaultFiles:
        """Bring the store back to where it was before any of it."""
        put_catalog(self.root, self.snapshot)
        files = self.files.after_kill()
        self.open(files, seed)
        return files

    def open(self, files: FaultFiles, seed: int) -> None:
        """Serve the store that stands in `files`."""
        self.world.files = files
        self.world.store = open_store(files, self.root, FakeClock(now_s=self.world.clock.now_s(), seed=seed))

    def make(self) -> None:
        """Make a point of each instant; those that are there stay as they are."""
        for instant_s in self.instants:
            self.world.make(instant_s)

    def end(self, files: FaultFiles) -> None:
        """Restart on what a cut left, look, and make the points again."""
        self.open(files, 99)
        self.world.check_shown()
        assert [vm.error for vm in self.world.store.recover() if vm.error] == [], files.story
        self.world.check()
        self.make()
        self.world.check()
        listed = [point.instant_s for point in self.world.store.points("web01")]
        assert listed == sorted({*listed, *self.instants}), files.story
        assert [path for path in files.files() if path.suffix in {".partial", ".tmp"}] == [], files.story
        self.world.store.close()


def test_power_cut_at_any_step_leaves_the_points_and_the_same_call_ends_it(root: Path, seed: int) -> None:
    life = Cutting(root, seed)
    files = life.start(5)
    life.make()
    life.world.store.close()
    count = 0
    for _, cut in crash_states(
        files.trace(), seed=seed, subsets_per_prefix=4, limit=WORLDS_MAX, distinct=True
    ):
        put_catalog(root, cut.last_note("catalog", life.snapshot))
        life.end(cut)
        count += 1
    assert count > 5


def test_kill_at_any_step_leaves_the_points_and_the_same_call_ends_it(root: Path, seed: int) -> None:
    life = Cutting(root, seed + 1)
    files = life.start(5)
    life.make()
    life.world.store.close()
    steps = len(files.trace())
    for step in range(1, steps, max(1, steps // KILLS_MAX)):
        files = life.start(step)
        files.kill_at(step)
        with pytest.raises(Killed):
            life.make()
        life.world.store._parts.catalog.close()
        life.end(files.after_kill())
