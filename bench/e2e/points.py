"""Opening the oldest of 24 points of a disk, each with 1 % of it changed: how soon, and how fast it is read.

The points come from 24 cycles of random 4 KiB writes, applied by a store in this process. The first byte is
timed from the start of the command, interpreter included, to the answer of a read over NBD. fio reads 4 KiB
at random places of the oldest and of the newest point, each from a server of its own.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.corpus import random_blocks
from bench.e2e.guest import PROGRAM, Client
from bench.e2e.replica import BLOCK, EVERY, Replica, blocks
from bench.harness import SEED, Figure, Report, missing, run_in_turn, scratch, short_of, timed, told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOOLS = ("nbdcopy", "fio")
MIB, GIB = 1 << 20, 1 << 30
POINTS = 24
_REQUESTS = 100_000
_OLDEST, _LATEST = "4 KiB random reads: the oldest of 24", "4 KiB random reads: the latest"
_FIRST_BYTE = "first byte of the oldest of 24, from the start of the command"


class Sizes(NamedTuple):
    """What is measured on. read_s: of one run of fio."""

    disk_bytes: int
    read_s: float
    runs: int


SMOKE = Sizes(64 * MIB, 0.2, 1)
FULL = Sizes(6 * GIB, 1.5, 4)


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report(f"opening one of {POINTS} points, 1 % of the disk changed by each")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    sizes = SMOKE if smoke else FULL
    short = short_of(sizes.disk_bytes * 4 // 3 + GIB)
    if short is not None:
        report.figures.append(Figure("skipped", short))
        return report
    with scratch() as folder:
        with Replica(folder / "store", disk_bytes=sizes.disk_bytes, policy=EVERY) as replica:
            told("the first copy is there")
            _make_points(replica, sizes)
        told(f"{POINTS} cycles were applied")
        bench = _Bench(folder, replica, sizes)
        bench.verify(replica.pattern)
        told("the oldest point is what it was")
        run_in_turn(
            report,
            {
                _FIRST_BYTE: bench.first_byte_s,
                _OLDEST: partial(bench.read_s, bench.oldest),
                _LATEST: partial(bench.read_s, "latest"),
            },
            runs=sizes.runs,
            tell=True,
        )
        _report_space(report, replica, sizes)
    report.add_limit("first byte of the oldest", report.median(_FIRST_BYTE), at_most=1.0, unit=" s")
    report.add_ratio("random reads of the oldest against the latest", _OLDEST, _LATEST, at_least=0.5)
    return report


def _make_points(replica: Replica, sizes: Sizes) -> None:
    """Run a cycle for each further point."""
    count = sizes.disk_bytes // 100 // BLOCK
    everywhere = random_blocks(sizes.disk_bytes // BLOCK, disk_bytes=sizes.disk_bytes)
    rng = np.random.default_rng(SEED)
    for number in range(POINTS):
        replica.receive(blocks(everywhere[number * count : (number + 1) * count]), rng.bytes(count * BLOCK))
        replica.apply()


class _Bench:
    """Servers of points. oldest: its id."""

    def __init__(self, folder: Path, replica: Replica, sizes: Sizes) -> None:
        self._folder = folder
        self._sizes = sizes
        self._store = ("--store", str(replica.root), "--vm", replica.vm)
        points = json.loads(timed([*PROGRAM, "point", "list", *self._store, "--json"])[1])
        complete = [point["id"] for point in points if point["state"] == "complete"]
        assert len(complete) == POINTS + 1
        self.oldest = complete[0]

    @contextlib.contextmanager
    def serving(self, point: str) -> Iterator[Path]:
        """Serve a point; yield the socket once it listens."""
        socket = self._folder / "p.sock"
        command = [*PROGRAM, "point", "serve", *self._store, "--point", point, "--socket", str(socket)]
        server = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            assert json.loads(server.stdout.readline())["event"] == "listening"
            yield socket
        finally:
            server.terminate()
            assert server.wait() == 0

    def verify(self, pattern: bytes) -> None:
        """Prove that the oldest point is served as it was: the pattern, over and over."""
        with self.serving(self.oldest) as socket:
            reading = subprocess.Popen(
                ["nbdcopy", "--no-extents", f"nbd+unix:///0?socket={socket}", "-"], stdout=subprocess.PIPE
            )
            assert reading.stdout is not None
            read_bytes = 0
            while data := reading.stdout.read(len(pattern)):
                assert data == pattern[: len(data)], f"another content at {read_bytes}"
                read_bytes += len(data)
            assert reading.wait() == 0
        assert read_bytes == self._sizes.disk_bytes

    def first_byte_s(self) -> float:
        """Return the seconds from the start of `point serve` to the first bytes that it gives out."""
        start = time.perf_counter()
        with self.serving(self.oldest) as socket:
            client = Client(socket)
            client.read(self._sizes.disk_bytes // 2, BLOCK)
            seconds = time.perf_counter() - start
            client.close()
        return seconds

    def read_s(self, point: str) -> float:
        """Return the seconds that _REQUESTS take."""
        with self.serving(point) as socket:
            _, printed = timed([
                "fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///0?socket={socket}", "--rw=randread",
                "--bs=4k", f"--size={self._sizes.disk_bytes}", "--iodepth=16", "--time_based",
                f"--runtime={int(self._sizes.read_s * 1000)}ms", "--randseed=42", "--output-format=json",
            ])  # fmt: skip
        job = json.loads(printed[printed.index("{") :])["jobs"][0]
        return _REQUESTS / float(job["read"]["iops"])


def _report_space(report: Report, replica: Replica, sizes: Sizes) -> None:
    """Say what a point takes, against what changed."""
    parts = [path.stat().st_blocks * 512 for path in replica.parts]
    churn = sizes.disk_bytes // 100 // BLOCK * BLOCK
    report.add_limit("space of a point, by what changed", sum(parts) / len(parts) / churn, at_most=1.05)
