"""Filling an empty dynamic VHDX: block allocation, the thing that makes QEMU's VHDX slow to write."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from bench.corpus import file_system_image
from bench.harness import Figure, Report, missing, run_in_turn, scratch, timed

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = ("qemu-img", "qemu-nbd", "nbdcopy", "mkfs.ext4")


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("filling an empty dynamic VHDX from another one")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    with scratch() as folder:
        source = folder / "a.vhdx"
        timed(["qemu-img", "convert", "-O", "vhdx", file_system_image(smoke=smoke), source])
        contenders = {
            "nbdcopy, qemu-nbd to qemu-nbd": partial(_nbdcopy, folder, source),
            "hvreplica disk convert": partial(_convert, folder, source),
            "qemu-img convert -W -m 16": partial(_qemu, folder, source),
        }
        run_in_turn(report, contenders, runs=1 if smoke else 3)
    report.add_ratio(
        "against nbdcopy", "hvreplica disk convert", "nbdcopy, qemu-nbd to qemu-nbd", at_least=10
    )
    report.add_ratio(
        "against qemu-img convert", "hvreplica disk convert", "qemu-img convert -W -m 16", at_least=1
    )
    return report


def _convert(folder: Path, source: Path) -> float:
    target = folder / "ours.vhdx"
    seconds, _ = timed([sys.executable, "-m", "hvreplica", "disk", "convert", source, target, "--quiet"])
    return _verified(source, target, seconds)


def _qemu(folder: Path, source: Path) -> float:
    target = folder / "qemu.vhdx"
    seconds, _ = timed(["qemu-img", "convert", "-W", "-m", "16", "-O", "vhdx", source, target])
    return _verified(source, target, seconds)


def _nbdcopy(folder: Path, source: Path) -> float:
    target = folder / "nbd.vhdx"
    virtual = source.stat().st_size and int(_virtual_bytes(source))
    timed(["qemu-img", "create", "-q", "-f", "vhdx", target, str(virtual)])
    sockets = (folder / "s", folder / "d")
    servers = [
        subprocess.Popen(["qemu-nbd", *mode, "-f", "vhdx", "-k", str(path), "-e", "8", "-t", str(file)])
        for mode, path, file in ((["-r"], sockets[0], source), ([], sockets[1], target))
    ]
    while not all(path.exists() for path in sockets):
        time.sleep(0.01)
    try:
        seconds, _ = timed(["nbdcopy", *(f"nbd+unix:///?socket={path}" for path in sockets)])
    finally:
        for server in servers:
            server.terminate()
            server.wait()
        for path in sockets:
            path.unlink(missing_ok=True)
    return _verified(source, target, seconds)


def _virtual_bytes(image: Path) -> str:
    _, answer = timed([sys.executable, "-m", "hvreplica", "disk", "info", image, "--json"])
    return answer.split('"virtual_bytes":')[1].split(",")[0]


def _verified(source: Path, target: Path, seconds: float) -> float:
    timed(["qemu-img", "compare", source, target])
    target.unlink()
    return seconds
