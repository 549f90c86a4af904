"""Power lost anywhere in a cut for two replicas: after the next start each of them gets every change."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from hvreplica.replication.capture_verb import forget_lost_cuts
from hvreplica.replication.fan import Fan, Target
from hvreplica.replication.missed import Missed
from hvreplica.replication.primary import Primary
from hvreplica.replication.state import StateFolder, track
from hvreplica.replication.work import Link, Tally, Work
from hvreplica.transport import client_context
from tests.replication.live_site import MIB, STATE, VM, LiveSite
from tests.replication.sites import Served
from tests.support.crash import worlds_after
from tests.support.fake_machine import FakeMachine
from tests.support.faultfile import Killed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

DEEP = os.environ.get("HVREPLICA_PROFILE") == "deep"


class SpoilingMachine(FakeMachine):
    """Writes over the logs that it is given back."""

    def recycle(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if self.files.exists(path):
                file = self.files.open(path, writable=True)
                file.write(b"\xee" * file.size(), 0)
                file.sync()
                file.close()
        super().recycle(paths)


class FanSite(LiveSite):
    """A VM with a second replica."""

    def start(self) -> None:
        super().start()
        machine = SpoilingMachine(self.files, self.disks, self.folder.logs, clock=self.clock)
        machine.budget_bytes = MIB // 4
        self.machine = self.work.machine = machine
        folder = StateFolder(self.files, STATE / "replicas" / "east", clock=self.clock)
        self.east = Work(
            folder=folder,
            state=folder.load() or track(VM, self.disks, clock=self.clock),
            disks=self.disks,
            link=None,
            files=self.files,
            clock=self.clock,
            on_progress=self.reports.append,
            tally=Tally("none", [0]),
            machine=machine,
            cutting=self.work.cutting,
        )
        self.east.save()
        targets = []
        for work in (self.work, self.east):
            missed = Missed(self.files, work.folder.folder, clock=self.clock)
            is_strange = work is self.east and work.state.phase != "new"
            missed.load({0: self.disks[0].virtual_bytes}, unless_there=is_strange)
            targets.append(Target(work, missed))
        Fan(targets)
        for work in (self.work, self.east):
            forget_lost_cuts(work)
            work.sweep_logs()

    def stop(self) -> None:
        self.east.close_tables()
        self.east.folder.release()
        super().stop()

    def to_east(self, served: Served) -> None:
        self.east.link = Link(served.address, client_context(served.tls), "auto", 2)
        self.east.tally = Tally("none", [0])
        with contextlib.closing(Primary(self.east)) as primary:
            primary.run()


@pytest.fixture
def east(tmp_path: Path, served: Served) -> Iterator[Served]:
    with contextlib.closing(Served(tmp_path / "east", served.tls)) as server:
        yield server


@pytest.mark.parametrize("is_away", [False, True], ids=["near", "away"])
def test_power_lost_anywhere_in_a_cut_both_replicas_get_every_change(
    seed: int, served: Served, east: Served, *, is_away: bool
) -> None:
    """is_away: the second one's queue is full, and it misses what is cut."""
    site = FanSite(seed, disks_bytes=(6 * MIB,))
    site.replicate(served)
    site.to_east(east)
    event_count, killed = 1, 0
    while True:
        for _ in range(3 if is_away else 1):
            site.write(25 * 4096)
            site.replicate(served)
        site.write(25 * 4096)
        site.write(4096, logged=False)
        site.disks[0].flush()
        site.files.kill_at(len(site.files.trace().events) + event_count)
        try:
            site.cut()
            site.files.heal()
            break
        except Killed:
            killed += 1
        finally:
            site.files.heal()
        journal = site.machine.must_know()
        worlds = worlds_after(site.files.trace(), seed=seed)
        site.files = site.rng.choice(worlds)
        site.start()
        site.machine.recall(journal)
        where = f"seed {seed}, killed after {event_count} events: {site.files.story}"
        site.to_east(east)
        assert site.equals(east), where
        site.replicate(served)
        assert site.equals(served), where
        event_count += 1 if DEEP else site.rng.randrange(2, 10)
    assert killed > 2
    site.to_east(east)
    assert site.equals(east)
    site.stop()
