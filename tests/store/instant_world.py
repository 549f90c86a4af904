"""A primary whose logs hold each write with its second, and what its disks held at any instant.

With `slots` it also knows the parts of seconds, and when its guest asked for flushes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.formats.times import pack_times
from hvreplica.hrl import LogWriter
from hvreplica.store import AlreadyHave, LogSpec, Store
from hvreplica.store.digest import Digest, digest_of
from hvreplica.store.follow import expected_digest
from hvreplica.store.moment import micros
from hvreplica.store.open_point import open_point
from hvreplica.store.policy import Policy, pack_policy
from tests.store.world import INSTANT_S, Cycle, Primary, guid, read_disk, send_logs, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles
from tests.support.points import read_point
from tests.support.times import times_of_history

if TYPE_CHECKING:
    import uuid

    from hvreplica.store.home import VmHome

KEEP = Policy(recovery_point_every_s=0, keep_logs_s=3600)


class InstantWorld:
    """Two disks, a store in memory, and the writes of the guest in order: (second, disk, offset, data)."""

    def __init__(
        self,
        root: Path,
        seed: int,
        policy: Policy = KEEP,
        slots: tuple[int, ...] = (),
        *,
        record: bool = False,
    ) -> None:
        """slots: microseconds, of which each log takes any for its ticks; none for logs without times.

        record: note the catalog at each commit, for tests that cut the power.
        """
        self.root = root
        self.slots = slots
        self.apart_s = 1.0
        self.flushes: list[float] = []
        self.times: dict[uuid.UUID, bytes] = {}
        self.rng = random.Random(seed)
        self.files = FaultFiles(root)
        self.clock = FakeClock(now_s=INSTANT_S, seed=seed)
        self.primary = Primary(self.clock, [small_disk(index, 2) for index in range(2)])
        self.primary.scribble(self.rng, 8)
        self.base = self.primary.image()
        noted = (lambda data: self.files.note("catalog", data)) if record else None
        self.store = Store.create_or_open(self.files, root, clock=self.clock, on_commit=noted)
        self.replica = self.primary.replicate(self.store)
        self.set_policy(policy)
        self.writes: list[tuple[float, int, int, bytes]] = []
        self.logged = 0
        self.points: dict[uuid.UUID, float] = {}
        self.clock.advance(1)  # no write has the second of the first copy

    @property
    def home(self) -> VmHome:
        return self.store.home("web01")

    def set_policy(self, policy: Policy) -> None:
        with self.home.catalog.transaction():
            self.home.catalog.set_policy(self.home.vm_id, pack_policy(policy))

    def write(self, count: int = 12) -> None:
        """Let the guest write here and there, some seconds apart or in the same one, zeros too."""
        for _ in range(count):
            self.clock.advance(self.rng.choice((0, 0, 1, 3)))
            if self.slots:
                self._advance_in_second()
            index, length = self.rng.randrange(2), self.rng.randint(1, 40) * 512
            offset = self.rng.randrange(0, (1 << 20) // 512) * 512
            data = bytes(length) if self.rng.random() < 0.2 else self.rng.randbytes(length)
            self.primary.write(index, offset, data)
            self.writes.append((self.clock.now_s(), index, offset, data))

    def _advance_in_second(self) -> None:
        self.clock.advance(self.rng.choice((2e-6, 0.0004, 0.003, 0.02, 0.7)))
        if self.rng.random() < 0.3:
            self.flushes.append(self.clock.now_s())
            self.clock.advance(3e-6)

    def _times_of(self, log_id: uuid.UUID, stamps: list[float]) -> bytes:
        ended_us, cut_before_us = micros(self.clock.now_s()), micros(self.points_s[-1])
        flushes = [at for at in map(micros, self.flushes) if at > cut_before_us]
        slot_us = self.rng.choice(self.slots)
        times = times_of_history(
            log_id, list(map(micros, stamps)), flushes, slot_us=slot_us, ended_us=ended_us
        )
        return pack_times(times)

    @property
    def points_s(self) -> list[float]:
        """When cuts were, the first copy included."""
        return [INSTANT_S, *self.points.values()]

    def cut(self, *, ordered: bool = True) -> Cycle:
        """Cut all disks now; each has a log of its writes in their order, one that has none has no log."""
        self.clock.advance(2)
        files, logs, contents = FaultFiles("/primary"), [], []
        for index in range(2):
            own = [each for each in self.writes[self.logged :] if each[1] == index]
            if not own:
                continue
            log_id, path = self.clock.guid(), Path(f"/primary/{index}.hrl")
            previous = self.primary.last_log[index]
            writer = LogWriter.create(
                files, path, log_id=log_id, previous_log_id=previous, data_write_guid=None, clock=self.clock
            )
            for second, _, offset, data in own:
                writer.append(np.array([[offset, len(data)]], np.int64), data, time_s=second)
            summary = writer.close()
            logs.append(LogSpec(index, log_id, previous, summary.log_bytes, is_ordered=ordered))
            contents.append(files.content_of(path))
            if ordered and self.slots:
                self.times[log_id] = self._times_of(log_id, [at for at, *_ in own])
            self.primary.last_log[index] = log_id
        self.logged = len(self.writes)
        assert self.primary.last_point is not None
        cycle = Cycle(
            self.clock.guid(),
            self.clock.guid(),
            self.primary.last_point,
            logs,
            contents,
            self.primary.image(),
        )
        self.primary.last_point = cycle.point_id
        self.primary.changes = {0: [], 1: []}
        return cycle

    def cycle(self, count: int = 12, *, ordered: bool = True, apply: bool = True) -> uuid.UUID:
        """Let the guest write, cut, ship and apply; return the point's id."""
        self.write(count)
        cycle = self.cut(ordered=ordered)
        self.points[cycle.point_id] = self.clock.now_s()
        sink = self.replica.begin_logs(
            cycle.transfer_id,
            point_id=cycle.point_id,
            previous_point_id=cycle.previous_point_id,
            instant_s=self.clock.now_s(),
            logs=cycle.logs,
            disks=cycle.sizes,
        )
        assert not isinstance(sink, AlreadyHave)
        for log in cycle.logs:
            if log.log_id in self.times:
                sink.take_times(log.log_id, self.times[log.log_id])
        send_logs(sink, cycle)
        sink.commit()
        if apply:
            self.replica.apply()
        self.clock.advance(self.apart_s)  # 1: no write of the next cycle has the second of this cut
        return cycle.point_id

    def at(self, instant_s: float, kind: str = "manual") -> dict[int, bytes]:
        """Return what the disks held then; of a point made of a whole second, at the end of that."""
        disks = {index: bytearray(content) for index, content in self.base.items()}
        whole = kind == "manual" and instant_s == int(instant_s)
        for time_s, index, offset, data in self.writes:
            if time_s < instant_s + 1 if whole else micros(time_s) <= micros(instant_s):
                disks[index][offset : offset + len(data)] = data
        return {index: bytes(content) for index, content in disks.items()}

    def active(self) -> dict[int, bytes]:
        """Return what the active disks of a failover show."""
        return {
            disk.disk: read_disk(self.files, self.home.paths.active(disk.disk), self.clock)
            for disk in self.home.failover().active
        }

    def make(self, instant_s: float) -> uuid.UUID:
        """Make a point of this second; return its id."""
        made = self.store.make_point_at("web01", instant_s)
        assert (made.kind, made.state, made.instant_s) == ("manual", "complete", instant_s)
        return next(point.id for point in self.home.catalog.points(1) if str(point.id) == made.id)

    def check(self) -> None:
        """Do as check_shown(), and refuse files of parts that nobody knows."""
        self.check_shown()
        names = set(self.files.names(self.home.paths.points))
        rows = self.home.catalog.undo_rows(self.home.vm_id)
        assert {name for name in names if name.endswith(".hru")} == {f"{row.id}.hru" for row in rows}

    def check_shown(self) -> None:
        """Hold each listed point to the guest's writes, read by the rule alone, and to its digest."""
        for point in self.store.points("web01"):
            if point.state != "complete":
                continue
            shown = INSTANT_S if point.id == str(guid(100)) else point.instant_s
            found = read_point(self.files, self.root, point.id, self.clock)
            assert found == self.at(shown, point.kind), point
            with open_point(self.home, point.id) as opened:
                for index, disk in opened.disks.items():
                    known = expected_digest(self.home, opened.id, index)
                    assert isinstance(known, Digest), "the first copy had a digest"
                    assert known == digest_of(disk), (point, index)
