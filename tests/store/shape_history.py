"""One life of a store whose disks change their shape, in steps that can be taken up again.

A first copy that is no point, logs that make it one, a disk that grows, one that is added and arrives in parts between
two cycles, one that goes, one that shrinks.
"""

from __future__ import annotations

import copy
import random
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.store import AlreadyHave, InitialSink
from tests.store.world import (
    MIB,
    Cycle,
    Primary,
    guid,
    read_disk,
    replica_path,
    send_disks,
    send_logs,
    small_disk,
)
from tests.support.fakeclock import FakeClock
from tests.support.points import read_point

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.formats.messages import PointPolicy
    from hvreplica.store import DiskSpec, Store, VmReplica
    from tests.support.faultfile import FaultFiles


@dataclass(frozen=True)
class Step:
    """One thing that a primary does, with what it announces then.

    cycle: None for an initial replication. number: of that one. whole: False where only a part of it is sent.
    """

    specs: list[DiskSpec]
    removed: list[int]
    cycle: Cycle | None = None
    number: int = 0
    joining: tuple[int, ...] = ()
    content: dict[int, bytes] | None = None
    whole: bool = True


class ShapeHistory:
    """What the primary sends and what each point must look like; see History."""

    def __init__(self, seed: int, policy: PointPolicy | None = None) -> None:
        rng = random.Random(seed)
        self.clock = FakeClock(seed=seed)
        self.primary = primary = Primary(self.clock, [small_disk(0, 1), small_disk(1, 1)], policy=policy)
        primary.scribble(rng, 6)
        self.steps: list[Step] = []
        self.images: dict[uuid.UUID, dict[int, bytes]] = {}
        self._initial(100)
        self._cycle(rng)
        primary.resize(0, 3 * MIB)
        primary.write(0, 3 * MIB - 1024, rng.randbytes(1024))
        self._cycle(rng)
        primary.add(small_disk(2, 2))
        primary.write(2, MIB - 512, rng.randbytes(1024))
        self._initial(200, joining=(2,), whole=False)
        self._cycle(rng, without=(2,))
        self._initial(200, joining=(2,), content=self.steps[-2].content)
        self._cycle(rng)
        primary.remove(1)
        primary.resize(0, MIB)
        self._cycle(rng)
        self.order = [None, guid(100), *self.images]
        self.cycles = [step.cycle for step in self.steps if step.cycle is not None]

    def _initial(
        self,
        number: int,
        *,
        joining: tuple[int, ...] = (),
        whole: bool = True,
        content: dict[int, bytes] | None = None,
    ) -> None:
        primary = self.primary
        image = {index: data for index, data in primary.image().items() if not joining or index in joining}
        step = Step(
            list(primary.specs), list(primary.removed), None, number, joining, content or image, whole
        )
        self.steps.append(step)
        if content is None:
            primary.changes = {
                index: [] if index in image else rows for index, rows in primary.changes.items()
            }
        if not joining:
            primary.last_point = guid(number)

    def _cycle(self, rng: random.Random, *, without: tuple[int, ...] = ()) -> None:
        self.primary.scribble(rng, 4)
        cycle = self.primary.cut(without=without)
        self.steps.append(Step(list(self.primary.specs), list(self.primary.removed), cycle))
        self.images[cycle.point_id] = cycle.disks

    def run(self, files: FaultFiles, store: Store) -> None:
        """Do everything that the replica does not have yet, as a primary that was told what it has."""
        for place, step in enumerate(self.steps):
            if self._is_done(store, place):
                continue
            primary = copy.copy(self.primary)
            primary.specs, primary.removed = step.specs, step.removed
            try:
                replica = primary.claim(store)
            finally:  # a primary knows its generation before it claims
                self.primary.generation, self.primary.has_claimed = primary.generation, True
            if step.cycle is None:
                self._send_disks(files, replica, step)
            else:
                self._send_logs(files, replica, step.cycle)
            replica.close()
        replica = self.primary.claim(store)
        replica.apply()
        replica.close()

    def _is_done(self, store: Store, place: int) -> bool:
        """Return whether the replica has this step, or one behind it of the same chain."""
        catalog = store._parts.catalog
        row = catalog.vm(self.primary.vm)
        if row is None:
            return False
        points = catalog.points(row.id)
        newest = self.order.index(points[-1].id if points else None)
        step = self.steps[place]
        if step.cycle is not None:
            return newest >= self.order.index(step.cycle.point_id)
        if not step.joining:
            return newest > 0
        held = [disk.base_id == guid(step.number) for disk in catalog.disks(row.id) if disk.spec.index == 2]
        return held == [True]

    def _send_disks(self, files: FaultFiles, replica: VmReplica, step: Step) -> None:
        sink = self.primary.begin_initial(replica, step.number, joining=step.joining, consistent=False)
        assert isinstance(sink, InitialSink), files.story
        content = step.content or {}
        if not step.whole:
            content = {index: data[:MIB] for index, data in content.items()}
        send_disks(sink, content, window_bytes=512 << 10, flush_every=2)
        sink.flush()
        if step.whole:
            sink.commit()
            if not step.joining:
                files.acknowledge(guid(step.number))

    def _send_logs(self, files: FaultFiles, replica: VmReplica, cycle: Cycle) -> None:
        sink = self.primary.begin_logs(replica, cycle)
        assert not isinstance(sink, AlreadyHave), files.story
        send_logs(sink, cycle, window_bytes=16 << 10, flush_every=2)
        files.acknowledge(sink.commit())
        replica.apply()
        files.note("applied", cycle.point_id)

    def check_listed(self, files: FaultFiles, root: Path, store: Store) -> None:
        """Refuse a complete point whose disks are not what the primary had at that instant."""
        for vm in store.status().vms:
            assert vm.damage == [], files.story
            for point in store.points(vm.name):
                assert point.state != "damaged", files.story
                if point.state == "complete":
                    found = read_point(files, root, point.id, self.clock)
                    assert found == self.images[uuid.UUID(point.id)], files.story

    def check_end(self, files: FaultFiles, root: Path) -> None:
        """Refuse an end that is not the last point."""
        point_id = self.cycles[-1].point_id
        assert self._read(files, root, point_id) == self.images[point_id], files.story

    def _read(self, files: FaultFiles, root: Path, point_id: uuid.UUID) -> dict[int, bytes]:
        return {
            index: read_disk(files, replica_path(root, "web01", index), self.clock)
            for index in self.images[point_id]
        }

    def last_acknowledged(self, files: FaultFiles, store: Store) -> None:
        """Refuse a replica that lost what it acknowledged."""
        acknowledged = list(files.acknowledged)
        if acknowledged:
            vm_id = store._parts.catalog.vms()[0].id
            newest = store._parts.catalog.points(vm_id)[-1].id
            assert self.order.index(newest) >= self.order.index(acknowledged[-1]), files.story
