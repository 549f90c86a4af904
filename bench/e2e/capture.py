"""Serving a disk over NBD while every write is tracked, against servers that track nothing.

fio's own NBD engine is the guest. A sample is the time that 100,000 requests take at the rate of one run, so
that ratios read as everywhere: above 1 we are faster. Servers run in turn, and one of them at a time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from bench.corpus import file_system_image
from bench.harness import Figure, Report, missing, run_in_turn, scratch, timed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "nbdkit", "nbdcopy", "fio")
MIB, GIB = 1 << 20, 1 << 30
_REQUESTS = 100_000
QEMU, NBDKIT = "qemu-nbd, VHDX", "nbdkit file, raw"
NULL = "nbdkit null, which keeps nothing"  # what the client and the socket between cost alone
OFF, MAP, LOG = "ours, no tracking", "ours, map", "ours, log"
# name, fio's rw, block size, queue depth, goals as (server, peer, at least)
_WORKS = (
    (
        "4 KiB random write, queue 16", "randwrite", "4k", 16,
        ((LOG, QEMU, 3.5), (LOG, NBDKIT, 0.9), (LOG, NULL, None), (MAP, OFF, 0.95), (LOG, OFF, 0.65)),
    ),
    (
        "4 KiB random write, queue 1", "randwrite", "4k", 1,
        ((LOG, QEMU, 2.0), (LOG, NULL, None), (MAP, OFF, 0.95), (LOG, OFF, 0.65)),
    ),
    ("4 KiB random read, queue 16", "randread", "4k", 16, ((LOG, NBDKIT, 1.2), (LOG, QEMU, None))),
    ("1 MiB write, queue 8", "write", "1m", 8, ((LOG, QEMU, 1.2), (MAP, NBDKIT, 1.0), (MAP, OFF, 0.95))),
    ("1 MiB read, queue 8", "read", "1m", 8, ((LOG, NBDKIT, None), (LOG, QEMU, None))),
)  # fmt: skip


@dataclass
class Bench:
    """One run of all."""

    folder: Path
    size_bytes: int
    seconds: float
    held_us: list[float] = field(default_factory=list)
    cut_every_s: float = 30.0  # as seldom as Hyper-V's shortest interval, so one, at the end of a run

    def command(self, name: str, image: Path, socket: Path, *extra: Path) -> list[str]:
        """Return what starts a server."""
        if name == QEMU:
            return ["qemu-nbd", "-f", "vhdx", "-k", str(socket), "-e", "8", "-t", str(image)]
        if name == NBDKIT:
            return ["nbdkit", "-f", "-U", str(socket), "file", str(image)]
        if name == NULL:
            return ["nbdkit", "-f", "-U", str(socket), "null", str(image.stat().st_size)]
        mode = {OFF: "off", MAP: "map", LOG: "log"}[name]
        state = self.folder / f"state-{mode}"
        words = [str(each) for each in (image, socket, state, self.cut_every_s, *extra)]
        return [sys.executable, "-m", "bench.e2e.capture_server", mode, *words]

    def serving(self, name: str, image: Path, work: Callable[[str], float], *extra: Path) -> float:
        """Start a server, do `work` with its address, stop it."""
        socket = self.folder / "s"
        server = subprocess.Popen(
            self.command(name, image, socket, *extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            while not socket.exists():
                if server.poll() is not None:
                    message = f"{name} ended with {server.returncode}"
                    raise RuntimeError(message)
                time.sleep(0.01)
            return work(f"nbd+unix:///?socket={socket}")
        finally:
            server.send_signal(signal.SIGTERM)
            printed, _ = server.communicate()
            socket.unlink(missing_ok=True)
            if name in {MAP, LOG} and printed:
                self.held_us.append(json.loads(printed)["held_us_max"])

    def rate(self, rw: str, block: str, depth: int, uri: str) -> float:
        """Return the seconds that _REQUESTS take."""
        _, printed = timed([
            "fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}",
            f"--size={self.size_bytes}", f"--iodepth={depth}", "--time_based",
            f"--runtime={int(self.seconds * 1000)}ms",
            "--randseed=42", "--output-format=json",
        ])  # fmt: skip
        job = json.loads(printed[printed.index("{") :])["jobs"][0]
        return float(_REQUESTS / (job["read"]["iops"] + job["write"]["iops"]))

    def images(self) -> dict[str, Path]:
        """Return an image for each server, filled."""
        vhdx, raw = self.folder / "filled.vhdx", self.folder / "n.raw"
        timed(["qemu-img", "create", "-q", "-f", "vhdx", vhdx, str(2 * self.size_bytes)])
        timed(["qemu-io", "-f", "vhdx", "-c", f"write -P 1 0 {self.size_bytes}", vhdx])
        timed(["qemu-img", "convert", "-S", "0", "-O", "raw", vhdx, raw])
        ours = self.folder / "ours.vhdx"
        timed(["cp", vhdx, ours])
        return {QEMU: vhdx, NBDKIT: raw, NULL: raw, OFF: ours, MAP: ours, LOG: ours}


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("serving a VHDX over NBD, every write tracked")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    with scratch() as folder:
        bench = Bench(folder, 16 * MIB if smoke else GIB, 0.2 if smoke else 2.0)
        images = bench.images()
        runs = 1 if smoke else 3
        for name, rw, block, depth, goals in _WORKS:
            servers = {QEMU, NBDKIT} | {each for goal in goals for each in goal[:2]}
            run_in_turn(report, {
                f"{name}: {server}": partial(
                    bench.serving, server, images[server], partial(bench.rate, rw, block, depth)
                )
                for server in images if server in servers
            }, runs=runs)  # fmt: skip
            for ours, peer, at_least in goals:
                report.add_ratio(
                    f"{name}: {ours} against {peer}", f"{name}: {ours}", f"{name}: {peer}", at_least=at_least
                )
        bench.cut_every_s = 0.1
        for mode in (LOG, MAP):
            bench.serving(mode, images[mode], partial(bench.rate, "randwrite", "4k", 16))
        report.add_limit("writes held by a cut, at most", max(bench.held_us) / 1000, at_most=1.0, unit=" ms")
        _verify(bench, images[LOG])
        for image in set(images.values()):
            image.unlink()
        _fill(report, bench, smoke=smoke, runs=runs)
    return report


def _verify(bench: Bench, image: Path) -> None:
    """Prove that what is measured is right: fio reads back what it wrote, a copy that follows is equal."""
    copy = bench.folder / "copy.raw"
    timed(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", image, copy])

    def work(uri: str) -> float:
        for rw, block in (("randwrite", "4k"), ("write", "1m")):
            timed([
                "fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}",
                f"--size={16 * MIB}", "--iodepth=16", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
                "--verify_state_save=0",
            ])  # fmt: skip
        return 0.0

    bench.serving(LOG, image, work, copy)
    timed(["qemu-img", "compare", "-f", "vhdx", "-F", "raw", image, copy])
    copy.unlink()


def _fill(report: Report, bench: Bench, *, smoke: bool, runs: int) -> None:
    """Fill an empty dynamic VHDX with nbdcopy; a cut, which reads what was filled, as seldom as above."""
    bench.cut_every_s = 30.0
    source = file_system_image(smoke=smoke)
    target = bench.folder / "t.vhdx"

    def copy(uri: str) -> float:
        return timed(["nbdcopy", source, uri])[0]

    def fill(server: str) -> float:
        kind = "raw" if server in {NBDKIT, NULL} else "vhdx"
        timed(["qemu-img", "create", "-q", "-f", kind, target, str(source.stat().st_size)])
        seconds = bench.serving(server, target, copy)
        if server != NULL:
            timed(["qemu-img", "compare", "-f", "raw", "-F", kind, source, target])
        target.unlink()
        return seconds

    names = {server: f"nbdcopy into an empty disk: {server}" for server in (QEMU, NBDKIT, NULL, LOG)}
    run_in_turn(report, {names[server]: partial(fill, server) for server in names}, runs=runs)
    report.add_ratio("nbdcopy into an empty disk against qemu-nbd", names[LOG], names[QEMU], at_least=10)
    report.add_ratio("nbdcopy into an empty disk against nbdkit", names[LOG], names[NBDKIT])
    report.add_ratio("nbdcopy into an empty disk against nbdkit null", names[LOG], names[NULL])
