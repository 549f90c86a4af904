"""A Linux guest on the export: what it fsynced is at the replica, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.capture.guest_agent import GuestAgent
from tests.support.command_line import Running, ask_verb, run_verb
from tests.support.ext4 import content_sums, replay_journal, require_clean
from tests.support.linux_guest import GuestImage, LinuxGuest

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
        self.folder, self.tls, self.socket = folder, tls, socket
        self.disk, self.state = folder / "web01.vhdx", folder / "state"
        self._running: dict[str, Running] = {}
        hvreplica.disk_create(self.disk, DISK_BYTES, block_bytes=MIB)
        self._address = "127.0.0.1:0"
        self.serve()

    def serve(self) -> None:
        store, address = self.folder / "store", self._address
        ready = self._start("serve", "--store", store, "--tls", self.tls, "--listen", address)
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

    def ask(self, verb: str, *arguments: object) -> Any:
        return ask_verb(verb, "--state", self.state, *arguments)

    def replicate(self) -> Any:
        return self.ask("replicate", "--vm", "web01", "--once")

    def export(self, path: Path) -> None:
        arguments = ("--vm", "web01", "--output", path, "--format", "raw")
        ask_verb("point", "export", "--store", self.folder / "store", *arguments)

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


def nbd(socket: Path, more: str = "") -> str:
    return f"driver=nbd,server.type=unix,server.path={socket},export=0{more}"


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


def test_capture_killed_under_load_guest_goes_on_and_replica_loses_nothing(
    image: GuestImage, site: Site, tmp_path: Path, short: Path
) -> None:
    """The guest is there before the first copy, writes through it, two kills and a frozen cut, and loses power."""
    site.end("serve", signal.SIGTERM)
    site.capture()
    with LinuxGuest(image, short, drive=nbd(site.socket, ",reconnect-delay=60,open-timeout=30")) as guest:
        format_and_mount(guest)
        guest.start("agent")
        guest.start("writing load/file")
        wait_for_files(guest, 5)
        assert site.ask("status")["replication_state"] == "ReadyForInitialReplication"
        site.serve()
        site.replicate()
        for _ in range(2):
            count = len(wait_for_files(guest, 5))
            site.end("capture", signal.SIGKILL)
            site.capture()
            wait_for_files(guest, count + 10)
        before = cut_frozen(site, guest, tmp_path / "frozen.raw")
        assert site.ask("resume")["replication_state"] == "Replicating"
        fsynced = wait_for_files(guest, len(before) + 10)
        guest.kill()
    assert site.replicate()["point"] == site.ask("status")["last_point"]
    status = site.ask("status")
    assert (status["replication_state"], status["running"], status["pending"]) == (
        "Replicating",
        "capture",
        [],
    )
    site.end("capture", signal.SIGTERM)
    replica = tmp_path / "replica.raw"
    site.export(replica)
    assert ask_verb("disk", "compare", site.disk, replica)["equal"]
    require_clean(tmp_path / "frozen.raw")
    require_held(content_sums(tmp_path / "frozen.raw", tmp_path / "frozen"), before)
    replay_journal(replica)
    require_clean(replica)
    require_held(content_sums(replica, tmp_path / "content"), fsynced)


def cut_frozen(site: Site, guest: LinuxGuest, path: Path) -> dict[str, str]:
    """Pause, cut with the guest frozen, make of point and cut a disk at `path`; return what was fsynced before."""
    site.ask("pause")
    refused = run_verb("replicate", "--vm", "web01", "--state", site.state, "--once", "--json")
    assert refused.error["class"] == "InvalidTransition"  # and the cycle that ran, if one did, is over
    before = guest.fsynced()
    cut = site.ask("cut", "--freeze", guest.agent_path, "--freeze-limit", 30)
    assert cut["frozen"] == 1
    status = site.ask("status")
    assert [waiting["point"] for waiting in status["pending"]] == [cut["point"]]
    site.export(path)
    (log,) = cut["logs"]
    hvreplica.log_apply(log["path"], path)
    return before
