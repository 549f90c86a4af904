"""A catalog whose disk fails under a COMMIT: the caller is told of an error, and the change is there."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hvreplica.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from hvreplica.store.database import Database


def fail_after_commit(monkeypatch: pytest.MonkeyPatch, catalog: Database) -> None:
    """Let every transaction be durable and raise nevertheless, as it looks from after a restart."""
    transaction = type(catalog).transaction

    @contextlib.contextmanager
    def failing(self: Database) -> Iterator[None]:
        with transaction(self):
            yield
        message = "the catalog failed: disk I/O error"
        raise StoreError(message)

    monkeypatch.setattr(type(catalog), "transaction", failing)
