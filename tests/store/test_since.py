"""What a promoted replica knows to have written since the fork."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.store.since import changed_between
from tests.store.point_world import MIB, PAGE, PointWorld

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 2 * MIB


def test_nothing_is_known_of_a_disk_that_the_kept_point_before_the_fork_has_not(tmp_path: Path) -> None:
    """A disk was added after that point, so no part tells what was written to it after the fork."""
    world = PointWorld(tmp_path / "store", {0: SIZE, 1: SIZE})
    try:
        vm_id, catalog = world.home.vm_id, world.catalog
        with catalog.transaction():
            catalog.set_members(vm_id, world.ids[0], {0: SIZE})
        fork = catalog.point(vm_id, world.cut({0: [(0, b"f" * PAGE)]}))
        assert fork is not None
        world.cut({0: [(PAGE, b"n" * PAGE)]})
        with (
            catalog.transaction()
        ):  # its parts become those of the first point, as when the next one is applied
            catalog.move_undo(vm_id, point_id=fork.id, target_id=world.ids[0], disk_index=0)
            catalog.supersede_point(vm_id, fork.id)
        known = changed_between(world.home, fork, 0, SIZE)
        assert known is not None
        assert known.tolist() == [[0, 2 * PAGE]]
        assert changed_between(world.home, fork, 1, SIZE) is None
    finally:
        world.close()
