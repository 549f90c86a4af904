"""The tables are frozen, those of older versions become them, and every column is explained."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sqlite3
from pathlib import Path

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.errors import Locked, UnsupportedVersion
from hvreplica.files import OS_FILES
from hvreplica.store import Store
from hvreplica.store.catalog import Catalog
from hvreplica.store.migrations import MIGRATIONS
from hvreplica.store.schema import APPLICATION_ID, SCHEMA_VERSION, TABLES

OLD = {version: Path(__file__).with_name(f"catalog_v{version}.sql") for version in MIGRATIONS}
PAGE = Path(__file__).parents[2] / "docs" / "formats" / "store.md"


def columns() -> dict[str, list[str]]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(TABLES)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: [row[1] for row in connection.execute(f"PRAGMA table_info({name})")] for name in names}
    connection.close()
    return found


def test_every_column_is_explained_in_its_place() -> None:
    sections = re.split(r"^### Table `(\w+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    explained = {
        name: re.findall(r"^\| (\w+) \| ", text, flags=re.MULTILINE)[1:]
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    }
    last = list(explained)[-1]
    explained[last] = explained[last][: len(columns()[last])]  # the page goes on behind it
    assert explained == columns()


def test_tables_change_only_with_their_version() -> None:
    digest = hashlib.sha256(" ".join(TABLES.split()).encode()).hexdigest()[:16]
    assert {SCHEMA_VERSION: digest} == {3: "123dd389607b050e"}, (
        "a change of the tables needs a new version and a migration"
    )


@pytest.mark.parametrize("version", OLD)
def test_migrated_tables_are_those_of_a_new_store(version: int) -> None:
    """The order of columns counts: rows are inserted by place."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(OLD[version].read_text())
    for step in range(version, SCHEMA_VERSION):
        for statement in MIGRATIONS[step]:
            connection.execute(statement)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: [row[1] for row in connection.execute(f"PRAGMA table_info({name})")] for name in names}
    assert found == columns()
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


def make_old(folder: Path, version: int) -> Path:
    """Return the folder of a store whose catalog this version wrote: see catalog_v<version>.sql."""
    with contextlib.closing(sqlite3.connect(folder / "catalog.db")) as connection:
        connection.executescript(OLD[version].read_text())
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make_old(tmp_path, 1)


def test_old_catalog_is_brought_on_with_all_that_it_says(old: Path) -> None:
    sizes = {0: 2 << 20, 1: 2 << 20}
    with contextlib.closing(Catalog(OS_FILES, old / "catalog.db", create=True)) as catalog:
        assert [vm.name for vm in catalog.vms()] == ["db01", "new01", "web01"]
        points = catalog.points(1, superseded=True)
        assert [point.state for point in points] == ["superseded", "complete", "spooled"]
        assert [catalog.members(1, point.id) for point in points] == [{}, sizes, sizes]
        assert [(row.is_held, row.base_id, row.removed_s) for row in catalog.disks(1)] == [
            (True, None, None)
        ] * 2
        assert [row.is_held for row in catalog.disks(2)] == [False, False]
        logs, initial = catalog.transfers(1)[0], catalog.transfers(2)[0]
        assert (logs.kind, logs.positions, logs.disks, len(logs.logs)) == ("logs", {0: 4096}, sizes, 2)
        assert (initial.kind, initial.positions, initial.disks) == (
            "initial",
            {0: 1 << 20},
            {0: 2 << 20, 1: 3 << 20},
        )
        assert initial.consistent
        assert catalog.transfers(3) == []


def test_catalog_of_version_2_is_brought_on_with_all_that_it_says(tmp_path: Path) -> None:
    with contextlib.closing(Catalog(OS_FILES, make_old(tmp_path, 2) / "catalog.db", create=True)) as catalog:
        points = catalog.points(1, superseded=True)
        assert [(point.kind, point.consistency, point.state, point.damage) for point in points] == [
            ("initial", "crash", "superseded", None),
            ("standard", "crash", "complete", None),
            ("standard", "crash", "spooled", None),
        ]
        join, logs = catalog.transfers(1)
        assert (join.kind, join.point_kind, join.consistency) == ("join", "initial", "none")
        assert (logs.kind, logs.point_kind, logs.consistency) == ("logs", "standard", "crash")
        assert logs.positions == {0: 4096}
        assert [vm.policy for vm in catalog.vms()] == [None] * 3
        assert catalog.undo_rows(1) == catalog.kept_logs(1) == []


@pytest.mark.parametrize("version", OLD)
def test_catalog_whose_migration_is_cut_is_the_old_one(tmp_path: Path, version: int) -> None:
    old = make_old(tmp_path, version)
    for count in range(len(MIGRATIONS[version])):
        connection = sqlite3.connect(old / "catalog.db", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        for statement in MIGRATIONS[version][: count + 1]:
            connection.execute(statement)
        connection.close()  # without a commit
    with contextlib.closing(Catalog(OS_FILES, old / "catalog.db", create=True)) as catalog:
        assert len(catalog.transfers(1)) == version  # see the specimens


def test_reader_brings_an_old_store_on_unless_it_is_served(old: Path) -> None:
    with pytest.raises(UnsupportedVersion, match="older"):
        Catalog(OS_FILES, old / "catalog.db", create=False)
    lock = OS_FILES.lock(old / "store.lock")
    with pytest.raises(Locked):
        Store.open_reading(OS_FILES, old, clock=SYSTEM)
    lock.release()
    with contextlib.closing(Store.open_reading(OS_FILES, old, clock=SYSTEM)) as store:
        assert [point.state for point in store.points("web01")] == ["complete", "spooled"]
