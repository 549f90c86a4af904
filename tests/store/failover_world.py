"""A primary and its replica, with what each point must look like, for failovers of all kinds."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from hvreplica.disk import open_disk
from hvreplica.store import Store
from hvreplica.store.open_point import open_point
from hvreplica.store.policy import Policy, pack_policy
from tests.store.world import Primary, guid, read_disk, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.store.home import VmHome


def read_whole(disk: Disk) -> bytes:
    """Return all bytes of a small disk."""
    buffer = bytearray(disk.virtual_bytes)
    disk.read_into(buffer, 0)
    return bytes(buffer)


class World:
    """A primary whose replica has one cycle applied and one that waits. images: by point, oldest first."""

    def __init__(
        self, root: Path, rng: random.Random, *, files: FileSystem | None = None, record: bool = False
    ) -> None:
        """files: in memory by default. record: note the catalog at each commit, for tests that cut the power."""
        self.root, self.clock = root, FakeClock(seed=3)
        self.files: Any = FaultFiles(root) if files is None else files
        self.primary = Primary(self.clock, [small_disk(0, 2), small_disk(1, 2)])
        self.primary.scribble(rng, 6)
        noted = (lambda data: self.files.note("catalog", data)) if record else None
        self.store = Store.create_or_open(self.files, root, clock=self.clock, on_commit=noted)
        self.replica = self.primary.replicate(self.store)
        catalog = self.home.catalog
        with catalog.transaction():  # a point at every cycle
            catalog.set_policy(self.home.vm_id, pack_policy(Policy(recovery_point_every_s=0)))
        self.rng = rng
        self.images: dict[uuid.UUID, dict[int, bytes]] = {guid(100): self.primary.image()}
        self.cycle()
        self.replica.apply()
        self.cycle()

    def cycle(self) -> None:
        """Ship one more cut; it is not applied."""
        self.primary.scribble(self.rng, 4)
        cut = self.primary.cut()
        self.primary.ship(self.replica, cut)
        self.images[cut.point_id] = cut.disks

    @property
    def home(self) -> VmHome:
        """What the verbs work on."""
        return self.store.home("web01")

    @property
    def latest(self) -> dict[int, bytes]:
        """What the newest point must look like."""
        return list(self.images.values())[-1]

    def kept(self) -> dict[uuid.UUID, dict[int, bytes]]:
        """Return what each point that can be had shows, read as anybody reads it."""
        shown = {}
        for point in self.store.points("web01"):
            if point.state == "complete":
                with open_point(self.home, uuid.UUID(point.id)) as opened:
                    shown[opened.id] = {index: read_whole(disk) for index, disk in opened.disks.items()}
        return shown

    def check_kept(self) -> None:
        """Refuse a point that is not what the primary had then."""
        for point_id, shown in self.kept().items():
            if point_id in self.images:
                assert shown == self.images[point_id], f"point {list(self.images).index(point_id)}"

    def active(self) -> dict[int, bytes]:
        """Return what the active disks show."""
        return {
            disk.disk: read_disk(self.files, self.home.paths.active(disk.disk), self.clock)
            for disk in self.home.failover().active
        }

    def run_vm(self, disk_offset: int = 4096, data: bytes = b"x" * 512) -> None:
        """Let the VM write at this site."""
        path = self.home.paths.active(0)
        with open_disk(self.files, path, writable=True, format="vhdx", clock=self.clock) as disk:
            disk.write(data, disk_offset)
