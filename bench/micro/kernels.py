"""How fast each kernel is for data outside of the cache, as a ratio to this machine's memory read rate.

    python bench/micro/kernels.py [--smoke] [--json FILE]

The read rate is that of the fastest of several plain read loops (read_rate.c), taken in this process and
again before and after every run of a kernel, so that a busy neighbour slows both. Reported: the median of the
runs and, as spread, the slowest and fastest quarter. Every answer is checked outside of the timed part. Bytes
are those read: two streams count twice. Goal: 0.8 for the kernels marked with it; the payload kernels stand
against sorted pwrite calls from memory.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from hvreplica import native
from hvreplica.files import OS_FILES
from hvreplica.native import reference
from hvreplica.native.kernels import Kernels

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
GOAL = 0.8
SEED = 42


@dataclass(frozen=True)
class Size:
    """What grows from the smoke run to the full one."""

    buffer_bytes: int
    rounds: int
    write_count: int
    payload_bytes: int


SMOKE = Size(buffer_bytes=2 * MIB, rounds=2, write_count=5_000, payload_bytes=4 * MIB)
FULL = Size(buffer_bytes=128 * MIB, rounds=41, write_count=1_000_000, payload_bytes=48 * MIB)


@dataclass
class Case:
    """One kernel. call: the timed part. check: is its result right? counted: bytes or rows per call."""

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], bool]
    counted: int
    goal: float | None = None


@dataclass
class Row:
    """What one case gave: rates in bytes or rows per second, ratios to the yardstick of its table."""

    name: str
    rate: float
    ratio: float
    ratio_low: float
    ratio_high: float
    goal: float | None
    digest: str
    rates: list[float] = field(default_factory=list, repr=False)


class ReadLoop:
    """The fastest plain read loop of this machine over one buffer."""

    def __init__(self, folder: Path, buffer: np.ndarray) -> None:
        library = folder / "read_rate.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        source = str(HERE / "read_rate.c")
        subprocess.run([*compiler, "-O3", "-shared", "-fPIC", "-o", str(library), source], check=True)
        loops = ctypes.CDLL(str(library))
        widths = [width for width in (16, 32, 64) if width <= loops.read_width()]
        self._arguments = (ctypes.c_void_p(buffer.ctypes.data), ctypes.c_size_t(buffer.nbytes))
        self._bytes = buffer.nbytes
        self.name = ""
        best = 0.0
        for name in [f"read_{width}{ahead}" for width in widths for ahead in ("", "_ahead")]:
            loop = getattr(loops, name)
            loop.restype = ctypes.c_uint64
            self._loop = loop
            rate = max(self.rate() for _ in range(5))
            if rate > best:
                best, self.name, chosen = rate, name, loop
        self._loop = chosen

    def rate(self) -> float:
        """Return bytes per second of one pass."""
        started = time.perf_counter()
        self._loop(*self._arguments)
        return self._bytes / (time.perf_counter() - started)


def measure(case: Case, rounds: int, yardstick: Callable[[], float]) -> Row:
    """Run a case `rounds` times, each between two runs of the yardstick, and once more for its result."""
    rates, ratios = [], []
    case.call()
    for _ in range(rounds):
        before = yardstick()
        started = time.perf_counter()
        case.call()
        rate = case.counted / (time.perf_counter() - started)
        rates.append(rate)
        ratios.append(rate / max(before, yardstick()))
    result = case.call()
    if not case.check(result):
        sys.exit(f"{case.name}: the answer is wrong")
    low, middle, high = statistics.quantiles(ratios, n=4)
    digest = hashlib.sha256(repr(result).encode()).hexdigest()[:12]
    return Row(case.name, statistics.median(rates), middle, low, high, case.goal, digest, rates)


def written_zeros(count: int) -> np.ndarray:
    """Return zeros in pages of their own: pages never written are all one, which stays in the cache."""
    zeros = np.empty(count, np.uint8)
    zeros.fill(0)
    return zeros


def byte_cases(size: Size, rng: np.random.Generator) -> tuple[np.ndarray, list[Case]]:
    """Return the cases over plain bytes, and the buffer that the read loops read."""
    count = size.buffer_bytes
    noise = rng.integers(0, 256, count, dtype=np.uint8)
    half = noise[: count // 2]  # two streams of half the length take as long as one of the whole
    copy, zeros, changed = half.copy(), written_zeros(count), half.copy()
    changed[:: 64 * 4096] ^= 1
    runs = [[start, 4096] for start in range(0, len(half), 64 * 4096)]
    scalar, part = Kernels("scalar"), noise[:4096]
    block = 64 * 1024

    def crc_is_right(value: int) -> bool:
        return native.crc32c(part) == reference.crc32c(part) and value == scalar.crc32c(noise)

    def digests_are_right(rows: np.ndarray) -> bool:
        return all(
            rows[index].tobytes() == xxhash.xxh3_128_digest(noise[index * block : (index + 1) * block])
            for index in range(len(rows))
        )

    def sums_are_right(sums: tuple[int, int]) -> bool:
        small = native.page_digest(part, 5) == reference.page_digest(part, 5)
        return small and sums == scalar.page_digest(noise, 5)

    total = int(noise.sum(dtype=np.uint64)) % (1 << 32)
    return noise, [
        Case("crc32c", lambda: native.crc32c(noise), crc_is_right, count, GOAL),
        Case("byte_sum", lambda: native.byte_sum(noise), lambda value: value == total, count, GOAL),
        Case("zero scan (is_zero)", lambda: native.is_zero(zeros), lambda value: value is True, count, GOAL),
        Case(
            "zero scan (data_runs)", lambda: native.data_runs(zeros), lambda rows: len(rows) == 0, count, GOAL
        ),
        Case(
            "compare (first_difference)",
            lambda: native.first_difference(half, copy),
            lambda value: value == -1,
            count,
            GOAL,
        ),
        Case(
            "compare (changed_runs)",
            lambda: native.changed_runs(half, changed, 4096),
            lambda rows: rows.tolist() == runs,
            count,
            GOAL,
        ),
        Case("fingerprints of 64 KiB", lambda: native.fingerprints(noise, block), digests_are_right, count),
        Case("page digest", lambda: native.page_digest(noise, 5), sums_are_right, count),
    ]


def bitmap_cases(size: Size, rng: np.random.Generator) -> list[Case]:
    """Return the cases over bitmaps."""
    count = size.buffer_bytes
    noise = rng.integers(0, 256, count, dtype=np.uint8)
    half = noise[: count // 2]
    target = written_zeros(len(half))
    sparse = written_zeros(count)
    sparse[1 :: 1 << 16] = 0b0011_1000
    runs = [[start * 8 + 3, 3] for start in range(1, count, 1 << 16)]
    ones = int(np.bitwise_count(noise).sum(dtype=np.uint64))
    return [
        Case("bitmap_count", lambda: native.bitmap_count(noise), lambda value: value == ones, count, GOAL),
        Case(
            "bitmap_merge",
            lambda: native.bitmap_merge(target, half),
            lambda _: bool((target == half).all()),
            count,
            GOAL,
        ),
        Case(
            "bitmap_runs, sparse",
            lambda: native.bitmap_runs(sparse, count * 8),
            lambda rows: rows.tolist() == runs,
            count,
            GOAL,
        ),
    ]


def table_cases(size: Size, rng: np.random.Generator) -> list[Case]:
    """Return the cases over tables; they count rows."""
    count = size.write_count
    starts = rng.integers(0, count * 4, count).astype(np.uint64) * np.uint64(4096)
    lengths = np.full(count, 8192, np.uint64)
    logs = np.arange(count, dtype=np.uint64) * np.uint64(8192)
    covered = len(np.unique(np.concatenate((starts, starts + np.uint64(4096))))) * 4096
    extents = np.stack((starts, lengths), axis=1)[:127]
    block = bytes(32) + native.pack_hrl_entries(extents, 7, np.zeros(127, np.uint32))

    def covers(result: tuple[np.ndarray, ...]) -> bool:
        ends = result[0] + result[1]
        return int(result[1].sum()) == covered and bool((ends[:-1] <= result[0][1:]).all())

    def parse_many() -> np.ndarray:
        for _ in range(200):
            entries = native.parse_hrl_entries(block, 127, 4096)
        return entries

    return [
        Case("coalesce, random", lambda: native.coalesce(starts, lengths, logs), covers, count),
        Case(
            "coalesce, in order",
            lambda: native.coalesce(logs, lengths, logs),
            lambda result: result[1].tolist() == [count * 8192],
            count,
        ),
        Case(
            "parse_hrl_entries, 127 a block",
            parse_many,
            lambda rows: rows["byte_offset"].tolist() == starts[:127].tolist(),
            127 * 200,
        ),
    ]


def payload_table(size: Size, folder: Path, rng: np.random.Generator) -> tuple[float, list[Row]]:
    """Return the rate of sorted pwrite calls from memory, and the payload kernels against it."""
    count = size.payload_bytes // 4096
    log = rng.integers(0, 256, size.payload_bytes, dtype=np.uint8)
    for name, content in (("disk", bytes(3 * size.payload_bytes)), ("log", log.tobytes())):
        (folder / name).write_bytes(content)
    disk, source = OS_FILES.open(folder / "disk", writable=True), OS_FILES.open(folder / "log")
    # Every third piece of the disk, so that none follows another in the file.
    extents = np.stack((np.arange(count) * 3 * 4096, np.full(count, 4096)), axis=1)
    in_order = np.arange(count, dtype=np.uint64) * np.uint64(4096)
    mixed = in_order[rng.permutation(count)]
    back = np.empty_like(log)

    def yardstick() -> float:
        started = time.perf_counter()
        native.write_extents(disk, None, extents, log)
        return size.payload_bytes / (time.perf_counter() - started)

    def holds(offsets: np.ndarray) -> bool:
        native.read_extents(disk, None, extents, back)
        return bool((back.reshape(-1, 4096) == log.reshape(-1, 4096)[offsets // 4096]).all())

    cases = [
        Case(
            "copy_extents, log in order",
            lambda: native.copy_extents(source, in_order, disk, None, extents),
            lambda _: holds(in_order),
            size.payload_bytes,
            0.7,
        ),
        Case(
            "copy_extents, log in any order",
            lambda: native.copy_extents(source, mixed, disk, None, extents),
            lambda _: holds(mixed),
            size.payload_bytes,
        ),
        Case(
            "read_extents",
            lambda: native.read_extents(disk, None, extents, back),
            lambda _: bool((back == log).all()),
            size.payload_bytes,
        ),
    ]
    yardstick()
    rows = [measure(case, size.rounds, yardstick) for case in cases]
    write_rate = statistics.median(yardstick() for _ in range(size.rounds))
    disk.close()
    source.close()
    return write_rate, rows


def call_overhead_s() -> float:
    """Return the seconds of one call that has nothing to do."""
    data, calls = bytes(8), 20_000
    started = time.perf_counter()
    for _ in range(calls):
        native.is_zero(data)
    return (time.perf_counter() - started) / calls


def machine() -> dict[str, Any]:
    """Return what the figures belong to."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit,
        "kernels": native.kernel_variant(),
    }


def show(title: str, unit: str, rows: list[Row]) -> None:
    """Print one table."""
    print(f"\n{title}")
    print(f"{'kernel':34} {unit:>10} {'ratio':>7} {'spread':>13}  goal")
    for row in rows:
        scale = 1e6 if unit == "Mrows/s" else 1e9
        goal = "" if row.goal is None else f"{row.goal} {'met' if row.ratio >= row.goal else 'MISSED'}"
        spread = f"{row.ratio_low:.2f}-{row.ratio_high:.2f}"
        print(f"{row.name:34} {row.rate / scale:10.2f} {row.ratio:7.2f} {spread:>13}  {goal}")


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="throughput of the kernels against the memory read rate")
    parser.add_argument(
        "--smoke", action="store_true", help="small and quick: does it run, are the answers right?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    size = SMOKE if arguments.smoke else FULL
    rng = np.random.default_rng(SEED)
    scratch = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - memory, not a name to guess
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        noise, cases = byte_cases(size, rng)
        loop = ReadLoop(Path(name), noise)
        cases += bitmap_cases(size, rng)
        bytes_rows = [measure(case, size.rounds, loop.rate) for case in cases]
        table_rows = [measure(case, size.rounds, lambda: 1.0) for case in table_cases(size, rng)]
        read_rate = statistics.median(loop.rate() for _ in range(size.rounds))
        write_rate, payload_rows = payload_table(size, Path(name), rng)
    overhead = call_overhead_s()
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"memory read rate {read_rate / 1e9:.1f} GB/s ({loop.name}), call overhead {overhead * 1e6:.2f} us")
    show(f"Bytes, {size.buffer_bytes // MIB} MiB a buffer; ratio to the read rate", "GB/s", bytes_rows)
    show(
        f"Payload in 4 KiB pieces on tmpfs; ratio to sorted pwrite, {write_rate / 1e9:.2f} GB/s",
        "GB/s",
        payload_rows,
    )
    print("\nTables\n" + "\n".join(f"{row.name:34} {row.rate / 1e6:10.2f} Mrows/s" for row in table_rows))
    if arguments.json is not None:
        figures = {
            "machine": facts,
            "smoke": arguments.smoke,
            "read_rate_bytes_per_s": read_rate,
            "sorted_pwrite_bytes_per_s": write_rate,
            "call_overhead_s": overhead,
            "bytes": [asdict(row) for row in bytes_rows],
            "payload": [asdict(row) for row in payload_rows],
            "tables": [
                {"name": row.name, "rows_per_s": row.rate, "digest": row.digest} for row in table_rows
            ],
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
