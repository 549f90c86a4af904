"""What a VHDX of 64 TB costs before its first byte is read: opening it, and checking all of its BAT.

The files are sparse; their tables are whole. Blocks lie in the file in an order of no use to anybody.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

import hvreplica
from bench.harness import Figure, Report, peak_of, scratch
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.vhdx.create import BAT_OFFSET, default_block_bytes
from hvreplica.files import OS_FILES
from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, BatGeometry, present_entry
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    from pathlib import Path

TIB = 1 << 40
CHECK_S_MAX, CHECK_MIB_MAX = 2, 200
OPEN_S_MAX = 0.05
_SCATTER = 7919  # a prime: block i lies at place i * 7919 modulo their number, so that none are neighbours
_WINDOW_BLOCKS = 1 << 18


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    virtual_bytes = TIB // 4 if smoke else 64 * TIB
    report = Report(f"a VHDX of {virtual_bytes / TIB:g} TiB")
    runs = 1 if smoke else 5
    with scratch() as folder:
        path = folder / "a.vhdx"
        for block_bytes in (default_block_bytes(virtual_bytes), MIB):
            name = f"blocks of {block_bytes // MIB} MiB"
            for content in ("empty", "full"):
                _create(path, virtual_bytes, block_bytes, is_full=content == "full")
                _measure_open(report, path, f"open, {name}, {content} BAT", virtual_bytes, runs)
            _measure_check(report, path, f"check, {name}, full BAT", runs)
            path.unlink()
    return report


def _create(path: Path, virtual_bytes: int, block_bytes: int, *, is_full: bool) -> None:
    create_disk(
        OS_FILES, path, virtual_bytes=virtual_bytes, block_bytes=block_bytes, clock=SYSTEM, overwrite=True
    )
    if not is_full:
        return
    geometry = BatGeometry.of(virtual_bytes=virtual_bytes, block_bytes=block_bytes, logical_sector_bytes=512)
    first_place = BAT_OFFSET + align_up(geometry.entry_count * BAT_ENTRY_BYTES, MIB)
    with path.open("r+b") as file:
        file.truncate(first_place + geometry.block_count * block_bytes)
        for first in range(0, geometry.block_count, _WINDOW_BLOCKS):
            blocks = np.arange(first, min(first + _WINDOW_BLOCKS, geometry.block_count), dtype=np.int64)
            places = first_place + blocks * _SCATTER % geometry.block_count * block_bytes
            indices = geometry.index_of(blocks)
            window = np.zeros(int(indices[-1] - indices[0]) + 1, "<u8")
            window[indices - indices[0]] = present_entry(places)
            file.seek(BAT_OFFSET + int(indices[0]) * BAT_ENTRY_BYTES)
            window.tofile(file)


def _measure_open(report: Report, path: Path, name: str, virtual_bytes: int, runs: int) -> None:
    """Measure opening in a process that runs already, for reading and for writing."""
    for writable in (False, True):
        label = f"{name}, {'writable' if writable else 'for reading'}"
        samples = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            disk = open_disk(OS_FILES, path, writable=writable, clock=SYSTEM)
            samples.append(time.perf_counter() - start)
            last = np.empty(512, np.uint8)
            disk.read_into(last.data, virtual_bytes - 512)
            disk.close()
            if last.any():
                message = "a hole does not read as zeros"
                raise RuntimeError(message)
        report.samples[label] = samples[1:]
        report.add_limit(label, statistics.median(samples[1:]), at_most=OPEN_S_MAX, unit=" s")


def _measure_check(report: Report, path: Path, name: str, runs: int) -> None:
    """Measure the whole command, and the most memory that it had."""
    if "disk_check" not in hvreplica.__all__:
        report.figures.append(Figure(name, "skipped: this version has no `disk check`"))
        return
    samples, peaks = [], []
    for _ in range(runs + 1):
        seconds, answer, peak_bytes = peak_of(
            [sys.executable, "-m", "hvreplica", "disk", "check", path, "--json"]
        )
        json.loads(answer)  # it ended with 0, which says that nothing is wrong
        samples.append(seconds)
        peaks.append(peak_bytes / MIB)
    report.samples[name] = samples[1:]
    report.add_limit(f"{name}, whole command", statistics.median(samples[1:]), at_most=CHECK_S_MAX, unit=" s")
    report.add_limit(f"{name}, peak memory", max(peaks), at_most=CHECK_MIB_MAX, unit=" MiB")
