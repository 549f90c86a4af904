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
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.errors import FormatError, StoreFull, Truncated, kept

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 40 MiB of its own; it takes root to make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40M", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(
            f"NOT TESTED: a server on a full file system; no tmpfs can be mounted: {made.stderr.strip()}"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def serve(store: Path, tls: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hvreplica", "serve", "--store", str(store), "--tls", str(tls)),
            *("--listen", "127.0.0.1:0", "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert process.stdout is not None
    answer = json.loads(process.stdout.readline())
    return process, answer.get("address") or f"{answer['host']}:{answer['port']}"


def test_server_on_a_full_file_system_lives_on_and_continues_in_a_larger_one(
    tmp_path: Path, small_disk: Path, tls: Path, seed: int
) -> None:
    disk = tmp_path / "a.raw"
    disk.write_bytes(random.Random(seed).randbytes(96 * MIB))
    options = {"tls": tls, "state": tmp_path / "state", "compression": "none", "connections": 4}
    store = small_disk / "store"
    process, address = serve(store, tls)
    for _ in range(3):
        with pytest.raises(StoreFull):
            hvreplica.replicate("web01", [disk], to=address, **options)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    subprocess.run(["mount", "-o", "remount,size=400M", str(small_disk)], check=True)
    assert hvreplica.replicate("web01", [disk], to=address, **options).kind == "initial"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    export = tmp_path / "export.raw"
    hvreplica.point_export(store, "web01", export, format="raw")
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
