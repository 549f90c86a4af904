"""Guest I/O through the Python API, in batches, against `qemu-img bench` on the same file in the same run.

Each side has what suits it: qemu-img bench the best of its queues, Python one thread or two; the goal holds
for the faster. Both read into and write from memory that stays in the cache. VHD and differencing disks are
measured where this version has them.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.e2e.formats import DRIVERS, can_have_parents, can_write
from bench.e2e.qemu_bench import GIB, KIB, MIB, PATTERN, QemuBench, Requests, scattered, sequential
from bench.harness import SEED, Figure, Report, missing, run_in_turn, scratch, timed
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BATCH_BYTES = 4 * MIB  # qemu-img bench has up to 64 requests of 1 MiB under way
BLOCK_BYTES = 2 * MIB
OUR_PATTERN = 0xA7


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("guest I/O through the Python API, in batches of 4 MiB")
    absent = missing("qemu-img")
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    virtual_bytes = 32 * MIB if smoke else GIB
    runs = 1 if smoke else 5
    with scratch() as folder:
        for name in ("vhdx", "vhd"):
            if not can_write(name, folder):
                report.figures.append(Figure(name, "skipped: this version cannot write it"))
                continue
            has_goal = name == "vhdx"
            _measure_allocated(report, Image(folder / f"full.{name}", name, virtual_bytes), runs, has_goal)
            _measure_first_touch(report, Image(folder / f"new.{name}", name, virtual_bytes), runs, has_goal)
        if can_have_parents():
            _measure_chain(report, folder, virtual_bytes, runs)
        else:
            report.figures.append(Figure("chain of VHDX", "skipped: this version cannot make one"))
    return report


@dataclass(frozen=True)
class Image:
    """A disk of this benchmark."""

    path: Path
    format: str
    virtual_bytes: int

    def create(self, **options: Any) -> None:
        """Make it, empty."""
        create_disk(
            OS_FILES,
            self.path,
            virtual_bytes=self.virtual_bytes,
            format=self.format,  # type: ignore[arg-type]
            block_bytes=BLOCK_BYTES,
            clock=SYSTEM,
            overwrite=True,
            **options,
        )

    def fill(self, data: np.ndarray) -> None:
        """Make it with this content."""
        self.create()
        self.write(np.array([[0, len(data)]], np.int64), data)

    def write(self, rows: np.ndarray, data: np.ndarray) -> None:
        """Write outside of what is measured."""
        with open_disk(OS_FILES, self.path, writable=True, clock=SYSTEM) as disk:
            disk.write_extents(rows, data.data)

    def time(self, rows: np.ndarray, *, is_write: bool, threads: int = 1) -> float:
        """Return the seconds of these requests, all of one length, and of a flush; without open and close."""
        length = int(rows[0, 1])
        count = max(1, BATCH_BYTES // length)
        with (
            contextlib.closing(open_disk(OS_FILES, self.path, writable=is_write, clock=SYSTEM)) as disk,
            ThreadPoolExecutor(threads) as pool,
        ):
            buffers = [np.full(count * length, OUR_PATTERN, np.uint8) for _ in range(threads)]

            def work(index: int) -> None:
                act = disk.write_extents if is_write else disk.read_extents
                end = len(rows) * (index + 1) // threads
                for first in range(len(rows) * index // threads, end, count):
                    batch = rows[first : min(first + count, end)]
                    act(batch, buffers[index][: len(batch) * length].data)

            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            disk.flush()
            return time.perf_counter() - start

    def verify(self, expected: np.ndarray) -> None:
        """Compare with the bytes that must be in it, by qemu-img. Raises: RuntimeError if one differs."""
        raw = self.path.with_suffix(".expected")
        expected.tofile(raw)
        driver = DRIVERS[self.format]
        timed(["qemu-img", "compare", "-f", "raw", "-F", driver, raw, self.path])
        raw.unlink()

    def verify_reads(self, rows: np.ndarray, expected: np.ndarray) -> None:
        """Read the requests in batches and compare. Raises: RuntimeError if a byte differs."""
        length = int(rows[0, 1])
        pieces = expected.reshape(-1, length)
        with open_disk(OS_FILES, self.path, clock=SYSTEM) as disk:
            for batch in _batches(rows):
                found = np.empty((len(batch), length), np.uint8)
                disk.read_extents(batch, found.data)
                if not np.array_equal(found, pieces[batch[:, 0] // length]):
                    message = f"{self.path.name} does not read as what was written"
                    raise RuntimeError(message)


def _measure_allocated(report: Report, image: Image, runs: int, has_goal: bool) -> None:  # noqa: FBT001
    """Measure reads and writes where all blocks have their places."""
    size = image.virtual_bytes
    expected = _noise(size)
    image.fill(expected)
    for requests in (
        make(size, is_write=is_write) for is_write in (False, True) for make in (sequential, scattered)
    ):
        rows = requests.extents(size)
        name = f"{image.format} {requests.name}"
        contenders: dict[str, Callable[[], float]] = {
            f"{name}, two threads": partial(image.time, rows, is_write=requests.is_write, threads=2),
            f"{name}, one thread": partial(image.time, rows, is_write=requests.is_write),
            f"{name}, qemu-img bench": QemuBench(image.path, DRIVERS[image.format], requests),
        }
        if not requests.is_write:
            image.verify_reads(rows, expected)
        run_in_turn(report, contenders, runs=runs)
        *ours, peer = contenders
        best, other = sorted(ours, key=report.median)
        report.add_ratio(best, best, peer, at_least=1 if has_goal else None)
        report.add_ratio(other, other, peer)
        if requests.is_write:
            # The last run was the peer's: its requests are the same ones if nothing else is there.
            pieces = expected.reshape(-1, requests.length)
            pieces[rows[:, 0] // requests.length] = PATTERN
            image.verify(expected)
            data = _noise(len(rows) * requests.length)
            image.write(rows, data)
            pieces[rows[:, 0] // requests.length] = data.reshape(-1, requests.length)
            image.verify(expected)
    image.path.unlink()


def _measure_first_touch(report: Report, image: Image, runs: int, has_goal: bool) -> None:  # noqa: FBT001
    """Measure writes that give every block its place. Ours are durable at their end."""
    size = image.virtual_bytes
    scattered_touch = Requests(
        "first touch, 4 KiB in each block", 4 * KIB, BLOCK_BYTES, size // BLOCK_BYTES, is_write=True
    )
    filling = Requests("first touch, 1 MiB in order", MIB, MIB, size // MIB // 4, is_write=True)
    # Filling whole blocks waits on both sides for the file system's pages: allocation is a small part.
    for requests, goal in ((scattered_touch, 10), (filling, 1)):
        rows = requests.extents(size)
        name = f"{image.format} {requests.name}"
        qemu = QemuBench(image.path, DRIVERS[image.format], requests, prepare=image.create)
        expected = np.zeros(size, np.uint8)

        def ours(
            rows: np.ndarray = rows, expected: np.ndarray = expected, length: int = requests.length
        ) -> float:
            image.create()
            seconds = image.time(rows, is_write=True)
            expected.reshape(-1, length)[rows[:, 0] // length] = OUR_PATTERN
            image.verify(expected)
            return seconds

        contenders: dict[str, Callable[[], float]] = {
            f"{name}, one thread": ours,
            f"{name}, qemu-img bench": qemu,
        }
        run_in_turn(report, contenders, runs=runs)
        report.add_ratio(name, *contenders, at_least=goal if has_goal else None)
        expected.reshape(-1, requests.length)[rows[:, 0] // requests.length] = PATTERN
        image.verify(expected)
        image.path.unlink()


def _measure_chain(report: Report, folder: Path, virtual_bytes: int, runs: int) -> None:
    """Measure random reads of a child that holds every second 4 KiB, against the same reads of one disk."""
    flat, parent, child = (
        Image(folder / f"{name}.vhdx", "vhdx", virtual_bytes) for name in ("flat", "base", "child")
    )
    expected = _noise(virtual_bytes)
    parent.fill(expected)
    child.create(type="differencing", parent=parent.path)
    held = np.arange(0, virtual_bytes, 8 * KIB, dtype=np.int64)
    rows = np.column_stack((held, np.full(len(held), 4 * KIB, np.int64)))
    data = np.full(len(held) * 4 * KIB, OUR_PATTERN, np.uint8)
    child.write(rows, data)
    expected.reshape(-1, 4 * KIB)[held // (4 * KIB)] = OUR_PATTERN
    flat.fill(expected)
    requests = scattered(virtual_bytes, is_write=False)
    rows = requests.extents(virtual_bytes)
    for image in (flat, child):
        image.verify_reads(rows, expected)
    contenders = {
        f"chain of two VHDX, {requests.name}, one thread": partial(child.time, rows, is_write=False),
        f"one VHDX of this content, {requests.name}, one thread": partial(flat.time, rows, is_write=False),
    }
    run_in_turn(report, contenders, runs=runs)
    report.add_ratio("reads of a chain, against one disk", *contenders)


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    count = max(1, BATCH_BYTES // int(rows[0, 1]))
    for first in range(0, len(rows), count):
        yield rows[first : first + count]


def _noise(length: int) -> np.ndarray:
    """Return bytes without a pattern and without zeros, the same ones in each run."""
    return np.random.default_rng(SEED).integers(1, 256, length, dtype=np.uint8)
