"""A replica server and a primary as real processes on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

PROGRAM = [sys.executable, "-m", "hvreplica"]


class Site:
    """A served store in `folder` and the certificates of both sides. Use as a context manager."""

    def __init__(self, folder: Path, *options: str) -> None:
        """options: more of `serve`, whose log goes to serve.log."""
        self.folder = folder
        self._count = 0
        self.store = folder / "store"
        self.tls = folder / "tls"
        subprocess.run([*PROGRAM, "tls", "init", str(self.tls)], check=True, capture_output=True)
        self._server = subprocess.Popen(
            [
                *PROGRAM,
                "serve",
                "--store",
                str(self.store),
                "--listen",
                "127.0.0.1:0",
                "--tls",
                str(self.tls),
                "--json",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=(folder / "serve.log").open("w"),
            text=True,
        )
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        answer = json.loads(line)
        self.address = f"{answer['host']}:{answer['port']}" if "host" in answer else answer["address"]

    def fresh(self, name: str) -> tuple[str, str]:
        """Return the names of a VM and of a state folder that were never used."""
        self._count += 1
        return f"{name}-{self._count}", f"state-{name}-{self._count}"

    def discard(self, vm: str, state: str) -> None:
        """Free the memory that a finished run's copies take; the store keeps the VM's name."""
        shutil.rmtree(self.folder / state)
        for disk in (self.store / vm / "disks").iterdir():
            disk.unlink()

    def replicate(self, *disks: Path, vm: str, state: str, options: tuple[str, ...] = ()) -> Outcome:
        """Run `replicate --once` as a process; return what it said, its seconds and its peak memory."""
        command = [*PROGRAM, "replicate", "--vm", vm, "--to", self.address, "--tls", str(self.tls)]
        command += ["--state", str(self.folder / state), "--once", "--json", *options]
        for disk in disks:
            command += ["--disk", str(disk)]
        out, err = self.folder / "replicate.out", self.folder / "replicate.err"
        start = time.perf_counter()
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said = out.read_text()[-2000:] + err.read_text()[-2000:]
            message = f"{command} ended with {process.returncode}: {said}"
            raise RuntimeError(message)
        return Outcome(json.loads(out.read_text()), seconds, usage.ru_maxrss * 1024)

    def replica(self, vm: str, index: int = 0) -> Path:
        """Return the replica's disk."""
        return self.store / vm / "disks" / f"{index}.vhdx"

    @property
    def server_id(self) -> int:
        """The number of the server's process."""
        return self._server.pid

    def server_peak_bytes(self) -> int:
        """Return the most memory that the server has had so far."""
        for line in Path(f"/proc/{self._server.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.send_signal(signal.SIGTERM)
        self._server.wait()


class Outcome:
    """What one replicate call said (its JSON), its wall seconds and its peak memory in bytes."""

    def __init__(self, answer: dict[str, Any], seconds: float, peak_bytes: int) -> None:
        self.answer = answer
        self.seconds = seconds
        self.peak_bytes = peak_bytes
