"""Applying a cycle with older points kept, against applying it without: bytes written, and seconds.

Two stores get the same cycles in turn. In one every point is kept, so that what a cycle overwrites is written
down before; in the other only the newest. Counted are the bytes of all calls that write, the catalog's
included. The disk is full of data that nothing compresses. `scattered`: single blocks of 4 KiB at random
places, the worst case. `mixed`: half of the bytes in runs of 64 KiB.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from bench.e2e.replica import BLOCK, EVERY, NO_OLDER, Replica, blocks, written_bytes
from bench.harness import SEED, Figure, Report, scratch, short_of, told
from hvreplica.disk.extents import merge
from hvreplica.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BYTES_MAX = 2.0
RATE_MIN = 0.5
_RUN_BLOCKS = 16


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    disk_bytes, churn_bytes, cycles = (32 * MIB, MIB, 1) if smoke else (1024 * MIB, 64 * MIB, 5)
    report = Report(f"applying {churn_bytes // MIB} MiB with undo and without")
    short = short_of(3 * disk_bytes + 4 * cycles * churn_bytes)
    if short is not None:
        report.figures.append(Figure("skipped", short))
        return report
    for name, choose in (("scattered", _scattered), ("mixed", _mixed)):
        with scratch() as folder:
            _measure(report, folder, name, choose, sizes=(disk_bytes, churn_bytes, cycles))
    return report


def _measure(
    report: Report,
    folder: Path,
    name: str,
    choose: Callable[[np.random.Generator, int, int], np.ndarray],
    *,
    sizes: tuple[int, int, int],
) -> None:
    disk_bytes, churn_bytes, cycles = sizes
    rng = np.random.default_rng(SEED)
    written: dict[str, int] = {}
    received = 0  # by each of the two
    names = {"with": f"apply with undo, {name}", "without": f"apply without undo, {name}"}
    with (
        Replica(folder / "with", disk_bytes=disk_bytes, policy=EVERY) as keeping,
        Replica(folder / "without", disk_bytes=disk_bytes, policy=NO_OLDER) as plain,
    ):
        for number in range(cycles + 1):  # the first one does not count
            extents = choose(rng, disk_bytes, churn_bytes)
            content = rng.bytes(int(extents[:, 1].sum()))
            for key, replica in (("with", keeping), ("without", plain)):
                log_bytes = replica.receive(extents, content)
                before, start = written_bytes(), time.perf_counter()
                replica.apply()
                seconds = time.perf_counter() - start
                if number:
                    report.samples.setdefault(names[key], []).append(seconds)
                    written[key] = written.get(key, 0) + written_bytes() - before
                    received += log_bytes // 2
                told(f"{seconds:9.3f} s  {names[key]}")
        keeping.verify_oldest()
        space = sum(path.stat().st_blocks * 512 for path in keeping.parts) / len(keeping.parts)
    share = written["with"] / written["without"]
    report.add_limit(f"bytes written with undo, of those without, {name}", share, at_most=BYTES_MAX)
    cycle = (written["with"] + received) / (written["without"] + received)
    report.figures.append(Figure(f"the same with the log's arrival, {name}", f"{cycle:.3f}"))
    report.add_ratio(
        f"rate with undo, of that without, {name}", names["with"], names["without"], at_least=RATE_MIN
    )
    report.add_limit(f"space of a point, by what changed, {name}", space / churn_bytes, at_most=1.05)


def _scattered(rng: np.random.Generator, disk_bytes: int, churn_bytes: int) -> np.ndarray:
    return blocks(rng.permutation(disk_bytes // BLOCK)[: churn_bytes // BLOCK].astype(np.int64) * BLOCK)


def _mixed(rng: np.random.Generator, disk_bytes: int, churn_bytes: int) -> np.ndarray:
    """Half of the blocks in runs, the other half alone; a few fall together, and as many are missing."""
    count = churn_bytes // BLOCK // 2
    runs = rng.permutation(disk_bytes // BLOCK // _RUN_BLOCKS)[: count // _RUN_BLOCKS].astype(np.int64)
    run_bytes = _RUN_BLOCKS * BLOCK
    rows = np.column_stack((runs * run_bytes, np.full(len(runs), run_bytes, np.int64)))
    return merge(np.concatenate((rows, _scattered(rng, disk_bytes, count * BLOCK))))
