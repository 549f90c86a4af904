"""A captured VM whose disks are resized, added and removed between two starts: exports, tracking and points follow."""

from __future__ import annotations

import contextlib
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.errors import ReplicaDiverged, StateError
from hvreplica.replication.capture_verb import Capture
from tests.support.live_client import SocketGuest

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from tests.replication.sites import Served

MIB = 1 << 20
VM = "web01"


class Site:
    """Disks by index, with what each must hold."""

    def __init__(self, folder: Path, served: Served, rng: random.Random) -> None:
        self.folder, self.served, self.rng = folder, served, rng
        self.state = folder / "state"
        self.link = {"to": served.address, "tls": served.tls}
        self.disks: dict[int, Path] = {}
        self.models: dict[int, bytearray] = {}
        self.add(0, 6 * MIB)
        self.add(1, 4 * MIB)

    def add(self, index: int, size_bytes: int) -> None:
        self.disks[index] = self.folder / f"{index}.vhdx"
        self.models[index] = bytearray(size_bytes)
        hvreplica.disk_create(self.disks[index], size_bytes, block_bytes=MIB)

    def resize(self, index: int, size_bytes: int) -> None:
        hvreplica.disk_resize(self.disks[index], size_bytes)
        model = self.models[index]
        self.models[index] = model[:size_bytes] + bytes(max(size_bytes - len(model), 0))

    def remove(self, index: int) -> None:
        del self.models[index], self.disks[index]

    @contextlib.contextmanager
    def running(self, **options: Any) -> Iterator[Capture]:
        paths = list(self.disks.values())
        socket = self.folder / "nbd.sock"
        with Capture(VM, paths, state=self.state, socket=socket, **options) as capture:
            thread = threading.Thread(target=capture.serve_forever)
            thread.start()
            try:
                yield capture
            finally:
                capture.stop()
                thread.join()

    def write(self, index: int, count: int = 10, *, at: int | None = None) -> None:
        """Let the guest write 4 KiB here and there, through the export of the disk's index."""
        with SocketGuest(self.folder / "nbd.sock", str(index)) as guest:
            for _ in range(count):
                offset = self.rng.randrange(len(self.models[index]) // 4096) * 4096 if at is None else at
                data = self.rng.randbytes(4096)
                guest.write(offset, data)
                self.models[index][offset : offset + 4096] = data
            guest.flush()

    def replicate(self) -> hvreplica.ReplicateResult:
        return hvreplica.replicate(VM, state=self.state, **self.link)

    def check(self) -> None:
        for index, model in self.models.items():
            assert self.served.content(VM, index) == model, index


@pytest.fixture
def site(tmp_path: Path, served: Served, rng: random.Random) -> Site:
    """Return a site whose two disks are at the replica."""
    made = Site(tmp_path, served, rng)
    with made.running():
        made.write(0, 100)
        made.write(1, 100)
        made.replicate()
        made.check()
    return made


def test_grown_disk_is_tracked_to_its_new_end(site: Site) -> None:
    site.resize(0, 9 * MIB)
    with site.running():
        site.write(0, at=9 * MIB - 4096)
        site.write(1)
        result = site.replicate()
        assert result.kind == "delta"
        assert result.disks[0].changed_bytes <= 2 * 64 * 1024
        site.check()
        assert site.replicate().kind == "none"


def test_grown_disk_without_a_write_is_grown_at_the_replica(site: Site) -> None:
    site.resize(1, 5 * MIB)
    with site.running():
        assert site.replicate().kind == "delta"
        site.check()
        assert site.replicate().kind == "none"


def test_shrunk_disk_is_shrunk_at_the_replica(site: Site) -> None:
    site.add(2, 4 * MIB)
    with site.running():
        site.write(2, at=0)
        site.replicate()
    site.resize(2, 2 * MIB)
    with site.running():
        site.write(2)
        site.replicate()
        site.check()


@pytest.mark.parametrize("is_removed", [False, True], ids=["shrunk", "removed"])
def test_cuts_that_wait_become_one_after_their_disk_became_another(site: Site, *, is_removed: bool) -> None:
    site.add(2, 4 * MIB)
    with site.running():
        site.replicate()
        site.replicate()
        site.write(2, 20, at=MIB)
        with SocketGuest(site.folder / "nbd.sock", "2") as guest:
            guest.write(4 * MIB - 4096, bytes(4096))
        hvreplica.cut(site.state)
    if is_removed:
        site.remove(2)
    else:
        site.resize(2, 2 * MIB)
    with site.running(log_budget_bytes=4096, remove_disks=["2"] if is_removed else []):
        site.write(0)
        hvreplica.cut(site.state)
        assert len(hvreplica.status(site.state).pending) == 1
        site.replicate()
        site.check()


def test_added_disk_is_served_tracked_and_copied(site: Site) -> None:
    site.add(2, 5 * MIB)
    with site.running():
        site.write(2, 60)
        status = hvreplica.status(site.state)
        assert [disk.stage for disk in status.disks] == ["protected", "protected", "joining"]
        site.write(0)
        result = site.replicate()
        assert result.disks[0].changed_bytes <= 10 * 64 * 1024
        site.check()
        site.write(2, 5)
        site.replicate()
        site.check()


def test_cuts_before_the_copy_of_an_added_disk_leave_no_log_of_it(site: Site) -> None:
    site.add(2, 5 * MIB)
    with site.running():
        site.write(2, 20)
        for _ in range(3):
            site.write(0, 1)
            hvreplica.cut(site.state)
        assert len(list((site.state / "logs").iterdir())) == 3
        site.replicate()
        site.replicate()
        site.check()


def test_added_disk_whose_process_ends_in_between_loses_no_write(site: Site) -> None:
    site.add(2, 5 * MIB)
    with site.running():
        site.write(2, 60)
    with site.running():
        site.write(2, 5)
        site.replicate()
        site.check()
    with site.running():
        site.write(2, 5)
        site.replicate()
        site.check()


def test_removed_disk_leaves_the_others_their_exports(site: Site) -> None:
    site.remove(0)
    with pytest.raises(StateError, match="not named"), site.running():
        pass
    with site.running(remove_disks=["0"]):
        site.write(1)  # by its old name
        site.replicate()
        site.check()
        with pytest.raises(StateError, match="running process has this disk"):
            hvreplica.replicate(VM, state=site.state, remove_disks=["1"], **site.link)
    with site.running():
        site.write(1)
        site.replicate()
        site.check()
    assert [disk.index for disk in hvreplica.status(site.state).disks] == [1]


def test_added_disk_is_copied_by_a_loop_between_its_cycles(site: Site) -> None:
    site.add(2, 24 * MIB)
    with site.running(**site.link, continuous=True):
        site.write(2, 500)
        site.write(0)
        site.replicate()
        site.check()


def test_lost_state_of_a_vm_that_lost_a_disk_is_taken_over_with_the_disk_named(site: Site) -> None:
    site.add(2, 4 * MIB)
    with site.running():
        site.write(2, at=0)
        site.replicate()
    site.remove(1)
    with site.running(remove_disks=["1"]):
        site.replicate()
    shutil.rmtree(site.state)
    with site.running(), pytest.raises(ReplicaDiverged) as refused:
        hvreplica.replicate(VM, state=site.state, takeover=True, **site.link)
    assert refused.value.hint == "stop capture, start it again with --remove-disk 1, then take over"
    with site.running(remove_disks=["1"]):
        site.write(2)
        assert hvreplica.replicate(VM, state=site.state, takeover=True, **site.link).kind == "delta"
        site.check()
