"""The tables of version 1 are frozen, and every column is explained."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from pathlib import Path

from hvreplica.store.schema import SCHEMA_VERSION, TABLES

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
    explained["point"] = explained["point"][: len(columns()["point"])]  # the page goes on behind it
    assert explained == columns()


def test_tables_change_only_with_their_version() -> None:
    digest = hashlib.sha256(" ".join(TABLES.split()).encode()).hexdigest()[:16]
    assert {SCHEMA_VERSION: digest} == {1: "0cb98a020f8e4ee4"}, (
        "a change of the tables needs a new version and a migration"
    )
