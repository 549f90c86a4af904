"""Run the fuzzers: python -m tests.fuzz [--seconds 60] [--only NAME] [--seed N] [--round N] [--input FILE].

Without --seed the clock gives one; it is printed with every finding. --round replays one input with its traceback,
--input one file. --atheris NAME hands a target to libFuzzer where atheris is installed; what follows goes to it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

from tests.fuzz import FUZZERS
from tests.fuzz.registry import Finding, Fuzzer, make_input, run

FINDINGS = Path("build/fuzz")


def main() -> int:
    """Return 1 if any fuzzer found anything."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", choices=[fuzzer.name for fuzzer in FUZZERS])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--round", type=int)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--atheris", action="store_true")
    options, rest = parser.parse_known_args()
    warnings.simplefilter("error")
    chosen = [fuzzer for fuzzer in FUZZERS if options.only in {None, fuzzer.name}]
    if options.atheris:
        _run_atheris(chosen[0], rest)
    if rest:
        parser.error(f"unknown: {rest}")
    if options.input is not None or options.round is not None:
        for fuzzer in chosen:
            data = (
                options.input.read_bytes()
                if options.input is not None
                else make_input(fuzzer, fuzzer.seeds(), options.seed, options.round)
            )
            _replay(fuzzer, data)
        return 0
    found = [_run(fuzzer, options.seed, options.seconds / len(chosen)) for fuzzer in chosen]
    return int(any(found))


def _run(fuzzer: Fuzzer, seed: int, seconds: float) -> bool:
    rounds, finding = run(fuzzer, seed=seed, seconds=seconds)
    print(f"{fuzzer.name:16} {rounds:8} rounds, seed {seed}", flush=True)
    if finding is not None:
        _keep(finding)
    return finding is not None


def _keep(finding: Finding) -> None:
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path = FINDINGS / f"{finding.fuzzer}-{finding.seed}-{finding.round}.bin"
    path.write_bytes(finding.data)
    print(f"FOUND {finding}\ninput: {path}", file=sys.stderr, flush=True)


def _replay(fuzzer: Fuzzer, data: bytes) -> None:
    try:
        fuzzer.target(data)
    except fuzzer.allowed as error:
        print(f"{fuzzer.name}: refused as it should be: {error}")
    else:
        print(f"{fuzzer.name}: accepted")


def _run_atheris(fuzzer: Fuzzer, arguments: list[str]) -> NoReturn:
    """Give one target to libFuzzer, its seeds written as the first corpus."""
    if importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is not installed: pip install atheris, or leave --atheris away")
    atheris = importlib.import_module("atheris")
    corpus = FINDINGS / f"corpus-{fuzzer.name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzzer.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def target(data: bytes) -> None:
        try:
            fuzzer.target(data)
        except fuzzer.allowed:
            pass

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], str(corpus), *arguments], target)
    atheris.Fuzz()
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
