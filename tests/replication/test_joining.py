"""A disk that is added to a VM under live tracking: its copy arrives in parts, and every write to it counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk, resize_disk
from hvreplica.errors import UnsupportedVersion
from hvreplica.files import OS_FILES
from hvreplica.replication import joining, serve
from hvreplica.replication.shape import follow
from tests.replication.live_site import MIB, STATE, VM, LiveSite

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.replication.sites import Served


class GrowingSite(LiveSite):
    """A LiveSite that gets a second disk."""

    def restart(self) -> None:
        """End the process and begin again; what tracking must know stays known."""
        known = self.machine.must_know()
        self.stop()
        self.start()
        self.follow()
        self.machine.recall(known)

    def follow(self) -> None:
        """Bring the state in line with the disks, as a call does when it starts."""
        self.work.disks = follow(self.work.state, VM, self.disks, self.folder.folder)
        self.work.save()

    def add(self, size_bytes: int) -> None:
        """Give the VM one more disk, mostly written, and begin again with it."""
        self.paths.append(Path(f"/primary/web01-{len(self.paths)}.vhdx"))
        create_disk(
            self.files,
            self.paths[-1],
            virtual_bytes=size_bytes,
            block_bytes=MIB,
            clock=self.clock,
            format="vhdx",
        )
        self.restart()
        self.write(size_bytes // 2, index=1, piece_bytes=MIB // 2)

    def is_due_after(self, windows: int) -> Callable[[], bool]:
        """Return what lets so many windows of the copy pass."""
        left = [windows + 1]

        def is_due() -> bool:
            left[0] -= 1
            return left[0] < 0

        return is_due


@pytest.fixture
def site(seed: int, served: Served) -> GrowingSite:
    """Return a site whose one disk is at the replica, with a second disk of 16 MiB that is not."""
    made = GrowingSite(seed)
    made.replicate(served)
    made.replicate(served)
    made.add(16 * MIB)
    return made


def stage(site: GrowingSite) -> str:
    return site.work.state.disks[1].stage


def test_added_disk_arrives_in_parts_while_the_others_go_on(site: GrowingSite, served: Served) -> None:
    parts = 0
    while stage(site) == "joining":
        parts += 1
        site.write(8 * 4096)
        site.write(8 * 4096, index=1)
        site.work.is_due = site.is_due_after(2)
        site.replicate(served)
        # The cut came behind this part of the copy: it is of all writes to the disk that points have.
        assert served.content(VM, 0) == site.machine.content(0)
    assert parts > 3
    assert site.equals(served)
    assert stage(site) == "protected"


@pytest.mark.parametrize("logged", [True, False])
def test_writes_to_what_was_sent_come_with_the_first_point(
    site: GrowingSite, served: Served, *, logged: bool
) -> None:
    site.work.is_due = site.is_due_after(3)
    site.replicate(served)
    assert site.work.state.joining is not None
    sent_bytes = site.work.state.joining.positions[0]
    assert 0 < sent_bytes < 16 * MIB
    for at in (0, sent_bytes - 4096, sent_bytes, 16 * MIB - 4096):
        site.machine.write(1, at, site.rng.randbytes(4096), logged=logged)
    site.work.is_due = site.is_due_after(0)
    site.replicate(served)  # a cut of both disks, while only one is in points
    assert {log.disk_index for log in site.machine.cuts[-1].logs} == {1}
    assert site.work.state.pending == []
    site.work.is_due = lambda: False
    site.replicate(served)
    assert site.equals(served)


def test_process_that_ends_in_the_copy_goes_on_with_it(site: GrowingSite, served: Served) -> None:
    site.work.is_due = site.is_due_after(3)
    site.replicate(served)
    assert site.work.state.joining is not None
    before = site.work.state.joining.positions
    assert joining.is_begun(site.work.state, 1)
    site.write(20 * 4096, index=1)
    site.restart()
    assert site.work.state.joining is not None
    assert site.work.state.joining.positions == before
    assert site.replicate(served).changed_bytes[1] < 16 * MIB
    assert site.equals(served)


def test_lost_table_begins_the_copy_anew(site: GrowingSite, served: Served) -> None:
    site.work.is_due = site.is_due_after(3)
    site.replicate(served)
    site.stop()
    site.files.unlink(STATE / "fingerprints" / "1.fp")
    site.start()
    site.follow()
    site.machine.recall([])
    site.write(4096, index=1)
    site.replicate(served)
    assert site.equals(served)


def test_lost_answer_to_the_end_of_a_copy_is_asked_for_again(
    site: GrowingSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = joining._settle

    def fail(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr(joining, "_settle", fail)
    with pytest.raises(KeyError):
        site.replicate(served)
    monkeypatch.setattr(joining, "_settle", settle)
    site.write(4096, index=1)
    assert site.replicate(served).changed_bytes[1] < 9 * MIB  # what was written since, not the copy
    assert site.equals(served)


def test_copy_that_the_replica_lost_is_sent_again(site: GrowingSite, served: Served) -> None:
    """A store that was restored from before the disk came, or a disk that somebody deleted: it says so."""
    site.work.state.disks[1].stage = "joined"  # as a primary believes that was acknowledged
    site.work.save()
    site.replicate(served)
    assert site.equals(served)


def test_disk_that_grows_while_it_arrives(site: GrowingSite, served: Served) -> None:
    site.work.is_due = site.is_due_after(3)
    site.replicate(served)
    known = site.machine.must_know()
    site.stop()
    resize_disk(site.files, site.paths[1], 20 * MIB, clock=SYSTEM)
    site.start()
    site.follow()
    site.machine.recall(known)
    site.machine.write(1, 20 * MIB - 4096, site.rng.randbytes(4096))
    site.replicate(served)
    assert site.equals(served)


def test_removed_disk_is_still_in_the_cuts_that_wait(seed: int, served: Served) -> None:
    """Cuts that were recorded with it are shipped with it; the first one without it lets it go."""
    site = GrowingSite(seed, disks_bytes=(4 * MIB, 4 * MIB))
    site.replicate(served)
    site.write(4096, index=1)
    site.cut()
    last = site.machine.content(1)
    site.stop()
    site.paths.pop()
    site.start()
    site.work.disks = follow(site.work.state, VM, site.disks, site.folder.folder, remove=["1"])
    site.work.save()
    assert stage(site) == "leaving"
    site.write(4096)
    site.replicate(served)
    assert stage(site) == "removed"
    assert site.equals(served)
    assert served_file(served, 1) == last


def test_cuts_that_become_one_are_of_the_disks_of_now(seed: int, served: Served) -> None:
    """What they held of a disk that has gone, or behind the end of one that is shorter, is nobody's any more."""
    site = GrowingSite(seed, disks_bytes=(8 * MIB, 4 * MIB))
    site.replicate(served)
    site.write(4096, index=1)
    site.machine.write(0, 8 * MIB - 4096, b"x" * 4096)
    site.cut()
    site.disks[0].write_zeroes(4 * MIB, 4 * MIB)
    site.stop()
    resize_disk(site.files, site.paths[0], 4 * MIB, clock=SYSTEM)
    site.paths.pop()
    site.start()
    site.work.disks = follow(site.work.state, VM, site.disks, site.folder.folder, remove=["1"])
    site.work.save()
    site.machine.budget_bytes = 0
    site.write(4096)
    site.cut()
    assert len(site.work.state.pending) == 1
    site.replicate(served)
    assert site.equals(served)


def served_file(served: Served, index: int) -> bytes:
    """Return what a disk's file in the store holds."""
    with open_disk(OS_FILES, served.store / VM / "disks" / f"{index}.vhdx", clock=SYSTEM) as disk:
        data = bytearray(disk.virtual_bytes)
        disk.read_into(data, 0)
        return bytes(data)


def test_older_replica_is_sent_no_copy_of_several_instants(
    seed: int, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.messages, "REVISION", 1)
    site = GrowingSite(seed)
    with pytest.raises(UnsupportedVersion, match="too old"):
        site.replicate(served)
