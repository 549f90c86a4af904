"""kill -9 in every verb of the way back, at any of its file operations: the same call, made again, ends it.

A real process dies each time: a fork that counts its file operations, so that many places can be tried.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

import hvreplica
from tests.replication.dying import dies
from tests.replication.test_kill import Sites
from tests.replication.two_sites import MIB, VM, TwoSites

if TYPE_CHECKING:
    import random
    from pathlib import Path

IS_DEEP = settings().max_examples > 1000
STEP = 1 if IS_DEEP else 13
OPERATIONS_MAX = 2000


class Server(Sites):
    """`serve` in a process of its own, on one store."""

    def __init__(self, store: Path, tls: Path) -> None:
        self.store, self.tls = store, tls
        self._server = None
        self.address = ""


class Forked:
    """A VM that was failed over, with its folder kept aside to begin again from."""

    def __init__(self, folder: Path, tls: Path, rng: random.Random) -> None:
        self.now, self.saved = folder / "now", folder / "saved"
        self.now.mkdir()
        self.sites = TwoSites(self.now, tls, rng, sizes=(3 * MIB, 2 * MIB))
        self.old_state, self.old_disks = self.sites.state, self.sites.disks
        with contextlib.closing(self.sites.closing):
            self.sites.write(40)
            self.sites.replicate(self.sites.b)
            self.at_a = [bytearray(model) for model in self.sites.models]
            self.sites.write(10, models=self.at_a)
            self.sites.fail_over(self.sites.b)
            self.sites.write(10)
        self.sites.servers.clear()
        self.server = Server(self.sites.a, tls)

    def save(self) -> None:
        """Keep the folder as it is now."""
        shutil.copytree(self.now, self.saved, symlinks=True)

    def restore(self) -> None:
        """Begin again."""
        self.server.stop()
        shutil.rmtree(self.now)
        shutil.copytree(self.saved, self.now, symlinks=True)

    def adopt(self) -> None:
        hvreplica.store_adopt(self.sites.a, VM, state=self.old_state)

    def reverse(self) -> Any:
        return hvreplica.failover_reverse(self.sites.b, VM, to=self.server.address, tls=self.server.tls)

    def check(self, models: list[bytearray]) -> None:
        """Hold the newest point at A to what it must be."""
        for index, model in enumerate(models):
            output = self.now / f"export{index}.raw"
            hvreplica.point_export(self.sites.a, VM, output, disk=index, format="raw", overwrite=True)
            assert output.read_bytes() == model, f"disk {index}"


@pytest.fixture
def forked(tmp_path: Path, tls: Path, rng: random.Random) -> Any:
    made = Forked(tmp_path, tls, rng)
    yield made
    made.server.stop()


def test_adoption_killed_anywhere_is_ended_by_the_same_call(forked: Forked) -> None:
    forked.save()
    first = forked.sites.rng.randrange(1, STEP + 1)
    for kill_at in range(first, OPERATIONS_MAX, STEP):
        was_killed = dies(kill_at, forked.adopt)
        forked.adopt()
        forked.check(forked.at_a)
        if not was_killed:
            break
        forked.restore()
    else:
        pytest.fail("the verb never came to its end")
    forked.server.serve()
    forked.reverse()
    forked.server.stop()
    forked.check(forked.sites.models)


def test_adoption_that_is_killed_again_and_again_ends(forked: Forked) -> None:
    for kill_at in range(3, OPERATIONS_MAX, 3):
        if not dies(kill_at, forked.adopt):
            break
    forked.check(forked.at_a)


def test_reversal_killed_anywhere_is_ended_by_the_same_call(forked: Forked) -> None:
    forked.adopt()
    forked.save()
    step = 1 if IS_DEEP else 67
    for kill_at in range(forked.sites.rng.randrange(1, step + 1), OPERATIONS_MAX, step):
        forked.server.serve()
        was_killed = dies(kill_at, forked.reverse)
        forked.reverse()
        forked.reverse()
        forked.server.stop()
        forked.check(forked.sites.models)
        if not was_killed:
            return
        forked.restore()
    pytest.fail("the verb never came to its end")


def test_failback_into_the_store_of_the_failover_killed_anywhere_is_ended_by_the_same_call(
    forked: Forked,
) -> None:
    sites, server = forked.sites, forked.server
    forked.adopt()
    server.serve()
    forked.reverse()
    sites.write(10)
    hvreplica.replicate(VM, state=sites.state, to=server.address, tls=server.tls, prepare=True)
    server.stop()
    hvreplica.failover_planned(sites.a, VM)
    points = [point.id for point in hvreplica.point_list(sites.b, VM)]
    forked.save()
    step = 1 if IS_DEEP else 23
    for kill_at in range(sites.rng.randrange(1, step + 1), OPERATIONS_MAX, step):

        def adopt() -> None:
            hvreplica.store_adopt(sites.b, VM, state=sites.state)

        was_killed = dies(kill_at, adopt)
        adopt()
        now = hvreplica.point_list(sites.b, VM)
        assert now[-1].state == "complete"
        assert points[-1] != now[-1].id
        for index, model in enumerate(sites.models):
            output = forked.now / f"export{index}.raw"
            hvreplica.point_export(sites.b, VM, output, disk=index, format="raw", overwrite=True)
            assert output.read_bytes() == model
        assert not list((sites.b / VM / "active").glob("*.vhdx"))
        if not was_killed:
            return
        forked.restore()
    pytest.fail("the verb never came to its end")


def test_preparation_and_planned_failover_killed_anywhere_are_ended_by_the_same_call(
    tmp_path: Path, tls: Path, rng: random.Random
) -> None:
    now, saved = tmp_path / "now", tmp_path / "saved"
    now.mkdir()
    sites = TwoSites(now, tls, rng, sizes=(3 * MIB,))
    server = Server(sites.b, tls)
    server.serve()
    hvreplica.replicate(VM, sites.disks, state=sites.state, to=server.address, tls=tls)
    sites.write(20)
    server.stop()
    shutil.copytree(now, saved)

    def prepare() -> None:
        hvreplica.replicate(VM, sites.disks, state=sites.state, to=server.address, tls=tls, prepare=True)

    def planned() -> None:
        hvreplica.failover_planned(sites.b, VM)

    step = 1 if IS_DEEP else 53
    is_ended = False
    for kill_at in range(rng.randrange(1, step + 1), OPERATIONS_MAX, step):
        server.serve()
        is_ended = not dies(kill_at, prepare)
        prepare()
        server.stop()
        is_ended = not dies(kill_at, planned) and is_ended
        planned()
        assert sites.content(sites.b / VM / "active/0.vhdx") == sites.models[0], "nothing is lost"
        if is_ended:
            return
        shutil.rmtree(now)
        shutil.copytree(saved, now)
    pytest.fail("the verbs never came to their end")
