"""The process that owns a state folder: its loop, what it answers to others, and how it stops."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.errors import (
    FreezeFailed,
    InvalidTransition,
    Locked,
    ProtocolViolation,
    ReplicaDiverged,
    StateError,
    Unreachable,
)
from hvreplica.replication import control, live, live_verbs, primary
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.control import Control
from hvreplica.replication.loop import CycleLoop, CycleRunner
from hvreplica.replication.metrics import exposition
from hvreplica.replication.resident import Replicator
from hvreplica.replication.work import make_link
from hvreplica.store import LogSink
from hvreplica.transport.exposition import PageServer
from tests.replication.live_site import MIB, STATE, VM, LiveSite
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.replication.sites import Served


class Owned:
    """A live VM with its runner, loop and control, on a clock that the test moves."""

    def __init__(self, seed: int, served: Served, *, interval_s: float | None = 30) -> None:
        self.clock = FakeClock(seed=seed)
        self.site = LiveSite(seed, disks_bytes=(6 * MIB,), clock=self.clock)
        self.book = Bookkeeper(self.site.files, STATE, clock=self.clock)
        link = make_link(served.address, served.tls, "auto", 1)
        self.runner = CycleRunner(self.site.work, self.book, link=link, keep_session=interval_s is None)
        self.loop = CycleLoop(self.runner, interval_s=interval_s)
        self.control = Control(self.runner, self.loop, running="capture")
        self.told: list[object] = []

    def ask(self, verb: str, **arguments: object) -> Any:
        return self.control.handle(verb, dict(arguments), self.told.append)

    def close(self) -> None:
        self.runner.close()
        self.site.stop()


@pytest.fixture
def owned(seed: int, served: Served) -> Iterator[Owned]:
    with contextlib.closing(Owned(seed, served)) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primary, "RETRY_AFTER_S", ())


def test_loop_runs_what_is_due_and_nothing_else(owned: Owned, served: Served) -> None:
    assert owned.loop.step() == pytest.approx(30)
    assert owned.book.record.replication_success_count == 1
    owned.site.write(4096)
    owned.clock.advance(29)
    assert owned.loop.step() == pytest.approx(1)
    assert not owned.site.equals(served)
    owned.clock.advance(1)
    owned.loop.step()
    assert owned.site.equals(served)
    assert owned.ask("status").statistics.replication_health == "Normal"


def test_loop_backs_off_while_the_replica_is_away(owned: Owned, served: Served) -> None:
    owned.loop.step()
    served.close()
    waits = []
    for _ in range(7):
        owned.clock.advance(owned.loop.wait_s() or 0)
        waits.append(owned.loop.step())
    assert waits == [pytest.approx(s) for s in (60, 120, 240, 480, 600, 1800, 1800)]
    status = owned.ask("status")
    assert status.statistics.replication_health == "Critical"
    assert status.statistics.network_failure_count == 7
    assert status.statistics.replication_miss_count >= (60 + 120 + 240 + 480 + 600 + 1800) // 30 - 7


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_replica_suspends_the_loop_and_room_resumes_it(
    owned: Owned, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owned.loop.step()
    owned.site.write(4096)
    with monkeypatch.context() as patch:
        patch.setattr(LogSink, "_put", _no_room)
        for _ in range(9):
            owned.clock.advance(owned.loop.wait_s() or 0)
            assert owned.loop.step() == pytest.approx(60), "no backing off: room may be there any time"
    status = owned.ask("status")
    assert (status.replication_state, status.paused) == ("Suspended", False)
    assert "waits for room at the replica" in status.statistics.replication_health_issues[0]
    assert "replication waits for room at the replica, again in 60 s" in caplog.text
    assert "\nhvreplica_replica_full{" in exposition(status)
    owned.clock.advance(60)
    assert owned.loop.step() == pytest.approx(30)
    assert owned.site.equals(served)
    assert owned.ask("status").replication_state == "Replicating"


def test_fatal_error_stops_the_loop_until_resumed(
    owned: Owned, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owned.loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(primary.Primary, "_deliver", _diverged)
        owned.clock.advance(30)
        assert owned.loop.step() is None
    owned.clock.advance(100_000)
    assert owned.loop.step() is None
    assert owned.ask("status").replication_state == "Error"
    assert "until it is resumed" in caplog.text
    status = owned.ask("resume")
    assert status.cycles.next_s == 0
    assert owned.loop.step() == pytest.approx(30)
    assert owned.ask("status").replication_state == "Replicating"


def test_cycle_that_the_replica_does_not_allow_stops_the_loop(
    owned: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InvalidTransition("disk 1 belongs to the newest point")

    monkeypatch.setattr(primary.Primary, "_deliver", refuse)
    assert owned.loop.step() is None
    assert owned.ask("status").replication_state == "Error"


def test_cycle_that_somebody_asks_for_mends_the_loop(owned: Owned, served: Served) -> None:
    owned.loop.step()
    address = served.address
    served.close()
    owned.clock.advance(30)
    assert owned.loop.step() == pytest.approx(60)
    served.start()
    with pytest.raises(Unreachable):
        owned.ask("replicate", vm=VM)
    assert served.address != address
    result = owned.ask("replicate", vm=VM, to=served.address, tls=str(served.tls))
    assert result.kind == "none"
    assert [report.phase for report in owned.told][-1] == "apply"
    assert owned.loop.wait_s() == 0


def test_pause_survives_the_process(owned: Owned, served: Served) -> None:
    owned.loop.step()
    assert owned.ask("pause").replication_state == "Suspended"
    owned.clock.advance(1000)
    assert owned.loop.step() is None
    with pytest.raises(InvalidTransition, match="paused"):
        owned.ask("replicate", vm=VM)
    owned.site.stop()
    owned.site.start()
    assert owned.site.work.state.paused
    tally_before = owned.site.work.state.last_point
    with pytest.raises(InvalidTransition, match="paused"):
        CycleRunner(owned.site.work, owned.book, link=owned.runner.link).run()
    assert owned.site.work.state.last_point == tally_before
    owned.site.work.state.paused = False
    owned.site.write(4096)
    owned.site.replicate(served)
    assert owned.site.equals(served)


def test_continuous_loop_keeps_its_session(seed: int, served: Served) -> None:
    with contextlib.closing(Owned(seed, served, interval_s=None)) as owned:
        owned.loop.step()
        generation = owned.site.work.state.generation
        for _ in range(4):
            owned.site.write(4096)
            owned.clock.advance(owned.loop.wait_s() or 0)
            assert owned.loop.step() == pytest.approx(0.2)
            assert owned.site.equals(served)
        assert owned.site.work.state.generation == generation
        owned.site.write(4096)
        owned.ask("replicate", vm=VM)
        assert owned.site.work.state.generation == generation, "it is the usual replica"
        assert owned.site.equals(served)


def test_cut_tells_the_instant_before_its_answer(owned: Owned) -> None:
    owned.site.write(4096)
    answer = owned.ask("cut")
    assert list(owned.told[0]) == ["instant"]  # type: ignore[call-overload]
    assert (len(answer.logs), answer.logs[0].disk, answer.held_us) == (1, 0, 7.0)
    assert owned.site.files.exists(Path(answer.logs[0].path))
    assert answer.logs[0].entries > 0
    assert owned.ask("status").pending[0].point == answer.point
    assert owned.ask("cut").logs == []


def test_cut_is_app_consistent_only_where_somebody_says_so(owned: Owned) -> None:
    for app_consistent in (True, False):
        owned.site.write(4096)
        owned.ask("cut", app_consistent=app_consistent)
        expected = "app" if app_consistent else "crash"
        assert owned.site.work.state.pending[-1].consistency == expected


def test_cut_with_a_guest_that_does_not_freeze_is_none(
    owned: Owned, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned.site.replicate(served)
    order: list[str] = []
    free: list[bool] = []
    cutting = owned.site.work.cutting

    def look() -> None:
        free.append(cutting.acquire(blocking=False))
        if free[-1]:
            cutting.release()

    class Agent:
        def __init__(self, path: str, **_: object) -> None:
            order.append(path)

        @contextlib.contextmanager
        def frozen(self, *, limit_s: float) -> Iterator[int]:
            order.append(f"freeze {limit_s:g}")
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            yield count
            order.append("thaw")
            if failing:
                raise FreezeFailed("the guest was thawed too early")

    def collapse(_: object) -> None:
        order.append("collapse")

    failing, count = False, 3
    monkeypatch.setattr(control, "GuestAgent", Agent)
    monkeypatch.setattr(live, "_collapse", collapse)
    owned.site.machine.on_cut = lambda: order.append("instant")
    owned.site.write(4096)
    done = owned.ask("cut", freeze="/agent", freeze_limit_s=2.0)
    assert owned.site.work.state.pending[-1].consistency == "app"
    assert (done.frozen, done.warnings) == (3, [])
    assert order == ["collapse", "/agent", "freeze 2", "instant", "thaw"]
    assert free == [False], "a frozen guest waits for no other cut"
    count = 0
    owned.site.write(4096)
    done = owned.ask("cut", freeze="/agent")
    assert (done.frozen, [warning[:30] for warning in done.warnings]) == (
        0,
        ["the guest froze no file system"],
    )
    failing = True
    owned.site.write(4096)
    with pytest.raises(FreezeFailed):
        owned.ask("cut", freeze="/agent")
    assert len(owned.site.work.state.pending) == 2
    assert owned.book.record.application_consistent_snapshot_failure_count == 1
    owned.site.machine.on_cut = lambda: None
    owned.site.replicate(served)
    assert owned.site.equals(served), "what the failed cut held is still known"


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("cut", {"freeze": 5}),
        ("cut", {"more": 1}),
        ("cut", {"freeze_limit_s": 0}),
        ("replicate", {"connections": 17}),
        ("replicate", {"disks": [""]}),
        ("status", {"x": 1}),
        ("fly", {}),
    ],
)
def test_arguments_from_outside_are_checked(owned: Owned, verb: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolation):
        owned.ask(verb, **arguments)


def test_calls_for_another_vm_or_other_disks_are_refused(owned: Owned) -> None:
    with pytest.raises(StateError, match="another VM"):
        owned.ask("replicate", vm="db01")
    with pytest.raises(StateError, match="other disks"):
        owned.ask("replicate", vm=VM, disks=["/other.vhdx"])
    owned.runner.link = None
    with pytest.raises(StateError, match="where the replica is"):
        owned.ask("replicate", vm=VM)
    with pytest.raises(ValueError, match="tls"):
        owned.ask("replicate", vm=VM, to="127.0.0.1:1")


def test_stopped_runner_ends_a_cycle_that_runs(owned: Owned, monkeypatch: pytest.MonkeyPatch) -> None:
    real = primary.Primary._deliver
    entered = threading.Event()

    def deliver(driver: primary.Primary, session: Any) -> None:
        entered.set()
        threading.Event().wait(0.05)
        real(driver, session)

    owned.loop.step()
    monkeypatch.setattr(primary.Primary, "_deliver", deliver)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            owned.runner.run()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(20)
    owned.runner.stop()
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(StateError, match="stopped"):
        owned.runner.run()
    assert owned.book.record.replication_failure_count == 0, "being stopped is no failure"


@pytest.fixture
def compared(tmp_path: Path, served: Served) -> Iterator[Path]:
    """Return a disk that is replicated by a Replicator in this process, with an interval of an hour."""
    disk = tmp_path / "a.raw"
    disk.write_bytes(bytes(range(256)) * 4096)
    with Replicator(
        VM,
        [disk],
        to=served.address,
        tls=served.tls,
        state=tmp_path / "state",
        interval_s=3600,
        metrics="127.0.0.1:0",
    ) as replicator:
        thread = threading.Thread(target=replicator.serve_forever)
        thread.start()
        (tmp_path / "metrics").write_text(replicator.metrics_address or "")
        try:
            yield disk
        finally:
            replicator.stop()
            thread.join()
    assert not (tmp_path / "state" / "control.sock").exists()


def test_process_that_replicates_again_and_again_answers_others(
    compared: Path, served: Served, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    first = hvreplica.replicate(VM, [compared], state=folder)
    assert first.kind in {"initial", "none"}
    with compared.open("r+b") as file:
        file.write(b"new")
    reports: list[hvreplica.Progress] = []
    result = hvreplica.replicate(VM, to=served.address, tls=served.tls, state=folder, progress=reports.append)
    assert result.kind in {"delta", "none"}, "the cycle that was due first may have come between"
    assert reports
    assert served.content(VM) == compared.read_bytes()
    with compared.open("r+b") as file:
        file.write(b"newer")
    cut = live_verbs.cut(folder)
    assert (len(cut.logs), cut.held_us) == (1, 0)
    assert live_verbs.status(folder).running == "replicate"
    with pytest.raises(StateError, match="no guest"):
        live_verbs.cut(folder, freeze="/agent")
    assert live_verbs.pause(folder).paused
    with pytest.raises(InvalidTransition):
        hvreplica.replicate(VM, state=folder)
    assert not live_verbs.resume(folder).paused
    with pytest.raises(Locked):
        Replicator(VM, [], to=served.address, tls=served.tls, state=folder, interval_s=5)
    page = urllib.request.urlopen(f"http://{(tmp_path / 'metrics').read_text()}/metrics").read().decode()
    assert "hvreplica_cycles_total" in page
    assert live_verbs.reset_statistics(folder).statistics.replication_success_count == 0


def test_verbs_without_a_process_use_the_folder(tmp_path: Path, served: Served) -> None:
    disk, folder = tmp_path / "a.raw", tmp_path / "state"
    disk.write_bytes(bytes(1 << 20))
    for verb in (live_verbs.status, live_verbs.cut, live_verbs.pause):
        with pytest.raises(StateError, match="no such state folder"):
            verb(folder)
    link = {"to": served.address, "tls": served.tls, "state": folder}
    with pytest.raises(StateError, match="does not know"):
        hvreplica.replicate(VM, **link)
    with pytest.raises(ValueError, match="no process captures"):
        hvreplica.replicate(VM, [disk], state=folder)
    hvreplica.replicate(VM, [disk], **link)
    assert live_verbs.status(folder).statistics.replication_success_count == 1
    assert live_verbs.cut(folder).logs == []
    with disk.open("r+b") as file:
        file.write(b"changed")
    cut = live_verbs.cut(folder)
    assert cut.logs[0].entries == 1
    assert live_verbs.status(folder).pending[0].bytes == cut.logs[0].bytes
    with pytest.raises(StateError, match="waits"):
        live_verbs.cut(folder)
    assert live_verbs.pause(folder).replication_state == "Suspended"
    with pytest.raises(InvalidTransition):
        hvreplica.replicate(VM, **link)
    live_verbs.resume(folder)
    result = hvreplica.replicate(VM, **link)
    assert [log.id for log in result.logs] == [cut.logs[0].id]
    assert served.content(VM) == disk.read_bytes()
    assert live_verbs.reset_statistics(folder).statistics.replication_success_count == 0


def test_page_of_measurements_is_served_and_nothing_else() -> None:
    pages = iter(["a 1\n"])
    server = PageServer("127.0.0.1:0", lambda: next(pages))
    server.start()
    try:
        with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert answer.read() == b"a 1\n"
        for path, code in (("/", 404), ("/metrics", 500)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"http://{server.address}{path}")
            assert caught.value.code == code
            caught.value.close()
        with pytest.raises(Unreachable):
            PageServer(str(server.address), lambda: "")
    finally:
        server.close()


def _diverged(*_: object) -> None:
    raise ReplicaDiverged("the replica is on another point")
