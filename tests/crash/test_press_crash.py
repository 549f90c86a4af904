"""Power cuts and kills at every step of pressing an undo part: the point is there, from the old file or the new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.store.part_files import open_part
from hvreplica.store.points_kept import sweep_points
from hvreplica.store.press import is_raw, press_part
from tests.store.history import put_catalog
from tests.store.parts import GRAIN_BYTES, add_part, add_points, names_in, opened_home, part_names
from tests.store.world import ram_folder
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store.home import VmHome

GRAINS = {number: (b"%8d" % number) * (GRAIN_BYTES // 8) for number in range(3, 150, 2)}


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


class Pressing:
    """A store with one part of text, durable, and what presses it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = FaultFiles(root)
        home = opened_home(root, files)
        self.point_id = add_points(home, 3)[0]
        add_part(home, self.point_id, GRAINS)
        home.catalog.close()
        self.files, self.snapshot = files, files.last_note("catalog")

    def start(self) -> tuple[FaultFiles, VmHome]:
        """Return the store as it stood before."""
        put_catalog(self.root, self.snapshot)
        files = self.files.after_kill()
        return files, opened_home(self.root, files, clock_seed=9)

    def press(self, home: VmHome) -> int:
        row = home.catalog.undo_rows(home.vm_id)[0]
        return press_part(home, row, held_bytes_min=0) if is_raw(row) else 0

    def check(self, files: FaultFiles) -> bool:
        """Restart on what a cut left, and go on; return whether it had been done."""
        home = opened_home(self.root, files, clock_seed=11)
        try:
            done = not is_raw(home.catalog.undo_rows(home.vm_id)[0])
            self.check_part(home)
            sweep_points(home)
            self.press(home)
            self.check_part(home)
            assert names_in(home) == part_names(home.catalog.undo_rows(home.vm_id))
            return done
        finally:
            home.catalog.close()

    def check_part(self, home: VmHome) -> None:
        (row,) = home.catalog.undo_rows(home.vm_id)
        found = {}
        with open_part(home.files, home.paths.undo(row.id)) as reader:
            for entry in (entry for batch in reader.entries() for entry in batch):
                data = reader.file.read(int(entry["log_offset"]), int(entry["data_length"]))
                for at in range(0, len(data), GRAIN_BYTES):
                    found[(int(entry["byte_offset"]) + at) // GRAIN_BYTES] = data[at : at + GRAIN_BYTES]
        assert found == GRAINS


def test_power_cut_anywhere_leaves_the_old_part_or_the_new_one(root: Path, seed: int) -> None:
    life = Pressing(root)
    files, home = life.start()
    assert life.press(home) > 0
    home.catalog.close()
    done = []
    for _, world in crash_states(files.trace(), seed=seed, subsets_per_prefix=2, limit=40, distinct=True):
        put_catalog(root, world.last_note("catalog", life.snapshot))
        done.append(life.check(world))
    assert True in done
    assert False in done


def test_kill_anywhere_leaves_the_old_part_or_the_new_one(root: Path) -> None:
    life = Pressing(root)
    files, home = life.start()
    life.press(home)
    home.catalog.close()
    steps = len(files.trace())
    for step in range(1, steps):
        files, home = life.start()
        files.kill_at(step)
        with pytest.raises(Killed):
            life.press(home)
        home.catalog.close()
        life.check(files.after_kill())
