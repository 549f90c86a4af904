"""The process that captures: what it finds when it starts, what it ships, and that it ends in good order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.capture.machine import Machine
from hvreplica.clock import SYSTEM
from hvreplica.errors import Locked, StateError, Unreachable
from hvreplica.files import OS_FILES
from hvreplica.replication import capture_verb, cycle
from hvreplica.replication.capture_verb import Capture
from hvreplica.replication.state import StateFolder
from tests.replication.captured import MIB, SIZES, VM, Captured
from tests.support.threads import own_threads

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from hvreplica.replication.work import Work
    from tests.replication.sites import Served


@pytest.fixture
def site(tmp_path: Path, served: Served, rng: random.Random) -> Captured:
    return Captured(tmp_path, served, rng)


@pytest.mark.parametrize("budget", [None, 0], ids=["log", "no-log"])
def test_cycles_of_a_captured_vm_bring_the_replica_to_its_disks(site: Captured, budget: int | None) -> None:
    with site.running(log_budget_bytes=budget), site.guest() as first, site.guest(1) as second:
        site.write(first, 60)
        assert site.replicate().kind == "initial"
        for _ in range(3):
            site.write(first, 20)
            site.write(first, 2, piece_bytes=3 * 512, align=512)
            site.write(second, 10, index=1)
            result = site.replicate()
            assert (result.kind, len(result.logs)) == ("delta", 2)
            assert site.equal()
        assert site.replicate().kind == "none"


def test_cuts_that_wait_beyond_the_budget_become_one(site: Captured) -> None:
    with site.running(log_budget_bytes=256 << 10) as capture, site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        for _ in range(5):
            site.write(guest, 70)
            hvreplica.cut(site.state)
        waiting = hvreplica.status(site.state).pending
        assert 1 <= len(waiting) < 5, "five logs of 280 KiB are more than the budget of 512 KiB"
        held = {path.stem for path in (site.state / "logs").iterdir()}
        assert len(held) == len(waiting)
        assert capture.machine.budget_bytes == 512 << 10
        site.replicate()
        assert site.equal()
        points = hvreplica.point_list(site.served.store, VM)
        site.write(guest, 1)
        site.replicate()
        assert site.equal()
        assert hvreplica.point_list(site.served.store, VM) != points


def test_captured_vm_is_replicated_while_its_guest_writes(site: Captured) -> None:
    """The first copy reads the disks while they change; each cycle of the loop is one instant all the same."""
    stop = threading.Event()

    def write() -> None:
        with site.guest() as guest:
            while not stop.is_set():
                site.write(guest, 10)

    with site.running(**site.link, continuous=True):
        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(4):
            site.replicate()
            assert hvreplica.point_list(site.served.store, VM)
        stop.set()
        thread.join()
        site.replicate()
        assert site.equal()
        status = hvreplica.status(site.state)
        assert status.statistics.replication_failure_count == 0


def test_capture_of_a_vm_that_was_compared_ships_what_differs(site: Captured) -> None:
    site.write_offline(50)
    hvreplica.replicate(VM, site.disks, state=site.state, **site.link)
    site.write_offline(5)
    with site.running():
        result = site.replicate()
        assert (result.kind, result.disks[0].changed_bytes <= 5 * 4096) == ("delta", True)
        assert site.equal()


def test_capture_after_a_clean_stop_finds_what_was_not_shipped_and_what_others_wrote(site: Captured) -> None:
    with site.running(), site.guest() as guest:
        site.write(guest, 40)
        site.replicate()
        site.write(guest, 3)
    with site.running():
        result = site.replicate()
        assert 0 < result.disks[0].changed_bytes <= 6 * 4096
        assert site.equal()
        assert site.replicate().kind == "none"
    site.write_offline(4)
    with site.running():
        assert 0 < site.replicate().disks[0].changed_bytes <= 4 * 4096
        assert site.equal()


def test_capture_that_was_killed_before_anything_was_shipped_forgets_nothing(
    site: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cuts are what a program takes away by itself: they must hold every write since the first start."""
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "close", Machine.abandon)
        with site.running(), site.guest() as guest:
            site.write(guest, 10)
    with site.running():
        cut = hvreplica.cut(site.state)
        copy = site.folder / "copy.raw"
        copy.write_bytes(bytes(SIZES[0]))
        hvreplica.log_apply(cut.logs[0].path, copy)
        assert copy.read_bytes() == site.models[0]


@pytest.mark.parametrize("is_other", [False, True], ids=["gone", "written-over"])
def test_cut_whose_log_is_lost_is_dropped_and_everything_looked_at(
    site: Captured, caplog: pytest.LogCaptureFixture, *, is_other: bool
) -> None:
    with site.running(), site.guest() as guest:
        site.write(guest, 30)
        site.replicate()
        for _ in range(3):
            site.write(guest, 2)
            hvreplica.cut(site.state)
    folder = StateFolder(OS_FILES, site.state, clock=SYSTEM)
    state = folder.load()
    assert state is not None
    lost, other = (folder.log_path(transfer.logs[0].log_id) for transfer in state.pending[1:])
    if is_other:
        lost.write_bytes(other.read_bytes())
    else:
        lost.unlink()
    folder.release()
    with site.running():
        assert "is lost" in caplog.text
        assert len(hvreplica.status(site.state).pending) == 1
        result = site.replicate()
        assert len(result.logs) == 2
        assert result.disks[0].changed_bytes <= 12 * 4096
        assert site.equal()


def test_resync_of_disks_at_rest_compares_what_a_dropped_cut_held(site: Captured) -> None:
    with site.running(), site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.write(guest, 10)
        hvreplica.cut(site.state)
    assert hvreplica.replicate(VM, site.disks, state=site.state, resync=True, **site.link).kind == "delta"
    assert site.equal()
    with site.running():
        site.replicate()
        assert site.equal()


def test_resync_of_disks_at_rest_that_is_cut_short_leaves_all_to_be_looked_at(
    site: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has dropped a cut whose writes no journal knows: a capture that starts next must not rely on them."""
    with site.running(), site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.write(guest, 10)
        hvreplica.cut(site.state)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cycle, "cut", killed)
    with pytest.raises(KeyboardInterrupt):
        hvreplica.replicate(VM, site.disks, state=site.state, resync=True, **site.link)
    with site.running():
        site.replicate()
        assert site.equal()


def test_cut_that_meets_a_resync_loses_nothing(site: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the resync has marked must not be in a cut that the resync then drops."""
    real = Machine.mark
    cutters: list[threading.Thread] = []

    def cut_if_free(work: Work) -> None:
        if work.cutting.acquire(blocking=False):
            work.cutting.release()
            hvreplica.cut(site.state)

    def mark(machine: Machine, index: int, extents: Any) -> None:
        real(machine, index, extents)
        if index == 1 and not cutters:
            cutters.append(threading.Thread(target=cut_if_free, args=(capture._resident.runner.work,)))
            cutters[0].start()
            cutters[0].join()

    with site.running() as capture, site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.write(guest, 10)
        monkeypatch.setattr(Machine, "mark", mark)
        hvreplica.replicate(VM, state=site.state, resync=True, **site.link)
        assert cutters
        site.replicate()
        assert site.equal()


def test_cut_without_capture_is_refused_before_the_first_copy(site: Captured) -> None:
    with site.running(), site.guest() as guest:
        site.write(guest, 5)
        assert hvreplica.cut(site.state).logs
    with pytest.raises(StateError):
        hvreplica.cut(site.state)


def test_state_disks_and_socket_belong_to_one_process(site: Captured) -> None:
    with site.running():
        with pytest.raises(Locked):
            Capture(VM, site.disks, state=site.state, socket=site.folder / "other.sock")
        with pytest.raises(Locked):
            Capture(VM, site.disks, state=site.folder / "other", socket=site.folder / "other.sock")
        with pytest.raises(Locked):
            Capture(
                VM, [site.folder / "c.raw"], state=site.folder / "third", socket=site.folder / "nbd.sock"
            ) if hvreplica.disk_create(site.folder / "c.raw", MIB, format="raw") else None
        assert site.replicate().kind == "initial"
    assert not (site.folder / "nbd.sock").exists()
    assert not (site.state / "control.sock").exists()
    with site.running():
        assert site.replicate().kind in {"none", "delta"}


def test_capture_that_cannot_start_leaves_nothing_locked(site: Captured, served: Served) -> None:
    with pytest.raises(Unreachable):
        Capture(VM, site.disks, state=site.state, socket=site.folder / "nbd.sock", metrics=served.address)
    with pytest.raises(ValueError, match="Unix socket"):
        Capture(VM, site.disks, state=site.state)
    with site.running():
        assert site.replicate().kind == "initial"


def test_stop_with_clients_and_a_cycle_on_its_way_is_clean(site: Captured) -> None:
    with own_threads(at_most=12), site.running(**site.link, continuous=True), site.guest() as guest:
        site.write(guest, 200)
    with site.running():
        site.replicate()
        assert site.equal()


@pytest.mark.parametrize(
    "options",
    [
        {"to": "h:1"},
        {"interval_s": 5},
        {"continuous": True},
        {"to": "h:1", "tls": "absent", "compression": "x"},
    ],
)
def test_settings_that_do_not_fit_are_refused(site: Captured, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"to|compression"):
        Capture(VM, site.disks, state=site.state, socket=site.folder / "s", **options)
    assert not site.state.exists()


def test_interval_is_a_number_above_0() -> None:
    assert capture_verb.interval_of(None, continuous=False) == 300
    assert capture_verb.interval_of(0.5, continuous=False) == 0.5
    assert capture_verb.interval_of(None, continuous=True) is None
    for interval_s, continuous in ((0, False), (-1, False), (float("inf"), False), (30, True)):
        with pytest.raises(ValueError, match="interval"):
            capture_verb.interval_of(interval_s, continuous=continuous)
