"""A Linux guest on the export: what it fsynced is at the replica, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

import hvreplica
from hvreplica.capture.guest_agent import GuestAgent
from tests.support.ext4 import content_sums, replay_journal, require_clean
from tests.support.linux_guest import GuestImage, LinuxGuest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.guest

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
DISK_BYTES = 192 * MIB


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    """Return what guests boot."""
    return GuestImage(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def short() -> Iterator[Path]:
    """Return a folder whose name leaves room in the address of a socket."""
    with tempfile.TemporaryDirectory(prefix="hvr") as folder:
        yield Path(folder)


class Capture:
    """Our export of a disk in a process of its own, and the logs of its cuts."""

    def __init__(self, disk: Path, socket: Path, state: Path) -> None:
        self._arguments = [str(disk), str(socket), str(state)]
        self._last_id = UUID(int=0)
        self.logs: list[Path] = []
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.replication.capturing", *self._arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def cut(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"cut {self._last_id}\n")
        self._process.stdin.flush()
        told = self._read()
        if told != "none":
            path, log_id, _ = told.split()
            self.logs.append(Path(path))
            self._last_id = UUID(log_id)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def nbd(socket: Path) -> str:
    return f"driver=nbd,server.type=unix,server.path={socket},export=0,reconnect-delay=60,open-timeout=30"


def format_and_mount(guest: LinuxGuest) -> None:
    guest.run("mkfs.ext4 -q /dev/vda")
    guest.run("mount /dev/vda /mnt")


def wait_for_files(guest: LinuxGuest, count: int) -> dict[str, str]:
    """Return what was fsynced as soon as that is at least `count` files."""
    guest.run(
        f"until [ $(cat /run/fsynced | wc -l) -ge {count} ]; do [ ! -e /run/ended ] || exit 1; usleep 20000; done"
    )
    return guest.fsynced()


def require_held(sums: dict[str, str], fsynced: dict[str, str]) -> None:
    wrong = {name for name, content in fsynced.items() if sums.get(name) != content}
    assert not wrong, (
        f"{len(wrong)} of {len(fsynced)} fsynced files are absent or changed: {sorted(wrong)[:5]}"
    )


def test_frozen_real_guest_holds_still_and_its_disk_is_clean(
    image: GuestImage, tmp_path: Path, short: Path
) -> None:
    disk, cut = tmp_path / "disk.raw", tmp_path / "cut.raw"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    with LinuxGuest(image, short, drive=f"file={disk},format=raw") as guest:
        format_and_mount(guest)
        guest.start("agent")
        guest.start("writing load/file")
        wait_for_files(guest, 5)
        with GuestAgent(guest.agent_path, timeout_s=30).frozen(limit_s=30) as count:
            assert count == 1
            before = guest.fsynced()
            shutil.copyfile(disk, cut)
            guest.run("usleep 300000")
            assert len(guest.fsynced()) - len(before) <= 1, "a frozen guest goes on writing"
        wait_for_files(guest, len(before) + 5)
    require_clean(cut)
    require_held(content_sums(cut, tmp_path / "content"), before)


def test_export_killed_under_load_guest_goes_on_and_loses_nothing(
    image: GuestImage, tmp_path: Path, short: Path
) -> None:
    disk = tmp_path / "web01.vhdx"
    hvreplica.disk_create(disk, DISK_BYTES, block_bytes=MIB)
    replica, frozen = tmp_path / "replica.raw", tmp_path / "frozen.raw"
    for path in (replica, frozen):
        hvreplica.disk_create(path, DISK_BYTES, format="raw")
    capture = Capture(disk, short / "nbd.sock", tmp_path / "state")
    with contextlib.ExitStack() as stack:
        stack.callback(capture.kill)
        guest = stack.enter_context(LinuxGuest(image, short, drive=nbd(short / "nbd.sock")))
        format_and_mount(guest)
        guest.start("agent")
        guest.start("writing load/file")
        wait_for_files(guest, 5)
        capture.cut()
        for _ in range(2):
            count = len(wait_for_files(guest, 5))
            capture.kill()
            capture.start()
            wait_for_files(guest, count + 10)
            capture.cut()
        with GuestAgent(guest.agent_path, timeout_s=30).frozen(limit_s=30):
            before = guest.fsynced()
            capture.cut()
        frozen_count = len(capture.logs)
        fsynced = wait_for_files(guest, len(before) + 10)
        guest.kill()
        capture.cut()
    for log in capture.logs[:frozen_count]:
        hvreplica.log_apply(log, frozen)
    for log in capture.logs:
        hvreplica.log_apply(log, replica)
    assert hvreplica.disk_compare(disk, replica).equal
    require_clean(frozen)
    require_held(content_sums(frozen, tmp_path / "frozen"), before)
    replay_journal(replica)
    require_clean(replica)
    require_held(content_sums(replica, tmp_path / "content"), fsynced)
