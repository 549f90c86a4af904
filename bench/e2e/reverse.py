"""Reverse after an unplanned failover: what travels and how long it takes, against comparing everything.

A large sparse disk is replicated, then both sides write at random in 4 KiB, each on its own: what the old
primary wrote is not at the replica, and what the promoted side wrote is not at the old primary. Our way ships
the union. The naive way knows nothing of the old primary's half, and compares all by hashes.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.e2e.site import PROGRAM, Site
from bench.harness import SEED, Figure, Report, scratch
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
_PIECE_BYTES = 4096
_VM = ("--vm", "web01")
_OURS, _NAIVE = "reverse: the union", "reverse: everything compared"


class Sizes(NamedTuple):
    """What is measured on. filled_bytes: in the disk before; side_bytes: written by each side alone."""

    disk_bytes: int
    filled_bytes: int
    side_bytes: int


SMOKE = Sizes(GIB, 16 * MIB, 4 * MIB)
FULL = Sizes(64 * GIB, GIB, 100 * MIB)


def run(*, smoke: bool) -> Report:
    """Measure, verify and report."""
    report = Report("reverse after an unplanned failover, both sides having written 4 KiB at random")
    sizes = SMOKE if smoke else FULL
    for name, unknown in ((_OURS, False), (_NAIVE, True)):
        with scratch() as folder:
            answer, seconds, adopt_s = _reverse(folder, sizes, unknown=unknown)
        report.samples[name] = [seconds]
        report.samples[f"{name}, store adopt before it"] = [adopt_s]
        if not unknown:
            ratio = answer["wire_bytes"] / answer["union_bytes"]
            report.add_limit("wire bytes of the union", ratio, at_most=1.1)
            union = answer["union_bytes"] / MIB
            report.figures.append(
                Figure("union", f"{union:.1f} MiB of {2 * sizes.side_bytes / MIB:.0f} MiB written")
            )
        report.figures.append(Figure(f"wire, {name}", f"{answer['wire_bytes'] / MIB:.1f} MiB"))
    return report


def _reverse(folder: Path, sizes: Sizes, *, unknown: bool) -> tuple[dict[str, Any], float, float]:
    """Fork a VM, adopt, reverse, verify; return the answer, its seconds, and those of the adoption."""
    rng = random.Random(SEED)
    disk, state = folder / "web01.vhdx", folder / "state"
    _ask("disk", "create", disk, "--size", sizes.disk_bytes)
    _fill(disk, rng, sizes.filled_bytes)
    with contextlib.ExitStack() as stack:
        at_a, at_b = (stack.enter_context(Site(_made(folder / name))) for name in ("a", "b"))
        link = ("--to", at_b.address, "--tls", at_b.tls)
        _ask("replicate", *_VM, "--disk", disk, "--state", state, *link, "--once")
        _write(disk, rng, sizes)
        _ask("failover", "unplanned", "--store", at_b.store, *_VM)
        active = at_b.store / "web01/active/0.vhdx"
        _write(active, rng, sizes)
        if unknown:
            shutil.rmtree(state)
        known = ("--unknown", "--disk", disk) if unknown else ("--state", state)
        start = time.perf_counter()
        _ask("store", "adopt", "--store", at_a.store, *_VM, *known)
        adopt_s = time.perf_counter() - start
        start = time.perf_counter()
        answer = _ask(
            *("failover", "reverse", "--store", at_b.store, *_VM, "--to", at_a.address, "--tls", at_a.tls)
        )
        seconds = time.perf_counter() - start
        _verify(active, at_a.replica("web01"), folder)
    return answer, seconds, adopt_s


def _fill(path: Path, rng: random.Random, total_bytes: int) -> None:
    """Fill the start of the disk with what no codec makes smaller."""
    with contextlib.closing(open_disk(OS_FILES, path, writable=True, clock=SYSTEM)) as disk:
        for at in range(0, total_bytes, MIB):
            disk.write(rng.randbytes(MIB), at)
        disk.flush()


def _write(path: Path, rng: random.Random, sizes: Sizes) -> None:
    """Write random pieces at random places of what is filled: none of it travels as zeros."""
    with contextlib.closing(open_disk(OS_FILES, path, writable=True, clock=SYSTEM)) as disk:
        for _ in range(sizes.side_bytes // _PIECE_BYTES):
            at = rng.randrange(sizes.filled_bytes // _PIECE_BYTES) * _PIECE_BYTES
            disk.write(rng.randbytes(_PIECE_BYTES), at)
        disk.flush()


def _verify(active: Path, replica: Path, folder: Path) -> None:
    answer = _ask("disk", "compare", active, replica)
    if not answer["equal"]:
        message = f"the replica is not what the VM holds, see {folder}"
        raise RuntimeError(message)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _ask(*arguments: object) -> dict[str, Any]:
    """Run a verb to its end and return its JSON."""
    command = [*PROGRAM, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}"
        raise RuntimeError(message)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
