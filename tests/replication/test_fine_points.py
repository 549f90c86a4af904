"""Points of parts of seconds and of flushes, from a guest's own diary of a real capture, over the wire."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.errors import NoSuchPoint
from hvreplica.files import OS_FILES
from hvreplica.formats import messages
from hvreplica.formats.messages import PointPolicy
from tests.replication.captured import VM, Captured
from tests.support.command_line import environment
from tests.support.live_client import SocketGuest
from tests.support.points import read_point

if TYPE_CHECKING:
    from pathlib import Path

    from tests.replication.sites import Served

SECTOR = 512
KEEP = PointPolicy(recovery_point_every_s=0, keep_logs_s=3600)


class Diary:
    """Numbered sectors on both disks in turn, with the guest's own times; each waits for the one before."""

    def __init__(self, socket: Path, seed: int, *, first: int = 0) -> None:
        self.guests = [SocketGuest(socket, str(index)) for index in range(2)]
        self.rng = random.Random(seed)
        self.first = self.next = first
        self.writes: list[tuple[float, float]] = []
        self.flushes: list[tuple[float, float, int]] = []

    def keep(self, count: int) -> None:
        for _ in range(count):
            sent_s = time.time()
            if self.rng.random() < 0.1:
                self.guests[self.next % 2].flush()
                self.flushes.append((sent_s, time.time(), self.next))
                continue
            self.guests[self.next % 2].write(self.next // 2 * SECTOR, self.sector(self.next))
            self.writes.append((sent_s, time.time()))
            self.next += 1

    def sector(self, number: int) -> bytes:
        return (number + 1).to_bytes(8, "little") * (SECTOR // 8)

    def count(self, disks: dict[int, bytes]) -> int:
        """Return how many writes are there, which must be the first ones."""
        there = [
            disks[number % 2][number // 2 * SECTOR :][:SECTOR] == self.sector(number)
            for number in range(self.next)
        ]
        count = sum(there)
        assert there == [True] * count + [False] * (self.next - count), "not the first ones"
        return count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self.guests:
            guest.close()


@pytest.fixture
def site(tmp_path: Path, served: Served, rng: random.Random) -> Captured:
    return Captured(tmp_path, served, rng)


def count_at(site: Captured, diary: Diary, instant: float | str, *, flush: bool = False) -> tuple[int, float]:
    made = hvreplica.point_at(site.served.store, VM, instant, flush=flush)
    assert made.is_flush == flush or not flush
    return diary.count(read_point(OS_FILES, site.served.store, made.id, SYSTEM)), made.instant_s


def check(site: Captured, diary: Diary, *, instants: int) -> None:
    """Make points here and there, and hold each to the diary."""
    wanted = [diary.rng.uniform(diary.writes[0][0], diary.writes[-1][1]) for _ in range(instants)]
    for instant_s in wanted:
        count, shown_s = count_at(site, diary, instant_s)
        assert instant_s - 0.011 < shown_s <= instant_s + 1e-6, "slots of such a log have at most 10 ms"
        # Both clocks are one; microseconds are cut off.
        assert all(sent_s <= shown_s + 2e-6 for sent_s, _ in diary.writes[: count - diary.first])
        assert all(done_s >= shown_s - 2e-6 for _, done_s in diary.writes[count - diary.first :])
    for _, done_s, number in diary.rng.sample(diary.flushes, 2):
        count, shown_s = count_at(site, diary, done_s + 1e-6, flush=True)
        assert count >= number, "all that was answered before the flush"
        assert count <= number, "nothing that was sent after it"
        assert shown_s <= done_s + 2e-6


def test_points_hold_what_the_guests_diary_says(site: Captured, seed: int) -> None:
    with site.running(points=KEEP), Diary(site.folder / "nbd.sock", seed) as diary:
        diary.keep(4)
        assert site.replicate().kind == "initial"
        diary.writes.clear()
        diary.flushes.clear()
        diary.first = diary.next
        diary.keep(150)
        assert site.replicate().kind == "delta"
        assert not list((site.state / "logs").iterdir())
        check(site, diary, instants=2)
        [span] = hvreplica.point_instants(site.served.store, VM)
        assert span.step_s == 0.001
        assert span.flushes >= len({number for *_, number in diary.flushes})


def test_replica_of_an_older_revision_is_not_asked(
    site: Captured, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "REVISION", 3)
    with site.running(points=KEEP), Diary(site.folder / "nbd.sock", seed) as diary:
        diary.keep(4)
        site.replicate()
        diary.keep(20)
        assert site.replicate().kind == "delta"
        assert not list((site.state / "logs").iterdir())
    [span] = hvreplica.point_instants(site.served.store, VM)
    assert (span.step_s, span.flushes) == (1.0, 0)
    with pytest.raises(NoSuchPoint, match="no flush of the guest is known"):
        hvreplica.point_at(site.served.store, VM, span.to_s, flush=True)


def test_damaged_times_are_not_sent_and_the_cycle_goes_on(
    site: Captured, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    with site.running(points=KEEP), Diary(site.folder / "nbd.sock", seed) as diary:
        diary.keep(4)
        site.replicate()
        diary.keep(20)
        hvreplica.cut(site.state)
        found = sorted((site.state / "logs").glob("*.hrt"))
        assert len(found) == 2
        found[0].write_bytes(found[0].read_bytes()[:-5])
        assert site.replicate().kind == "delta"
        assert "is not told the parts of seconds" in caplog.text
    assert [span.step_s for span in hvreplica.point_instants(site.served.store, VM)] == [1.0]


class Process:
    """`hvreplica capture` in a process of its own."""

    def __init__(self, site: Captured) -> None:
        command = [sys.executable, "-m", "hvreplica", "capture", "--vm", VM, "--socket", "nbd.sock"]
        command += ["--state", "state", "--keep-logs", "1h", "--recovery-point-every", "0"]
        for path in site.disks:
            command += ["--disk", path.name]
        self.process = subprocess.Popen(
            command, cwd=site.folder, env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert "listening" in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_capture_that_is_killed_leaves_times_that_fit_their_logs_or_none(site: Captured, seed: int) -> None:
    """What was cut before has its times; what was open has no log in order, and the next cycle has again."""
    process = Process(site)
    try:
        with Diary(site.folder / "nbd.sock", seed) as diary:
            diary.keep(4)
            site.replicate()
            diary.writes.clear()
            diary.flushes.clear()
            diary.first = diary.next
            diary.keep(80)
            hvreplica.cut(site.state)
            waiting = diary.next
            diary.keep(30)
        process.kill()
        assert len(list((site.state / "logs").glob("*.hrt"))) == 2
        process = Process(site)
        site.replicate()
        with Diary(site.folder / "nbd.sock", seed + 1, first=diary.next) as later:
            later.keep(40)
            site.replicate()
            spans = hvreplica.point_instants(site.served.store, VM)
            assert [span.step_s for span in spans] == [0.001, None, 0.001]
            del diary.writes[waiting - diary.first :]
            diary.flushes = [flush for flush in diary.flushes if flush[2] < waiting]
            check(site, diary, instants=2)
            check(site, later, instants=2)
    finally:
        process.kill()
    assert not list((site.state / "logs").iterdir())
