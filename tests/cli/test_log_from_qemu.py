"""`log from-qemu` as a user types it, against a real QEMU: words, JSON, exit codes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

import hvreplica
from tests.support.storage_daemon import NODE, StorageDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.cli.conftest import Run

    Invoke = Callable[..., Run]

MIB = 1 << 20


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    with (tmp_path / "disk.raw").open("wb") as disk:
        disk.truncate(4 * MIB)
    with StorageDaemon(tmp_path / "daemon", tmp_path / "disk.raw") as running:
        yield running


def test_logs_of_a_running_vm(invoke: Invoke, daemon: StorageDaemon, tmp_path: Path) -> None:
    command = ("log", "from-qemu", "--qmp", daemon.monitors[0], "--node", NODE, "--bitmap", "ours")
    run = invoke(*command, tmp_path / "0.hrl", "--json")
    assert run.code == 31
    assert "--full" in run.error["hint"]
    daemon.write((MIB, 4096, 1))
    run = invoke(*command, tmp_path / "0.hrl", "--full", "--scratch", tmp_path / "daemon")
    assert run.code == 0
    assert "4.0 MiB in all on disk" in run.out
    daemon.write((2 * MIB, 4096, 2))
    run = invoke(*command, tmp_path / "1.hrl", "--follows", tmp_path / "0.hrl", "--json")
    assert (run.code, run.err) == (0, "")
    assert (run.answer["data_bytes"], run.answer["virtual_bytes"]) == (65536, 4 * MIB)
    assert run.answer["previous_log_id"] == hvreplica.log_info(tmp_path / "0.hrl").log_id
    run = invoke(*command, tmp_path / "2.hrl", "--follows", run.answer["log_id"])
    assert "0 B changed on disk: 0 entries" in run.out
    assert invoke(*command, tmp_path / "2.hrl").code == 70
    hvreplica.disk_create(tmp_path / "copy.raw", 4 * MIB, format="raw")
    for number in range(3):
        assert invoke("log", "apply", tmp_path / f"{number}.hrl", tmp_path / "copy.raw").code == 0
    assert (tmp_path / "copy.raw").read_bytes() == daemon.content()


def test_no_qemu_and_no_node(invoke: Invoke, daemon: StorageDaemon, tmp_path: Path) -> None:
    command = ("log", "from-qemu", tmp_path / "0.hrl", "--bitmap", "ours", "--full")
    run = invoke(*command, "--qmp", daemon.monitors[0], "--node", "other", "--json")
    assert (run.code, run.error["expected"]) == (32, "disk, file")
    run = invoke(*command, "--qmp", tmp_path / "none.sock", "--node", NODE)
    assert run.code == 41
    assert "-qmp unix:" in run.err
    assert not (tmp_path / "0.hrl").exists()


def test_without_the_package_it_is_named(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    command = (
        "log",
        "from-qemu",
        tmp_path / "0.hrl",
        "--qmp",
        tmp_path / "q",
        "--node",
        "a",
        "--bitmap",
        "b",
    )
    run = invoke(*command)
    assert run.code == 60
    assert 'pip install "hvreplica[qemu]"' in run.err
