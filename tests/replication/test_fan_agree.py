"""What a cut leaves out because all replicas hold it already: never what one of them does not."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.capture.machine import Machine
from hvreplica.replication.fan import Fan
from hvreplica.tracking.fingerprints import FingerprintTable
from tests.replication.captured import MIB, SIZES, VM

if TYPE_CHECKING:
    from tests.replication.fan_site import Fanned


def test_what_all_replicas_hold_alike_is_left_out_of_what_a_restart_looks_at(
    site: Fanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so it is where one of them is compared anew, or has cuts that wait."""
    monkeypatch.setattr(Machine, "close", Machine.abandon)
    with site.both(), site.guest() as guest:
        site.write(guest, 30)
        site.replicate()
        site.to_east()
        site.write(guest, 10)
        site.replicate()
        assert site.queues() == (0, 1)
    with site.running():
        assert hvreplica.status(site.state).disks[0].tracking.unlogged_bytes > 4 * MIB  # type: ignore[union-attr]
        assert site.replicate().disks[0].changed_bytes <= 10 * 4096, "those of the cut that waits"
        hvreplica.replicate(VM, state=site.east_state, resync=True, **site.east_link)
        assert site.east_equal()
        assert site.replicate().disks[0].changed_bytes <= 10 * 4096, "those that the other one missed"
        assert site.equal()


def test_block_that_is_written_back_while_a_cut_waits_is_not_left_out(site: Fanned) -> None:
    """The tables say what it holds, and all agree; but the cut that waits says otherwise."""
    with site.running(replicas=[site.replica()], log_budget_bytes=0), site.guest() as guest:
        before = site.rng.randbytes(4096)
        guest.write(0, before)
        site.models[0][:4096] = before
        site.replicate()
        site.to_east()
        site.replicate()
        guest.write(0, bytes(range(256)) * 16)
        hvreplica.cut(site.state)
        guest.write(0, before)
        for at in range(MIB, 6 * MIB, MIB // 16):
            guest.write(at, bytes(512))
        hvreplica.cut(site.state)
        assert site.queues() == (2, 2)
        site.replicate()
        assert site.equal()
        site.to_east()
        assert site.east_equal()


@pytest.mark.parametrize("moment", ["between", "after"])
def test_block_that_is_written_back_while_a_cut_gets_on_its_way_is_not_left_out(
    site: Fanned, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The threads of the replicas' cycles take cuts out of their queues while another cut looks at these."""

    def sending(function: Any, *, sends_after: bool = False) -> Any:
        def called(fan: Fan, *values: Any) -> Any:
            result = function(fan, *values) if sends_after else None
            for target in fan.targets:
                target.work.next_transfer()
            sent.append(len(fan.targets))
            return result if sends_after else function(fan, *values)

        return called

    sent: list[int] = []
    with site.running(replicas=[site.replica()], log_budget_bytes=0), site.guest() as guest:
        before = site.rng.randbytes(4096)
        guest.write(0, before)
        site.models[0][:4096] = before
        site.replicate()
        site.to_east()
        site.replicate()
        guest.write(0, bytes(range(256)) * 16)
        hvreplica.cut(site.state)
        guest.write(0, before)
        for at in range(MIB, 6 * MIB, MIB // 16):
            guest.write(at, bytes(512))
        name = "_agreed" if moment == "between" else "_known"
        with monkeypatch.context() as patch:
            patch.setattr(Fan, name, sending(getattr(Fan, name), sends_after=moment == "after"))
            hvreplica.cut(site.state)
        assert sent
        site.replicate()
        assert site.equal()
        site.to_east()
        assert site.east_equal()


def test_cut_that_gets_on_its_way_is_never_out_of_sight(site: Fanned) -> None:
    """Not even between its place in the queue and that of what is on its way."""

    class Watched(list[Any]):
        def pop(self, at: Any = -1) -> Any:
            first = super().pop(at)
            look.start()
            look.join(0.1)  # it waits for this very step, or sees too little
            return first

    with site.running() as capture, site.guest() as guest:
        work = capture._replicas._main
        site.replicate()
        site.replicate()
        site.write(guest, 1)
        hvreplica.cut(site.state)
        found: list[object] = []
        look = threading.Thread(
            target=lambda: found.extend([work.known_tables(), work.previous_log_ids()[0]])
        )
        work.state.pending = Watched(work.state.pending)
        transfer = work.next_transfer()
        look.join()
        assert transfer is not None
        assert found == [None, transfer.logs[0].log_id]


def test_what_a_shorter_disk_of_a_cut_that_waits_takes_away_is_not_left_out(site: Fanned) -> None:
    tail = site.rng.randbytes(4096)
    path, (_, whole) = site.disks[1], SIZES
    at = whole - whole % 4096 - 4096
    with site.both(), site.guest(1) as guest:
        site.write(guest, 5, index=1)
        guest.write(at, tail)
        site.models[1][at : at + 4096] = tail
        site.replicate()
        site.to_east()
        site.replicate()
    os.truncate(path, MIB)
    with site.running():
        hvreplica.cut(site.state)
        assert site.queues() == (1, 1)
    os.truncate(path, whole)
    site.models[1][MIB:] = bytes(whole - MIB)
    with site.running(log_budget_bytes=0), site.guest(1) as guest:
        guest.write(at, tail)
        site.models[1][at : at + 4096] = tail
        hvreplica.cut(site.state)
        site.replicate()
        site.to_east()
        assert site.equal()
        assert site.east_equal()


def test_table_becomes_no_shorter_while_a_cut_may_read_it(
    site: Fanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.both(), site.guest(1) as guest:
        site.replicate()
        site.to_east()
        site.write(guest, 1, index=1)
        hvreplica.cut(site.state)
    os.truncate(site.disks[1], SIZES[1] + MIB)
    site.models[1] += bytes(MIB)
    real = FingerprintTable.resize
    free: list[bool] = []

    def try_cutting(cutting: Any) -> None:
        free.append(cutting.acquire(blocking=False))
        if free[-1]:
            cutting.release()

    with site.both() as capture:
        cutting = capture._replicas.works["east"].cutting

        def resize(table: FingerprintTable, virtual_bytes: int) -> None:
            thread = threading.Thread(target=try_cutting, args=(cutting,))
            thread.start()
            thread.join()
            real(table, virtual_bytes)

        monkeypatch.setattr(FingerprintTable, "resize", resize)
        site.replicate()
        site.to_east()
        assert site.equal()
        assert site.east_equal()
    assert free
    assert not any(free)
