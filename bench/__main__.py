"""`python -m bench [--smoke] [NAME ...]`: run the benchmarks, print the figures, keep them as JSON.

Names: initial, delta, fill, memory, disk_io, convert, check, capture, continuous, recovery, undo, points,
retention, pressed, reverse, kernels, transport. All but the last two measure whole commands, or the Python
API against whole programs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from bench.harness import RESULTS, machine, save

END_TO_END = (
    "initial",
    "delta",
    "fill",
    "memory",
    "disk_io",
    "convert",
    "check",
    "capture",
    "continuous",
    "recovery",
    "undo",
    "points",
    "retention",
    "pressed",
    "reverse",
)
MICRO = {"kernels": ("--smoke",), "transport": ("--mib", "4", "--rounds", "1")}  # with their smoke options


def main() -> int:
    """Run what was asked for; 1 if a benchmark could not verify its output."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small data, one run: does everything work?")
    parser.add_argument(
        "names", nargs="*", choices=[[], *END_TO_END, *MICRO], help="which ones; all without a name"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that keeps the figures")
    arguments = parser.parse_args()
    # A run that is ended removes what it has in memory, which would stay there for all other programs.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # An installed program has its byte code; without it, starting Python would count the compiler.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    names = arguments.names or [*MICRO, *END_TO_END]
    if len(names) > 1:
        # Each in a process of its own: what one has in memory must not weigh on the next one's children.
        options = ["--results", str(arguments.results)] + ["--smoke"] * arguments.smoke
        for name in names:
            subprocess.run([sys.executable, "-m", "bench", *options, name], check=True)
        return 0
    name = names[0]
    if name in MICRO:
        options = list(MICRO[name]) if arguments.smoke else []
        subprocess.run([sys.executable, "-m", f"bench.micro.{name}", *options], check=True)
        return 0
    sys.stdout.write(json.dumps(machine()) + "\n")
    report = import_module(f"bench.e2e.{name}").run(smoke=arguments.smoke)
    report.print()
    sys.stdout.write(f"\nkept in {save([report], arguments.results)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
