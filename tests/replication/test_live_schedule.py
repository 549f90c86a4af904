"""When cycles begin, what counts as missed, how errors are waited out, and what health comes of it."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest

from hvreplica.clock import iso_time
from hvreplica.errors import PeerClosed, ReplicaDiverged, StoreFull, Unreachable
from hvreplica.replication import bookkeeping, statistics
from hvreplica.replication.bookkeeping import FATAL, Bookkeeper, load_statistics
from hvreplica.replication.metrics import exposition
from hvreplica.replication.results import DiskChange, ReplicateResult
from hvreplica.replication.schedule import RETRY_AFTER_S, Schedule
from hvreplica.replication.state import PrimaryState, TrackedDisk
from hvreplica.replication.statistics import Situation, Statistics
from hvreplica.replication.status import make_status
from tests.support.fake_machine import FakeTracking
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

FOLDER_PATH = "/state"


def test_cycles_in_time_are_due_on_a_grid() -> None:
    schedule = Schedule(30, now_s=100)
    starts = []
    for _ in range(4):
        now_s = schedule.start_s + 0.01  # a thread wakes a little late
        starts.append(schedule.start_s)
        assert schedule.begin(now_s) == 0
        assert schedule.end(now_s + 5) == 0
    assert starts == [100, 130, 160, 190]


def test_cycle_that_overruns_is_missed_and_the_next_begins_at_once() -> None:
    schedule = Schedule(30, now_s=0)
    schedule.begin(0)
    assert schedule.end(29.9) == 0
    schedule.begin(30)
    assert schedule.end(31 + 60) == 2
    assert schedule.start_s == 91
    assert schedule.begin(91) == 0
    assert schedule.end(92) == 0
    assert schedule.start_s == 121


def test_errors_are_waited_out_longer_and_longer() -> None:
    schedule = Schedule(900, now_s=0)
    now_s, waits = 0.0, []
    for _ in range(8):
        schedule.begin(now_s)
        schedule.fail(now_s, is_fatal=False)
        waits.append(schedule.start_s - now_s)
        now_s = schedule.start_s
    assert waits == [*RETRY_AFTER_S, 1800, 1800, 1800]
    schedule.begin(now_s)
    schedule.end(now_s + 1)
    assert not schedule.is_failing
    schedule.begin(schedule.start_s)
    schedule.fail(schedule.start_s, is_fatal=False)
    assert schedule.start_s == pytest.approx(now_s + 900 + 60)


@pytest.mark.parametrize(("interval_s", "wait_s"), [(900, 60), (30, 60), (None, 30)])
def test_room_at_the_replica_is_asked_for_at_one_pace(interval_s: float | None, wait_s: float) -> None:
    schedule = Schedule(interval_s, now_s=0)
    now_s = 0.0
    for _ in range(20):
        schedule.begin(now_s)
        schedule.fail(now_s, is_fatal=False, waits_for_room=True)
        assert schedule.start_s - now_s == wait_s
        assert schedule.is_failing
        assert not schedule.is_stopped
        now_s = schedule.start_s


def test_cycles_that_were_due_while_an_error_was_waited_out_are_missed() -> None:
    schedule = Schedule(30, now_s=0)
    schedule.begin(0)
    assert schedule.fail(1, is_fatal=False) == 0
    assert schedule.start_s == 61
    assert schedule.begin(61) == 1  # 30; that of 60 begins at 61
    assert schedule.end(62) == 0


def test_fatal_error_stops_until_resumed() -> None:
    schedule = Schedule(30, now_s=0)
    schedule.begin(0)
    schedule.fail(1, is_fatal=True)
    assert schedule.is_stopped
    schedule.resume(1000)
    assert (schedule.is_stopped, schedule.start_s, schedule.begin(1000)) == (False, 1000, 0)


def test_continuous_cycles_try_again_within_seconds() -> None:
    schedule = Schedule(None, now_s=0)
    now_s, waits = 0.0, []
    for _ in range(8):
        schedule.begin(now_s)
        schedule.fail(now_s, is_fatal=False)
        waits.append(schedule.start_s - now_s)
        now_s = schedule.start_s
    assert waits == [1, 2, 4, 8, 15, 30, 60, 60]


def test_continuous_cycles_have_a_pause_and_miss_none() -> None:
    schedule = Schedule(None, now_s=0)
    assert schedule.begin(0) == 0
    assert schedule.end(0.05) == 0
    assert schedule.start_s == pytest.approx(0.2)
    schedule.begin(0.2)
    assert schedule.end(7) == 0
    assert schedule.start_s == 7


def test_any_history_counts_each_due_time_once(seed: int) -> None:
    """Begun and missed cycles together are the times that passed, however cycles and errors fall."""
    rng = random.Random(seed)
    for _ in range(200):
        schedule = Schedule(10, now_s=0)
        now_s, begun, missed, starts = 0.0, 0, 0, []
        for _ in range(30):
            now_s = max(now_s, schedule.start_s)
            starts.append(now_s)
            missed += schedule.begin(now_s)
            begun += 1
            now_s += rng.choice([0.5, 3, 12, 45])
            fails = rng.random() < 0.2
            missed += schedule.fail(now_s, is_fatal=False) if fails else schedule.end(now_s)
        assert all(later > earlier for earlier, later in pairwise(starts))
        # Each cycle that begins late moves the grid by less than an interval.
        assert begun + missed <= now_s / 10 + begun + 1
        assert missed >= (now_s - begun * 10) / 10 - begun


def result(kind: str = "delta", *, size: int = 1000, seconds: float = 2.0) -> ReplicateResult:
    return ReplicateResult("web01", kind, [DiskChange("/a", 1 << 20, size)], 10, seconds, [], "p")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def files() -> FaultFiles:
    return FaultFiles(FOLDER_PATH)


@pytest.fixture
def book(files: FaultFiles, clock: FakeClock) -> Bookkeeper:
    from pathlib import Path  # noqa: PLC0415

    return Bookkeeper(files, Path(FOLDER_PATH), clock=clock)


def health(book: Bookkeeper, clock: FakeClock, **situation: object) -> tuple[str, str]:
    values = {"has_replica": True, "phase": "ready", "is_paused": False, "pending_bytes": 0} | situation
    grade, issues = statistics.judge(book.record, Situation(**values, now_s=clock.now_s()))  # type: ignore[arg-type]
    return grade, " | ".join(issues)


def test_health_follows_what_happened(book: Bookkeeper, clock: FakeClock) -> None:
    assert health(book, clock, has_replica=False) == ("NotApplicable", "")
    grade, issue = health(book, clock, phase="initial")
    assert grade == "Warning"
    assert "initial replication" in issue
    for _ in range(8):
        book.succeeded(result())
    assert health(book, clock) == ("Normal", "")
    assert health(book, clock, is_paused=True) == ("Warning", "replication is paused")
    book.missed(2)
    assert health(book, clock)[0] == "Normal", "a fifth may be missed"
    book.missed(1)
    grade, issue = health(book, clock)
    assert (grade, issue) == ("Warning", "27 % of the cycles in this interval were missed")
    book.failed(Unreachable("no answer", path="replica:1"))
    grade, issue = health(book, clock)
    assert grade == "Critical"
    assert "replica:1: no answer" in issue
    book.failed(ReplicaDiverged("it diverged"))
    assert "waits to be resumed" in health(book, clock)[1]
    book.succeeded(result())
    clock.advance(3601)
    assert "over an hour ago" in health(book, clock)[1]
    book.succeeded(result(seconds=10_000.0))
    assert "five minutes" in health(book, clock)[1]


def test_waiting_for_room_is_a_state_of_its_own_with_its_own_beginning(
    book: Bookkeeper, clock: FakeClock
) -> None:
    book.failed(Unreachable("no answer"))
    clock.advance(100)
    full_s = clock.now_s()
    book.failed(StoreFull("no room left for the replica"))
    clock.advance(100)
    book.failed(StoreFull("no room left for the replica"))
    told = f"waits for room at the replica since {iso_time(full_s)}, and goes on by itself: no room left"
    assert told in health(book, clock)[1]
    book.failed(Unreachable("no answer"))
    assert f"has failed since {iso_time(clock.now_s())}" in health(book, clock)[1]


def test_statistics_count_sizes_latencies_and_failures(book: Bookkeeper, clock: FakeClock) -> None:
    book.succeeded(result("initial", size=1 << 30, seconds=4000.0))
    book.succeeded(result(size=300, seconds=1.0))
    book.succeeded(result(size=600, seconds=5.0))
    book.failed(PeerClosed("cut"))
    book.failed(StoreFull("full"))
    book.freeze_failed()
    shown = statistics.show(book.record, Situation(True, "ready", False, 77, clock.now_s()))
    assert (
        shown.replication_success_count,
        shown.replication_failure_count,
        shown.network_failure_count,
    ) == (3, 2, 1)
    assert shown.application_consistent_snapshot_failure_count == 1
    assert (shown.replication_size, shown.average_replication_size, shown.max_replication_size) == (
        600,
        300,
        600,
    )
    assert (shown.replication_latency, shown.average_replication_latency, shown.max_replication_latency) == (
        5.0,
        2.0,
        5.0,
    )
    assert shown.pending_replication_size == 77
    assert shown.replication_health == "Critical"


def test_interval_ends_after_twelve_hours_and_by_reset(book: Bookkeeper, clock: FakeClock) -> None:
    book.succeeded(result())
    synchronized = book.record.last_synchronized_at
    clock.advance(statistics.MONITORING_INTERVAL_S)
    assert book.record.replication_success_count == 0
    assert book.record.last_synchronized_at == synchronized
    book.succeeded(result())
    book.reset()
    assert book.record.replication_success_count == 0
    assert book.record.start_statistic_time == clock.now_s()
    clock.set_now(1.0)
    assert book.record.start_statistic_time == 1.0, "a clock that was set back begins a new interval"


def test_statistics_survive_and_are_not_saved_at_every_cycle(
    book: Bookkeeper, files: FaultFiles, clock: FakeClock
) -> None:
    from pathlib import Path  # noqa: PLC0415

    folder = Path(FOLDER_PATH)
    for _ in range(100):
        book.succeeded(result())
        clock.advance(0.04)
    saved = load_statistics(files, folder)
    assert saved is not None
    assert saved.replication_success_count == 1
    book.save()
    assert load_statistics(files, folder) == book.record
    assert Bookkeeper(files, folder, clock=clock).record == book.record
    for data in (
        b"",
        b"{",
        b"[1]",
        b'{"start_statistic_time": "x"}',
        b'{"start_statistic_time": 1, "version": 2}',
    ):
        file = files.open(folder / bookkeeping.FILE_NAME, writable=True)
        file.resize(0)
        file.write(data, 0)
        file.close()
        assert load_statistics(files, folder) is None
    assert Bookkeeper(files, folder, clock=clock).record.replication_success_count == 0


def test_statistics_that_cannot_be_saved_stop_nothing(
    book: Bookkeeper, files: FaultFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files.capacity_bytes = 0
    book.succeeded(result())
    assert "cannot be saved" in caplog.text


def test_errors_that_no_retry_mends_are_fatal() -> None:
    assert not issubclass(Unreachable, FATAL)
    assert not issubclass(StoreFull, FATAL)
    assert issubclass(ReplicaDiverged, FATAL)


def state(vm: str = "web01") -> PrimaryState:
    from uuid import UUID  # noqa: PLC0415

    return PrimaryState(2, vm, UUID(int=1), 3, "ready", [TrackedDisk("/a", 512, 512, 512, 0)])


def test_exposition_names_every_family_once_and_escapes_names() -> None:
    record = Statistics(5.0, replication_success_count=3, last_synchronized_at=6.5)
    tracking = FakeTracking(0, "/a", 512, 1, 2, 3, "open", 4, 5, 6)
    page = exposition(make_status(state('a"b\\c\nd'), record, now_s=7.0, tracking=[tracking]))
    lines = page.splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 15
    assert 'hvreplica_cycles_total{vm="a\\"b\\\\c\\nd"} 3' in lines
    assert 'hvreplica_disk_dirty_bytes{vm="a\\"b\\\\c\\nd",disk="0"} 1' in lines
    assert 'hvreplica_last_synchronized_seconds{vm="a\\"b\\\\c\\nd"} 6.5' in lines
    samples = [line for line in lines if not line.startswith("#")]
    assert {line.split("{")[0] for line in samples} == set(names)
    assert page.endswith("\n")


def test_status_is_plain_json() -> None:
    record = Statistics(5.0)
    text = msgspec.json.encode(make_status(state(), record, now_s=7.0))
    shown = msgspec.json.decode(text)
    assert shown["replication_state"] == "Replicating"
    assert shown["statistics"]["replication_health"] == "Normal"
    assert shown["disks"][0]["tracking"] is None
