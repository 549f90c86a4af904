"""Memory of each side, and the cost of a small change, on a sparse disk of 10 TiB."""

from __future__ import annotations

import contextlib
import sys

import numpy as np

from bench.corpus import random_blocks
from bench.e2e.site import Site
from bench.harness import SEED, Report, scratch, timed
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES

TIB = 1 << 40
BLOCK = 4096
LIMIT_MIB = 256


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("a sparse disk of 10 TiB with 4 MiB of random 4 KiB writes per cycle")
    size_bytes, count = (TIB // 4, 64) if smoke else (10 * TIB, 1024)
    with scratch() as folder:
        image = folder / "big.vhdx"
        timed([sys.executable, "-m", "hvreplica", "disk", "create", image, "--size", str(size_bytes)])
        offsets = random_blocks(count * 2, disk_bytes=size_bytes)
        with Site(folder) as site:
            peaks = []
            for phase, chosen in (("initial", offsets[::2]), ("delta", offsets[1::2])):
                with contextlib.closing(open_disk(OS_FILES, image, writable=True, clock=SYSTEM)) as disk:
                    extents = np.column_stack((chosen, np.full(len(chosen), BLOCK, np.int64)))
                    disk.write_extents(extents, np.random.default_rng(SEED).bytes(len(chosen) * BLOCK))
                    disk.flush()
                outcome = site.replicate(image, vm="big", state="state")
                assert outcome.answer["kind"] == phase
                report.samples[phase] = [outcome.seconds]
                peaks.append(outcome.peak_bytes)
            timed([sys.executable, "-m", "hvreplica", "disk", "compare", image, site.replica("big")])
            server_peak = site.server_peak_bytes()
    report.add_limit("primary, peak memory", max(peaks) / (1 << 20), at_most=LIMIT_MIB, unit=" MiB")
    report.add_limit("replica, peak memory", server_peak / (1 << 20), at_most=LIMIT_MIB, unit=" MiB")
    return report
