"""A TLS folder made once: making keys costs more than most tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.transport.certificates import init_tls

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tls_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a CA and both certificates; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("tls")
    init_tls(OS_FILES, folder, clock=SYSTEM)
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of another CA."""
    folder = tmp_path_factory.mktemp("other")
    init_tls(OS_FILES, folder, clock=SYSTEM)
    return folder
