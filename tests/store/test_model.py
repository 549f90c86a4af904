"""Any order of claims, takeovers, transfers, cuts and restarts: the store agrees with a model of a few lines.

The model knows what was acknowledged and what the disk held at each point. A listed complete point must be that
disk, the newest acknowledged point must never be lost, and only the owner may write.
"""

from __future__ import annotations

import contextlib
import errno
import uuid

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hvreplica.errors import Fenced, HvReplicaError
from hvreplica.store import AlreadyHave, InitialSink, LogSink, Store, VmReplica
from tests.store.world import (
    MIB,
    Cycle,
    Primary,
    data_extents,
    guid,
    ram_folder,
    read_replica,
    send_logs,
    small_disk,
)
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

STEP = MIB // 4


class StoreModel(RuleBasedStateMachine):
    """One VM, one disk, two primaries that take it from each other."""

    @initialize(replicated=st.booleans())
    def begin(self, *, replicated: bool) -> None:
        self.stack = contextlib.ExitStack()
        self.root = self.stack.enter_context(ram_folder())
        self.files = FaultFiles(self.root)
        self.clock = FakeClock(seed=1)
        self.store = Store.create_or_open(self.files, self.root, clock=self.clock)
        self.primary = Primary(self.clock, [small_disk(0, 1)])
        self.owner: tuple[uuid.UUID, int] | None = None
        self.images: dict[uuid.UUID, bytes] = {}
        self.acknowledged: list[uuid.UUID] = []  # since the newest initial replication, oldest first
        self.replica: VmReplica | None = None
        self.sink: InitialSink | None = None
        self.sending: tuple[int, bytes] = (0, b"")  # number of the initial transfer and what it sends
        self.cycle: Cycle | None = None
        self.initials = 100
        if replicated:
            self.initial_commits(whole=True)

    def session(self) -> VmReplica:
        """Return the session that is open, or begin one."""
        if self.replica is None:
            self.session_begins()
        assert self.replica is not None
        return self.replica

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.store.close()
            self.stack.close()

    # The guest and the sessions

    @rule(offset=st.integers(0, 2047), sectors=st.integers(1, 64), byte=st.integers(0, 255))
    def guest_writes(self, offset: int, sectors: int, byte: int) -> None:
        length = min(sectors, 2048 - offset) * 512
        self.primary.write(0, offset * 512, bytes([byte]) * length)

    @rule()
    def session_begins(self) -> None:
        self.replica = self.primary.claim(self.store)
        self.owner = (self.primary.relationship_id, self.primary.generation)
        self.sink = None

    @rule(relationship=st.integers(1, 3), change=st.integers(-1, 2))
    def somebody_claims(self, relationship: int, change: int) -> None:
        self.session()
        assert self.owner is not None
        identity, generation = guid(relationship), max(self.owner[1] + change, 0)
        rival = Primary(self.clock, [small_disk(0, 1)], relationship_id=identity, generation=generation)
        same = identity == self.owner[0]
        if generation <= self.owner[1]:
            with contextlib.suppress(Fenced):
                rival.claim(self.store)
                raise AssertionError("a claim that is not newer was accepted")
            return
        old = self.replica
        self.replica = rival.claim(self.store)
        self.owner = (identity, generation)
        if old is not None:
            with contextlib.suppress(Fenced):
                old.apply()
                raise AssertionError("a fenced session went on")
        self.sink = None
        if not same:  # the heir goes on from the point that the replica has
            last = self.acknowledged[-1] if self.acknowledged else None
            rival.disks = {0: bytearray(self.images[last] if last else bytes(MIB))}
            rival.last_point = last
            self.primary, self.cycle = rival, None
        else:
            self.primary.generation = generation

    # The initial replication

    @rule(again=st.booleans())
    def initial_begins(self, *, again: bool) -> None:
        replica = self.session()
        if not again or replica.transfer != guid(self.sending[0]):
            self.initials += 1
            self.sending = (self.initials, bytes(self.primary.disks[0]))
        sink = self.primary.begin_initial(replica, self.sending[0])
        assert not isinstance(sink, AlreadyHave)
        sink.resume_from(0, sink.position(0))
        self.sink = sink

    @rule(count=st.integers(1, 4), flush=st.booleans())
    def initial_sends(self, count: int, *, flush: bool) -> None:
        if self.sink is None:
            self.initial_begins(again=True)
        assert self.sink is not None
        for _ in range(count):
            offset = self.sink.covered_bytes
            if offset < MIB:
                window = self.sending[1][offset : offset + STEP]
                self.sink.write(0, offset, STEP, *data_extents(window, offset))
        if flush:
            self.sink.flush()

    @rule(whole=st.booleans())
    def initial_commits(self, *, whole: bool) -> None:
        if self.sink is None or whole:
            self.initial_sends(4 if whole else 1, flush=False)
        assert self.sink is not None
        if self.sink.covered_bytes < MIB:
            with contextlib.suppress(HvReplicaError):
                self.sink.commit()
                raise AssertionError("a disk with gaps was committed")
            return
        number, image = self.sending
        assert self.sink.commit() == guid(number)
        self.acknowledged = [guid(number)]
        self.images[guid(number)] = image
        self.sink = None
        self.cycle = None
        self.primary.last_point = guid(number)
        self.primary.last_log = {0: uuid.UUID(int=0)}
        # What the guest wrote since the copy began must come with the next cut: all of the disk is a superset.
        self.primary.changes = {0: [(0, MIB)]}

    # Cycles

    @rule(finish=st.sampled_from([True, True, False]))
    def cycle_is_shipped(self, *, finish: bool) -> None:
        if not self.acknowledged:
            self.initial_commits(whole=True)
        replica = self.session()
        if self.cycle is None:
            self.primary.last_point = self.acknowledged[-1]
            self.cycle = self.primary.cut()
        cycle = self.cycle
        self.sink = None
        sink = self.primary.begin_logs(replica, cycle)
        if isinstance(sink, LogSink):
            send_logs(sink, cycle, window_bytes=STEP, flush_every=2)
            if not finish:
                return
            sink.commit()
            self.acknowledged.append(cycle.point_id)
            self.images[cycle.point_id] = cycle.disks[0]
        self.cycle = None

    @rule()
    @precondition(lambda self: self.acknowledged)
    def points_are_applied(self) -> None:
        assert self.session().apply() == self.acknowledged[-1]
        self.check_disk()

    @rule(at=st.integers(1, 6), operation=st.sampled_from(["write", "sync", "unlink", "open"]))
    @precondition(lambda self: self.acknowledged)
    def apply_fails(self, at: int, operation: str) -> None:
        replica = self.session()
        self.files.fail(operation, at=at, error=errno.EIO, path="*/web01/*")
        with contextlib.suppress(OSError):
            replica.apply()
        self.files.heal()

    # Restarts

    @rule(recover=st.booleans(), clean=st.booleans())
    def process_ends(self, *, recover: bool, clean: bool) -> None:
        if clean:
            self.store.close()
        else:
            self.files = self.files.after_kill()
            self.store._parts.catalog.close()
        self.replica = self.sink = None
        self.store = Store.create_or_open(self.files, self.root, clock=self.clock)
        if recover:
            assert [vm.error for vm in self.store.recover() if vm.error] == []
            if self.acknowledged:
                self.check_disk()

    # What must hold

    def check_disk(self) -> None:
        newest = self.acknowledged[-1]
        assert [(point.id, point.state) for point in self.store.points("web01")] == [
            (str(newest), "complete")
        ]
        assert read_replica(self.files, self.root, self.primary)[0] == self.images[newest]

    @invariant()
    def listed_points_are_right(self) -> None:
        if not hasattr(self, "store") or self.owner is None:
            return
        points = self.store.points("web01")
        listed = [uuid.UUID(point.id) for point in points]
        assert listed == self.acknowledged[len(self.acknowledged) - len(listed) :]
        assert bool(listed) == bool(self.acknowledged)
        assert all(point.state in {"spooled", "applying"} for point in points[1:])
        if points and points[0].state == "complete":
            assert read_replica(self.files, self.root, self.primary)[0] == self.images[listed[0]]
        if self.replica is not None:
            assert self.replica.last_point == (self.acknowledged[-1] if self.acknowledged else None)


IS_DEEP = settings.default.max_examples > 1000
StoreModel.TestCase.settings = settings(
    max_examples=600 if IS_DEEP else 30, stateful_step_count=30, deadline=None
)
TestStoreModel = StoreModel.TestCase
