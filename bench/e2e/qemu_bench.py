"""`qemu-img bench` as the peer of guest I/O: the same requests on the same image, at its best depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.harness import timed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PATTERN = 0x55
_STRIDE = 7919  # a prime: requests of 4 KiB jump over the disk and meet each place once
# Threads are faster for large requests, io_uring for small ones; which of them is best, a trial says.
_SETTINGS = (("threads", 4), ("threads", 64), ("io_uring", 4), ("io_uring", 64))


@dataclass(frozen=True)
class Requests:
    """`count` requests of `length` bytes, each `step` bytes behind the one before, around the disk."""

    name: str
    length: int
    step: int
    count: int
    is_write: bool

    def extents(self, virtual_bytes: int) -> np.ndarray:
        """Return them as rows (disk_offset, length), in their order, each place once."""
        offsets = np.arange(self.count, dtype=np.int64) * self.step
        offsets %= virtual_bytes  # as qemu-img bench does
        return np.column_stack((offsets, np.full(self.count, self.length, np.int64)))


def sequential(virtual_bytes: int, *, is_write: bool) -> Requests:
    """Return requests of 1 MiB over the whole disk."""
    name = f"sequential {'write' if is_write else 'read'}, 1 MiB"
    return Requests(name, MIB, MIB, virtual_bytes // MIB, is_write)


def scattered(virtual_bytes: int, *, is_write: bool) -> Requests:
    """Return requests of 4 KiB over half of the disk, far apart."""
    name = f"random {'write' if is_write else 'read'}, 4 KiB"
    return Requests(name, 4 * KIB, 4 * KIB * _STRIDE, virtual_bytes // (8 * KIB), is_write)


class QemuBench:
    """Runs requests on the image `path`; before the first call it tries all settings and keeps the fastest.

    prepare: called before each run, outside of the timed part.
    """

    def __init__(
        self, path: Path, driver: str, requests: Requests, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self._path = path
        self._driver = driver
        self._requests = requests
        self._prepare = prepare
        self._setting: tuple[str, int] | None = None

    def __call__(self) -> float:
        """Return the seconds that qemu-img bench says: without its start, without a flush at the end."""
        if self._setting is None:
            self._setting = self._fastest()
        return self._run(self._setting)

    def _fastest(self) -> tuple[str, int]:
        found = {}
        for setting in _SETTINGS:
            try:
                found[setting] = self._run(setting)
            except RuntimeError:
                if setting[0] == "threads":
                    raise  # io_uring may be absent, threads are always there
        return min(found, key=lambda setting: found[setting])

    def _run(self, setting: tuple[str, int]) -> float:
        self._prepare()
        aio, depth = setting
        requests = self._requests
        command = ["qemu-img", "bench", "-f", self._driver, "-t", "unsafe", "-i", aio, "-d", str(depth)]
        command += ["-c", str(requests.count), "-s", str(requests.length), "-S", str(requests.step)]
        if requests.is_write:
            command += ["-w", f"--pattern={PATTERN}"]
        _, answer = timed([*command, self._path])
        return float(answer.split("Run completed in ")[1].split()[0])
