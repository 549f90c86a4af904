"""kill -9 of either real process at any of its file operations: the next `--once` continues, both ends are equal."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
DISK_BYTES = 32 * MIB
ROUNDS = 60 if settings().max_examples > 1000 else 3


class Sites:
    """A primary and a replica of which either may be told to die."""

    def __init__(self, folder: Path, tls: Path, seed: int) -> None:
        self.folder, self.tls = folder, tls
        self.disk, self.store = folder / "web01.vhdx", folder / "store"
        self.rng = random.Random(seed)
        hvreplica.disk_create(self.disk, DISK_BYTES, block_bytes=MIB)
        self.write(6 * MIB)
        self._server: subprocess.Popen[str] | None = None
        self.address = ""

    def write(self, total_bytes: int, piece_bytes: int = 64 << 10) -> None:
        with contextlib.closing(open_disk(OS_FILES, self.disk, writable=True, clock=SYSTEM)) as disk:
            for _ in range(total_bytes // piece_bytes):
                at = self.rng.randrange((DISK_BYTES - piece_bytes) // 4096) * 4096
                disk.write(self.rng.randbytes(piece_bytes), at)
            disk.flush()

    def serve(self, *, kill_at: int = 0) -> None:
        self.stop()
        arguments = [
            "serve",
            "--store",
            str(self.store),
            "--listen",
            "127.0.0.1:0",
            "--tls",
            str(self.tls),
            "--json",
        ]
        self._server = _start(kill_at, *arguments)
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if line:
            self.address = _address(line)

    def stop(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            self._server.communicate()
            self._server = None

    def replicate(self, *, kill_at: int = 0) -> tuple[int, str, str]:
        process = _start(
            kill_at, "replicate", "--vm", "web01", "--disk", str(self.disk), "--to", self.address,
            "--tls", str(self.tls), "--state", str(self.folder / "state"), "--once", "--json",
        )  # fmt: skip
        out, err = process.communicate()
        return process.returncode, out, err

    def is_equal(self) -> bool:
        export = self.folder / "export.raw"
        hvreplica.point_export(self.store, "web01", export, format="raw", overwrite=True)
        return hvreplica.disk_compare(self.disk, export).equal


def _start(kill_at: int, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.replication.dying", str(kill_at), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _address(line: str) -> str:
    answer = json.loads(line)
    return answer["address"] if "address" in answer else f"{answer['host']}:{answer['port']}"


@pytest.fixture
def sites(tmp_path: Path, tls: Path, seed: int) -> Iterator[Sites]:
    made = Sites(tmp_path, tls, seed)
    yield made
    made.stop()


def operations(err: str) -> int:
    """Return how many file operations a run that was not killed counted."""
    return int(err.rsplit("operations ", 1)[1])


@pytest.mark.parametrize("phase", ["initial", "delta"])
def test_primary_killed_anywhere_next_call_continues(sites: Sites, phase: str) -> None:
    sites.serve()
    if phase == "delta":
        assert sites.replicate()[0] == 0
        sites.write(MIB)
    else:
        shutil.rmtree(sites.folder / "state", ignore_errors=True)
    for attempt in range(ROUNDS):
        kill_at = sites.rng.randrange(3, 90)
        code, _, err = sites.replicate(kill_at=kill_at)
        where = f"attempt {attempt}, killed at operation {kill_at}: {err}"
        assert code in (0, -signal.SIGKILL), where
        code, out, err = sites.replicate()
        assert code == 0, f"{where}\nthen {out} {err}"
        assert sites.is_equal(), where
        sites.write(MIB // 2)


def test_replica_killed_anywhere_next_call_continues(sites: Sites) -> None:
    """The server dies in its initial transfer first, then in cycles; it restarts on the same store."""
    deaths = 0
    for attempt in range(ROUNDS + 1):
        kill_at = sites.rng.randrange(40, 500) if attempt < 3 else sites.rng.randrange(40, 160)
        sites.serve(kill_at=kill_at)
        where = f"attempt {attempt}, server killed at operation {kill_at}"
        code, out, err = sites.replicate()
        deaths += code != 0
        assert code in (0, 41, 42), f"{where}: {out} {err}"
        assert "Traceback" not in err, where
        sites.serve()
        code, out, err = sites.replicate()
        assert code == 0, f"{where}\nthen {out} {err}"
        assert sites.is_equal(), where
        sites.write(MIB // 2)
    assert deaths > 1, "the server is to be killed while it works"
