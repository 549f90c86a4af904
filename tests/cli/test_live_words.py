"""What live tracking's verbs say where they are called wrongly, and what they leave alone then."""

from __future__ import annotations

import contextlib
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.cli.store import _row
from hvreplica.store.status import DiskStatus
from tests.support.command_line import Running
from tests.support.live_client import SocketGuest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.command_line import Run

MIB = 1 << 20


@pytest.fixture
def started() -> Iterator[Callable[..., Running]]:
    """Return a function that starts a verb; whatever still runs at the end is killed."""
    with contextlib.ExitStack() as running:
        yield lambda *arguments: running.enter_context(Running(*arguments))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    hvreplica.disk_create(tmp_path / "a.vhdx", 8 * MIB)
    return tmp_path / "a.vhdx"


def served(tmp_path: Path, disk: Path, started: Callable[..., Running], *more: Any) -> Running:
    arguments = (
        "--vm",
        "web01",
        "--disk",
        disk,
        "--state",
        tmp_path / "state",
        "--socket",
        tmp_path / "n.sock",
    )
    return started("capture", *arguments, *more, "--json")


@pytest.mark.parametrize("verb", ["cut", "status", "pause", "resume"])
def test_verbs_leave_a_folder_of_something_else_alone(
    tmp_path: Path, hvreplica: Callable[..., Run], verb: str
) -> None:
    (tmp_path / "photos").mkdir()
    done = hvreplica(verb, "--state", tmp_path / "photos")
    assert done.code != 0
    assert "holds no state of a VM" in done.err
    assert list((tmp_path / "photos").iterdir()) == []
    assert hvreplica(verb, "--state", "").code == 2


def test_calls_without_their_disks_make_no_state(tmp_path: Path, hvreplica: Callable[..., Run]) -> None:
    rest = ("--vm", "web01", "--state", tmp_path / "state")
    link = ("--to", "127.0.0.1:1", "--tls", tmp_path / "tls")
    _tls(tmp_path)
    for arguments in (
        ("capture", *rest, "--socket", tmp_path / "n.sock"),
        ("replicate", *rest, *link, "--once"),
        ("replicate", *rest, *link),
    ):
        assert "does not know the VM's disks" in hvreplica(*arguments).err
        assert hvreplica(*arguments, "--disk", tmp_path / "absent.vhdx").code == 70
    (tmp_path / "a.hrl").write_bytes(b"")
    assert hvreplica("log", "import", tmp_path / "a.hrl", "--state", tmp_path / "state").code != 0
    assert not (tmp_path / "state").exists()


def _tls(folder: Path) -> None:
    hvreplica.tls_init(folder / "tls")


def test_others_are_told_what_runs(
    tmp_path: Path, disk: Path, started: Callable[..., Running], hvreplica: Callable[..., Run]
) -> None:
    capture = served(tmp_path, disk, started)
    rest = ("--vm", "web01", "--state", tmp_path / "state")
    _tls(tmp_path)
    for arguments in (
        ("capture", *rest, "--socket", tmp_path / "m.sock"),
        ("replicate", *rest, "--to", "127.0.0.1:1", "--tls", tmp_path / "tls"),
    ):
        err = hvreplica(*arguments).err
        assert f"`capture` runs (pid {capture.process.pid})" in err
        assert "replicate --once" in err


def test_cut_before_the_first_copy_announces_no_point(
    tmp_path: Path, disk: Path, started: Callable[..., Running], hvreplica: Callable[..., Run]
) -> None:
    served(tmp_path, disk, started)
    with SocketGuest(tmp_path / "n.sock", "0") as guest:
        guest.write(0, b"x" * 512)
        cut = hvreplica("cut", "--state", tmp_path / "state", "--json").answer
        assert len(cut["logs"]) == 1
        assert cut["point"] is None
        assert "no copy of the VM yet" in cut["warnings"][0]
        guest.write(0, b"y" * 512)
        assert "recovery point" not in hvreplica("cut", "--state", tmp_path / "state").out
    failed = hvreplica("cut", "--state", tmp_path / "state", "--before", "no-such-program")
    assert "the command of --before cannot be run" in failed.err


def test_quiet_verbs_say_nothing(
    tmp_path: Path, disk: Path, started: Callable[..., Running], hvreplica: Callable[..., Run]
) -> None:
    served(tmp_path, disk, started)
    for verb in ("pause", "resume"):
        done = hvreplica(verb, "--state", tmp_path / "state", "-q")
        assert (done.code, done.out) == (0, "")
    assert hvreplica("disk", "create", tmp_path / "b.vhdx", "--size", "8M", "-q").out == ""


def test_garbage_and_probes_do_not_fill_the_log(
    tmp_path: Path, disk: Path, started: Callable[..., Running], hvreplica: Callable[..., Run]
) -> None:
    capture = served(tmp_path, disk, started)
    other = tmp_path / "other.vhdx"
    hvreplica("disk", "create", other, "--size", "8M")
    arguments = ("--vm", "b", "--disk", other, "--state", tmp_path / "s", "--socket", tmp_path / "n.sock")
    assert "listens there" in hvreplica("capture", *arguments).err
    for _ in range(60):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "n.sock"))
            client.settimeout(30)
            client.recv(18)
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while client.recv(4096):
                    pass
    _, err = capture.end()
    warnings = [line for line in err.splitlines() if " warning " in line]
    assert 6 <= len(warnings) <= 12, err
    assert "further clients were refused or failed as well" in err
    assert "connection broke" not in err


def test_store_status_counts_the_disks_that_the_vm_has() -> None:
    disks = [DiskStatus(0, "a", "0.vhdx", MIB, MIB), DiskStatus(1, "b", "1.vhdx", MIB, MIB, "removed")]
    row = _row(SimpleNamespace(name="web01", phase="ready", disks=disks, points=[]))  # type: ignore[arg-type]
    assert row[2:5] == (1, "1.0 MiB", "2.0 MiB")
