"""The catalog keeps what was committed, whole, and refuses databases that it does not understand."""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import BadSignature, Locked, StoreError, StoreFull, UnsupportedVersion
from hvreplica.files import OS_FILES
from hvreplica.store import database as module
from hvreplica.store.catalog import Catalog
from hvreplica.store.records import (
    NIL,
    DiskRow,
    KeptLogRow,
    LogSpec,
    Owner,
    PointRow,
    TransferRow,
    UndoRow,
)
from hvreplica.store.schema import APPLICATION_ID, SCHEMA_VERSION
from tests.store.world import guid, ram_folder, small_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OWNER = Owner(guid(1), 3, "sha256:aa")


@pytest.fixture
def folder() -> Iterator[Path]:
    with ram_folder() as name:
        yield name


@pytest.fixture
def catalog(folder: Path) -> Iterator[Catalog]:
    opened = Catalog(OS_FILES, folder / "catalog.db", create=True)
    yield opened
    opened.close()


def add_vm(catalog: Catalog, name: str = "web01") -> int:
    with catalog.transaction():
        vm_id = catalog.insert_vm(name, name, name, OWNER, 10.0)
        catalog.set_owner(vm_id, OWNER, 10.0)
        catalog.insert_disk(vm_id, small_disk(1))
        catalog.insert_disk(vm_id, small_disk(0))
    return vm_id


def insert_points(catalog: Catalog, vm_id: int, *numbers: int, then: type[Exception] | None = None) -> None:
    with catalog.transaction():
        for number in numbers:
            catalog.insert_point(vm_id, point(number))
        if then is not None:
            raise then


def point(number: int, state: str = "spooled") -> PointRow:
    return PointRow(guid(number), 0, 5.5, "standard", "crash", state, guid(number - 1), 77, 20.0, None)


def transfer(number: int = 7, point_number: int = 70) -> TransferRow:
    logs = (LogSpec(0, guid(701), NIL, 8192), LogSpec(1, guid(702), guid(9), 9216))
    ids = (guid(number), "logs", "receiving", guid(point_number), guid(69))
    return TransferRow(*ids, 5.5, 30.0, {0: 4096}, {0: 4 << 20, 1: 8 << 20}, logs)


def test_durability_settings_are_the_strict_ones(catalog: Catalog) -> None:
    settings = {
        name: catalog._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "user_version", "application_id")
    }
    assert settings == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "user_version": SCHEMA_VERSION,
        "application_id": APPLICATION_ID,
    }


def test_rows_come_back_as_they_were_written(catalog: Catalog, folder: Path) -> None:
    vm_id = add_vm(catalog)
    spec = dataclasses.replace(small_disk(0), virtual_bytes=6 << 20, virtual_disk_id=guid(8))
    state = DiskRow(spec, 1 << 20, guid(5), guid(6), guid(100))
    with catalog.transaction():
        catalog.set_disk_state(vm_id, state)
        catalog.name_disk(vm_id, 0, spec.label, guid(8))
        catalog.name_disk(vm_id, 0, spec.label, None)
        catalog.name_disk(vm_id, 1, "data.vhdx", None)
        catalog.remove_disk(vm_id, 1, 77.0)
        catalog.insert_transfer(vm_id, transfer())
        catalog.set_position(vm_id, "logs", 0, 8192)
        catalog.insert_point(vm_id, point(50, "complete"))
    catalog.close()
    again = Catalog(OS_FILES, folder / "catalog.db", create=False)
    row = again.vm("web01")
    assert row is not None
    assert (row.name, row.folder, row.owner, row.claimed_s) == ("web01", "web01", OWNER, 10.0)
    assert again.vm("web02") is None
    assert again.vms() == [row]
    assert [disk.spec.index for disk in again.disks(vm_id)] == [0, 1]
    assert again.disks(vm_id)[0] == state
    assert again.disks(vm_id)[1].spec.label == "data.vhdx"
    assert again.disks(vm_id)[1].last_log_id == NIL
    assert again.disks(vm_id)[1].removed_s == 77.0
    assert again.transfer(vm_id, "initial", "join") is None
    found = again.transfer(vm_id, "initial", "logs")
    assert found is not None
    assert found.positions == {0: 8192}
    assert (found.logs, found.disks) == (transfer().logs, transfer().disks)
    assert (found.id, found.kind, found.state, found.previous_point_id) == (
        guid(7),
        "logs",
        "receiving",
        guid(69),
    )
    assert [(item.id, item.sequence, item.state) for item in again.points(vm_id)] == [
        (guid(50), 1, "complete")
    ]
    assert again.owners(vm_id) == [(OWNER, 10.0)]
    again.close()


def test_failed_transaction_leaves_nothing(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    with pytest.raises(KeyError):
        insert_points(catalog, vm_id, 1, then=KeyError)
    with pytest.raises(StoreError):
        insert_points(catalog, vm_id, 1, 1)
    assert catalog.points(vm_id) == []


def test_changes_outside_of_a_transaction_are_refused(catalog: Catalog) -> None:
    with pytest.raises(AssertionError):
        catalog.set_transfer_state(1, "initial", "renaming")
    with pytest.raises(AssertionError), catalog.transaction(), catalog.transaction():
        pass


def test_unknown_states_are_refused_by_the_tables(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    with pytest.raises(StoreError), catalog.transaction():
        catalog.insert_point(vm_id, point(1, "perhaps"))
    with pytest.raises(StoreError), catalog.transaction():
        catalog.insert_transfer(99, transfer())


def test_transfer_leaves_its_logs_only_where_a_point_takes_them(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    for keep in (False, True):
        with catalog.transaction():
            catalog.insert_transfer(vm_id, transfer())
        with catalog.transaction():
            catalog.end_transfer(vm_id, "logs") if keep else catalog.delete_transfers(vm_id, "logs")
        assert catalog.transfers(vm_id) == []
        assert catalog.log_ids(vm_id) == ({guid(701), guid(702)} if keep else set())
        assert catalog.members(vm_id, guid(70)) == (transfer().disks if keep else {})
    with catalog.transaction():
        catalog.delete_logs(vm_id, guid(70))
    assert catalog.log_ids(vm_id) == set()


def test_superseded_points_are_remembered_with_their_disks_until_pruned(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    with catalog.transaction():
        for number in range(1, 6):
            catalog.insert_point(vm_id, point(number))
            catalog.set_members(vm_id, guid(number), {0: number << 20})
        catalog.complete_point(vm_id, guid(3), "complete", 44.0)
        for number in (1, 2):
            catalog.supersede_point(vm_id, guid(number))
    assert all(catalog.members(vm_id, guid(number)) for number in range(1, 6))
    assert [(item.sequence, item.state) for item in catalog.points(vm_id)] == [
        (3, "complete"),
        (4, "spooled"),
        (5, "spooled"),
    ]
    assert catalog.points(vm_id)[0].applied_s == 44.0
    with catalog.transaction():
        catalog.prune_points(vm_id, 4)
    assert [item.sequence for item in catalog.points(vm_id, superseded=True)] == [2, 3, 4, 5]
    with catalog.transaction():
        catalog.prune_points(vm_id, 0)
    assert [item.sequence for item in catalog.points(vm_id, superseded=True)] == [3, 4, 5]
    assert [number for number in range(1, 6) if catalog.members(vm_id, guid(number))] == [3, 4, 5]


def test_transfers_of_two_kinds_know_their_own_positions(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    join = dataclasses.replace(
        transfer(8, 80), kind="join", positions={1: 512}, logs=(), disks={1: 8 << 20}, consistent=False
    )
    with catalog.transaction():
        catalog.insert_transfer(vm_id, transfer())
        catalog.insert_transfer(vm_id, join)
    assert {row.kind: row.positions for row in catalog.transfers(vm_id)} == {
        "join": {1: 512},
        "logs": {0: 4096},
    }
    with catalog.transaction():
        catalog.delete_transfers(vm_id, "logs")
    assert catalog.transfers(vm_id) == [join]


def test_owner_history_keeps_each_primary_once(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    later = [Owner(guid(1), 4, "sha256:aa"), Owner(guid(1), 4, "sha256:bb"), Owner(guid(2), 9, "sha256:cc")]
    for time_s, owner in enumerate(later, 11):
        with catalog.transaction():
            catalog.set_owner(vm_id, owner, float(time_s))
    assert catalog.owners(vm_id) == [(owner, float(time_s)) for time_s, owner in enumerate(later, 11)]
    row = catalog.vm("web01")
    assert row is not None
    assert row.owner == later[-1]


def test_newer_store_is_refused_and_left_alone(folder: Path) -> None:
    path = folder / "catalog.db"
    Catalog(OS_FILES, path, create=True).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(UnsupportedVersion, match="newer hvreplica") as caught:
        Catalog(OS_FILES, path, create=True)
    assert (caught.value.field, caught.value.actual) == ("user_version", SCHEMA_VERSION + 1)
    assert path.read_bytes() == before


def test_foreign_database_is_refused_and_left_alone(folder: Path) -> None:
    path = folder / "catalog.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE contacts (name TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(BadSignature):
        Catalog(OS_FILES, path, create=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 8000])
def test_damaged_database_is_named(folder: Path, content: bytes) -> None:
    path = folder / "catalog.db"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        Catalog(OS_FILES, path, create=True)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_reading_makes_no_database(folder: Path) -> None:
    with pytest.raises(StoreError, match="no replica store"):
        Catalog(OS_FILES, folder / "catalog.db", create=False)
    with pytest.raises(StoreError, match="no replica store"):
        Catalog(OS_FILES, folder / "absent" / "catalog.db", create=False)
    assert list(folder.iterdir()) == []


def test_odd_folder_names_are_no_options(folder: Path) -> None:
    odd = folder / "a?mode=memory&x#y %41"
    odd.mkdir()
    Catalog(OS_FILES, odd / "catalog.db", create=True).close()
    assert (odd / "catalog.db").exists()


def test_commit_hook_sees_each_committed_state(folder: Path) -> None:
    states: list[bytes] = []
    catalog = Catalog(OS_FILES, folder / "catalog.db", create=True, on_commit=states.append)
    add_vm(catalog)
    with pytest.raises(KeyError), catalog.transaction():
        raise KeyError
    catalog.close()
    assert len(states) == 2  # the tables, the VM
    for number, state in enumerate(states):
        path = folder / f"{number}.db"
        path.write_bytes(state)
        again = Catalog(OS_FILES, path, create=False)
        assert len(again.vms()) == number
        again.close()


def test_second_process_waits_then_says_who_is_in_the_way(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_TIMEOUT_S", 0.05)
    other = Catalog(OS_FILES, folder / "catalog.db", create=False)
    with catalog.transaction():
        assert other.vms() == []
        with pytest.raises(Locked), other.transaction():
            pass
    with other.transaction():
        pass
    other.close()


def test_full_disk_is_told_and_survived(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    pages = catalog._connection.execute("PRAGMA page_count").fetchone()[0]
    catalog._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFull) as caught:
        insert_points(catalog, vm_id, *range(1, 1000))
    assert "free" in str(caught.value)
    assert catalog.points(vm_id) == []
    catalog._connection.execute("PRAGMA max_page_count = 100000")
    with catalog.transaction():
        catalog.insert_point(vm_id, point(1))
    assert len(catalog.points(vm_id)) == 1


def test_changes_from_many_threads_are_all_kept(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)

    def work(first: int) -> None:
        for number in range(first, first + 20):
            with catalog.transaction():
                catalog.insert_point(vm_id, point(number))

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [item.sequence for item in catalog.points(vm_id)] == list(range(1, 81))


def test_parts_of_a_point_keep_their_order_when_they_move(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)

    def part(number: int, point_number: int, disk_index: int = 0) -> UndoRow:
        return UndoRow(guid(point_number), disk_index, guid(number), "undo", 8192, 4096, digest_change="ab")

    with catalog.transaction():
        for row in (part(1, 70), part(2, 70), part(3, 70, 1), part(4, 71), part(5, 71), part(6, 71, 1)):
            catalog.add_undo(vm_id, row)
        catalog.move_undo(vm_id, point_id=guid(71), target_id=guid(70), disk_index=0)
    kept = catalog.undo_rows(vm_id, point_id=guid(70), disk_index=0)
    assert [(row.id, row.place) for row in kept] == [(guid(1), 0), (guid(2), 1), (guid(4), 2), (guid(5), 3)]
    assert [row.id for row in catalog.undo_rows(vm_id, point_id=guid(71))] == [guid(6)]
    assert catalog.undo_rows(vm_id, disk_index=1)[0] == part(3, 70, 1)
    with catalog.transaction():
        catalog.delete_undo(vm_id, guid(5))
    assert [row.id for row in catalog.undo_rows(vm_id)] == [guid(1), guid(2), guid(4), guid(3), guid(6)]


def test_what_older_points_need_comes_back_as_it_was_written(catalog: Catalog) -> None:
    vm_id = add_vm(catalog)
    log = KeptLogRow(guid(5), 1, NIL, 9216, guid(71), guid(70), 5.5, is_ordered=True, kept_until_s=99.5)
    with catalog.transaction():
        catalog.insert_point(vm_id, point(1, "complete"))
        catalog.insert_kept_log(vm_id, log)
        catalog.set_policy(vm_id, "{}")
        catalog.set_failover(vm_id, "[]")
        catalog.set_digest(vm_id, 1, "cd")
        for sentence in ("torn", "rotten"):
            catalog.damage_point(vm_id, guid(1), sentence)
    assert catalog.kept_logs(vm_id) == [log]
    assert [(row.policy, row.failover) for row in catalog.vms()] == [("{}", "[]")]
    assert [row.digest for row in catalog.disks(vm_id)] == [None, "cd"]
    assert [(row.state, row.damage) for row in catalog.points(vm_id)] == [("damaged", "torn")]
    with catalog.transaction():
        catalog.delete_kept_log(vm_id, guid(5))
        catalog.supersede_point(vm_id, guid(1))
    assert catalog.kept_logs(vm_id) == []
    assert [row.damage for row in catalog.points(vm_id, superseded=True)] == [None]
