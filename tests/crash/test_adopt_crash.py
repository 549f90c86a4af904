"""Power cuts and kills at every step of `store adopt` and `failover reverse`: called again, each ends as it should.

What the old primary alone wrote is in the point that the adoption makes, every older point stays what it was, and
after the reversal the newest point at the old site is what the VM holds.
"""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import settings

import hvreplica
from hvreplica.formats.messages import PointPolicy
from hvreplica.store.promotion import Wish, fail_over
from tests.crash.near_network import NearNetwork
from tests.crash.two_hosts import MIB, VM, Host, TwoHosts, check_points, read_disk
from tests.store.world import ram_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.disk.open import Format

IS_DEEP = settings().max_examples > 1000
CUTS = 1000 if IS_DEEP else 5
EVERY = PointPolicy(recovery_points=24, recovery_point_every_s=0)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    NearNetwork().install(monkeypatch)
    with ram_folder() as folder:
        yield folder


class Forked:
    """A VM that was failed over to another site, and wrote at both since. old: the host where it ran before."""

    def __init__(self, root: Path, seed: int, *, kind: Format = "vhdx") -> None:
        self.vm = TwoHosts(root, seed, (2 * MIB, MIB), kind=kind)
        self.rng = random.Random(seed)
        for _ in range(3):
            self.cycle()
        self.fork("unplanned")

    def cycle(self, **options: Any) -> None:
        """Write and replicate; the point must show that from now on."""
        self.vm.write()
        result = self.vm.replicate(points=EVERY, **options)
        self.vm.there.points[uuid.UUID(result.point)] = self.vm.image

    def fork(self, verb: Any) -> None:
        """Fail over, and let the VM write there; at its old site too where it was not prepared."""
        vm = self.vm
        self.old, self.old_state, self.old_disks = vm.here, vm.state, vm.disks
        self.at_old = [bytearray(model) for model in vm.models]
        if verb == "unplanned":
            vm.write(2, models=self.at_old)
        with vm.there.home() as home:
            fail_over(home, verb, Wish("latest" if verb == "unplanned" else None, wait_s=0.0))
        vm.run_at(vm.there)
        vm.write(3)

    def go_back(self) -> None:
        """Move the VM back on purpose, so that the site it leaves has a store that it was failed over to."""
        self.adopt()
        self.reverse()
        self.cycle()
        self.cycle(prepare=True)
        self.fork("planned")

    def adopt(self) -> object:
        """Return what of the report a repeated call must tell, too: what the other site will ask for."""
        report = self.vm.adopt(self.old, self.old_state)
        return report.known, report.changed_bytes, report.disks

    def adopt_unknown(self) -> None:
        hvreplica.store_adopt(
            self.old.store,
            VM,
            disks=self.old_disks,
            unknown=True,
            files=self.old.files,
            clock=self.vm.clock,
        )

    def reverse(self) -> None:
        self.vm.reverse()

    def check(self, models: list[bytearray]) -> None:
        """Hold all points to what they must show, and the newest one at the old site to this."""
        image = {index: bytes(model) for index, model in enumerate(models)}
        known = set(self.old.points)
        listed = check_points(self.old)
        made = set(listed) - known
        assert [self.old.points[point] for point in made] in ([], [image]), self.old.files.story
        assert self.old.points[listed[-1]] == image, self.old.files.story
        assert known <= set(listed)
        check_points(self.vm.here)
        for path, model in zip(self.vm.disks, self.vm.models, strict=True):
            assert read_disk(self.vm.here, path) == model

    def cut_everywhere(
        self, host: Callable[[], Host], verb: Callable[[], object], check: Callable[[], None]
    ) -> None:
        """Cut a verb at steps of a host, each time from the same beginning."""
        restore = self.vm.save()
        points = {each: dict(each.points) for each in (self.vm.a, self.vm.b)}
        restore()
        told = verb()
        steps = len(host().files.trace())
        check()
        assert steps > 10
        places = sorted(self.rng.sample(range(1, steps), min(CUTS, steps - 1)))
        for step in places:
            restore()
            for each, known in points.items():
                each.points = dict(known)
            assert host().dying(step, self.rng, power=step % 4 > 0, verb=verb) or step > steps - 10
            assert verb() == told
            check()


class Scene(NamedTuple):
    """An adoption. back: of a site where the VM was failed over to. unknown: without the state folder."""

    kind: Format = "vhdx"
    back: bool = False
    unknown: bool = False

    def __str__(self) -> str:
        return f"{self.kind}{'-back' * self.back}{'-unknown' * self.unknown}"


@pytest.mark.parametrize(
    "scene", [Scene(), Scene(kind="raw"), Scene(unknown=True), Scene(back=True)], ids=str
)
def test_adoption_cut_at_any_step_is_ended_by_the_same_call(scene: Scene, root: Path, seed: int) -> None:
    forked = Forked(root, seed, kind=scene.kind)
    if scene.back:
        forked.go_back()
    verb = forked.adopt_unknown if scene.unknown else forked.adopt
    forked.cut_everywhere(lambda: forked.old, verb, lambda: forked.check(forked.at_old))
    forked.reverse()
    forked.check(forked.vm.models)
    forked.vm.close()


@pytest.mark.parametrize("back", [False, True], ids=["new", "back"])
@pytest.mark.parametrize("at_caller", [True, False], ids=["caller", "replica"])
def test_reversal_cut_at_any_step_is_ended_by_the_same_call(
    root: Path, seed: int, *, at_caller: bool, back: bool
) -> None:
    forked = Forked(root, seed + 1)
    if back:
        forked.go_back()
    forked.adopt()
    check_points(forked.old)
    forked.cut_everywhere(
        lambda: forked.vm.here if at_caller else forked.old,
        forked.reverse,
        lambda: forked.check(forked.vm.models),
    )
    forked.cycle()
    forked.check(forked.vm.models)
    forked.vm.close()
