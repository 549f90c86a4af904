"""`log import` as a user types it: whose log it is, JSON, exit codes."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.command_line import Run

    Invoke = Callable[..., Run]

MIB = 1 << 20


@pytest.fixture
def protected(tmp_path: Path) -> Path:
    """Return a folder with a.vhdx and b.vhdx, replicated once with the state folder `state`."""
    hvreplica.tls_init(tmp_path / "tls")
    disks = [tmp_path / "a.vhdx", tmp_path / "b.vhdx"]
    for disk in disks:
        hvreplica.disk_create(disk, 4 * MIB)
    server = hvreplica.Server(tmp_path / "store", listen="127.0.0.1:0", tls=tmp_path / "tls")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        host, port = server.address
        hvreplica.replicate("two", disks, to=f"{host}:{port}", tls=tmp_path / "tls", state=tmp_path / "state")
    finally:
        server.close()
        thread.join()
    return tmp_path


def foreign_log(path: Path, *, previous: uuid.UUID | None = None) -> Path:
    with LogWriter.create(
        OS_FILES,
        path,
        log_id=uuid.uuid4(),
        previous_log_id=previous,
        data_write_guid=None,
        clock=SYSTEM,
    ) as writer:
        writer.append(np.array([[MIB, 4096]]), b"new " * 1024)
    return path


def test_an_import_says_what_becomes_of_the_logs(invoke: Invoke, protected: Path) -> None:
    logs = [foreign_log(protected / "0.hrl"), foreign_log(protected / "1.hrl", previous=uuid.uuid4())]
    command = ("log", "import", *logs, "--state", protected / "state")
    run = invoke(*command, "--disk-index", 1, "--disk-index", 0)
    assert run.code == 22
    assert "--force" in run.err
    run = invoke(
        *command, "--disk", protected / "b.vhdx", "--disk", protected / "a.vhdx", "--force", "--json"
    )
    assert (run.code, run.err) == (0, "")
    assert [(log["disk_index"], log["follows"]) for log in run.answer["logs"]] == [(1, True), (0, False)]
    assert run.answer["waiting"] == 1
    more = foreign_log(protected / "2.hrl", previous=uuid.UUID(run.answer["logs"][1]["log_id"]))
    run = invoke(*command[:2], more, *command[4:], "--disk-index", 0)
    assert run.code == 0
    assert "4.0 KiB changed on disk 0 (follows the last one)" in run.out
    assert "waits to be shipped" in run.out


def test_the_disk_is_looked_at_on_request(invoke: Invoke, protected: Path) -> None:
    log = foreign_log(protected / "0.hrl")
    command = ("log", "import", log, "--state", protected / "state", "--disk-index", 0, "--verify-disk")
    run = invoke(*command, "--json")
    assert run.code == 20
    assert run.error["actual"] == f"4096 bytes of {protected / 'a.vhdx'} differ"
    hvreplica.log_apply(log, protected / "a.vhdx")
    assert invoke(*command, "--json").answer["logs"][0]["verified_disk"] is True


def test_each_log_needs_a_disk(invoke: Invoke, protected: Path) -> None:
    logs = [foreign_log(protected / "0.hrl"), foreign_log(protected / "1.hrl")]
    command = ("log", "import", *logs, "--state", protected / "state")
    for options in (
        ("--disk-index", 0),
        ("--disk-index", 0, "--disk", protected / "b.vhdx"),
        ("--disk-index", 64, "--disk-index", 0),
    ):
        assert invoke(*command, *options).code == 2
    assert invoke(*command, "--disk-index", 0, "--disk-index", 0).code == 2
    assert invoke(*command).code == 60
    assert invoke(*command, "--disk-index", 0, "--disk-index", 2).code == 60
    assert invoke("log", "import", logs[0], "--state", protected / "other", "--disk-index", 0).code == 60
