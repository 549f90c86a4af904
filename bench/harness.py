"""What every benchmark shares: a folder in memory, timed runs in turn, medians with their spread, a report.

A contender is a callable that does the work once and returns its seconds; it verifies its own output outside
of the timed part. Contenders run in turn, A B C A B C …, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SEED = 42
RESULTS = Path(__file__).parent / "results"
Contender = "Callable[[], float]"
_SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - tmpfs is what is measured


@dataclass(frozen=True)
class Figure:
    """One line of the report. goal: what the value should reach, in words; reached: whether it does."""

    name: str
    value: str
    goal: str = ""
    reached: bool | None = None


@dataclass
class Report:
    """What one benchmark found."""

    title: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Return the median of a contender's seconds."""
        return statistics.median(self.samples[name])

    def add_ratio(self, name: str, ours: str, peer: str, *, at_least: float | None = None) -> None:
        """Add how many times as fast `ours` is as `peer`, by medians, with the spread over the runs.

        at_least: the goal; None for a figure without one.
        """
        ratio = self.median(peer) / self.median(ours)
        pairs = [p / o for o, p in zip(self.samples[ours], self.samples[peer], strict=True)]
        value = f"{ratio:.2f} x ({min(pairs):.2f} .. {max(pairs):.2f})"
        if at_least is None:
            self.figures.append(Figure(name, value))
        else:
            self.figures.append(Figure(name, value, f">= {at_least} x", ratio >= at_least))

    def add_limit(self, name: str, value: float, *, at_most: float, unit: str = "") -> None:
        """Add a value that must stay below a limit."""
        self.figures.append(Figure(name, f"{value:.3f}{unit}", f"<= {at_most:g}{unit}", value <= at_most))

    def print(self) -> None:
        """Print seconds of each contender, then the figures."""
        write = sys.stdout.write
        write(f"\n{self.title}\n")
        for name, seconds in self.samples.items():
            low, high = min(seconds), max(seconds)
            write(f"  {statistics.median(seconds):9.3f} s  ({low:.3f} .. {high:.3f})  {name}\n")
        for figure in self.figures:
            mark = {True: "reached", False: "NOT reached", None: ""}[figure.reached]
            write(
                f"  {figure.name}: {figure.value}   {f'goal {figure.goal}, {mark}' if figure.goal else ''}\n"
            )
        sys.stdout.flush()


def told(sentence: str) -> None:
    """Say how far a long benchmark is, so that one that is ended early has shown something."""
    sys.stderr.write(f"  {time.strftime('%H:%M:%S')}  {sentence}\n")
    sys.stderr.flush()


def run_in_turn(
    report: Report, contenders: Mapping[str, Callable[[], float]], *, runs: int, tell: bool = False
) -> None:
    """Run each contender `runs` times, in turn, after one run that does not count. tell: each one at once."""
    for round_index in range(runs + 1):
        for name, contender in contenders.items():
            seconds = contender()
            if tell:
                told(f"{seconds:9.3f} s  {name}" + ("" if round_index else " (does not count)"))
            if round_index:
                report.samples.setdefault(name, []).append(seconds)


def timed(command: Sequence[str | os.PathLike[str]], **options: object) -> tuple[float, str]:
    """Run a command and return its seconds and what it printed. Raises: RuntimeError if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]
    seconds = time.perf_counter() - start
    if done.returncode:
        message = f"{command} ended with {done.returncode}: {done.stderr[-2000:]}"
        raise RuntimeError(message)
    return seconds, done.stdout


# A process counts as its own the most memory of the one that started it, which may be a large one: so a small
# one stands between.
_WATCHER = """
import os, resource, sys, time
start = time.perf_counter()
status = os.spawnvp(os.P_WAIT, sys.argv[1], sys.argv[1:])
seconds = time.perf_counter() - start
sys.stderr.write(f"{seconds} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
sys.exit(status)
"""


def peak_of(command: Sequence[str | os.PathLike[str]]) -> tuple[float, str, int]:
    """Run a command; return its seconds, what it printed, and the most memory it had, in bytes.

    Raises: RuntimeError if it fails.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        [sys.executable, "-S", "-c", _WATCHER, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        message = f"{command} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        raise RuntimeError(message)
    seconds, peak_kib = done.stderr.split()[-2:]
    return float(seconds), done.stdout, int(peak_kib) * 1024


def missing(*tools: str) -> list[str]:
    """Return those of `tools` that are not installed."""
    return [tool for tool in tools if shutil.which(tool) is None]


def short_of(wanted_bytes: int) -> str | None:
    """Say that a folder of scratch() cannot take this much; None if it can.

    What lies in memory and does not fit makes the system end programs, of others too.
    """
    free_bytes = shutil.disk_usage(_SCRATCH or tempfile.gettempdir()).free
    if _SCRATCH:
        line = next((line for line in _lines("/proc/meminfo") if "MemAvailable" in line), None)
        free_bytes = min(free_bytes, int(line.split()[1]) * 1024) if line else free_bytes
    if free_bytes >= wanted_bytes:
        return None
    return f"needs {wanted_bytes >> 20} MiB of memory, {free_bytes >> 20} MiB are free"


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder in memory where there is one, and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hvreplica-bench-", dir=_SCRATCH))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> dict[str, object]:
    """Return what the figures were taken on."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) // 1024 for line in _lines("/proc/meminfo") if "MemTotal" in line), 0)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_mib": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit,
    }


def save(reports: Sequence[Report], folder: Path) -> Path:
    """Write machine, samples and figures to a new JSON file in `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    rows = [
        {
            "title": report.title,
            "samples_s": report.samples,
            "figures": [vars(figure) for figure in report.figures],
        }
        for report in reports
    ]
    path.write_text(json.dumps({"machine": machine(), "reports": rows}, indent=1))
    return path


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
