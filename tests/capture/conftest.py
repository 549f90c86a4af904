"""TLS contexts made once: making keys costs more than most tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.transport import client_context, server_context
from hvreplica.transport.certificates import init_tls

if TYPE_CHECKING:
    import ssl
    from pathlib import Path


@pytest.fixture(scope="session")
def tls_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a CA and the certificates of both sides."""
    folder = tmp_path_factory.mktemp("tls")
    init_tls(OS_FILES, folder, clock=SYSTEM)
    return folder


@pytest.fixture(scope="session")
def tls_server(tls_folder: Path) -> ssl.SSLContext:
    return server_context(tls_folder)


@pytest.fixture(scope="session")
def tls_client(tls_folder: Path) -> ssl.SSLContext:
    return client_context(tls_folder)
