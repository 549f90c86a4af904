"""QEMU's programs and ours keep off each other's disks."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import Locked
from hvreplica.files import OS_FILES
from hvreplica.units import MIB
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["vhdx", "raw"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / f"disk.{request.param}"
    create_disk(OS_FILES, made, virtual_bytes=8 * MIB, format=request.param, clock=SYSTEM)
    return made


class NbdServer:
    """A qemu-nbd that has a disk open for writing."""

    def __init__(self, path: Path, folder: Path) -> None:
        pid_file = folder / "nbd.pid"
        arguments = [
            "--fork",
            "-t",
            "-f",
            path.suffix[1:],
            "-k",
            folder / "nbd.sock",
            f"--pid-file={pid_file}",
        ]
        run_tool("qemu-nbd", *arguments, path)
        self.pid = int(pid_file.read_text())
        self._handle = os.pidfd_open(self.pid)

    def stop(self) -> None:
        if self._handle >= 0:
            signal.pidfd_send_signal(self._handle, signal.SIGTERM)
            assert select.select([self._handle], [], [], 30)[0]
            os.close(self._handle)
            self._handle = -1


@pytest.fixture
def nbd_server(path: Path, tmp_path: Path) -> Iterator[NbdServer]:
    server = NbdServer(path, tmp_path)
    yield server
    server.stop()


def test_qemu_does_not_write_to_a_disk_that_is_open_for_writing(path: Path) -> None:
    kind = path.suffix[1:]
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM):
        refused = run_tool("qemu-io", "-f", kind, path, "-c", "write 0 512", expected=(1,))
        assert "lock" in refused.stderr
        if kind == "vhdx":  # who reads a raw disk does not mind who writes to it
            refused = run_tool("qemu-io", "-r", "-f", kind, path, "-c", "read 0 512", expected=(1,))
            assert "lock" in refused.stderr
        run_tool("qemu-io", "-r", "-U", "-f", kind, path, "-c", "read 0 512")
    run_tool("qemu-io", "-f", kind, path, "-c", "write 0 512")


def test_qemu_reads_a_parent_and_does_not_write_to_it(path: Path) -> None:
    kind = path.suffix[1:]
    with open_disk(OS_FILES, path, shared=True, clock=SYSTEM):
        assert "lock" in run_tool("qemu-io", "-f", kind, path, "-c", "write 0 512", expected=(1,)).stderr
        run_tool("qemu-io", "-r", "-f", kind, path, "-c", "read 0 512")


def test_a_disk_that_qemu_writes_to_is_not_opened(path: Path, nbd_server: NbdServer) -> None:
    for writable in (True, False):
        with pytest.raises(Locked) as refused:
            open_disk(OS_FILES, path, writable=writable, shared=not writable, clock=SYSTEM)
        assert f"qemu-nbd (pid {nbd_server.pid})" in str(refused.value)
    open_disk(OS_FILES, path, clock=SYSTEM).close()
    nbd_server.stop()
    open_disk(OS_FILES, path, writable=True, clock=SYSTEM).close()


def test_a_refused_opening_leaves_no_lock(path: Path, nbd_server: NbdServer) -> None:
    with pytest.raises(Locked):
        open_disk(OS_FILES, path, writable=True, clock=SYSTEM)
    nbd_server.stop()
    run_tool("qemu-io", "-f", path.suffix[1:], path, "-c", "write 0 512")
