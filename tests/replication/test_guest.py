"""A Linux guest on the export: what it fsynced is at the replica, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import InvalidTransition
from hvreplica.files import OS_FILES
from tests.support.boot_sector import DONE, EXIT_PORT, SECTOR_BYTES, boot_sector
from tests.support.command_line import TIMEOUT_S, Running, ask_verb
from tests.support.ext4 import content_sums, replay_journal, require_clean
from tests.support.linux_guest import GuestImage, LinuxGuest
from tests.support.tools import require_tool

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


class Site:
    """A VM under capture and the replica of it, each of them the command line in a process of its own."""

    def __init__(self, folder: Path, tls: Path, socket: Path) -> None:
        self.tls, self.socket = tls, socket
        self.disk, self.state, self.store = folder / "web01.vhdx", folder / "state", folder / "store"
        self._running: dict[str, Running] = {}
        hvreplica.disk_create(self.disk, DISK_BYTES, block_bytes=MIB)
        self._address = "127.0.0.1:0"
        self.serve()

    def serve(self) -> None:
        ready = self._start("serve", "--store", self.store, "--tls", self.tls, "--listen", self._address)
        self._address = ready["address"]

    def capture(self) -> None:
        self._start(
            "capture", "--vm", "web01", "--disk", self.disk, "--socket", self.socket, "--state", self.state,
            "--to", self._address, "--tls", self.tls, "--interval", 2,
        )  # fmt: skip

    def end(self, verb: str, number: int) -> None:
        """Send a signal, and require what the verb promises for it."""
        process = self._running.pop(verb)
        code, errors = process.end(number)
        process.close()
        assert code == (0 if number == signal.SIGTERM else -number), errors
        assert "Traceback" not in errors, errors

    def replicate(self) -> Any:
        return ask_verb("replicate", "--vm", "web01", "--state", self.state, "--once")

    def wait_for_point_after(self, point: str | None) -> None:
        """Return once cycles by themselves have brought another point to the replica."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while (status := hvreplica.status(self.state)).last_point == point:
            errors = self._running["capture"].errors()
            assert time.monotonic() < deadline_s, f"no cycle: {status}\n{errors}"
            threading.Event().wait(0.1)

    def export(self, path: Path, point: str) -> None:
        chosen = ("--store", self.store, "--vm", "web01", "--point", point)
        ask_verb("point", "export", *chosen, "--output", path, "--format", "raw")

    def close(self) -> None:
        for process in self._running.values():
            process.close()

    def _start(self, verb: str, *arguments: object) -> dict[str, Any]:
        self._running[verb] = process = Running(verb, *arguments, "--json")
        assert process.ready.get("event") == "listening", process.errors()
        return process.ready


@pytest.fixture
def site(tmp_path: Path, tls: Path, short: Path) -> Iterator[Site]:
    """Return a VM's two sites, of which the replica's serves."""
    with contextlib.closing(Site(tmp_path, tls, short / "web01.sock")) as made:
        yield made


def nbd(socket: Path) -> str:
    return f"driver=nbd,server.type=unix,server.path={socket},export=0"


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


def test_capture_killed_under_load_guest_goes_on_and_replica_loses_nothing(
    image: GuestImage, site: Site, tmp_path: Path, short: Path
) -> None:
    """The guest is there before the first copy, writes through it, two kills and a frozen cut, and loses power."""
    site.end("serve", signal.SIGTERM)
    site.capture()
    with LinuxGuest(image, short, drive=nbd(site.socket) + ",reconnect-delay=60,open-timeout=30") as guest:
        guest.run("mkfs.ext4 -q /dev/vda")
        guest.run("mount /dev/vda /mnt")
        guest.start("agent")
        guest.start("writing load/file")
        wait_for_files(guest, 5)
        assert hvreplica.status(site.state).replication_state == "ReadyForInitialReplication"
        site.serve()
        site.replicate()
        for _ in range(2):
            count, point = len(guest.fsynced()), hvreplica.status(site.state).last_point
            site.end("capture", signal.SIGKILL)
            site.capture()
            wait_for_files(guest, count + 10)
            site.wait_for_point_after(point)
        before = cut_frozen(site, guest, tmp_path / "frozen.raw")
        fsynced = wait_for_files(guest, len(before) + 10)
        guest.kill()
    point = site.replicate()["point"]
    status = ask_verb("status", "--state", site.state)
    assert (status["replication_state"], status["pending"]) == ("Replicating", [])
    site.end("capture", signal.SIGTERM)
    replica = tmp_path / "replica.raw"
    site.export(replica, point)
    assert hvreplica.disk_compare(site.disk, replica).equal
    require_clean(tmp_path / "frozen.raw")
    require_held(content_sums(tmp_path / "frozen.raw", tmp_path / "frozen"), before)
    replay_journal(replica)
    require_clean(replica)
    require_held(content_sums(replica, tmp_path / "content"), fsynced)


def cut_frozen(site: Site, guest: LinuxGuest, path: Path) -> dict[str, str]:
    """Cut with the guest frozen, make of the last point and the cut a disk; return what was fsynced before."""
    hvreplica.pause(site.state)
    with pytest.raises(InvalidTransition):  # comes when the cycle that ran, if one did, is over
        hvreplica.replicate("web01", state=site.state)
    before = guest.fsynced()
    cut = ask_verb("cut", "--state", site.state, "--freeze", guest.agent_path, "--freeze-limit", 30)
    assert cut["frozen"] == 1
    status = hvreplica.status(site.state)
    assert [waiting.point for waiting in status.pending] == [cut["point"]]
    hvreplica.point_export(site.store, "web01", path, point=status.last_point, format="raw")
    (log,) = cut["logs"]
    hvreplica.log_apply(log["path"], path)
    assert hvreplica.resume(site.state).replication_state == "Replicating"
    return before


def test_firmware_boots_a_captured_disk_and_what_it_writes_is_in_the_cut(tmp_path: Path, short: Path) -> None:
    program = require_tool("qemu-system-x86_64")
    disk, copy, socket = tmp_path / "web01.vhdx", tmp_path / "copy.raw", short / "web01.sock"
    state, message = ("--state", tmp_path / "state"), b"read through NBD"
    hvreplica.disk_create(disk, 8 * MIB, block_bytes=MIB)
    with open_disk(OS_FILES, disk, writable=True, clock=SYSTEM) as written:
        written.write(boot_sector(read_lba=9999, write_lba=12345), 0)
        written.write(message.ljust(SECTOR_BYTES, b"\0"), 9999 * SECTOR_BYTES)
    hvreplica.disk_convert(disk, copy, format="raw")
    command = [
        program, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,accel=tcg", "-m", "32",
        "-debugcon", "stdio", "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1", "-drive", nbd(socket),
    ]  # fmt: skip
    with Running("capture", "--vm", "web01", "--disk", disk, "--socket", socket, *state, "--json") as capture:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        assert (done.stdout, done.returncode) == (message, 2 * DONE + 1), (done.stderr, capture.errors())
        (log,) = ask_verb("cut", *state)["logs"]
        assert capture.end()[0] == 0
    assert not hvreplica.disk_compare(disk, copy).equal
    hvreplica.log_apply(log["path"], copy)
    assert hvreplica.disk_compare(disk, copy).equal
