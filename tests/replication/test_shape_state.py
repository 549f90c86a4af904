"""What a primary's state says of its disks, step by step, with cuts that wait from before a disk changed."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from hvreplica.errors import StateError
from hvreplica.formats import messages
from hvreplica.replication import shape
from hvreplica.replication.state import PrimaryState, Transfer, shapes, track
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from hvreplica.disk import Disk

MIB = 1 << 20
FOLDER = Path("/state")
NIL = uuid.UUID(int=0)


@dataclass
class Shown:
    """As much of a disk as is remembered of it."""

    path: Path
    virtual_bytes: int = MIB
    virtual_disk_id: uuid.UUID | None = None
    logical_sector_bytes: int = 512
    physical_sector_bytes: int = 4096
    block_bytes: int = MIB
    format: str = "raw"


@dataclass
class Site:
    """A VM that is ready, and the disks that it shows."""

    disks: list[Shown] = field(default_factory=lambda: [Shown(Path("/a")), Shown(Path("/b"))])

    def __post_init__(self) -> None:
        self.state = track("vm", self.shown, clock=FakeClock(seed=1))
        self.state.phase = "ready"

    @property
    def shown(self) -> list[Disk]:
        return cast("list[Disk]", self.disks)

    def follow(self, *remove: str | int) -> None:
        shape.follow(self.state, "vm", self.shown, FOLDER, remove=remove)

    def cut(self) -> Transfer:
        """Record a cut behind those that wait."""
        transfer = Transfer("logs", "cut", NIL, NIL, 0.0, [], disks=shape.point_disks(self.state))
        self.state.pending.append(transfer)
        return transfer

    def settle(self) -> None:
        """Take note that the replica has the oldest cut."""
        transfer = self.state.pending[0]
        shape.settled(self.state, transfer)
        self.state.pending.remove(transfer)

    @property
    def stages(self) -> list[str]:
        return [disk.stage for disk in self.state.disks]


def sizes(disks: list[messages.DiskSize]) -> dict[int, int]:
    return {disk.index: disk.virtual_bytes for disk in disks}


def test_unchanged_vm_needs_no_cut_to_say_so() -> None:
    site = Site()
    site.follow()
    assert not shape.differs(site.state)


def test_resize_is_told_once_and_by_the_cuts_behind_it_only() -> None:
    site = Site()
    before = site.cut()
    site.disks[0].virtual_bytes = 3 * MIB
    site.follow()
    assert sizes(before.disks) == {0: MIB, 1: MIB}
    assert shape.differs(site.state)
    site.cut()
    assert not shape.differs(site.state)  # a cut that waits says it
    site.settle()
    assert site.state.disks[0].replica_bytes == MIB
    site.settle()
    assert site.state.disks[0].replica_bytes is None
    assert not shape.differs(site.state)


def test_cut_of_an_older_version_is_of_what_the_vm_had_then() -> None:
    site = Site()
    before = site.cut()
    before.disks = []
    site.disks[0].virtual_bytes = 3 * MIB
    site.follow()
    assert sizes(before.disks) == {0: MIB, 1: MIB}


def test_resize_back_before_anything_was_sent_is_none() -> None:
    site = Site()
    site.disks[0].virtual_bytes = 3 * MIB
    site.follow()
    site.disks[0].virtual_bytes = MIB
    site.follow()
    assert not shape.differs(site.state)


def test_resize_back_behind_a_cut_that_waits_is_told() -> None:
    site = Site()
    site.disks[0].virtual_bytes = 3 * MIB
    site.follow()
    site.cut()
    site.disks[0].virtual_bytes = MIB
    site.follow()
    assert shape.differs(site.state)
    site.settle()
    assert shape.differs(site.state)
    assert site.state.disks[0].replica_bytes == 3 * MIB


def test_removed_disk_stays_announced_until_no_cut_has_it() -> None:
    site = Site()
    site.cut()
    del site.disks[0]
    site.follow("/a")
    assert site.stages == ["leaving", "protected"]
    assert [disk.index for disk in shapes(site.state)] == [0, 1]
    site.settle()
    assert site.stages == ["leaving", "protected"]
    assert shape.differs(site.state)
    assert sizes(site.cut().disks) == {1: MIB}
    site.settle()
    assert site.stages == ["removed", "protected"]
    assert [disk.index for disk in shapes(site.state)] == [1]


def test_disk_that_joined_and_left_between_two_cuts_is_kept_for_the_one_that_has_it() -> None:
    site = Site()
    site.cut()
    site.disks.append(Shown(Path("/c")))
    site.follow()
    assert site.stages[2] == "joining"
    assert sizes(shape.point_disks(site.state)) == {0: MIB, 1: MIB}
    site.state.disks[2].stage = "joined"
    site.cut()
    del site.disks[2]
    site.follow(2)
    site.cut()
    site.settle()  # a point from before it came does not let it go
    assert site.stages[2] == "leaving"
    site.settle()
    assert site.stages[2] == "leaving"
    site.settle()
    assert site.stages[2] == "removed"


def test_disk_that_never_arrived_is_removed_at_once() -> None:
    site = Site()
    site.disks.append(Shown(Path("/c")))
    site.follow()
    del site.disks[2]
    site.follow(2)
    assert site.stages[2] == "removed"
    assert not shape.differs(site.state)


def test_index_is_never_used_again() -> None:
    site = Site()
    for number in range(messages.DISKS_MAX - 2):
        site.disks = [site.disks[0], Shown(Path(f"/new{number}"))]
        site.follow(number + 1)
        site.state.disks[number + 2].stage = "protected"
    site.disks[1:] = [Shown(Path("/more"))]
    with pytest.raises(StateError, match="no index is used again"):
        site.follow(messages.DISKS_MAX - 1)


def test_call_that_fails_leaves_the_state_as_it_was() -> None:
    site = Site()
    before = repr(site.state)
    site.disks[0].virtual_bytes = 2 * MIB
    del site.disks[1]
    with pytest.raises(StateError):
        site.follow()
    assert repr(site.state) == before


def test_fresh_state_keeps_the_place_of_removed_disks() -> None:
    site = Site()
    state, ordered = shape.state_of_call(
        None, "vm", site.shown, remove=["1"], folder=FOLDER, clock=FakeClock(seed=2)
    )
    assert [(disk.path, disk.stage) for disk in state.disks] == [
        ("/a", "protected"),
        ("", "removed"),
        ("/b", "protected"),
    ]
    assert shape.indexes(state) == [0, 2]
    assert ordered == site.disks


def test_state_of_which_nothing_was_sent_is_begun_anew_with_its_identity() -> None:
    site = Site()
    site.state.phase = "new"
    known = site.state
    site.disks = [Shown(Path("/z"))]
    state, _ = shape.state_of_call(known, "other", site.shown, folder=FOLDER, clock=FakeClock(seed=2))
    assert isinstance(state, PrimaryState)
    assert (state.vm, [disk.path for disk in state.disks]) == ("other", ["/z"])
    assert state.relationship_id == known.relationship_id
