"""A planned failover at the primary: the last cut is shipped, and the VM is held until that is taken back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.errors import InvalidTransition, Unreachable
from hvreplica.files import OS_FILES
from hvreplica.replication.capture_verb import Capture
from hvreplica.replication.state import load_state
from tests.replication.captured import VM, Captured

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.replication.sites import Served


@pytest.fixture
def site(tmp_path: Path, served: Served, rng: random.Random) -> Captured:
    return Captured(tmp_path, served, rng)


def prepare(site: Captured, **options: object) -> hvreplica.ReplicateResult:
    return hvreplica.replicate(VM, site.disks, state=site.state, prepare=True, **site.link, **options)


def kind_of_stop(site: Captured) -> str | None:
    state = load_state(OS_FILES, site.state)
    assert state is not None
    return None if state.stopped is None else state.stopped.kind


def test_prepare_ships_what_is_left_and_holds_the_vm_until_it_is_cancelled(site: Captured) -> None:
    site.write_offline(20)
    hvreplica.replicate(VM, site.disks, state=site.state, **site.link)
    site.write_offline(20)

    result = prepare(site)

    assert result.prepared
    assert result.kind == "delta"
    assert site.equal()
    assert hvreplica.status(site.state).replication_state == "PreparedForFailover"
    for start in (
        site.replicate,
        lambda: Capture(VM, site.disks, state=site.state, socket=site.folder / "nbd.sock"),
        lambda: hvreplica.cut(site.state),
    ):
        with pytest.raises(InvalidTransition, match="prepared for a planned failover"):
            start()
    assert prepare(site).point == result.point, "preparing again changes nothing"

    found = hvreplica.cancel_prepare(site.state, **site.link)

    assert found.replication_state == "Replicating"
    site.write_offline(20)
    site.replicate()
    assert site.equal()


def test_prepare_that_cannot_reach_the_replica_holds_the_vm_and_is_cancelled_without_it(
    site: Captured, served: Served
) -> None:
    site.write_offline(20)
    hvreplica.replicate(VM, site.disks, state=site.state, **site.link)
    served.close()

    with pytest.raises(Unreachable):
        prepare(site)

    assert kind_of_stop(site) == "prepared"
    assert hvreplica.cancel_prepare(site.state).replication_state == "Replicating"
    assert hvreplica.cancel_prepare(site.state).replication_state == "Replicating", "nothing is left to do"


def test_prepared_vm_whose_replica_is_gone_goes_on_by_force_alone(site: Captured, served: Served) -> None:
    site.write_offline(20)
    prepare(site)
    served.close()

    with pytest.raises(Unreachable):
        hvreplica.cancel_prepare(site.state, **site.link)
    assert kind_of_stop(site) == "prepared"
    assert hvreplica.cancel_prepare(site.state, force=True).replication_state == "Replicating"


def test_prepare_of_a_captured_vm_needs_its_clients_gone(site: Captured) -> None:
    with site.running():
        with site.guest() as guest:
            site.write(guest, 30)
            with pytest.raises(InvalidTransition, match="1 clients use its disks"):
                prepare(site)
            site.write(guest, 30)  # it was refused, and nothing is held

        left = threading.Event()
        while not left.is_set():  # the server takes note of a client's end a moment later
            try:
                result = prepare(site)
            except InvalidTransition:
                continue
            left.set()
        assert result.prepared
        assert site.equal()
        with pytest.raises((AssertionError, OSError)), site.guest() as guest:
            guest.read(0, 512)
        with pytest.raises(InvalidTransition):
            site.replicate()

        hvreplica.cancel_prepare(site.state, **site.link)
        with site.guest() as guest:
            site.write(guest, 30)
        site.replicate()
    assert site.equal()


def test_prepare_by_force_cuts_clients_off_and_has_all_that_they_flushed(site: Captured) -> None:
    with site.running(), site.guest() as guest:
        site.write(guest, 30)
        prepare(site, force=True)
        with pytest.raises((AssertionError, OSError)):
            guest.write(0, bytes(4096))
        assert site.equal()
