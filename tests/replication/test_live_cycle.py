"""Cycles of a VM that is tracked live: the initial copy of a living disk, cuts in order, and what a failure leaves."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hvreplica
from hvreplica.errors import ChecksumMismatch, InvalidTransition, StateError, TrackingLost, Unreachable
from hvreplica.replication import cycle, live, primary, sources
from hvreplica.replication.live import cut_live
from hvreplica.replication.session import ReplicaSession
from hvreplica.replication.state import VERSION
from tests.replication.live_site import MIB, STATE, VM, LiveSite
from tests.support.crash import worlds_after
from tests.support.faultfile import Killed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.replication.sites import Served
    from tests.support.fake_machine import FakeCut


@pytest.fixture
def site(seed: int) -> Iterator[LiveSite]:
    """Return a VM with two disks."""
    made = LiveSite(seed, disks_bytes=(24 * MIB, 8 * MIB + 512))
    yield made
    made.stop()


def test_initial_copy_of_a_disk_that_is_written_meanwhile_becomes_one_instant(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sources.DiskSource.load

    def load(source: sources.DiskSource, window: sources.Window, buffer: object) -> sources.Loaded:
        site.write(8 * 4096)
        return real(source, window, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(sources.DiskSource, "load", load)
    tally = site.replicate(served)
    assert tally.kind == "initial"
    assert len(tally.shipped) >= 1
    assert site.equals(served)
    assert site.files.names(STATE / "logs") == []


def test_initial_copy_without_a_write_gives_a_point_of_its_own(site: LiveSite, served: Served) -> None:
    site.cut()
    assert site.replicate(served).kind == "initial"
    assert site.equals(served)
    assert not site.work.state.mixed
    assert [point.id for point in hvreplica.point_list(served.store, VM)] == [str(site.work.state.last_point)]


@pytest.mark.parametrize("align", [4096, 512])
@pytest.mark.parametrize("logged", [True, False])
def test_cycle_ships_what_was_written_since_the_last(
    site: LiveSite, served: Served, align: int, *, logged: bool
) -> None:
    site.replicate(served)
    site.machine.recycled_bytes = 100_000
    for _ in range(3):
        for index in range(2):
            site.write(40 * 4096, index=index, align=align, logged=logged)
        tally = site.replicate(served)
        assert tally.kind == "delta"
        assert site.equals(served)
    assert site.replicate(served).kind == "none"
    assert site.machine.known[-1], "nothing was on its way, so the tables describe the replica"


def test_tables_that_followed_partial_blocks_are_right_or_say_not_known(
    site: LiveSite, served: Served
) -> None:
    """A comparison after live cycles finds every difference, and little that is none."""
    site.replicate(served)
    for align in (512, 4096, 1536):
        site.write(60 * 512, piece_bytes=512 * site.rng.randrange(1, 30), align=512)
        site.write(60 * align, piece_bytes=align, align=align)
        site.replicate(served)
    for index, disk in enumerate(site.disks):
        site.machine.mark(index, np.array([[0, disk.virtual_bytes]], np.int64))
    tally = site.replicate(served)
    unaligned_writes = 60 + 60 + 60 + 60
    assert tally.changed_bytes[0] <= unaligned_writes * 2 * 4096, "only edges of writes are not known"
    assert site.equals(served)


def test_cuts_that_wait_are_shipped_in_order_each_a_point(site: LiveSite, served: Served) -> None:
    site.replicate(served)
    ids = []
    for _ in range(4):
        site.write(10 * 4096)
        ids.append(site.cut().transfer)
    assert site.machine.known[-3:] == [False] * 3, "the replica will not hold what the tables say"
    logs = [transfer.logs[0] for transfer in ids if transfer is not None]
    assert [log.previous_log_id for log in logs[1:]] == [log.log_id for log in logs[:-1]]
    before = served_points(served)
    site.write(4096)
    tally = site.replicate(served)
    assert [log.id for log in tally.shipped[:4]] == [str(log.log_id) for log in logs]
    assert len(tally.shipped) == 5
    assert site.equals(served)
    assert served_points(served) != before
    assert site.files.names(STATE / "logs") == []


def test_cut_while_a_transfer_is_on_its_way_waits_behind_it(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.replicate(served)
    real = cycle.ship
    cuts = []

    def ship(work: object, session: object, transfer: object) -> None:
        if len(cuts) < 2:
            site.write(5 * 4096)
            cuts.append(cut_live(site.work))
        real(work, session, transfer)  # type: ignore[arg-type]

    monkeypatch.setattr(cycle, "ship", ship)
    site.write(4096)
    tally = site.replicate(served)
    assert len(cuts) == 2
    assert len(tally.shipped) == 3
    assert site.equals(served)
    assert not site.work.state.pending


def test_cut_during_the_initial_copy_is_refused(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    real = sources.DiskSource.load

    def load(source: sources.DiskSource, window: sources.Window, buffer: object) -> sources.Loaded:
        with pytest.raises(InvalidTransition, match="initial"):
            cut_live(site.work)
        refused.append(window)
        return real(source, window, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(sources.DiskSource, "load", load)
    site.replicate(served)
    assert refused


def test_cut_that_cannot_be_recorded_counts_as_changed_again(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.replicate(served)
    site.write(20 * 4096)
    with monkeypatch.context() as patch:
        patch.setattr(type(site.folder), "save", full)
        with pytest.raises(OSError, match="full"):
            site.cut()
    assert len(site.machine.given_back) == 1
    assert not site.work.state.pending
    assert site.replicate(served).kind == "delta"
    assert site.equals(served)


def test_recorded_cut_stands_where_tracking_cannot_forget_it(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.replicate(served)
    site.write(20 * 4096)
    real = site.machine.settle

    def settle(cut: FakeCut) -> None:
        real(cut)
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(site.machine, "settle", settle)
        recorded = site.cut()
    assert "full" in caplog.text
    assert site.work.state.pending == [recorded.transfer]
    site.replicate(served)
    assert site.equals(served)


def test_too_many_cuts_that_wait_are_refused(site: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PENDING_MAX", 2)
    for _ in range(2):
        site.write(4096)
        site.cut()
    site.write(4096)
    with pytest.raises(StateError, match="too many"):
        site.cut()
    assert len(site.machine.cuts) == 2


def test_cuts_that_become_one_cannot_go_their_way_meanwhile(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.replicate(served)
    real = site.machine.mark

    def ship_if_free() -> None:
        """Do what the thread of the cycles does once a cut that waits was shipped."""
        if not site.work.lock.acquire(blocking=False):
            return
        while (transfer := site.work.next_transfer()) is not None:
            site.work.forget_logs(transfer)
            site.work.state.transfer = None
        site.work.lock.release()

    def mark(index: int, extents: Any) -> None:
        real(index, extents)
        thread = threading.Thread(target=ship_if_free)
        thread.start()
        thread.join()

    for _ in range(3):
        site.write(4096)
        site.cut()
    monkeypatch.setattr(site.machine, "mark", mark)
    monkeypatch.setattr(site.machine, "budget_bytes", 1)
    site.cut()
    assert len(site.work.state.pending) == 1
    assert "whole disk" not in caplog.text
    monkeypatch.undo()
    site.replicate(served)
    assert site.equals(served)


def test_waiting_cut_whose_log_is_damaged_does_not_stop_later_ones(
    site: LiveSite, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    site.replicate(served)
    for _ in range(2):
        site.write(4096)
        site.cut()
    path = site.folder.log_path(site.work.state.pending[0].logs[0].log_id)
    with contextlib.closing(site.files.open(path, writable=True)) as file:
        file.write(bytes(512), 0)
    site.machine.budget_bytes = 1
    site.cut()
    assert "looks at the whole disk 0" in caplog.text
    site.machine.budget_bytes = 1 << 50
    site.replicate(served)
    assert site.equals(served)


@pytest.mark.parametrize("damage", ["missing", "entries", "data"])
def test_damaged_log_on_its_way_is_dropped_and_what_it_held_is_sent(
    site: LiveSite, served: Served, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    site.replicate(served)
    for _ in range(3):
        site.write(8 * 4096)
        site.cut()
    log = site.work.state.pending[0].logs[0]
    path = site.folder.log_path(log.log_id)
    if damage == "missing":
        site.files.unlink(path)
    else:
        with contextlib.closing(site.files.open(path, writable=True)) as file:
            file.write(b"\xa5" * 16, 8192 + 100 if damage == "data" else log.log_bytes - 4096 + 40)
    tally = site.replicate(served)
    assert path.name in caplog.text
    assert len(tally.shipped) == 1, "one cut holds all that was dropped"
    assert sum(tally.changed_bytes) < 8 * MIB, "what the replica holds already is not sent"
    assert site.equals(served)
    assert site.files.names(STATE / "logs") == []
    site.write(4096)
    assert len(site.replicate(served).shipped) == 1
    assert site.equals(served)


def test_damage_that_the_replica_alone_finds_drops_nothing(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.replicate(served)
    site.write(4096)
    recorded = site.cut()

    def ship(*_: object) -> None:
        raise ChecksumMismatch("the replica refused: another checksum")

    with monkeypatch.context() as patch:
        patch.setattr(cycle, "ship", ship)
        with pytest.raises(ChecksumMismatch):
            site.replicate(served)
    assert site.work.state.transfer == recorded.transfer
    site.replicate(served)
    assert site.equals(served)


def test_acknowledged_log_that_cannot_be_read_asks_for_resync(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.replicate(served)
    site.write(4 * 4096)
    site.cut()
    real = cycle.settle
    path = site.folder.log_path(site.work.state.pending[0].logs[0].log_id)

    def settle(*arguments: Any) -> None:
        site.files.unlink(path)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cycle, "settle", settle)
        with pytest.raises(TrackingLost, match="the replica has this log") as caught:
            site.replicate(served)
    assert (caught.value.path, "--resync" in (caught.value.hint or "")) == (path, True)
    site.replicate(served, with_resync=True)
    assert site.equals(served)


@pytest.mark.parametrize("power", [True, False], ids=["power-cut", "killed"])
def test_drop_of_a_damaged_log_cut_anywhere_loses_nothing(served: Served, seed: int, *, power: bool) -> None:
    site = LiveSite(seed, disks_bytes=(6 * MIB,))
    site.replicate(served)
    event_count, killed, gone = 1, 0, True
    while gone:
        for _ in range(2):
            site.write(2 * 4096)
            site.cut()
        site.disks[0].flush()
        transfer = site.work.next_transfer()
        assert transfer is not None
        site.files.unlink(site.folder.log_path(transfer.logs[0].log_id))
        site.files.sync_directory(site.folder.logs)
        site.files.kill_at(len(site.files.trace().events) + event_count)
        try:
            live.drop_damaged(site.work)
            gone = False
        except Killed:
            killed += 1
        finally:
            site.files.heal()
        journal = site.machine.must_know()
        site.files = site.rng.choice(worlds_after(site.files.trace())) if power else site.files.after_kill()
        site.start()
        site.machine.recall(journal)
        site.replicate(served)
        assert site.equals(served), f"seed {seed}, killed after {event_count} events: {site.files.story}"
        event_count += 1
    site.stop()
    assert killed > 3


def test_server_that_was_away_gets_all_cuts_later(
    site: LiveSite, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primary, "RETRY_AFTER_S", ())
    site.replicate(served)
    served.close()
    for _ in range(2):
        site.write(4096)
        site.cut()
        with pytest.raises(Unreachable):
            site.replicate(served)
    served.start()
    site.write(4096)
    assert len(site.replicate(served).shipped) == 3
    assert site.equals(served)


def test_session_that_is_kept_serves_many_cycles(site: LiveSite, served: Served) -> None:
    driver = site.primary(served, keep_session=True)
    with contextlib.closing(driver):
        driver.run()
        generation = site.work.state.generation
        for _ in range(5):
            site.write(10 * 4096)
            driver.run()
            assert site.equals(served)
        assert site.work.state.generation == generation
        assert len(driver._session._channels) == 1  # type: ignore[union-attr]
        served.close()
        served.start()
        site.write(4096)
    site.replicate(served)
    assert site.equals(served)


def test_resync_looks_at_all_and_drops_what_waits(site: LiveSite, served: Served) -> None:
    site.replicate(served)
    site.write(10 * 4096)
    site.cut()
    site.files.unlink(STATE / "logs" / site.files.names(STATE / "logs")[0])
    site.write(10 * 4096)
    tally = site.replicate(served, with_resync=True)
    assert len(tally.shipped) == 1
    # Of what the log has a write of, the whole grain of 64 KiB is sent.
    assert sum(tally.changed_bytes) <= 10 * (64 << 10) + 30 * 4096, "the log, and what the comparison finds"
    assert site.equals(served)


@pytest.mark.parametrize("number", [2, 3, 5, 6, 7, 8])
def test_resync_whose_line_breaks_at_any_answer_ends_as_one_that_was_not(
    served: Served, seed: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(primary, "RETRY_AFTER_S", (0.0,))
    site = LiveSite(seed, disks_bytes=(6 * MIB, MIB + 512))
    site.replicate(served)
    site.write(4096)
    site.cut()
    site.files.unlink(STATE / "logs" / site.files.names(STATE / "logs")[0])
    site.write(4096)
    real, answers = ReplicaSession._expect, []

    def expect(session: ReplicaSession, channel: Any, kind: Any) -> Any:
        answers.append(kind)
        if len(answers) == number:
            channel.abort()
        return real(session, channel, kind)

    monkeypatch.setattr(ReplicaSession, "_expect", expect)
    tally = site.replicate(served, with_resync=True)
    assert len(answers) > number
    assert len(tally.shipped) == 1
    assert sum(tally.changed_bytes) <= (64 << 10) + 3 * 4096
    assert site.equals(served)
    site.stop()


def test_state_without_cuts_that_wait_is_read(site: LiveSite) -> None:
    """Version 1 of state.json, as it was written before live tracking."""
    site.stop()
    path = STATE / "state.json"
    file = site.files.open(path, writable=True)
    text = file.read(0, file.size()).decode()
    for name in ("pending", "mixed", "paused"):
        assert f'"{name}"' in text
    old = (
        f'{{"version": 1, "vm": "{VM}", "relationship_id": "{site.work.state.relationship_id}", "generation": 3,'
        ' "phase": "ready", "disks": [{"path": "/a", "virtual_bytes": 512, "logical_sector_bytes": 512,'
        ' "physical_sector_bytes": 512, "block_bytes": 0}], "transfer": {"kind": "logs", "stage": "cutting",'
        f' "transfer_id": "{site.work.state.relationship_id}", "point_id": "{site.work.state.relationship_id}",'
        ' "instant_s": 5.0, "positions": []}}'
    )
    file.resize(0)
    file.write(old.encode(), 0)
    file.sync()
    file.close()
    site.start()
    state = site.work.state
    assert (state.version, state.generation, state.pending, state.paused) == (VERSION, 3, [], False)
    assert state.transfer is not None
    assert state.transfer.stage == "cutting"


@pytest.mark.parametrize("power", [True, False], ids=["power-cut", "killed"])
def test_cycle_cut_anywhere_continues_and_loses_nothing(served: Served, seed: int, *, power: bool) -> None:
    """Killed at any file event of cut, ship and settle; tracking comes back with all that it must still know."""
    site = LiveSite(seed, disks_bytes=(6 * MIB,))
    site.replicate(served)
    event_count, killed = 1, 0
    while True:
        site.write(site.rng.randrange(1, 6) * 4096)
        if site.rng.random() < 0.5:
            site.cut()
            site.write(4096)
        site.disks[0].flush()
        site.files.kill_at(event_count)
        try:
            site.replicate(served)
            break
        except Killed:
            killed += 1
        finally:
            site.files.heal()
        journal = site.machine.must_know()
        site.files = site.rng.choice(worlds_after(site.files.trace())) if power else site.files.after_kill()
        site.start()
        site.machine.recall(journal)
        where = f"seed {seed}, killed after {event_count} events: {site.files.story}"
        site.replicate(served)
        assert site.equals(served), where
        assert site.replicate(served).kind == "none", where
        event_count += site.rng.randrange(1, 6)
    site.stop()
    assert killed > 10, "a cycle has more file events than that"


def served_points(served: Served) -> list[str]:
    return [point.id for point in hvreplica.point_list(served.store, VM)]


def full(*_: object) -> None:
    raise OSError(28, "full")
