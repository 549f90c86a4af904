"""Run the fuzzers: python -m tests.fuzz [--seconds 60] [--only NAME] [--seed N] [--jobs N] [-- libFuzzer options].

With atheris installed every fuzzer is guided by coverage; without it, or with --seeded, its seeds are mutated
at random. Without --seed the clock gives one. --input replays one file with its traceback, --round one input
of a seeded run. --distil chooses the committed corpus from all inputs that were found.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz import guided

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fuzz.registry import Finding, Fuzzer


def main() -> int:
    """Return 1 if any fuzzer found anything, or a canary was not found."""
    options = _options()
    is_guided = guided.is_available() and not options.seeded and options.input is options.round is None
    with guided.instrumented() if is_guided and not options.distil else contextlib.nullcontext():
        from tests.fuzz.canary import guided_canary  # noqa: PLC0415 - what is imported here is instrumented
        from tests.fuzz.fuzzers import FUZZERS  # noqa: PLC0415
    warnings.simplefilter("error")
    chosen = [fuzzer for fuzzer in FUZZERS if fnmatch.fnmatch(fuzzer.name, options.only)]
    if not chosen:
        sys.exit(f"no fuzzer {options.only}; there are: {', '.join(fuzzer.name for fuzzer in FUZZERS)}")
    if options.input is not None or options.round is not None:
        return _replay_all(chosen, options)
    if options.distil:
        return _distil_all(chosen)
    if not is_guided:
        return _run_seeded(chosen, options.seed, options.seconds)
    print(f"guided by coverage, seed {options.seed}", flush=True)
    failed = not guided.find_canary(guided_canary(), seed=options.seed)
    _say_canary(is_found=not failed)
    for outcome in guided.run_guided(
        chosen, seconds=options.seconds, seed=options.seed, jobs=options.jobs, arguments=options.rest
    ):
        print(outcome.summary, flush=True)
        if outcome.code:
            print(outcome.story, file=sys.stderr, flush=True)
            failed = True
    return int(failed)


def _say_canary(*, is_found: bool) -> None:
    print(f"{'canary':18} {'found' if is_found else 'NOT FOUND: do not believe this run'}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", default="*", help="a name, or a pattern such as 'vhdx_*'")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeded", action="store_true")
    parser.add_argument("--round", type=int)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("rest", nargs="*")
    return parser.parse_args()


def _run_seeded(fuzzers: Sequence[Fuzzer], seed: int, seconds: float) -> int:
    from tests.fuzz.canary import canary  # noqa: PLC0415
    from tests.fuzz.registry import run  # noqa: PLC0415

    if not guided.is_available():
        print(
            "atheris is not installed: seeds are mutated at random, coverage guides nothing", file=sys.stderr
        )
    _, planted = run(canary(), seed=seed, rounds=50_000)
    _say_canary(is_found=planted is not None)
    found = planted is None
    for fuzzer in fuzzers:
        rounds, finding = run(fuzzer, seed=seed, seconds=seconds / len(fuzzers))
        print(f"{fuzzer.name:18} {rounds:>9} rounds, seed {seed}", flush=True)
        if finding is not None:
            _keep(finding)
            found = True
    return int(found)


def _keep(finding: Finding) -> None:
    guided.FINDINGS.mkdir(parents=True, exist_ok=True)
    path = guided.FINDINGS / f"{finding.fuzzer}-{finding.seed}-{finding.round}.bin"
    path.write_bytes(finding.data)
    print(f"FOUND {finding}\ninput: {path}", file=sys.stderr, flush=True)


def _replay_all(fuzzers: Sequence[Fuzzer], options: argparse.Namespace) -> int:
    from tests.fuzz.registry import attempt, make_input  # noqa: PLC0415

    for fuzzer in fuzzers:
        if options.input is not None:
            data = options.input.read_bytes()
        else:
            data = make_input(fuzzer, fuzzer.seeds(), options.seed, options.round)
        error = attempt(fuzzer, data)
        if error is not None:
            raise error
        print(f"{fuzzer.name}: a value, or a refusal as it should be")
    return 0


def _distil_all(fuzzers: Sequence[Fuzzer]) -> int:
    from tests.fuzz.distil import distil  # noqa: PLC0415

    total = 0
    for fuzzer in fuzzers:
        count, size = distil(fuzzer)
        total += size
        print(f"{fuzzer.name:18} {count:>5} inputs {size:>7} bytes", flush=True)
    print(f"{total} bytes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
