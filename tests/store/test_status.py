"""Status tells what is so: phases, transfers, waiting logs, and nothing of a control character."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec
import pytest

from hvreplica.store import Store, StoreStatus, check
from tests.store.world import EVERY, MIB, NOTHING, Primary, guid, ram_folder, send_disks, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store.home import VmHome


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with Store.create_or_open(FaultFiles(root), root, clock=FakeClock(seed=9)) as opened:
        yield opened


def test_empty_store_has_no_vms(store: Store, root: Path) -> None:
    status = store.status()
    assert (status.root, status.vms) == (str(root), [])
    assert status.free_bytes > 0


def test_phases_follow_the_transfers(store: Store) -> None:
    primary = Primary(FakeClock(seed=1), [small_disk(0, 2), small_disk(1, 2)], policy=EVERY)
    primary.scribble(random.Random(1), 9)

    def seen() -> tuple[str, int | None, list[str], int]:
        vm = store.status().vms[0]
        done = None if vm.transfer is None else vm.transfer.durable_bytes
        return vm.phase, done, [point.state for point in vm.points], vm.spool_bytes

    replica = primary.claim(store)
    assert seen() == ("empty", None, [], 0)
    sink = primary.begin_initial(replica)
    assert seen() == ("initial", 0, [], 0)
    sink.write(0, 0, MIB, *NOTHING)
    sink.flush()
    assert seen() == ("initial", MIB, [], 0)
    transfer = store.status().vms[0].transfer
    assert transfer is not None
    assert (transfer.id, transfer.kind, transfer.total_bytes) == (str(guid(100)), "initial", 4 * MIB)
    again = primary.begin_initial(primary.claim(store))
    send_disks(again, {0: bytes(2 * MIB), 1: bytes(2 * MIB)})
    again.commit()
    assert seen() == ("ready", None, ["complete"], 0)
    primary.last_point = guid(100)
    replica = primary.claim(store)
    cycle = primary.cut()
    primary.begin_logs(replica, cycle)
    assert seen() == ("ready", 0, ["complete"], 0)
    primary.ship(replica, cycle)
    assert seen() == ("ready", None, ["complete", "spooled"], sum(log.log_bytes for log in cycle.logs))
    replica.apply()
    assert seen() == ("ready", None, ["complete", "complete"], 0)


def test_status_is_json_and_back(store: Store) -> None:
    Primary(FakeClock(seed=1), [small_disk()]).replicate(store)
    status = store.status()
    assert msgspec.json.decode(msgspec.json.encode(status), type=StoreStatus) == status


def test_status_beside_a_working_server_sees_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog is read, then the server applies and removes, then the files are looked at."""
    primary = Primary(FakeClock(seed=1), [small_disk(0, 2)])
    replica = primary.replicate(store)
    primary.scribble(random.Random(2), 9, 64)
    primary.ship(replica, primary.cut())
    read_catalog = check._records
    steps = iter([replica.apply])

    def then_the_server_goes_on(home: VmHome, *, logs: bool) -> object:
        records = read_catalog(home, logs=logs)
        for step in steps:
            step()
        return records

    monkeypatch.setattr(check, "_records", then_the_server_goes_on)
    assert store.status().vms[0].damage == []
