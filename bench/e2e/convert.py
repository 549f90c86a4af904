"""`disk convert` and `disk compare` of a file system as whole commands, against qemu-img.

Comparing is also measured inside one process against the machine's memory read rate, and with a difference in
the first MiB.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.corpus import file_system_image
from bench.e2e.formats import DRIVERS
from bench.harness import Figure, Report, missing, run_in_turn, scratch, timed
from bench.micro.kernels import ReadLoop
from hvreplica.clock import SYSTEM
from hvreplica.disk import compare_disks, open_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
PROGRAM = [sys.executable, "-m", "hvreplica", "disk"]
TOOLS = ("qemu-img", "mkfs.ext4", "cp", os.environ.get("CC", "cc"))
EARLY_EXIT_S_MAX = 0.05


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("converting and comparing a file system of 6 GiB")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    runs = 1 if smoke else 5
    with scratch() as folder:
        raw = folder / "a.raw"
        timed(["cp", "--sparse=always", file_system_image(smoke=smoke), raw])
        for name in ("vhdx", "vhd"):
            if not _can_convert(name, folder):
                report.figures.append(
                    Figure(f"raw to {name} and back", "skipped: this version cannot write it")
                )
                continue
            goal = 1 if name == "vhdx" else None
            image = folder / f"a.{name}"
            _measure_convert(report, raw, image, runs, goal)
            timed([*PROGRAM, "convert", raw, image, "--quiet"])
            _measure_convert(report, image, folder / "b.raw", runs, goal)
        _measure_compare(report, raw, folder / "a.vhdx", runs)
    return report


def _can_convert(name: str, folder: Path) -> bool:
    """Return whether the command makes a disk of the format `name` of a file whose name ends so."""
    source, target = folder / "trial.raw", folder / f"trial.{name}"
    source.write_bytes(bytes(4 * MIB))
    timed([*PROGRAM, "convert", source, target, "--quiet"])
    with open_disk(OS_FILES, target, clock=SYSTEM) as disk:
        found: str = disk.format
    source.unlink()
    target.unlink()
    return found == name


def _measure_convert(report: Report, source: Path, target: Path, runs: int, goal: float | None) -> None:
    from_format, to_format = source.suffix[1:], target.suffix[1:]
    driver = DRIVERS[to_format]
    qemu: list[str | Path] = [
        "qemu-img",
        "convert",
        "-W",
        "-m",
        "16",
        "-f",
        DRIVERS[from_format],
        "-O",
        driver,
    ]
    if to_format == "vhd":
        qemu += ["-o", "force_size=on"]  # without it QEMU makes the disk longer than its source
    name = f"{from_format} to {to_format}"
    commands: dict[str, list[str | Path]] = {
        f"{name}, hvreplica disk convert": [*PROGRAM, "convert", source, target, "--quiet"],
        f"{name}, qemu-img convert -W -m 16": [*qemu, source, target],
    }

    def convert(command: list[str | Path]) -> float:
        seconds, _ = timed(command)
        timed(["qemu-img", "compare", "-f", DRIVERS[from_format], "-F", driver, source, target])
        target.unlink()
        return seconds

    contenders = {label: partial(convert, command) for label, command in commands.items()}
    run_in_turn(report, contenders, runs=runs)
    report.add_ratio(f"convert {name}", *contenders, at_least=goal)


def _measure_compare(report: Report, raw: Path, image: Path, runs: int) -> None:
    commands: dict[str, list[str | Path]] = {
        "compare, hvreplica disk compare": [*PROGRAM, "compare", raw, image, "--quiet"],
        "compare, qemu-img compare": ["qemu-img", "compare", "-f", "raw", "-F", "vhdx", raw, image],
    }
    contenders: dict[str, Callable[[], float]] = {
        label: partial(_seconds, command) for label, command in commands.items()
    }
    run_in_turn(report, contenders, runs=runs)
    report.add_ratio("compare", *contenders, at_least=1)
    buffer = np.ones(128 * MIB, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        loop = ReadLoop(Path(folder), buffer)
    ratios, rates = [], []
    for _ in range(runs + 1):
        before = loop.rate()
        start = time.perf_counter()
        found = compare_disks(OS_FILES, raw, image, clock=SYSTEM)
        rates.append(2 * found.bytes_compared / (time.perf_counter() - start))
        ratios.append(rates[-1] / max(before, loop.rate()))
        if not found.equal:
            message = "equal disks compare as different"
            raise RuntimeError(message)
    value = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
    rate = statistics.median(rates) / 1e9
    report.figures.append(
        Figure("compare, bytes of both disks, of the memory read rate", f"{value}; {rate:.1f} GB/s")
    )
    _measure_early_exit(report, raw, image, runs)


def _measure_early_exit(report: Report, raw: Path, image: Path, runs: int) -> None:
    """Measure finding a difference at 64 KiB, inside of this process; changes `raw`."""
    at = 64 << 10
    with raw.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        found = compare_disks(OS_FILES, raw, image, clock=SYSTEM)
        samples.append(time.perf_counter() - start)
        if found.first_difference != at:
            message = f"the difference at {at} was found at {found.first_difference}"
            raise RuntimeError(message)
    name = "compare, a difference in the first MiB"
    report.samples[name] = samples
    report.add_limit(name, statistics.median(samples), at_most=EARLY_EXIT_S_MAX, unit=" s")


def _seconds(command: list[str | Path]) -> float:
    return timed(command)[0]
