"""The whole life of a replica between processes: points, tests, failovers, both directions; nothing is lost."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from hvreplica.clock import instant_time
from tests.replication.life import (
    VM,
    Content,
    ModelVM,
    Site,
    let_second_end,
    require_content,
    require_sound,
    served_site,
)
from tests.support.command_line import Running, ask_verb, run_verb
from tests.support.live_client import SocketGuest
from tests.support.tools import require_tool, run_tool

if TYPE_CHECKING:
    import random
    from pathlib import Path

EVERY_POINT = ("--recovery-points", 24, "--recovery-point-every", 0)


class Life:
    """One VM and two sites. points: what each point of site B must hold, for as long as it lives."""

    def __init__(self, folder: Path, rng: random.Random, a: Site, b: Site) -> None:
        self.folder, self.a, self.b = folder, a, b
        self.vm = ModelVM(folder, rng)
        self.points: dict[str, Content] = {}
        self.points_a: dict[str, Content] = {}

    def cycle(self, state: Path, to: Site, *options: object, kind: str = "delta") -> Any:
        """Replicate once to a site; its new point must hold what the VM does."""
        first = [f"--disk={path}" for path in self.vm.disks] if kind == "initial" else []
        answer = ask_verb("replicate", *VM, *first, "--state", state, *to.link, "--once", *options)
        assert answer["kind"] == kind, answer
        self.record(to, answer["point"], self.vm.content)
        return answer

    def record(self, site: Site, point: str, content: Content) -> None:
        """Expect a new point at a site, and all those of before."""
        points = self.points if site is self.b else self.points_a
        points[point] = content
        site.require(points)

    def try_point(self, point: str, state: Path) -> None:
        """Boot a test VM, as far as a file system check goes, from an old point while replication goes on."""
        socket, image = self.folder / "test.sock", self.folder / "test.img"
        content = self.points[point]
        verb = ("failover", "test", "--store", self.b.store, *VM, "--point", point, "--socket", socket)
        with Running(*verb, "--json") as test:
            assert test.ready["point"] == point, test.errors()
            for index, wanted in enumerate(content.disks):
                run_tool("nbdcopy", f"nbd+unix:///{index}?socket={socket}", image)
                assert image.read_bytes() == wanted
                if index == 0:
                    require_sound(image, content.files)
                image.unlink()
            client = SocketGuest(socket, "0")
            client.write(1 << 20, b"written by the test VM".ljust(4096))
            client.flush()
            self.vm.work("during-the-test")
            self.cycle(state, self.b)
            assert client.read(1 << 20, 22) == b"written by the test VM"
            client.close()
            code, errors = test.end()
            assert code == 0, errors
        assert self.b.ask("failover status")["test"]["point"] == point
        assert self.b.ask("failover test", "--cleanup")["test"] is None
        self.b.require(self.points)

    def move(self, state: Path, here: Site, there: Site) -> None:
        """Move the VM from a site to the other one on purpose, and let `here` follow it from then on."""
        before = self.vm.work(f"last-at-{here.store.name}")
        prepared = self.cycle(state, there, "--prepare-failover")
        assert prepared["prepared"]
        assert run_verb("replicate", *VM, "--state", state, *there.link, "--once", "--json").code == 61
        promoted = there.ask("failover planned")
        assert (promoted["point"], promoted["point_type"]) == (prepared["point"], "planned")
        require_content(there.active, before)  # nothing is lost
        self.vm.start(before, there.active)
        self.vm.work(f"first-at-{there.store.name}")
        adopted = here.ask("store adopt", "--state", state)
        assert adopted["changed_bytes"] == 0, "nobody wrote to the disks that were prepared"
        self.reverse(there, here)

    def reverse(self, here: Site, there: Site) -> None:
        """Become the primary; the other site takes what differs, and what comes after it."""
        answer = here.ask("failover reverse", *there.link)
        assert answer["compared"] == []
        self.record(there, answer["point"], self.vm.content)
        require_content(self.vm.disks, self.vm.content)
        self.vm.work(f"more-at-{here.store.name}")
        self.cycle(here.primary, there, *EVERY_POINT)


def test_whole_life_of_a_replica(tmp_path: Path, tls: Path, rng: random.Random) -> None:
    for tool in ("mkfs.ext4", "debugfs", "e2fsck", "nbdcopy"):
        require_tool(tool)
    with served_site(tmp_path / "a", tls) as a, served_site(tmp_path / "b", tls) as b:
        life = Life(tmp_path, rng, a, b)
        state = tmp_path / "state"
        life.vm.work("first")
        life.cycle(state, b, *EVERY_POINT, kind="initial")
        for name in ("second", "third", "fourth"):
            life.vm.work(name)
            life.cycle(state, b)
        old = list(life.points)[1]
        life.try_point(old, state)

        life.move(state, a, b)
        a.require(life.points_a)
        life.move(b.primary, b, a)  # failback
        b.require(life.points)
        assert len(life.points) >= 8, "of before, of the planned failover, and of after the failback"
        lose_primary_a(life, old)
        lose_primary_b(life)


def lose_primary_a(life: Life, old: str) -> None:
    """Let A write on, lose it, fail over to B, choose an older point, stay there, and reverse once more."""
    a, b = life.a, life.b
    newest = life.vm.content
    at_a = life.vm.work("never-shipped")
    life.vm.start(newest, b.active)
    found = b.ask("failover unplanned")
    assert (found["state"], found["point"]) == ("FailedOverWaitingCompletion", list(life.points)[-1])
    require_content(b.active, newest)
    fenced = run_verb("replicate", *VM, "--state", a.primary, *b.link, "--once", "--json")
    assert (fenced.code, fenced.error["class"]) == (56, "Fenced")

    found = b.ask("failover cancel", "--point", old)
    require_content(b.active, life.points[old])
    life.record(b, found["point"], life.points[old])
    life.vm.start(life.points[old], b.active)
    image = life.folder / "active.img"
    ask_verb("disk", "convert", b.active[0], image)
    require_sound(image, life.points[old].files)
    life.vm.work("after-the-loss")
    assert b.ask("failover commit")["state"] == "FailedOver"
    assert run_verb("failover", "cancel", "--store", b.store, *VM, "--json").code == 61
    b.require(life.points)

    adopted = a.ask("store adopt", "--state", a.primary)
    assert adopted["changed_bytes"] > 0
    life.record(a, adopted["point"], at_a)  # what A alone had is not lost either
    life.reverse(b, a)
    b.require(life.points)


def lose_primary_b(life: Life) -> None:
    """Let the VM run at B under capture, kill that, and bring A up as the VM was between two of its cycles."""
    a, b = life.a, life.b
    socket = life.folder / "b.sock"
    verb = ("capture", *VM, "--state", b.primary, "--socket", socket, "--keep-logs", "12h", "--json")
    with Running(*verb) as capture, life.vm.served(socket):
        assert capture.ready["event"] == "listening", capture.errors()
        life.vm.work("under-capture")
        life.cycle(b.primary, a)
        life.vm.work("soon-after-the-cycle")
        wanted = life.vm.work("before-the-instant")
        instant = instant_time(let_second_end())
        life.vm.work("after-the-instant")
        life.vm.work("before-the-next-cycle")
        life.cycle(b.primary, a)
        life.vm.work("of-no-cycle")
        capture.end(signal.SIGKILL)
    late = run_verb(
        "failover", "unplanned", "--store", a.store, *VM, "--point", "2020-01-01T00:00:00Z", "--json"
    )
    assert (late.code, late.error["class"]) == (52, "NoSuchPoint")
    assert a.ask("failover status")["state"] == "Replicating"
    found = a.ask("failover unplanned", "--point", instant)
    assert found == a.ask("failover unplanned", "--point", instant)
    require_content(a.active, wanted)
    life.record(a, found["point"], wanted)
    image = life.folder / "active.img"
    ask_verb("disk", "convert", a.active[0], image, "--overwrite")
    require_sound(image, wanted.files)
