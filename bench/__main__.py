"""`python -m bench [--smoke] [NAME ...]`: run the benchmarks, print the figures, keep them as JSON.

Names: initial, delta, fill, memory, kernels, transport. All but the last two run whole commands as processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from bench.harness import RESULTS, Report, machine, save

END_TO_END = ("initial", "delta", "fill", "memory")
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
    sys.stdout.write(json.dumps(machine()) + "\n")
    reports: list[Report] = []
    for name in arguments.names or (*MICRO, *END_TO_END):
        if name in MICRO:
            sys.stdout.flush()
            options = MICRO[name] if arguments.smoke else ()
            subprocess.run([sys.executable, "-m", f"bench.micro.{name}", *options], check=True)
            continue
        report = import_module(f"bench.e2e.{name}").run(smoke=arguments.smoke)
        report.print()
        reports.append(report)
    if reports:
        sys.stdout.write(f"\nkept in {save(reports, arguments.results)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
