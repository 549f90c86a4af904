"""Any order of cycles, drops, failovers, reversals and crashes, against a dictionary of snapshots.

Two hosts take turns in running a VM. Each rule is a verb of its whole life, and most of them may be cut by a kill or
a power cut at any of their steps, at either host, and are called again then. After each rule every listed point
shows what the VM held then, none is missing that nobody let go, the disks that the VM runs on hold what it wrote, and
the other site's old primary is let in nowhere.
"""

from __future__ import annotations

import contextlib
import random
import threading
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk, resize_disk
from hvreplica.errors import (
    FailoverRefused,
    Fenced,
    InvalidTransition,
    NoSuchPoint,
    PointInUse,
    StateError,
    StoreError,
)
from hvreplica.formats.messages import PointPolicy
from hvreplica.store import Store
from hvreplica.store.firedrill import begin_firedrill, end_firedrill
from hvreplica.store.instant import make_point_at
from hvreplica.store.pace import Pace
from hvreplica.store.promotion import Wish, cancel, commit, fail_over
from hvreplica.store.retain import let_go, retain
from tests.crash.near_network import NearNetwork
from tests.crash.two_hosts import MIB, VM, Host, TwoHosts, check_points, read_disk
from tests.store.world import ram_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IS_DEEP = settings().max_examples > 1000
EXAMPLES, STEPS = (400, 30) if IS_DEEP else (10, 16)
EVERY = PointPolicy(
    recovery_points=24, recovery_point_every_s=0, keep="last 1000", budget_bytes=0, keep_logs_s=3600
)
POLICIES = (
    EVERY,
    EVERY,
    PointPolicy(recovery_points=0, keep=""),
    PointPolicy(recovery_points=3, recovery_point_every_s=60, keep=""),
    PointPolicy(recovery_points=0, keep="last 3, app-consistent 1"),
    PointPolicy(recovery_points=24, recovery_point_every_s=0, keep="", budget_bytes=MIB),
    PointPolicy(recovery_points=24, recovery_point_every_s=0, keep="", budget_bytes=0, keep_logs_s=600),
)


class Crash(NamedTuple):
    """A host dies at a step of a verb. of: whether it is the one that the verb is called at, else the other."""

    step: int
    at_caller: bool
    power: bool


CRASHES = st.none() | st.builds(Crash, st.integers(1, 12) | st.integers(1, 250), st.booleans(), st.booleans())
DRAW = st.floats(0, 0.99)


class Site(NamedTuple):
    """Where the VM ran before a failover: its disks there, with what they hold."""

    host: Host
    state: Path
    disks: list[Path]
    models: list[bytearray]


class LifeModel(RuleBasedStateMachine):
    """phase: primary, prepared, held (a planned failover was cancelled), failed, committed or adopted.

    old: where the VM ran before, from failed on. told: the policy that a host's store follows. kept: points of
    a host that must be there while that is EVERY.
    """

    @initialize(seed=st.integers(0, 1 << 30), two=st.booleans())
    def begin(self, seed: int, *, two: bool) -> None:
        self.stack = contextlib.ExitStack()
        root = self.stack.enter_context(ram_folder())
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        NearNetwork().install(patch)
        self.vm = TwoHosts(root, seed, (2 * MIB, MIB) if two else (2 * MIB,))
        self.stack.callback(self.vm.close)
        self.rng = random.Random(seed)
        self.phase, self.old, self.chosen = "primary", None, None
        self.policy = EVERY
        self.kept: dict[str, set[uuid.UUID]] = {"a": set(), "b": set()}
        self.told: dict[str, PointPolicy] = {}
        self.seconds: dict[str, list[tuple[float, dict[int, bytes]]]] = {"a": [], "b": []}
        self.expected: list[dict[int, bytes]] = []
        self.cycle(None, app=False)

    old: Site | None
    chosen: uuid.UUID | None

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with contextlib.closing(self.stack):
            for host in (self.vm.a, self.vm.b):
                self.verify(host)

    # ---- how verbs are called

    def run(
        self,
        verb: Callable[[], Any],
        crash: Crash | None,
        caller: Host,
        again: Callable[[], Any] | None = None,
    ) -> Any:
        """Call a verb; where a crash cut it, look, and call it again. again: what to call then instead."""
        if crash is not None:
            host = caller if crash.at_caller else self.other(caller)
            done: list[Any] = []
            if not host.dying(crash.step, self.rng, power=crash.power, verb=lambda: done.append(verb())):
                return done[0]
            self.look()
            return (again or verb)()
        return verb()

    def other(self, host: Host) -> Host:
        return self.vm.b if host is self.vm.a else self.vm.a

    def cycling(self) -> None:
        """Take note of the policy that the next cycle tells; what may go by it goes unseen."""
        host = self.vm.there
        if self.policy is not EVERY or self.told.get(host.name) is not EVERY:
            self.told.pop(host.name, None)
            self.kept[host.name].clear()

    def point(self, host: Host, draw: float) -> uuid.UUID | None:
        """Return one of the points that a host lists as complete."""
        if not host.has_vm:
            return None
        with host.home() as home:
            listed = [row.id for row in home.catalog.points(home.vm_id) if row.state == "complete"]
        return listed[int(draw * len(listed))] if listed else None

    # ---- what comes next

    @rule(draw=DRAW, crash=CRASHES, flag=st.booleans())
    def onward(self, draw: float, crash: Crash | None, *, flag: bool) -> None:
        """Go a step further on the way to the other site and back."""
        if self.phase == "primary" and flag:
            self.prepare(crash)
        elif self.phase == "prepared" and draw < 0.8:
            self.planned(crash)
        elif self.phase in {"primary", "prepared", "held"}:
            self.unplanned(draw, crash)
        elif self.phase == "failed" and flag:
            self.commit(crash, delete=draw < 0.2)
        elif self.phase in {"failed", "committed"}:
            self.adopt(crash)
        else:
            self.vm.write(2)
            self.reverse(crash)

    @precondition(lambda self: self.phase in {"prepared", "held", "failed"})
    @rule(draw=DRAW, crash=CRASHES, again=st.booleans())
    def back(self, draw: float, crash: Crash | None, *, again: bool) -> None:
        """Take back what was begun."""
        if self.phase == "failed":
            self.cancel(draw, crash, again=again)
        else:
            self.go_on(crash)

    @precondition(lambda self: self.phase in {"failed", "committed"})
    @rule(count=st.integers(1, 3), tries=st.booleans(), takeover=st.booleans())
    def at_old_site(self, count: int, *, tries: bool, takeover: bool) -> None:
        """Let the old primary go on as if nothing had been."""
        self.write_at_old_site(count)
        if tries:
            self.old_primary_tries(takeover=takeover)

    @rule(
        which=st.sampled_from(
            [
                "drop",
                "drop",
                "compact",
                "drill",
                "verify",
                "down",
                "policy",
                "resize",
                "resize",
                "add",
                "instant",
                "instant",
            ]
        ),
        draw=DRAW,
        crash=CRASHES,
        at_here=st.booleans(),
        policy=st.sampled_from(POLICIES),
    )
    def aside(
        self, which: str, draw: float, crash: Crash | None, policy: PointPolicy, *, at_here: bool
    ) -> None:
        """Do what does not move the VM."""
        has_own_disks = self.phase == "primary" and self.vm.disks[0].name.startswith("disk")
        if which == "drop":
            self.drop(draw, crash, at_here=at_here)
        elif which == "instant":
            self.point_at(draw, crash, self.vm.here if at_here else self.vm.there)
        elif which == "compact":
            self.compact(crash, at_here=at_here)
        elif which == "drill":
            self.firedrill(draw, at_here=at_here)
        elif which == "verify":
            self.look_again(at_here=at_here)
        elif which == "down":
            self.host_down(at_here=at_here, power=draw < 0.7)
        elif which == "policy":
            self.policy = policy
        elif which == "resize" and has_own_disks:
            self.resize(1 + int(draw * 4), int(draw * 1000) % 3)
        elif which == "add" and has_own_disks and len(self.vm.disks) < 3:
            self.add_disk()

    # ---- a VM at work

    @rule(count=st.integers(1, 5))
    def write(self, count: int) -> None:
        if self.phase not in {"prepared", "held"}:
            self.vm.write(count)
        self.vm.clock.advance(self.rng.choice((1, 20, 100)))

    @precondition(lambda self: self.phase == "primary")
    @rule(crash=CRASHES, app=st.booleans(), resync=st.sampled_from((False, False, False, True)))
    def cycle(self, crash: Crash | None, *, app: bool, resync: bool = False) -> None:
        vm, policy = self.vm, self.policy
        vm.write(2)
        vm.clock.advance(30)
        self.expected = [vm.image]

        self.cycling()

        def call() -> hvreplica.ReplicateResult:
            if app:
                with contextlib.suppress(StateError):  # of a call that was cut one waits already
                    hvreplica.cut(vm.state, app_consistent=True, files=vm.here.files, clock=vm.clock)
            return vm.replicate(points=policy, resync=resync)

        result = self.run(call, crash, vm.here)
        self.told[vm.there.name] = policy
        self.expect(vm.there, uuid.UUID(result.point), vm.image)

    def resize(self, mib: int, index: int) -> None:
        index %= len(self.vm.models)
        model, size = self.vm.models[index], mib * MIB
        files, path, clock = self.vm.here.files, self.vm.disks[index], self.vm.clock
        if size < len(model):
            with open_disk(files, path, writable=True, format="vhdx", clock=clock) as disk:
                disk.write_zeroes(size, len(model) - size)
                disk.flush()
        resize_disk(files, path, size, force=True, clock=clock, format="vhdx")
        self.vm.models[index] = model[:size] + bytes(max(size - len(model), 0))

    def add_disk(self) -> None:
        vm = self.vm
        path = vm.here.folder / f"disk{len(vm.disks)}-{self.rng.getrandbits(32)}.vhdx"
        create_disk(vm.here.files, path, virtual_bytes=MIB, block_bytes=MIB, clock=vm.clock, format="vhdx")
        vm.disks.append(path)
        vm.models.append(bytearray(MIB))
        vm.write(2)

    @precondition(lambda self: self.phase == "primary")
    @rule(count=st.integers(2, 5), crash=CRASHES)
    def run_live(self, count: int, crash: Crash | None) -> None:
        """Replicate what is logged write by write; then any second of it can be had."""
        self.cycle(None, app=False)
        there = self.vm.there
        seen = self.vm.run_live(count)
        self.seconds[there.name] += seen
        self.expected = [self.vm.image]
        self.look()
        self.cycle(None, app=False)
        second, image = seen[self.rng.randrange(count - 1)]
        if self.policy is EVERY:
            made = self.run(lambda: self.make_point_at(there, second), crash, there)
            assert there.points.setdefault(made, image) == image
            self.look()

    def make_point_at(self, host: Host, second: float) -> uuid.UUID:
        with host.home() as home:
            return make_point_at(home, second).id

    def point_at(self, draw: float, crash: Crash | None, host: Host) -> None:
        """Make a point of an older second, if the logs of it are there still and lead on to the newest."""
        seconds = self.seconds[host.name]
        if not seconds:
            return
        second, image = seconds[int(draw * len(seconds))]
        try:
            made = self.run(lambda: self.make_point_at(host, second), crash, host)
        except StoreError:
            return
        assert host.points.setdefault(made, image) == image

    # ---- points

    def drop(self, draw: float, crash: Crash | None, *, at_here: bool) -> None:
        host = self.vm.here if at_here else self.vm.there
        point = self.point(host, draw)
        if point is None:
            return

        def call() -> None:
            with host.home() as home, contextlib.suppress(NoSuchPoint):
                let_go(home, point)

        was_kept = point in self.kept[host.name]
        self.kept[host.name].discard(point)
        try:
            self.run(call, crash._replace(at_caller=True) if crash else None, host)
        except (PointInUse, InvalidTransition):
            if was_kept:
                self.kept[host.name].add(point)

    def compact(self, crash: Crash | None, *, at_here: bool) -> None:
        host = self.vm.here if at_here else self.vm.there
        if not host.has_vm:
            return

        def call() -> None:
            with host.home() as home:
                retain(home)

        self.run(call, crash._replace(at_caller=True) if crash else None, host)

    def firedrill(self, draw: float, *, at_here: bool) -> None:
        host = self.vm.here if at_here else self.vm.there
        if not host.has_vm:
            return
        with host.home() as home:
            if home.failover().test is None:
                with contextlib.suppress(NoSuchPoint):
                    begin_firedrill(home, self.point(host, draw))
            else:
                end_firedrill(home)

    def look_again(self, *, at_here: bool) -> None:
        self.verify(self.vm.here if at_here else self.vm.there)

    def verify(self, host: Host) -> None:
        """Read a store again: the digests of all points must be those of what they show."""
        if not host.has_vm:
            return
        with contextlib.closing(Store.open_reading(host.files, host.store, clock=self.vm.clock)) as store:
            verdict = store.verify(None, Pace(SYSTEM, threading.Event().wait))
        for vm in verdict.vms:
            assert [point for point in vm.points if point.state != "ok"] == [], vm

    def host_down(self, *, at_here: bool, power: bool) -> None:
        """Let a host go down between two verbs."""
        host = self.vm.here if at_here else self.vm.there
        host.crash(self.rng, power=power)

    # ---- the way there

    def unplanned(self, draw: float, crash: Crash | None) -> None:
        point = None if draw > 0.6 else self.point(self.vm.there, draw / 0.6)
        self.promote("unplanned", point, crash)

    def prepare(self, crash: Crash | None) -> None:
        vm = self.vm
        self.expected = [vm.image]
        self.cycling()
        result = self.run(lambda: vm.replicate(points=self.policy, prepare=True), crash, vm.here)
        self.told[vm.there.name] = self.policy
        self.expect(vm.there, uuid.UUID(result.point), vm.image)
        self.phase = "prepared"
        with pytest.raises(InvalidTransition):
            vm.replicate()

    def go_on(self, crash: Crash | None) -> None:
        vm = self.vm
        link = vm.there.link

        def call() -> object:
            return hvreplica.cancel_prepare(vm.state, **link, files=vm.here.files, clock=vm.clock)

        self.run(call, crash, vm.here)
        self.phase = "primary"

    def planned(self, crash: Crash | None) -> None:
        image = self.vm.image
        self.promote("planned", None, crash)
        assert self.vm.image == image, "nothing is lost"

    def promote(self, verb: Any, point: uuid.UUID | None, crash: Crash | None) -> None:
        """Let the VM run at the other site."""
        vm, host = self.vm, self.vm.there

        def call() -> Any:
            with host.home() as home:
                wish = Wish("latest" if point is None and verb == "unplanned" else point, wait_s=0.0)
                return fail_over(home, verb, wish)

        with contextlib.ExitStack() as stack:
            before = stack.enter_context(host.home())
            refused = self.refusal(before, verb, point)
        if refused:
            with pytest.raises(FailoverRefused):
                call()
            return
        record = self.run(call, crash._replace(at_caller=True) if crash else None, host)
        self.old = Site(vm.here, vm.state, vm.disks, vm.models)
        self.arrive(host, record)

    def refusal(self, home: Any, verb: str, point: uuid.UUID | None) -> bool:
        """Return whether the point cannot be brought up as a whole: the VM lost a disk of it since."""
        if point is None:
            return False
        newest = [row for row in home.catalog.points(home.vm_id) if row.is_kept][-1]
        gone = home.catalog.members(home.vm_id, point).keys() - home.catalog.members(home.vm_id, newest.id)
        return verb == "unplanned" and bool(gone)

    def arrive(self, host: Host, record: Any) -> None:
        """Take what a failover made for what the VM runs on."""
        assert record.state == "FailedOverWaitingCompletion"
        shown = host.points[record.point]
        assert [disk.disk for disk in record.active] == sorted(shown)
        self.vm.models = [bytearray(shown[index]) for index in sorted(shown)]
        self.vm.run_at(host)
        self.vm.disks = [host.store / VM / "active" / f"{index}.vhdx" for index in sorted(shown)]
        self.phase, self.chosen = "failed", record.point

    def cancel(self, draw: float, crash: Crash | None, *, again: bool) -> None:
        vm, host, old = self.vm, self.vm.here, self.old
        assert old is not None
        point = self.point(host, draw) if again else None
        with host.home() as home:
            reverted = home.failover().reverted
            manual = None if reverted is None else reverted.id
            if point is not None and self.refusal(home, "unplanned", point):
                return
        if point == manual:
            point = None
        self.kept[host.name] -= {manual}

        def call() -> Any:
            with host.home() as home:
                return cancel(home, Wish(point, force=True, wait_s=0.0))

        crash = crash._replace(at_caller=True) if crash else None
        done = self.run(call, crash, host, lambda: self.ended(host, call, point))
        if point is not None:
            self.arrive(host, done)
            return
        vm.here, vm.there = old.host, host
        vm.state, vm.disks, vm.models = old.state, old.disks, old.models
        self.phase, self.old = ("held" if self.is_prepared(old) else "primary"), None

    def ended(self, host: Host, call: Callable[[], Any], point: uuid.UUID | None) -> Any:
        """Call a cancel, or what is left of it where it was cut."""
        with host.home() as home:
            record = home.failover()
            if record.intent is not None and record.intent.verb == "unplanned":
                return fail_over(home, "unplanned", Wish(point, wait_s=0.0))
            if record.state != "FailedOverWaitingCompletion" and record.intent is None:
                return record
        return call()

    def is_prepared(self, old: Site) -> bool:
        """Return whether the old primary holds its VM for a planned failover still."""
        status = hvreplica.status(old.state, files=old.host.files, clock=self.vm.clock)
        return status.replication_state == "PreparedForFailover"

    def commit(self, crash: Crash | None, *, delete: bool) -> None:
        host = self.vm.here
        if delete:
            self.kept[host.name].clear()

        def call() -> None:
            with host.home() as home:
                if delete and home.failover().test is not None:
                    end_firedrill(home)
                commit(home, Wish(delete_points=delete, wait_s=0.0))

        self.run(call, crash._replace(at_caller=True) if crash else None, host)
        self.phase = "committed"

    # ---- the way back

    def write_at_old_site(self, count: int) -> None:
        """Let the VM write at its old site, before it stops there or because nobody stops it."""
        old = self.old
        assert old is not None
        self.vm.write(count, host=old.host, disks=old.disks, models=old.models)

    def old_primary_tries(self, *, takeover: bool) -> None:
        old, vm = self.old, self.vm
        assert old is not None
        with pytest.raises((Fenced, InvalidTransition)):
            hvreplica.replicate(
                VM,
                old.disks,
                state=old.state,
                files=old.host.files,
                clock=vm.clock,
                takeover=takeover,
                **vm.here.link,
            )

    def adopt(self, crash: Crash | None) -> None:
        vm, old = self.vm, self.old
        assert old is not None
        status = hvreplica.status(old.state, files=old.host.files, clock=vm.clock)
        known = [index for index, disk in enumerate(status.disks) if disk.stage == "protected"]
        image = {index: bytes(old.models[index]) for index in known}  # a disk of no point stays where it is
        self.expected = [image]
        crash = crash._replace(at_caller=True) if crash else None
        report = self.run(lambda: vm.adopt(old.host, old.state), crash, old.host)
        self.expect(old.host, uuid.UUID(report.point), image)
        self.phase = "adopted"

    def reverse(self, crash: Crash | None) -> None:
        vm = self.vm
        self.expected = [vm.image]
        result = self.run(vm.reverse, crash, vm.here)
        self.expect(vm.there, uuid.UUID(result.point), vm.image)
        self.phase, self.old, self.policy = "primary", None, EVERY

    # ---- what must be so

    def expect(self, host: Host, point: uuid.UUID, image: dict[int, bytes]) -> None:
        """Hold a point to an image from now on, and to being there."""
        host.points.setdefault(point, image)
        assert host.points[point] == image, "a point that was there already"
        self.kept[host.name].add(point)
        with host.home() as home:
            newest = [row for row in home.catalog.points(home.vm_id) if row.is_kept][-1]
        assert newest.id == point

    def look(self) -> None:
        """Refuse a point that is not what it was, or that went by itself."""
        for host in (self.vm.a, self.vm.b):
            known = dict(host.points)
            listed = check_points(host)
            for point in set(listed) - known.keys():
                images = [*known.values(), self.vm.image, *self.expected]
                if self.old is not None:
                    images.append({index: bytes(model) for index, model in enumerate(self.old.models)})
                assert host.points[point] in images, f"a point of nothing that ever was, at {host.name}"
            if self.told.get(host.name) is EVERY:
                assert self.kept[host.name] <= set(listed), (host.name, host.files.story)

    @invariant()
    def all_is_what_it_was(self) -> None:
        if not hasattr(self, "vm"):
            return
        self.look()
        for path, model in zip(self.vm.disks, self.vm.models, strict=True):
            assert read_disk(self.vm.here, path) == model, f"{path} of the VM that runs"


LifeModel.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLifeModel = LifeModel.TestCase
