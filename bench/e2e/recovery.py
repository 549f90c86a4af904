"""Back in sync after capture was killed under load: what travels and how long it takes, against comparing.

The disk is large and sparse, the guest writes random 4 KiB to a part of it. After kill -9 nothing of the open
log is believed: what the journal has marked is read again, and what differs from the replica is sent. The
naive way, with no journal, compares the whole disk with the fingerprints of the replica.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.e2e.guest import PROGRAM, CaptureProcess, filled_disk, start_load, wait_until
from bench.e2e.site import Site
from bench.harness import Figure, Report, missing, scratch, timed

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = ("qemu-img", "qemu-io", "fio")
MIB, GIB = 1 << 20, 1 << 30
_REGION_BYTES = 4 * MIB
_OURS, _NAIVE = "after kill -9: what the journal marks", "after kill -9: the whole disk compared"


class Sizes(NamedTuple):
    """What is measured on. load_bytes: of the part that is written at random, for load_s seconds."""

    disk_bytes: int
    filled_bytes: int
    load_bytes: int
    load_s: float


SMOKE = Sizes(GIB, 32 * MIB, 16 * MIB, 0.3)
FULL = Sizes(64 * GIB, 4 * GIB, 256 * MIB, 5.0)


class Recovery(NamedTuple):
    """One kill and what followed. seconds: of the cycle after capture stood again, and of its start.

    region_bytes: of the journal's regions then; open_log_bytes: of the log that the kill left.
    """

    seconds: float
    start_s: float
    wire_bytes: int
    changed_bytes: int
    region_bytes: int
    open_log_bytes: int


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("back in sync after kill -9 of capture, under random 4 KiB writes")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    sizes = SMOKE if smoke else FULL
    with scratch() as folder:
        disk = folder / "web01.vhdx"
        filled_disk(disk, disk_bytes=sizes.disk_bytes, filled_bytes=sizes.filled_bytes)
        with Site(folder) as site:
            with CaptureProcess(folder, disk, folder / "state"):
                _cycle(site)
            ours = [_recover(site, folder, disk, sizes) for _ in range(1 if smoke else 3)]
            naive = [_recover(site, folder, disk, sizes, "--resync")]
        _verify(folder, disk)
    report.samples[_OURS] = [each.seconds for each in ours]
    report.samples[_NAIVE] = [each.seconds for each in naive]
    report.samples["start of capture after it"] = [each.start_s for each in [*ours, *naive]]
    for each in ours:
        bound = each.region_bytes + each.open_log_bytes
        report.add_limit("wire bytes of the bound", each.wire_bytes / bound, at_most=1.0)
        report.figures.append(
            Figure("wire, journal's regions, open log, changed", " ".join(
                f"{count / MIB:.1f}" for count in (
                    each.wire_bytes, each.region_bytes, each.open_log_bytes, each.changed_bytes
                )
            ) + " MiB")
        )  # fmt: skip
    report.figures.append(Figure("wire of the whole comparison", f"{naive[0].wire_bytes / MIB:.1f} MiB"))
    report.figures.append(
        Figure("times as fast as it", f"{report.median(_NAIVE) / report.median(_OURS):.1f} x")
    )
    return report


def _recover(site: Site, folder: Path, disk: Path, sizes: Sizes, *options: str) -> Recovery:
    """Kill capture under load, start it, and bring the replica up to date."""
    state = folder / "state"
    with CaptureProcess(folder, disk, state) as capture:
        load = start_load(capture.socket, size_bytes=sizes.load_bytes, seconds=60.0)
        wait_until(lambda: capture.status()["disks"][0]["tracking"]["writes"], "the first write")
        time.sleep(sizes.load_s)
        assert load.poll() is None, "the load ended before the kill"
        capture.kill()
        load.communicate()
    open_log_bytes = sum(log.stat().st_size for log in (state / "open").iterdir())
    start = time.perf_counter()
    with CaptureProcess(folder, disk, state) as capture:
        start_s = time.perf_counter() - start
        regions = capture.status()["disks"][0]["tracking"]["journal_regions"]
        start = time.perf_counter()
        answer = _cycle(site, *options)
        seconds = time.perf_counter() - start
        timed(["qemu-img", "compare", "-U", disk, site.replica("web01")])
    changed = answer["disks"][0]["changed_bytes"]
    region_bytes = regions * _REGION_BYTES
    return Recovery(seconds, start_s, answer["wire_bytes"], changed, region_bytes, open_log_bytes)


def _cycle(site: Site, *options: str) -> dict[str, Any]:
    return site.replicate(vm="web01", state="state", options=options).answer


def _verify(folder: Path, disk: Path) -> None:
    """Prove that the newest point is the disk."""
    exported = folder / "exported.vhdx"
    timed([*PROGRAM, "point", "export", "--store", folder / "store", "--vm", "web01", "--output", exported])
    timed(["qemu-img", "compare", disk, exported])
