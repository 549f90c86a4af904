"""One captured VM with several replicas: each cut is for all of them, and each goes at its own pace."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hvreplica
from hvreplica.capture.machine import Machine
from hvreplica.clock import SYSTEM
from hvreplica.errors import InvalidTransition, Locked, StateError
from hvreplica.files import OS_FILES, OsBlockFile, OsFiles
from hvreplica.replication import initial, repair
from hvreplica.replication.control import CutRequest
from hvreplica.replication.missed import RANGES_MAX, Missed
from hvreplica.replication.replicas import Replica
from hvreplica.replication.state import StateFolder
from hvreplica.replication.work import Work
from hvreplica.tracking.compare import ComparedDisk
from tests.replication.captured import MIB, VM
from tests.replication.fan_site import NEVER_S
from tests.replication.sites import Served

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from tests.replication.fan_site import Fanned

DEEP = os.environ.get("HVREPLICA_PROFILE") == "deep"


def test_each_replica_gets_every_change_at_its_own_pace(site: Fanned) -> None:
    with site.both(), site.guest() as guest, site.guest(1) as second:
        site.write(guest, 30)
        site.replicate()
        site.to_east()
        site.replicate()
        for _ in range(3):
            site.write(guest, 5)
            site.write(second, 3, index=1)
            site.replicate()
            assert site.equal()
        assert site.queues() == (0, 3), "each cut waits for the slower one"
        assert len(hvreplica.point_list(site.east.store, VM)) == 1
        site.to_east()
        assert site.east_equal()
        site.write(guest, 5)
        site.to_east()
        assert site.east_equal()
        assert site.queues() == (1, 0)
        site.replicate()
        assert site.equal()
    assert not list((site.state / "logs").iterdir())
    assert not list((site.east_state / "logs").iterdir())


def test_replica_that_is_added_later_begins_while_the_other_goes_on(site: Fanned) -> None:
    with site.running(), site.guest() as guest:
        site.write(guest, 20)
        site.replicate()
        site.write(guest, 5)
    with site.both(), site.guest() as guest:
        site.write(guest, 5)
        site.to_east()
        site.replicate()
        assert site.equal()
        site.to_east()
        assert site.east_equal()


def test_cuts_during_a_first_copy_are_missed_and_then_made_good(
    site: Fanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other replica cut meanwhile may be newer or older than what the copy has read."""
    real = initial._send
    with site.running(), site.guest() as guest:
        site.write(guest, 20)
        site.replicate()

    def send(work: Work, *arguments: Any) -> None:
        with site.guest() as guest:
            site.write(guest, 10)
            site.replicate()
            real(work, *arguments)
            site.write(guest, 10)
            site.replicate()
        assert site.equal()
        missed.append((site.east_state / "missed.json").read_text())

    missed: list[str] = []
    monkeypatch.setattr(initial, "_send", send)
    with site.both():
        site.to_east()
        assert site.east_equal()
        assert "[[" in missed[0]
        assert "[[" not in (site.east_state / "missed.json").read_text()


@pytest.mark.parametrize("added", [0, 1])
def test_what_a_first_copy_missed_is_not_forgotten_where_no_other_replica_is_left(
    site: Fanned, monkeypatch: pytest.MonkeyPatch, added: int
) -> None:
    """The copy goes on behind what it has read, and tracking forgot that with the other replica's cut."""
    real = Work.ship

    def ship(work: Work, session: Any, source: Any, transfer: Any, *, phase: str) -> bool:
        if phase == "ship":
            return real(work, session, source, transfer, phase=phase)

        def next_window() -> Any:
            window = following()
            source.is_whole = False  # what was sent is recorded, and not committed
            return window

        following, source.next_window = source.next_window, next_window
        real(work, session, source, transfer, phase=phase)
        assert min(transfer.positions) > 0
        raise StateError("cut off")

    if added:
        last = site.disks.pop()
        with site.both():
            site.replicate()
            site.to_east()
        site.disks.append(last)
    with site.both(), site.guest(added) as guest:
        site.write(guest, 20, index=added)
        site.to_east()
        with monkeypatch.context() as patch:
            patch.setattr(Work, "ship", ship)
            with pytest.raises(StateError, match="cut off"):
                site.replicate()
        site.write(guest, 10, index=added)
        site.to_east()
        assert f'"{added}":[[' in (site.state / "missed.json").read_text()
    with site.running(remove_replicas=["east"]):
        site.replicate()
        site.replicate()
        assert site.equal()
        assert "[[" not in (site.state / "missed.json").read_text()


def test_replica_that_is_down_for_long_holds_up_nobody_and_fills_no_disk(site: Fanned) -> None:
    with site.running(replicas=[site.replica()], log_budget_bytes=64 << 10), site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.to_east()
        site.east.close()
        for _ in range(6):
            site.write(guest, 10)
            site.replicate()
            assert site.equal()
            held = sum(path.stat().st_blocks * 512 for path in (site.east_state / "logs").iterdir())
            assert held <= 1 << 20
        assert '"disks":{"0":[[' in (site.east_state / "missed.json").read_text()
        waiting = hvreplica.status(site.east_state).statistics.pending_replication_size
        assert waiting >= 40 * 4096
        site.east.start()
        site.east_link["to"] = site.east.address
        result = site.to_east()
        assert site.east_equal()
        assert result.disks[0].changed_bytes <= 60 << 16, "in grains of 64 KiB, where little is to be read"
        site.write(guest, 1)
        site.replicate()
        assert site.equal()
        assert site.queues() == (0, 1), "it has each cut again"


def test_replica_whose_state_lies_on_another_file_system_has_logs_of_its_own(
    site: Fanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_one(function: Any) -> Any:
        def operation(source: Path, target: Path) -> None:
            if (site.east_state in source.parents) != (site.east_state in target.parents):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), os.fspath(source))
            function(source, target)

        return operation

    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, on_one(getattr(os, name)))
    with site.both(), site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.to_east()
        for first, last in ((site.replicate, site.to_east), (site.to_east, site.replicate)):
            site.write(guest, 5)
            first()
            assert sum(site.queues()) == 1, "the cut is for both"
            last()
            assert site.equal()
            assert site.east_equal()
        assert not list((site.state / "logs").iterdir())
        assert not list((site.east_state / "logs").iterdir())


class Died(BaseException):
    """The process is dead: nothing that it still does reaches a file."""


@contextlib.contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[int]]:
    """Let the `at`-th change of a file, and every later one, fail; yield the running count."""
    count = [0]

    def counted(function: Any) -> Any:
        def operation(*values: Any, **options: Any) -> Any:
            count[0] += 1
            if at and count[0] >= at:
                raise Died
            return function(*values, **options)

        return operation

    with monkeypatch.context() as patch:
        for kind, names in (
            (OsFiles, ("open", "replace", "link", "unlink", "sync_directory")),
            (OsBlockFile, ("write", "sync", "resize", "zero")),
        ):
            for name in names:
                patch.setattr(kind, name, counted(getattr(kind, name)))
        yield count


@pytest.mark.parametrize("state", ["queue", "missed"])
def test_killed_anywhere_in_a_cut_no_replica_forgets_a_change(
    site: Fanned, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Without cycles of its own, so that nothing runs on after the simulated death."""
    monkeypatch.setattr(Machine, "close", Machine.abandon)
    options = {"log_budget_bytes": 64 << 10} if state == "missed" else {}

    def check() -> None:
        with site.running():
            site.replicate()
            site.to_east()
            assert site.equal(), f"killed at {at}"
            assert site.east_equal(), f"killed at {at}"

    with site.both(), site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.to_east()
    at, count = 0, 1
    while at <= count:
        with site.running(**options) as capture, site.guest() as guest:
            site.write(guest, 20)
            hvreplica.cut(site.state)
            site.write(guest, 4)
            with dying(monkeypatch, at) as reached, contextlib.suppress(Died):
                capture._resident.control.cut(CutRequest(), lambda _: None)
        count = count if at else reached[0]
        at += 1 if DEEP else site.rng.randrange(1, count // 2)
        if DEEP:
            check()
    check()


def test_status_pause_and_resume_are_of_one_replica_each(site: Fanned) -> None:
    with site.both(), site.guest() as guest:
        site.write(guest, 5)
        site.replicate()
        site.to_east()
        assert hvreplica.pause(site.east_state).paused
        site.write(guest, 5)
        assert site.replicate().kind == "delta"
        with pytest.raises(InvalidTransition, match="paused"):
            site.to_east()
        found = hvreplica.status(site.state)
        assert not found.paused
        assert [(each.name, each.status.paused) for each in found.replicas] == [("east", True)]
        cycles = found.replicas[0].status.cycles
        assert cycles is not None
        assert (cycles.to, cycles.interval_s) == (site.east.address, NEVER_S)
        hvreplica.resume(site.east_state)
        site.to_east()
        assert site.east_equal()
    rest = hvreplica.status(site.state)
    assert [(each.name, each.status.running) for each in rest.replicas] == [("east", None)]
    assert rest.replicas[0].status.disks[0].journal is not None


def test_replica_that_is_not_named_is_fed_on_until_it_is_removed(site: Fanned) -> None:
    with site.both(), site.guest() as guest:
        site.write(guest, 5)
        site.replicate()
        site.to_east()
    with site.running(), site.guest() as guest:
        site.write(guest, 5)
        site.replicate()
        assert site.queues() == (0, 1)
        assert hvreplica.replicate(VM, state=site.east_state, **site.east_link).kind == "delta"
        assert site.east_equal()
    with site.running(remove_replicas=["east"]):
        site.replicate()
        assert hvreplica.status(site.state).replicas == []
    assert not list((site.east_state / "logs").iterdir())
    with pytest.raises(StateError, match="no such replica"), site.running(remove_replicas=["east"]):
        pass


def test_replica_whose_folder_is_at_work_is_not_removed(site: Fanned) -> None:
    with site.both():
        site.to_east()
    folder = StateFolder(OS_FILES, site.east_state, clock=SYSTEM)
    try:
        with pytest.raises(Locked), site.running(remove_replicas=["east"]):
            pass
        assert (site.east_state / "fingerprints" / "0.fp").exists()
        assert (site.east_state / "state.json").exists()
    finally:
        folder.release()
    with site.running(remove_replicas=["east"]):
        pass
    assert not (site.east_state / "state.json").exists()


def test_repair_of_one_replica_holds_up_no_cut_and_loses_nothing_of_it(
    site: Fanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block can go back, one has changed before, one changes and is cut in the middle."""

    def fetch(*values: Any) -> Any:
        if not cutter.is_alive() and not cut:
            cutter.start()
            cutter.join(20)  # where the repair held it up, it would wait for this call
            cut.append(not cutter.is_alive())
        return real(*values)

    def cut_between() -> None:
        with site.guest() as guest:
            for at in (MIB, 2 * MIB):
                guest.write(at, b"n" * 4096)
                site.models[0][at : at + 4096] = b"n" * 4096
            hvreplica.cut(site.state)
            guest.write(2 * MIB, b"o" * 4096)
            site.models[0][2 * MIB : 2 * MIB + 4096] = b"o" * 4096

    cut: list[bool] = []
    real = repair.fetch_fingerprints
    cutter = threading.Thread(target=cut_between)
    with site.running(), site.guest() as guest:
        for at in (0, MIB, 2 * MIB):
            data = site.rng.randbytes(4096)
            guest.write(at, data)
            site.models[0][at : at + 4096] = data
        site.replicate()
    with site.running(replicas=[site.replica()]):
        site.to_east()
        site.to_east()
        for at in (0, MIB, 2 * MIB):
            site.east.damage(at)
        hvreplica.store_verify(site.east.store)
        monkeypatch.setattr(repair, "fetch_fingerprints", fetch)
        site.to_east()
        assert cut == [True]
        site.to_east()
        assert site.east_equal()
        hvreplica.store_verify(site.east.store)
        site.to_east()
        assert not hvreplica.store_verify(site.east.store).vms[0].is_damaged
        assert site.east_equal()
        site.replicate()
        assert site.equal()


def test_vm_that_is_prepared_for_one_replica_is_not_for_another_nor_starts(site: Fanned) -> None:
    with site.both():
        with site.guest() as guest:
            site.write(guest, 5)
        site.replicate()
        hvreplica.replicate(VM, state=site.east_state, prepare=True, **site.east_link)
        for _ in range(2):
            with pytest.raises(InvalidTransition, match="another of its replicas"):
                hvreplica.replicate(VM, state=site.state, prepare=True, **site.link)
            with pytest.raises(InvalidTransition, match="another of its replicas"):
                hvreplica.cancel_prepare(site.state)
            with contextlib.suppress(OSError, AssertionError), site.guest() as guest:
                guest.read(0, 512)
                pytest.fail("the VM may start")
        hvreplica.cancel_prepare(site.east_state, **site.east_link)
        with site.guest() as guest:
            site.write(guest, 2)
        site.replicate()
        site.to_east()
        assert site.equal()
        assert site.east_equal()


def old_primary_comes_back(site: Fanned, promoted: Served, state: Path) -> hvreplica.AdoptReport:
    """Promote a replica, and make one of the old primary's disks; what it had missed differs there."""
    expected = [promoted.content(VM, index) for index in range(2)]
    hvreplica.failover_unplanned(promoted.store, VM)
    report = hvreplica.store_adopt(site.folder / "old", VM, state=state)
    with contextlib.closing(Served(site.folder / "old", promoted.tls)) as old:
        hvreplica.failover_reverse(promoted.store, VM, to=old.address, tls=old.tls)
        is_equal = [old.content(VM, index) for index in range(2)] == expected
    assert is_equal
    return report


@pytest.mark.parametrize("cut_off_bytes", [0, 9])
def test_way_back_takes_what_the_promoted_replica_had_missed(site: Fanned, cut_off_bytes: int) -> None:
    """Cuts that the other replica made took it out of the journal. A damaged record says that it is all."""
    missed = site.state / "missed.json"
    with site.running(replicas=[site.replica()], log_budget_bytes=64 << 10), site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.to_east()
        site.served.close()
        for _ in range(2):
            site.write(guest, 20)
            site.to_east()
        assert "[[" in missed.read_text()
    os.truncate(missed, missed.stat().st_size - cut_off_bytes)
    site.served.start()
    report = old_primary_comes_back(site, site.served, site.state)
    assert 0 < report.changed_bytes <= 40 * 4096


@pytest.mark.parametrize("is_known", [True, False])
def test_way_back_from_a_further_replica_reads_what_the_journal_names(
    site: Fanned, monkeypatch: pytest.MonkeyPatch, *, is_known: bool
) -> None:
    """It is in the folder above. Where nothing says what the replica missed, whole disks are read."""
    missed = site.east_state / "missed.json"
    read: list[bool] = []
    real = ComparedDisk.changes_into

    def changes_into(disk: ComparedDisk, *arguments: Any, **options: Any) -> int:
        within = disk._within
        read.append(within is None or int(within[:, 1].sum()) == disk._disk.virtual_bytes)
        return real(disk, *arguments, **options)

    with site.running(replicas=[site.replica()], log_budget_bytes=64 << 10), site.guest() as guest:
        site.write(guest, 10)
        site.replicate()
        site.to_east()
        site.replicate()
        for _ in range(3):
            site.write(guest, 20)
            site.replicate()
        assert "[[" in missed.read_text()
        site.write(guest, 1)
    if not is_known:
        missed.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ComparedDisk, "changes_into", changes_into)
        old_primary_comes_back(site, site.east, site.east_state)
    assert any(read) != is_known


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "a" * 65, "-a", "a\n"])
def test_name_of_a_replica_is_no_path(site: Fanned, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        hvreplica.Capture(
            VM, site.disks, state=site.state, socket=site.folder / "s", replicas=[Replica(name, "h:1", "tls")]
        )
    assert not site.state.exists()


def test_what_is_missed_becomes_coarser_and_never_less(tmp_path: Path, rng: random.Random) -> None:
    missed = Missed(OS_FILES, tmp_path, clock=SYSTEM)
    missed.load({0: 1 << 40}, unless_there=False)
    starts = np.array([rng.randrange(1 << 27) * 8192 for _ in range(3 * RANGES_MAX)], np.int64)
    rows = np.column_stack((starts, np.full(len(starts), 4096)))
    missed.add({0: rows})
    again = Missed(OS_FILES, tmp_path, clock=SYSTEM)
    again.load({0: 1 << 40}, unless_there=True)
    noted = again.of([0])[0]
    assert len(noted) <= RANGES_MAX
    at = np.searchsorted(noted[:, 0], starts, "right") - 1
    assert (noted[at, 0] + noted[at, 1] >= starts + 4096).all()
    (tmp_path / "missed.json").write_text('{"version":1,"disks":{"0":[[5')
    again.load({0: 1 << 40}, unless_there=False)
    assert again.of([0])[0].tolist() == [[0, 1 << 40]]
