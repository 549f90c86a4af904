"""The SQLite database below the catalog: opening, versions, transactions, and its failures as ours.

Every change happens inside transaction() and is durable when that block ends (WAL, synchronous=FULL): this is
the store's durability point.

One object per process, used by any thread; several processes may have the same catalog open.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hvreplica.errors import BadSignature, Locked, StoreError, StoreFull, UnsupportedVersion, kept
from hvreplica.store.migrations import MIGRATIONS
from hvreplica.store.schema import APPLICATION_ID, SCHEMA_VERSION, TABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.files import FileSystem

_BUSY_TIMEOUT_S = 30.0  # another process holds the write lock for one small transaction at a time
_RESTORE_HINT = "restore catalog.db from a copy; the disks beside it are plain VHDX files"


class Database:
    """The open database; close() when done."""

    def __init__(
        self,
        files: FileSystem,
        path: Path,
        *,
        create: bool,
        on_commit: Callable[[bytes], None] | None = None,
    ) -> None:
        """Open what is at `path`; with `create`, make the tables where there are none, and bring old ones on.

        on_commit: called after each commit with the whole database as bytes, while no other change can
        happen. Raises: BadSignature for a database that is not a store's, UnsupportedVersion for a newer one
        and, without `create`, for an older one; StoreError for a damaged one.
        """
        self._files = files
        self._path = path
        self._on_commit = on_commit
        self._lock = threading.RLock()
        self._changing = False
        self._failure: StoreError | None = None
        with self._translated():
            self._connection = sqlite3.connect(
                f"file:{quote(str(path))}?mode={'rwc' if create else 'rw'}",
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
                uri=True,
            )
        try:
            self._prepare(create=create)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close; may be called twice."""
        with self._lock:
            self._connection.close()

    def _prepare(self, *, create: bool) -> None:
        with self._translated():
            version = self._pragma("user_version")
            if self._pragma("application_id") != APPLICATION_ID and (
                version != 0 or self.rows("SELECT 1 FROM sqlite_master")
            ):
                raise BadSignature(
                    "this database is not the catalog of a replica store",
                    path=self._path,
                    field="application_id",
                    expected=APPLICATION_ID,
                    actual=self._pragma("application_id"),
                    hint="choose an empty folder for the store",
                )
            if version > SCHEMA_VERSION:
                raise UnsupportedVersion(
                    "the store was written by a newer hvreplica",
                    path=self._path,
                    field="user_version",
                    expected=f"at most {SCHEMA_VERSION}",
                    actual=version,
                    hint="use the hvreplica that wrote it, or a newer one",
                )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            found = self.rows("PRAGMA quick_check")
        if found != [("ok",)]:
            raise StoreError(
                f"the catalog is damaged: {found[0][0]}",
                path=self._path,
                hint=_RESTORE_HINT,
            )
        if version == 0 and not create:
            raise _no_store(self._path)
        if version < SCHEMA_VERSION:
            if not create:
                raise _outdated(self._path, version)
            self._bring_on(version)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def _bring_on(self, version: int) -> None:
        """Make the tables, or those of this version out of older ones, as a whole."""
        steps = (
            [TABLES.split(";")] if version == 0 else [MIGRATIONS[at] for at in range(version, SCHEMA_VERSION)]
        )
        with self.transaction():
            if self._pragma("user_version") != version:
                return  # another process was faster
            for statement in (statement for step in steps for statement in step):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    # Transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Change the catalog: all of the block or nothing, durable on return, alone in all processes.

        Raises: StoreFull, Locked, StoreError. After an error nothing is known to have changed; where the disk
        failed, the change may still show up after a restart, so every caller must be able to meet its own
        work again, and this object takes no further change.
        """
        with self._lock:
            if self._failure is not None:
                raise kept(self._failure)
            if self._changing:
                message = "transactions do not nest"
                raise AssertionError(message)
            with self._translated():
                self._connection.execute("BEGIN IMMEDIATE")
                self._changing = True
                try:
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
                finally:
                    self._changing = False
            if self._on_commit is not None:
                self._on_commit(self._connection.serialize())

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read several rows that belong together."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            with self._translated():
                self._connection.execute("BEGIN")
                try:
                    yield
                finally:
                    self._connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CANTOPEN:
            return _no_store(self._path)
        free_bytes = 0
        with contextlib.suppress(OSError):
            free_bytes = self._files.free_bytes(self._path.parent)
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and free_bytes < 1 << 20):
            return StoreFull(
                "no room left for the catalog",
                path=self._path,
                actual=f"{free_bytes} bytes free",
                hint="make room in the store's file system; nothing is lost, the next try continues",
            )
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return Locked("another process changes the catalog", path=self._path, hint="try again")
        if code == sqlite3.SQLITE_NOTADB:
            return StoreError(
                "the catalog is not a database any more",
                path=self._path,
                hint=_RESTORE_HINT,
            )
        failure = StoreError(
            f"the catalog failed: {error}",
            path=self._path,
            hint="look at the disk it is on, then start again",
        )
        if code == sqlite3.SQLITE_IOERR:
            self._failure = kept(failure)
        return failure

    def rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return what a statement that changes nothing finds."""
        with self._lock, self._translated():
            return self._connection.execute(statement, values).fetchall()

    def change(self, statement: str, values: tuple[Any, ...]) -> int:
        """Run one statement of a transaction; return how many rows it changed."""
        if not self._changing:
            message = "a change outside of transaction()"
            raise AssertionError(message)
        return self._connection.execute(statement, values).rowcount


def _no_store(path: Path) -> StoreError:
    return StoreError(
        "there is no replica store here, or it cannot be opened",
        path=path,
        hint="name the folder that `hvreplica serve --store` uses, and check its permissions",
    )


def _outdated(path: Path, version: int) -> UnsupportedVersion:
    return UnsupportedVersion(
        "the store was written by an older hvreplica",
        path=path,
        field="user_version",
        expected=SCHEMA_VERSION,
        actual=version,
        hint="start `hvreplica serve` of this version on it once",
    )
