"""One life of a store: an initial replication of two disks, cycles, the applying of them; and what must hold."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING

from hvreplica import native
from hvreplica.store import AlreadyHave, Store
from hvreplica.store.digest import Digest
from hvreplica.store.follow import expected_digest
from tests.store.world import Primary, guid, read_replica, send_disks, send_logs, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.points import read_point

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.formats.messages import PointPolicy
    from tests.store.world import Cycle
    from tests.support.faultfile import FaultFiles


class History:
    """What the primary sends and what each point must look like."""

    def __init__(self, seed: int, *, cycles: int = 2, policy: PointPolicy | None = None) -> None:
        """Let the guest write, and cut it."""
        rng = random.Random(seed)
        self.clock = FakeClock(seed=seed)
        self.primary = Primary(self.clock, [small_disk(0, 2), small_disk(1, 2)], policy=policy)
        self.primary.scribble(rng, 8)
        self.initial = self.primary.image()
        self.images = {guid(100): self.initial}
        self.primary.last_point = guid(100)
        self.primary.changes = {index: [] for index in self.primary.disks}
        self.cycles: list[Cycle] = []
        for _ in range(cycles):
            self.primary.scribble(rng, 6)
            cycle = self.primary.cut()
            self.cycles.append(cycle)
            self.images[cycle.point_id] = cycle.disks
        self.order = [None, *self.images]

    def run(self, files: FaultFiles, store: Store) -> None:
        """Do everything that the replica does not have yet, as a primary that was told what it has."""
        replica = self.primary.claim(store)
        if replica.phase != "ready":
            sink = self.primary.begin_initial(replica)
            assert not isinstance(sink, AlreadyHave)
            send_disks(sink, self.initial, window_bytes=512 << 10, flush_every=3)
            files.acknowledge(sink.commit())
        for cycle in self.cycles:
            if self.order.index(replica.last_point) >= self.order.index(cycle.point_id):
                continue
            sink = self.primary.begin_logs(replica, cycle)
            assert not isinstance(sink, AlreadyHave)
            send_logs(sink, cycle, window_bytes=16 << 10, flush_every=2)
            files.acknowledge(sink.commit())
            replica.apply()
            files.note("applied", cycle.point_id)
        replica.apply()
        replica.close()

    def check_listed(self, files: FaultFiles, root: Path, store: Store) -> None:
        """Refuse a complete point whose disks are not what the primary had at that instant."""
        for vm in store.status().vms:
            assert vm.damage == [], files.story
            for point in store.points(vm.name):
                assert point.state != "damaged", files.story
                if point.state == "complete":
                    found = read_point(files, root, point.id, self.clock)
                    assert found == self.images[uuid.UUID(point.id)], files.story
                    self._check_digests(store, uuid.UUID(point.id), files.story)

    def _check_digests(self, store: Store, point_id: uuid.UUID, story: str) -> None:
        """Refuse a digest that is not the one of the point's content; it may be unknown, never wrong."""
        home = store._known(self.primary.vm)
        for index, content in self.images[point_id].items():
            digest = expected_digest(home, point_id, index)
            assert digest in {None, Digest(*native.page_digest(content, 0))}, story


def put_catalog(root: Path, data: bytes | None) -> None:
    """Let the catalog be what had been committed, as SQLite leaves it after a power cut."""
    for suffix in ("", "-wal", "-shm"):
        (root / f"catalog.db{suffix}").unlink(missing_ok=True)
    if data is not None:
        (root / "catalog.db").write_bytes(data)


def open_store(files: FaultFiles, root: Path, clock: FakeClock) -> Store:
    return Store.create_or_open(files, root, clock=clock, on_commit=lambda data: files.note("catalog", data))


def check_world(world: FaultFiles, history: History, root: Path) -> None:
    """Restart on what a cut left, and go on to the end."""
    acknowledged = list(world.acknowledged)
    with open_store(world, root, FakeClock(seed=77)) as store:
        history.check_listed(world, root, store)
        found = store.recover()
        assert [vm.error for vm in found if vm.error] == [], world.story
        history.check_listed(world, root, store)
        if acknowledged:
            replica = history.primary.claim(store)
            assert history.order.index(replica.last_point) >= history.order.index(acknowledged[-1]), (
                world.story
            )
        history.run(world, store)
        assert read_replica(world, root, history.primary) == history.primary.image(), world.story
        assert store.points("web01")[-1].id == str(history.cycles[-1].point_id)
        leftovers = [path for path in world.files() if path.suffix in {".hrl", ".partial", ".tmp"}]
        assert leftovers == [], world.story
