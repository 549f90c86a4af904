"""How the service of a disk speaks of its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.units import MIB
from tests.support.live import READ, TRIM, Guest, Site

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("command", [READ, TRIM])
def test_a_client_that_leaves_without_its_answers_is_told_of_in_words(tmp_path: Path, command: int) -> None:
    site = Site(tmp_path, sizes=[8 * MIB])
    with site.running() as machine:
        guest = Guest(machine.services[0])
        for _ in range(32):
            guest.send(command, 0, MIB)
        guest._socket.close()
        guest._thread.join()
    said = str(guest._ended)
    assert said.startswith(f"the client of {site.paths[0]} went away without a goodbye (")
    assert "Errno" not in said
