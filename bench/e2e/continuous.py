"""How old a write is at most before the replica has it, while the guest writes 50 MiB/s of random 4 KiB.

Beside fio a client writes a numbered block every 20 ms and notes when it was acknowledged. What the replica
has is told from outside: a write that was acknowledged before the instant of a cut is in the cut's point, and
the server logs when it has committed a point. So a write's age is the time from its acknowledgement to the
commit of the first point with a later instant. Clocks round up: the log's milliseconds count as the next one.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import statistics
import struct
import threading
import time
from bisect import bisect_right
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from bench.e2e.guest import (
    PROGRAM,
    CaptureProcess,
    Client,
    filled_disk,
    processor_s,
    start_load,
    wait_until,
    written_rate,
)
from bench.e2e.site import Site
from bench.harness import Figure, Report, missing, scratch, timed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOOLS = ("qemu-img", "qemu-io", "fio")
MIB = 1 << 20
_EVERY_S = 0.02
_PLACES = 256  # blocks that the numbered ones go to in turn
_BLOCK_BYTES = 4096
_LOG_RESOLUTION_S = 0.001
_BEHIND_S = 60.0  # to get everything after the load


class Point(NamedTuple):
    """A point at the replica. instant_s: what it shows; durable_s: when it was committed. Unix times."""

    instant_s: float
    durable_s: float
    is_applied: bool


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("continuous replication of 50 MiB/s of random 4 KiB writes")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    seconds, load_bytes = (1.0, 16 * MIB) if smoke else (20.0, 1024 * MIB)
    with scratch() as folder:
        disk, log = folder / "web01.vhdx", folder / "serve.log"
        filled_disk(disk, disk_bytes=load_bytes + _PLACES * _BLOCK_BYTES, filled_bytes=load_bytes)
        with Site(folder, "--log-json") as site:
            options = ("--to", site.address, "--tls", str(site.tls), "--continuous")
            with CaptureProcess(folder, disk, folder / "state", options) as capture:
                prober = Prober(capture.socket, load_bytes)
                prober.probe()
                wait_until(lambda: _has_all(site, prober), "the first copy", limit_s=_BEHIND_S)
                prober.acknowledged_s.clear()
                before_s = capture.processor_s(), processor_s(site.server_id)
                with prober.probing():
                    fio = start_load(
                        capture.socket, size_bytes=load_bytes, seconds=seconds, options=("--rate=50m",)
                    )
                    rate = written_rate(fio)
                used_s = capture.processor_s() - before_s[0], processor_s(site.server_id) - before_s[1]
                prober.probe()  # behind all of the load, so that its point has everything
                wait_until(lambda: _has_all(site, prober), "the last write", limit_s=_BEHIND_S)
                prober.close()
        _verify(folder, disk, prober)
        points = _points(site.store, log)
    _add_figures(report, prober.acknowledged_s, points, rate)
    each = ", ".join(f"{each_s / (rate * seconds / 1e9):.1f} s" for each_s in used_s)
    report.figures.append(Figure("processor time of capture and serve per GB written", each))
    return report


class Prober:
    """Writes numbered blocks to places behind the load. acknowledged_s: the Unix time of each answer."""

    def __init__(self, path: Path, first_offset: int) -> None:
        self._client = Client(path)
        self._first_offset = first_offset
        self._stop = threading.Event()
        self.acknowledged_s: list[float] = []
        self.number = 0

    def probe(self) -> None:
        self.number += 1
        place = self._first_offset + self.number % _PLACES * _BLOCK_BYTES
        head = struct.pack(">Qd", self.number, time.time())
        self._client.write(place, head.ljust(_BLOCK_BYTES, b"p"))
        self.acknowledged_s.append(time.time())

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Write one every 20 ms, where the answers allow it, while the block runs."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def last_block(self) -> tuple[int, int]:
        """Return (disk_offset, number) of the block written last."""
        return self._first_offset + self.number % _PLACES * _BLOCK_BYTES, self.number

    def close(self) -> None:
        self._client.close()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self.probe()


def _points(store: Path, log: Path) -> list[Point]:
    """Return the points of which it is logged when they were committed, in their order."""
    durable_s = {}
    for line in log.read_text().splitlines():
        words = json.loads(line)
        if "received in" in words["message"]:
            point_id = words["message"].split("point ")[1].split()[0]
            durable_s[point_id] = datetime.fromisoformat(words["time"]).timestamp() + _LOG_RESOLUTION_S
    with contextlib.closing(sqlite3.connect(f"file:{store / 'catalog.db'}?mode=ro", uri=True)) as catalog:
        rows = catalog.execute(
            "SELECT id, instant_s, applied_s FROM point WHERE kind = 'standard' ORDER BY sequence"
        )
        return [
            Point(instant_s, durable_s[point_id], applied_s is not None)
            for point_id, instant_s, applied_s in rows
            if point_id in durable_s
        ]


def _has_all(site: Site, prober: Prober) -> bool:
    """Return whether the newest point holds everything that was acknowledged, and the disks show it."""
    points = _points(site.store, site.folder / "serve.log") if (site.store / "catalog.db").exists() else []
    return bool(points) and points[-1].is_applied and points[-1].instant_s > prober.acknowledged_s[-1]


def _verify(folder: Path, disk: Path, prober: Prober) -> None:
    """Prove that the newest point is the disk, the last numbered block included."""
    exported = folder / "exported.raw"
    timed([*PROGRAM, "point", "export", "--store", folder / "store", "--vm", "web01", "--output", exported])
    timed(["qemu-img", "compare", "-f", "vhdx", "-F", "raw", disk, exported])
    disk_offset, number = prober.last_block()
    with exported.open("rb") as file:
        file.seek(disk_offset)
        assert struct.unpack(">Q", file.read(8)) == (number,)


def _add_figures(report: Report, acknowledged_s: list[float], points: list[Point], rate: float) -> None:
    instants = [point.instant_s for point in points]
    ages = []
    for at_s in acknowledged_s:
        place = bisect_right(instants, at_s)
        # A point is durable with all before it, so the first later instant is the one that counts.
        ages.append(points[place].durable_s - at_s)
    ages.sort()
    assert ages[0] > 0, "a write was at the replica before it was acknowledged"
    during = [point for point in points if acknowledged_s[0] < point.instant_s <= acknowledged_s[-1]]
    report.samples["age of a write when the replica has it"] = ages
    report.add_limit(
        "99 % of writes are at the replica within", ages[int(0.99 * (len(ages) - 1))], at_most=1.0, unit=" s"
    )
    report.figures += [
        Figure(
            "median and most", f"{statistics.median(ages):.3f} s, {ages[-1]:.3f} s, of {len(ages)} writes"
        ),
        Figure("points during the load", f"{len(during)} in {acknowledged_s[-1] - acknowledged_s[0]:.1f} s"),
        Figure("written by the guest", f"{rate / 1e6:.1f} MB/s", ">= 50 MB/s", rate >= 50e6),
    ]
