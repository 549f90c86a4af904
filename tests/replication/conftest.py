"""Two sites in one process: a served store in a real folder, and a primary whose files can lose power."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import hvreplica
from tests.replication.fan_site import Fanned
from tests.replication.sites import Guest, Served
from tests.support.threads import own_threads

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with certificates for both sides."""
    folder = tmp_path_factory.mktemp("tls") / "tls"
    hvreplica.tls_init(folder)
    return folder


@pytest.fixture
def served(tmp_path: Path, tls: Path) -> Iterator[Served]:
    """Return a server that can be stopped and started again on the same store."""
    with own_threads(at_most=12), contextlib.closing(Served(tmp_path / "store", tls)) as site:
        yield site


@pytest.fixture
def guest(seed: int) -> Guest:
    """Return a guest with one disk of 24 MiB, a third of it written."""
    return Guest(seed)


@pytest.fixture
def east(tmp_path: Path, served: Served) -> Iterator[Served]:
    """Return the server of a second replica."""
    server = Served(tmp_path / "east", served.tls)
    yield server
    server.close()


@pytest.fixture
def site(tmp_path: Path, served: Served, east: Served, rng: random.Random) -> Fanned:
    """Return a captured VM that feeds both."""
    return Fanned(tmp_path, served, east, rng)
