"""Another program that writes to a disk that is served, past all locks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.support.live import Guest, Site, random_data
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path, sizes=[8 * MIB])
    with open_disk(OS_FILES, made.paths[0], writable=True, clock=SYSTEM) as disk:
        disk.write(random_data(8 * MIB), 0)
    return made


def test_a_stranger_is_noticed_at_the_next_cut_which_ships_what_it_wrote(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with site.running() as machine:
        machine.mark(0, np.array([[0, 8 * MIB]], np.int64))
        site.cycle(machine)
        with Guest(machine.services[0]) as guest:
            guest.write(0, random_data(4096))
            site.cycle(machine)
            assert not caplog.records
            image = f"driver=vhdx,file.driver=file,file.locking=off,file.filename={site.paths[0]}"
            run_tool("qemu-io", "--image-opts", image, "-c", "write -P 7 1M 64k")
            guest.write(MIB // 2, random_data(4096))
            cut = site.cycle(machine)
            assert cut.logs[0].changed_bytes >= 8 * MIB
            assert f"another program writes to {site.paths[0]}" in caplog.text
            assert site.copy_of(0) == site.disk_of(machine, 0)
            assert site.copy_of(0)[MIB : MIB + 65_536] == b"\7" * 65_536
            caplog.clear()
            guest.write(MIB // 2, random_data(4096))
            assert site.cycle(machine).logs[0].changed_bytes == 4096
            assert not caplog.records


def test_a_disk_that_is_replaced_is_told_of_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with site.running() as machine:
        site.cycle(machine)
        site.paths[0].rename(site.folder / "old.vhdx")
        site.paths[0].write_bytes(b"another")
        site.cycle(machine)
        site.cycle(machine)
        assert caplog.text.count("was replaced or removed while it is served") == 1
        site.paths[0].unlink()
        (site.folder / "old.vhdx").rename(site.paths[0])
