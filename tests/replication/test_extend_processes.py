"""Three sites between real processes: primary, replica and further replica, with kill -9 of what feeds it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import settings

import hvreplica
from tests.replication.life import VM as NAME
from tests.replication.life import Site, served_site
from tests.replication.test_failback_kill import dies
from tests.replication.two_sites import MIB, VM, TwoSites
from tests.support.command_line import Running, ask_verb, environment, run_verb

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
EACH = hvreplica.PointPolicy(recovery_points=24, recovery_point_every_s=0)
EVERY_POINT = ("--recovery-points", 24, "--recovery-point-every", 0)
IS_DEEP = settings().max_examples > 1000


class ThreeSites(TwoSites):
    """A primary, a replica at `near`, one at `far` that is fed from it. points: what each point holds."""

    def __init__(self, folder: Path, tls: Path, rng: random.Random, near: Site, far: Site) -> None:
        super().__init__(folder, tls, rng, sizes=(6 * MIB, 3 * MIB))
        self.near, self.far = near, far
        self.points: dict[Path, dict[str, list[bytes]]] = {near.store: {}, far.store: {}}

    def cycle(self, count: int = 3) -> str:
        """Write, and bring a point to the replica; return its id."""
        self.write(count)
        link = {"to": self.near.address, "tls": self.tls}
        answer = hvreplica.replicate(VM, self.disks, state=self.state, points=EACH, **link)
        return self.record(self.near, answer.point)

    def extend(self, *options: object) -> Any:
        """Bring the newest point to the further site."""
        answer = self.near.ask("extend", *self.far.link, "--once", *options)
        self.record(self.far, answer["point"])
        return answer

    def extend_here(self) -> None:
        """Do so without another process."""
        self.record(self.far, self.feed().point)

    def feed(self) -> hvreplica.ReplicateResult:
        """Do no more than that."""
        return hvreplica.extend(self.near.store, VM, to=self.far.address, tls=self.tls, points=EACH)

    def record(self, site: Site, point: str) -> str:
        """Expect the newest point of a site to hold what the VM does."""
        self.points[site.store].setdefault(point, [bytes(model) for model in self.models])
        return point

    def require(self, site: Site) -> None:
        """Fail the test unless each point that was made at a site is there and holds what it should."""
        listed = hvreplica.point_list(site.store, VM)
        assert {point.id for point in listed if point.state == "complete"} == self.points[site.store].keys()
        copy = self.folder / "copy.raw"
        for point, models in self.points[site.store].items():
            for index, model in enumerate(models):
                hvreplica.point_export(
                    site.store, VM, copy, point=point, disk=index, format="raw", overwrite=True
                )
                assert copy.read_bytes() == model, f"disk {index} of point {point} in {site.store}"


@contextlib.contextmanager
def three_sites(folder: Path, tls: Path, rng: random.Random) -> Iterator[ThreeSites]:
    with served_site(folder / "near", tls) as near, served_site(folder / "far", tls) as far:
        yield ThreeSites(folder, tls, rng, near, far)


def killed(kill_at: int, *arguments: object) -> int:
    """Run the command line until its `kill_at`-th file operation; return the code."""
    return subprocess.run(
        [sys.executable, "-m", "tests.replication.dying", str(kill_at), *map(str, arguments)],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'src'}"),
        capture_output=True,
        timeout=60,
        check=False,
    ).returncode


def test_a_chain_of_three_sites(tmp_path: Path, tls: Path, rng: random.Random) -> None:
    with three_sites(tmp_path, tls, rng) as sites:
        near, far = sites.near, sites.far
        sites.cycle()
        assert sites.extend(*EVERY_POINT)["kind"] == "initial"
        for _ in range(2):
            sites.cycle()
            sites.cycle()
            assert sites.extend()["kind"] == "delta"
        _kill(sites)
        _let_go(sites)
        _run_on_a_schedule(sites)
        for site in (near, far):
            sites.require(site)
        theirs = {point.instant_s for point in hvreplica.point_list(near.store, VM)}
        own = [point.instant_s for point in hvreplica.point_list(far.store, VM)]
        assert own == sorted(own)
        assert len(set(own) - theirs) == 1, "but for the one that was let go"
        _promote(sites)
        sites.require(far)


def _kill(sites: ThreeSites) -> None:
    """Kill -9 what feeds the further site, in three cycles at different places, and call it again."""
    deaths = 0
    for kill_at in (70, 130):
        sites.cycle()
        code = killed(kill_at, "extend", "--store", sites.near.store, *NAME, *sites.far.link, "--once")
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
        sites.extend()
    assert deaths, "it is to be killed while it works"


def _let_go(sites: ThreeSites) -> None:
    """Let the point go that was shipped last, which no rule does, before the next cycle."""
    shipped = list(sites.points[sites.near.store])[-1]
    sites.cycle()
    sites.near.ask("point delete", "--point", shipped)
    del sites.points[sites.near.store][shipped]
    assert sites.extend()["kind"] == "delta"


def _run_on_a_schedule(sites: ThreeSites) -> None:
    """Feed the further site from a process that stays; another call has it run a cycle."""
    sites.cycle()
    state = sites.near.store / VM / "extended"
    options = ("--store", sites.near.store, *NAME, *sites.far.link, "--interval", 3600)
    with Running("extend", *options, "--json") as feeding:
        assert sites.extend()["kind"] in ("delta", "none"), "whichever of the two came first"
        assert ask_verb("status", "--state", state)["running"] == "extend"
        sites.cycle()
        assert sites.extend()["kind"] == "delta"
        refused = run_verb("cut", "--state", state, "--json")
        assert "extended replication" in refused.error["message"]
        code, errors = feeding.end()
        assert code == 0, errors


def _promote(sites: ThreeSites) -> None:
    """Run the VM at the further site, the other two being lost; what it has is the newest point there."""
    models = list(sites.points[sites.far.store].values())[-1]
    sites.cycle()
    sites.far.ask("failover unplanned")
    for index, model in enumerate(models):
        assert sites.content(sites.far.store / VM / "active" / f"{index}.vhdx") == model
    refused = run_verb(
        *("extend", "--store", sites.near.store, *NAME, *sites.far.link, "--once", "--json"),
    )
    assert (refused.code, refused.error["class"]) == (56, "Fenced")
    assert "failover cancel" in refused.error["hint"]
    sites.cycle()


def test_first_copy_killed_at_any_file_operation(tmp_path: Path, tls: Path, rng: random.Random) -> None:
    """Each time another point is the newest when it is called again."""
    with three_sites(tmp_path, tls, rng) as sites:
        was_killed, kill_at = True, 30
        sites.cycle()
        while was_killed:
            with served_site(tmp_path / f"far{kill_at}", tls) as sites.far:
                sites.points[sites.far.store] = {}
                was_killed = dies(kill_at, sites.feed)
                sites.cycle(1)
                sites.extend_here()
                _require_newest(sites)
            shutil.rmtree(sites.near.store / VM / "extended")
            kill_at += 1 if IS_DEEP else 80


def test_cycle_killed_at_any_file_operation(tmp_path: Path, tls: Path, rng: random.Random) -> None:
    with three_sites(tmp_path, tls, rng) as sites:
        was_killed, kill_at = True, 5
        sites.cycle()
        sites.extend_here()
        while was_killed:
            sites.cycle(1)
            was_killed = dies(kill_at, sites.feed)
            sites.cycle(1)
            sites.extend_here()
            _require_newest(sites)
            kill_at += 1 if IS_DEEP else 40


def _require_newest(sites: ThreeSites) -> None:
    copy = sites.folder / "copy.raw"
    for index, model in enumerate(sites.models):
        hvreplica.point_export(sites.far.store, VM, copy, disk=index, format="raw", overwrite=True)
        assert copy.read_bytes() == model
