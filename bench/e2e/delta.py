"""A cycle after 1 GiB of random 4 KiB writes: what travels, and how fast the log is applied.

The peer for applying is the least that any program can do: a loop in C over the same extents, sorted, each
one pwrite() from memory into a raw file that is already there.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bench.corpus import file_system_image, random_blocks
from bench.e2e.site import Site
from bench.harness import SEED, Figure, Report, missing, run_in_turn, scratch, timed
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogWriter, apply_log

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4096
BATCH = 2048
TOOLS = ("qemu-img", "mkfs.ext4", "cc")
_PEER = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
/* argv: disk, offsets (sorted int64), data in the same order. Prints the seconds of the pwrite loop. */
int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int disk = open(argv[1], O_WRONLY), rows = open(argv[2], O_RDONLY), data = open(argv[3], O_RDONLY);
    struct stat st;
    if (disk < 0 || rows < 0 || data < 0 || fstat(rows, &st)) return 3;
    size_t count = (size_t)st.st_size / 8, block = 4096;
    long long *at = malloc(count * 8);
    char *bytes = mmap(NULL, count * block, PROT_READ, MAP_SHARED | MAP_POPULATE, data, 0);
    if (!at || bytes == MAP_FAILED || read(rows, at, count * 8) != (ssize_t)(count * 8)) return 4;
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (size_t i = 0; i < count; i++)
        if (pwrite(disk, bytes + i * block, block, at[i]) != (ssize_t)block) return 5;
    if (fdatasync(disk)) return 6;
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("%.6f\n", (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec));
    return 0;
}
"""


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("a delta of 4 KiB pieces")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    with scratch() as folder:
        image = folder / "a.vhdx"
        timed(["qemu-img", "convert", "-O", "vhdx", file_system_image(smoke=smoke), image])
        with contextlib.closing(open_disk(OS_FILES, image, clock=SYSTEM)) as disk:
            disk_bytes = disk.virtual_bytes
        count = (8 << 20 if smoke else 1 << 30) // BLOCK
        offsets = random_blocks(count, disk_bytes=disk_bytes)
        _cycle(report, folder, image, offsets)
        _apply(report, folder, image, offsets, runs=1 if smoke else 5)
    return report


def _cycle(report: Report, folder: Path, image: Path, offsets: np.ndarray) -> None:
    with Site(folder) as site:
        site.replicate(image, vm="web01", state="state")
        _change(image, offsets)
        outcome = site.replicate(image, vm="web01", state="state", options=("--compression", "none"))
        changed = outcome.answer["disks"][0]["changed_bytes"]
        assert outcome.answer["kind"] == "delta"
        assert changed == len(offsets) * BLOCK
        timed(["qemu-img", "compare", image, site.replica("web01")])
        nothing = site.replicate(image, vm="web01", state="state")
        assert nothing.answer["kind"] == "none"
    report.samples["delta: compare, log, ship, apply"] = [outcome.seconds]
    report.samples["nothing changed: compare only"] = [nothing.seconds]
    wire = outcome.answer["wire_bytes"] / changed
    report.add_limit("wire bytes of a delta, uncompressed, per changed byte", wire, at_most=1.05)


def _change(image: Path, offsets: np.ndarray) -> None:
    rng = np.random.default_rng(SEED)
    with contextlib.closing(open_disk(OS_FILES, image, writable=True, clock=SYSTEM)) as disk:
        for first in range(0, len(offsets), BATCH):
            batch = offsets[first : first + BATCH]
            disk.write_extents(_extents(batch), rng.bytes(len(batch) * BLOCK))
        disk.flush()


def _extents(offsets: np.ndarray) -> np.ndarray:
    return np.column_stack((offsets, np.full(len(offsets), BLOCK, np.int64)))


def _apply(report: Report, folder: Path, image: Path, offsets: np.ndarray, *, runs: int) -> None:
    """Apply logs of the same extents: in the disk's order as `replicate` cuts them, and in a random order.

    The replica verifies a log when it arrives and applies it without a second look; `log apply` looks first.
    """
    in_order, shuffled, data = folder / "sorted.hrl", folder / "shuffled.hrl", folder / "x.data"
    count = len(offsets)
    content = np.frombuffer(np.random.default_rng(SEED + 2).bytes(count * BLOCK), np.uint8).reshape(-1, BLOCK)
    content.tofile(data)
    _write_log(in_order, content, offsets, np.arange(count))
    _write_log(shuffled, content, offsets, np.random.default_rng(SEED + 1).permutation(count))
    del content
    raw = folder / "a.raw"
    timed(["qemu-img", "convert", "-O", "raw", image, raw])
    (folder / "x.rows").write_bytes(offsets.tobytes())
    (folder / "peer.c").write_text(_PEER)
    timed(["cc", "-O2", "-o", folder / "peer", folder / "peer.c"])
    peer = [folder / "peer", raw, folder / "x.rows", data]
    contenders = {
        "sorted pwrite in C, raw": lambda: float(timed(peer)[1]),
        "replica's apply of a cycle, VHDX": partial(_apply_once, in_order, image, verify_data=False),
        "log apply with verification, VHDX": partial(_apply_once, in_order, image),
        "log apply with verification, raw": partial(_apply_once, in_order, raw),
        "log apply of random writes, VHDX": partial(_apply_once, shuffled, image),
    }
    run_in_turn(report, contenders, runs=runs)
    timed(["qemu-img", "compare", "-f", "raw", "-F", "vhdx", raw, image])
    for name in list(contenders)[1:]:
        report.add_ratio(f"{name}, against sorted pwrite", name, "sorted pwrite in C, raw", at_least=0.7)


def _write_log(log: Path, content: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> None:
    writer = LogWriter.create(
        OS_FILES, log, log_id=SYSTEM.guid(), previous_log_id=None, data_write_guid=None, clock=SYSTEM
    )
    with writer:
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            writer.append(_extents(offsets[chosen]), np.ascontiguousarray(content[chosen]))


def _apply_once(log: Path, target: Path, *, verify_data: bool = True) -> float:
    with contextlib.closing(open_disk(OS_FILES, target, writable=True, clock=SYSTEM)) as disk:
        start = time.perf_counter()
        apply_log(OS_FILES, log, disk, verify_data=verify_data)
        disk.flush()
        return time.perf_counter() - start
