"""A store that is full: points stay, the state says what is waited for, and it goes on by itself with room."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import StoreFull
from hvreplica.files import OS_FILES
from hvreplica.formats.messages import PointPolicy
from hvreplica.store import Store
from hvreplica.store.budget import used_bytes
from tests.store.world import MIB, Primary, ram_folder, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles
from tests.support.points import read_point

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.files import FileSystem
    from hvreplica.store import VmReplica


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


class Filling:
    """A VM that writes until its replica has no room."""

    def __init__(self, files: FileSystem, root: Path, seed: int) -> None:
        self.files, self.root = files, root
        self.clock = FakeClock(seed=seed)
        self.rng = random.Random(seed)
        self.primary = Primary(self.clock, [small_disk(0, 4)], policy=PointPolicy(keep="last 1000"))
        self.primary.scribble(self.rng, 8)
        self.store = Store.create_or_open(files, root, clock=self.clock)
        self.replica: VmReplica = self.primary.replicate(self.store)
        self.images = {str(self.primary.last_point): self.primary.image()}

    def cycle(self) -> None:
        """Ship and apply one more point."""
        offset = self.rng.randrange(0, 3 * MIB // 4096) * 4096
        self.primary.write(0, offset, self.rng.randbytes(MIB // 2))
        cycle = self.primary.cut()
        self.images[str(cycle.point_id)] = cycle.disks
        self.waiting = cycle
        self.go_on()

    def go_on(self) -> None:
        """Do what a primary does at its next try."""
        self.primary.ship(self.replica, self.waiting)
        self.replica.apply()

    def listed(self) -> list[str]:
        return [point.id for point in self.store.points("web01") if point.state == "complete"]

    def check(self) -> None:
        for point_id in self.listed():
            assert read_point(self.files, self.root, point_id, self.clock) == self.images[point_id]

    def fill(self) -> int:
        """Let the VM write until there is no room; return how many points there are."""
        for _ in range(100):
            try:
                self.cycle()
            except StoreFull as error:
                assert "no room left" in str(error)
                return len(self.listed())
        message = "it never was full"
        raise AssertionError(message)


@pytest.mark.parametrize("room_bytes", [0, 100_000, 600_000, 1_200_000])
def test_full_store_keeps_its_points_and_goes_on_with_room(root: Path, seed: int, room_bytes: int) -> None:
    files = FaultFiles(root)
    life = Filling(files, root, seed)
    for _ in range(3):
        life.cycle()
    before = life.listed()
    files.capacity_bytes = sum(len(files.content_of(path)) for path in files.files()) + room_bytes
    count = life.fill()
    for _ in range(3):
        with contextlib.suppress(StoreFull):
            life.go_on()
    assert life.listed()[: len(before)] == before, "no point goes to make room"
    life.check()
    files.capacity_bytes = None
    life.go_on()
    assert len(life.listed()) >= count + 1
    life.check()
    life.store.close()


def test_status_says_that_room_is_waited_for(root: Path, seed: int) -> None:
    files = FaultFiles(root)
    life = Filling(files, root, seed)
    life.cycle()
    assert life.store.status().vms[0].warnings == []
    files.capacity_bytes = sum(len(files.content_of(path)) for path in files.files()) + 600_000
    life.fill()
    [warning] = life.store.status().vms[0].warnings
    assert warning.startswith("replication may wait for room")
    files.capacity_bytes = None
    life.go_on()
    assert life.store.status().vms[0].warnings == []
    life.store.close()


def test_status_and_list_warn_of_the_point_that_goes_next(root: Path, seed: int) -> None:
    files = FaultFiles(root)
    life = Filling(files, root, seed)
    for _ in range(8):
        life.cycle()
    taken_bytes = used_bytes(life.store._known("web01"))
    assert taken_bytes > MIB
    life.store.set_policy("web01", PointPolicy(budget_bytes=taken_bytes * 11 // 10))
    first, *rest = life.store.points("web01")
    assert first.warning is not None
    assert f"the next to go is {first.id}" in first.warning
    assert [point.warning for point in rest] == [None] * len(rest)
    assert life.store.status().vms[0].warnings == [first.warning]
    life.store.close()


def test_real_file_system_that_is_full_goes_on_when_points_are_deleted(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        life = Filling(OS_FILES, folder, seed)
        count = life.fill()
        assert count > 5
        life.check()
        with contextlib.suppress(StoreFull):
            life.go_on()
        gone = life.store.delete_points("web01", [point.id for point in _oldest(life.store, 4)])
        assert len(gone) == 4
        life.go_on()
        life.check()
        life.store.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _oldest(store: Store, count: int) -> list[object]:
    home = store._known("web01")
    return home.catalog.points(home.vm_id)[:count]  # type: ignore[return-value]
