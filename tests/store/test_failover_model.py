"""Any order of cycles, drops, failovers, cancels and kills: every point stays what it was, and one side writes."""

from __future__ import annotations

import contextlib
import random
import uuid

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hvreplica.errors import FailoverRefused, Fenced, InvalidTransition, NoSuchPoint, PointInUse
from hvreplica.store import Store
from hvreplica.store.failover import is_frozen
from hvreplica.store.points_kept import drop_point
from hvreplica.store.promotion import Wish, cancel, fail_over
from tests.store.failover_world import World
from tests.store.world import ram_folder
from tests.support.faultfile import Killed

EXAMPLES = 200 if settings().max_examples > 1000 else 4


class FailoverModel(RuleBasedStateMachine):
    """One VM with two disks. chosen: the point that the active disks began as. written: what the VM wrote."""

    @initialize(seed=st.integers(0, 1 << 30))
    def begin(self, seed: int) -> None:
        self.stack = contextlib.ExitStack()
        root = self.stack.enter_context(ram_folder())
        self.world = World(root, random.Random(seed))
        self.chosen: uuid.UUID | None = None
        self.written = False

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.world.store.close()
            self.stack.close()

    def point(self, draw: float) -> uuid.UUID:
        """Return one of the points that the primary made and that can be had, or waits."""
        manual = self.world.home.failover().reverted
        listed = [uuid.UUID(row.id) for row in self.world.store.points("web01")]
        mine = [
            each for each in listed if each in self.world.images and (manual is None or each != manual.id)
        ]
        return mine[int(draw * len(mine))]

    @property
    def is_frozen(self) -> bool:
        return is_frozen(self.world.home.failover())

    @rule(apply=st.booleans())
    def cycle(self, *, apply: bool) -> None:
        if self.is_frozen:
            with pytest.raises(Fenced):
                self.world.primary.claim(self.world.store)
            return
        self.world.replica = self.world.primary.claim(self.world.store)
        self.world.cycle()
        if apply:
            self.world.replica.apply()

    @rule(draw=st.floats(0, 0.99))
    def drop(self, draw: float) -> None:
        with contextlib.suppress(PointInUse, InvalidTransition, NoSuchPoint):
            drop_point(self.world.home, self.point(draw))

    @rule(draw=st.floats(0, 0.99), kill=st.integers(0, 200))
    def unplanned(self, draw: float, kill: int) -> None:
        point = self.point(draw)

        def call() -> None:
            fail_over(self.world.home, "unplanned", Wish(point, wait_s=0.0))

        if self.is_frozen:
            if point != self.chosen:
                with pytest.raises(InvalidTransition):
                    call()
            return
        self.run(call, kill)
        self.chosen, self.written = point, False

    @precondition(lambda self: self.chosen is not None)
    @rule(draw=st.floats(0, 0.99), kill=st.integers(0, 200), again=st.booleans())
    def cancel(self, draw: float, kill: int, *, again: bool) -> None:
        point = self.point(draw) if again else None
        if self.written:
            with pytest.raises(FailoverRefused):
                cancel(self.world.home, Wish(wait_s=0.0))
        self.run(lambda: cancel(self.world.home, Wish(point, force=True, wait_s=0.0)), kill)
        self.chosen, self.written = point, False

    @precondition(lambda self: self.chosen is not None)
    @rule()
    def vm_writes(self) -> None:
        self.world.run_vm()
        self.written = True

    def run(self, call: object, kill: int) -> None:
        """Call a verb; where it was killed, restart and call it again, if it had begun."""
        assert callable(call)
        files = self.world.files
        if not kill:
            call()
            return
        files.settle()
        files.kill_at(kill)
        try:
            call()
        except Killed:
            self.world.store._parts.catalog.close()
            self.world.files = files.after_kill()
            self.world.store = Store.create_or_open(self.world.files, self.world.root, clock=self.world.clock)
            assert [vm.error for vm in self.world.store.recover() if vm.error] == []
            self.look()
            call()
        else:
            files.heal()

    def look(self) -> None:
        self.world.check_kept()
        assert self.world.store.status().vms[0].damage == []

    @invariant()
    def points_are_what_they_were(self) -> None:
        if not hasattr(self, "world"):
            return
        self.look()
        assert (self.chosen is not None) == (
            self.world.home.failover().state == "FailedOverWaitingCompletion"
        )
        if self.chosen is not None and not self.written:
            assert self.world.active() == self.world.images[self.chosen]


FailoverModel.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=8, deadline=None)
TestFailoverModel = FailoverModel.TestCase
