"""A server whose disk is full: each error is told, the process lives on, and the work continues later."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import hvreplica
from hvreplica.errors import FormatError, StoreFull, Truncated, kept

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def serve(store: Path, tls: Path, *, room_bytes: int) -> tuple[subprocess.Popen[str], str]:
    """Start a server whose disk takes so many bytes of payload."""
    command = [
        "-m",
        "tests.replication.full",
        str(room_bytes),
        "serve",
        "--store",
        str(store),
        "--tls",
        str(tls),
    ]
    process = subprocess.Popen(
        [sys.executable, *command, "--listen", "127.0.0.1:0", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
    )
    assert process.stdout is not None
    answer = json.loads(process.stdout.readline())
    return process, answer.get("address") or f"{answer['host']}:{answer['port']}"


def test_server_survives_writes_that_fail_in_several_threads(tmp_path: Path, tls: Path, seed: int) -> None:
    disk = tmp_path / "a.raw"
    disk.write_bytes(random.Random(seed).randbytes(64 * MIB))
    options = {"tls": tls, "state": tmp_path / "state", "compression": "none", "connections": 4}
    process, address = serve(tmp_path / "store", tls, room_bytes=24 * MIB)
    for _ in range(3):
        with pytest.raises(StoreFull):
            hvreplica.replicate("web01", [disk], to=address, **options)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    process, address = serve(tmp_path / "store", tls, room_bytes=1 << 40)
    assert hvreplica.replicate("web01", [disk], to=address, **options).kind == "initial"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    export = tmp_path / "export.raw"
    hvreplica.point_export(tmp_path / "store", "web01", export, format="raw")
    assert export.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(
    "error", [OSError(28, "full", "/x"), Truncated("short", path="/x", offset=5, hint="h")]
)
def test_kept_error_says_the_same_and_holds_no_frame(error: Exception) -> None:
    error.__dict__.setdefault("__notes__", []).append("a note")
    try:
        raise error
    except (OSError, FormatError) as raised:
        copied = kept(raised)
    assert copied.__traceback__ is None
    assert copied.__context__ is None
    assert str(copied) == str(error)
    assert type(copied) is type(error)
    assert copied.__dict__ == error.__dict__
    assert traceback.format_exception_only(copied) == traceback.format_exception_only(error)
    gc.collect()
