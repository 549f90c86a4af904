"""A real QEMU without a guest: qemu-storage-daemon serves a raw disk over NBD, with a QMP monitor or two."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

from hvreplica.capture.qmp import Qmp
from hvreplica.clock import SYSTEM
from tests.support.tools import require_tool, run_tool

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

NODE = "disk"
START_S = 30


class StorageDaemon:
    """One process; close() ends it. Its export shows what a guest would see, whether it is written or not."""

    def __init__(self, folder: Path, disk: Path, *, monitors: int = 1, options: str = "") -> None:
        """options: of the raw node, such as a throttle's."""
        folder.mkdir(exist_ok=True)
        self.disk = disk
        self.export = folder / "nbd.sock"
        self.monitors = [folder / f"qmp{index}.sock" for index in range(monitors)]
        for path in (self.export, *self.monitors):
            path.unlink(missing_ok=True)
        command = [
            require_tool("qemu-storage-daemon"),
            *("--blockdev", f"driver=file,node-name=file,filename={disk}{options}"),
            *("--blockdev", f"driver=raw,node-name={NODE},file=file"),
            *("--nbd-server", f"addr.type=unix,addr.path={self.export}"),
            *("--export", f"type=nbd,id=export,node-name={NODE},name=disk,writable=on"),
        ]
        for index, path in enumerate(self.monitors):
            command += ["--chardev", f"socket,id=monitor{index},path={path},server=on,wait=off"]
            command += ["--monitor", f"chardev=monitor{index}"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline_s = SYSTEM.monotonic_s() + START_S
        while not (self.export.exists() and all(path.exists() for path in self.monitors)):
            if self.process.poll() is not None or SYSTEM.monotonic_s() > deadline_s:
                self.close()
                message = f"qemu-storage-daemon did not start: {self.process.stderr}"
                raise AssertionError(message)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)

    @property
    def url(self) -> str:
        """The export, for NBD clients."""
        return f"nbd+unix:///disk?socket={self.export}"

    def write(self, *writes: tuple[int, int, int]) -> None:
        """Write (disk_offset, length, pattern byte) as a guest; -1 as pattern zeroes without data."""
        commands: list[str] = []
        for offset, length, pattern in writes:
            word = f"write -z {offset} {length}" if pattern < 0 else f"write -P {pattern} {offset} {length}"
            commands += ["-c", word]
        run_tool("qemu-io", "-f", "raw", *commands, self.url)

    def content(self) -> bytes:
        """Return what the guest sees."""
        run_tool(
            "qemu-img", "convert", "-f", "raw", "-O", "raw", self.url, copy := self.export.with_suffix(".raw")
        )
        return copy.read_bytes()

    def qmp(self, index: int = 0) -> Qmp:
        """Return a connection to a monitor."""
        return Qmp(self.monitors[index])

    def close(self) -> None:
        """End the process at once, as a power cut ends a host's QEMU."""
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
