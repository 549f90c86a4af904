"""A VM's disk under `hvreplica capture`, as a process, and what stands for its guest: fio, a small client."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.harness import timed

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = [sys.executable, "-m", "hvreplica"]
_START_S = 60.0
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_READ, _WRITE, _DISC = 0, 1, 2


class CaptureProcess:
    """`hvreplica capture` of one disk. Use as a context manager; kill() ends it as a crash does."""

    def __init__(self, folder: Path, disk: Path, state: Path, options: Sequence[str] = ()) -> None:
        self.state = state
        self.socket = folder / "nbd.sock"
        command = [*PROGRAM, "capture", "--vm", "web01", "--disk", str(disk), "--socket", str(self.socket)]
        self._process = subprocess.Popen(
            [*command, "--state", str(state), "--json", "--log-json", *options],
            stdout=subprocess.PIPE,
            stderr=(folder / "capture.log").open("a"),
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (folder / "capture.log").read_text()[-2000:]
        assert json.loads(line)["event"] == "listening"

    def status(self) -> dict[str, Any]:
        """Return what `status` says."""
        answer: dict[str, Any] = json.loads(timed([*PROGRAM, "status", "--state", self.state, "--json"])[1])
        return answer

    def kill(self) -> None:
        """End it at once, as a crash of the process does."""
        self._process.kill()
        self._process.wait()

    def processor_s(self) -> float:
        """Return the seconds of processor time that it has used."""
        return processor_s(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        status = self._process.wait()
        assert status in {0, -9}, f"capture ended with {status}"


class Client:
    """One connection to the export "0": one request at a time, each answered on return."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._receive(18)  # greeting and flags
        # Fixed newstyle without the zeros, then the export called "0" is chosen.
        self._socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 1) + b"0")
        self.size_bytes, _ = struct.unpack(">QH", self._receive(10))
        self._cookie = 0

    def write(self, disk_offset: int, data: bytes) -> None:
        self._cookie += 1
        request = _REQUEST.pack(0x25609513, 0, _WRITE, self._cookie, disk_offset, len(data))
        self._socket.sendall(request + data)
        magic, error, cookie = _REPLY.unpack(self._receive(16))
        assert (magic, error, cookie) == (0x67446698, 0, self._cookie)

    def read(self, disk_offset: int, length: int) -> bytes:
        self._cookie += 1
        self._socket.sendall(_REQUEST.pack(0x25609513, 0, _READ, self._cookie, disk_offset, length))
        magic, error, cookie = _REPLY.unpack(self._receive(16))
        assert (magic, error, cookie) == (0x67446698, 0, self._cookie)
        return self._receive(length)

    def close(self) -> None:
        self._socket.sendall(_REQUEST.pack(0x25609513, 0, _DISC, 0, 0, 0))
        self._socket.close()

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            assert part, "the server ended"
            data += part
        return data


def processor_s(process_id: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_load(
    path: Path, *, size_bytes: int, seconds: float, options: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start fio: 4 KiB writes at random places of the first `size_bytes`, 16 at a time; the caller waits."""
    return subprocess.Popen(
        [
            "fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///0?socket={path}", "--rw=randwrite",
            "--bs=4k", "--iodepth=16", f"--size={size_bytes}", "--time_based",
            f"--runtime={int(seconds * 1000)}ms", "--randseed=42", "--output-format=json", *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def written_rate(fio: subprocess.Popen[str]) -> float:
    """Wait for fio; return the bytes per second that it wrote."""
    printed, _ = fio.communicate()
    assert fio.returncode == 0, printed
    job = json.loads(printed[printed.index("{") :])["jobs"][0]
    return float(job["write"]["bw_bytes"])


def filled_disk(path: Path, *, disk_bytes: int, filled_bytes: int) -> None:
    """Make a dynamic VHDX whose first `filled_bytes` are written, all with the same byte."""
    timed(["qemu-img", "create", "-q", "-f", "vhdx", path, str(disk_bytes)])
    step = 1 << 30
    for start in range(0, filled_bytes, step):
        length = min(step, filled_bytes - start)
        timed(["qemu-io", "-f", "vhdx", "-c", f"write -q -P 1 {start} {length}", path])


def wait_until(done: Any, what: str, *, limit_s: float = _START_S) -> None:
    """Return once `done()` is true. Raises: TimeoutError."""
    end = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)
