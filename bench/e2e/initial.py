"""Initial replication of a real file system against the pipes that people use instead.

Ours has TLS with certificates on both sides, a digest on each frame and a durable store at the other end;
the pipes have none of that. Both ends share this machine, all files stand in memory.
"""

from __future__ import annotations

import socket
import subprocess
import time
from functools import partial
from pathlib import Path

from bench.corpus import file_system_image
from bench.e2e.site import Site
from bench.harness import Figure, Report, missing, run_in_turn, scratch, timed

TOOLS = ("qemu-img", "socat", "zstd", "lz4", "mkfs.ext4")


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("initial replication of a dynamic VHDX over TLS, both ends on this machine")
    absent = missing(*TOOLS)
    if absent:
        report.figures.append(Figure("skipped", f"needs {', '.join(absent)}"))
        return report
    with scratch() as folder:
        image = folder / "a.vhdx"
        timed(["qemu-img", "convert", "-O", "vhdx", file_system_image(smoke=smoke), image])
        with Site(folder) as site:
            wire: dict[str, int] = {}
            contenders = {
                "plain socat": partial(_pipe, image, ["cat"], ["cat"]),
                "hvreplica none": partial(_ours, site, image, "none", wire),
                "lz4 -1 | socat | lz4 -d": partial(
                    _pipe, image, ["lz4", "-q", "-1", "-c"], ["lz4", "-q", "-d", "-c"]
                ),
                "hvreplica auto": partial(_ours, site, image, "auto", wire),
                "zstd -1 -T2 | socat | zstd -d": partial(
                    _pipe, image, ["zstd", "-q", "-1", "-T2", "-c"], ["zstd", "-q", "-d", "-c"]
                ),
                "hvreplica zstd": partial(_ours, site, image, "zstd", wire),
                "cp": partial(_copy, image),
            }
            run_in_turn(report, contenders, runs=1 if smoke else 5)
        peer_bytes = len(
            subprocess.run(["zstd", "-q", "-1", "-T2", "-c", image], capture_output=True, check=True).stdout
        )
    report.add_ratio("zstd against its pipe", "hvreplica zstd", "zstd -1 -T2 | socat | zstd -d", at_least=1.1)
    report.add_limit("zstd, wire bytes against its pipe's", wire["zstd"] / peer_bytes, at_most=1.0)
    report.add_ratio("auto against the lz4 pipe", "hvreplica auto", "lz4 -1 | socat | lz4 -d", at_least=2.0)
    report.add_limit(
        "none, seconds against plain socat",
        report.median("hvreplica none") / report.median("plain socat"),
        at_most=2.5,
    )
    for name, count in wire.items():
        report.figures.append(Figure(f"wire bytes, {name}", f"{count:,}"))
    report.figures.append(Figure("wire bytes, zstd pipe", f"{peer_bytes:,}"))
    return report


def _ours(site: Site, image: Path, compression: str, wire: dict[str, int]) -> float:
    vm, state = site.fresh(compression)
    outcome = site.replicate(image, vm=vm, state=state, options=("--compression", compression))
    wire[compression] = outcome.answer["wire_bytes"]
    timed(["qemu-img", "compare", image, site.replica(vm)])
    site.discard(vm, state)
    return outcome.seconds


def _pipe(image: Path, encode: list[str], decode: list[str]) -> float:
    output = image.with_name("pipe.out")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with output.open("wb") as out:
        listen = subprocess.Popen(
            ["socat", "-b", "1048576", f"TCP-LISTEN:{port},reuseaddr,bind=127.0.0.1", "-"],
            stdout=subprocess.PIPE,
        )
        receive = subprocess.Popen(decode, stdin=listen.stdout, stdout=out)
        _wait_listening(port)
        start = time.perf_counter()
        with image.open("rb") as source:
            send = subprocess.Popen(encode, stdin=source, stdout=subprocess.PIPE)
            subprocess.run(
                ["socat", "-b", "1048576", "-", f"TCP:127.0.0.1:{port}"], stdin=send.stdout, check=True
            )
        receive.wait()
        seconds = time.perf_counter() - start
    send.wait()
    listen.wait()
    timed(["cmp", image, output])
    output.unlink()
    return seconds


def _wait_listening(port: int) -> None:
    wanted = f":{port:04X} "
    while not any(
        wanted in line and line.split()[3] == "0A"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
    ):
        time.sleep(0.01)


def _copy(image: Path) -> float:
    output = image.with_name("copy.out")
    seconds, _ = timed(["cp", image, output])
    output.unlink()
    return seconds
