"""A Linux guest on the export: what it fsynced is at the replica, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.capture.guest_agent import GuestAgent
from tests.support.ext4 import content_sums, replay_journal, require_clean
from tests.support.linux_guest import GuestImage, LinuxGuest
from tests.support.tools import require_tool, run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.guest

MIB = 1 << 20
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


class QemuNbd:
    """Another program's export of the same disk, to judge guest and checks by."""

    def __init__(self, disk: Path, socket: Path) -> None:
        self._command = [require_tool("qemu-nbd"), "--persistent", "--socket", str(socket), "-x", "0"]
        self._command += ["-f", "vhdx", str(disk)]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


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
    disk, exported = tmp_path / "web01.vhdx", tmp_path / "export.raw"
    hvreplica.disk_create(disk, DISK_BYTES, block_bytes=MIB)
    server = QemuNbd(disk, short / "nbd.sock")
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        guest = stack.enter_context(LinuxGuest(image, short, drive=nbd(short / "nbd.sock")))
        format_and_mount(guest)
        guest.start("writing load/file")
        for _ in range(2):
            count = len(wait_for_files(guest, 5))
            server.kill()
            server.start()
            fsynced = wait_for_files(guest, count + 10)
        guest.kill()
    run_tool("qemu-img", "convert", "-f", "vhdx", "-O", "raw", disk, exported)
    replay_journal(exported)
    require_clean(exported)
    require_held(content_sums(exported, tmp_path / "content"), fsynced)
