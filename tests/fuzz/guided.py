"""Coverage-guided runs: atheris instruments the package, then each fuzzer has a forked process of its own.

    .cache/fuzz/found/NAME      inputs that reached something new, kept from run to run
    .cache/fuzz/seeds/NAME      the fuzzer's seeds, written anew each time
    .cache/fuzz/findings        what broke a rule
    tests/fuzz/corpus/NAME      small inputs that reach much, committed

libFuzzer ends its process when it has found something and when its time is up, and the instrumentation costs
seconds: so it is done once, and every fuzzer is forked from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import random
import re
import resource
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

    from tests.fuzz.registry import Fuzzer

CACHE = Path(".cache/fuzz")
FINDINGS = CACHE / "findings"
CORPUS = Path(__file__).parent / "corpus"
ROUND_SECONDS_MAX = 5
RESIDENT_MIB_MAX = 1024
# Address space costs nothing until it is touched, and the table of the largest disk takes half a GiB of it.
ADDRESS_BYTES_MAX = 8 << 30
CANARY_SECONDS = 60
PLANTED = "the planted bug"
_GRACE_SECONDS = 30
_FOUND = 77  # as libFuzzer's own
_STORY_LENGTH_MAX = 6000
_PROGRESS = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: \d+ corp: (\d+)/")
_INSTRUMENTED = ["hvreplica", "tests.fuzz.canary"]


def is_available() -> bool:
    """Return whether coverage can guide at all here."""
    return importlib.util.find_spec("atheris") is not None


@contextlib.contextmanager
def instrumented() -> Iterator[None]:
    """Instrument what is imported inside, which must be the first import of the package."""
    atheris = importlib.import_module("atheris")
    with _silent_stderr(), atheris.instrument_imports(include=_INSTRUMENTED):
        yield


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one fuzzer's run ended. code: 0 if it found nothing, else libFuzzer's."""

    name: str
    code: int
    log: str

    @property
    def summary(self) -> str:
        """What was done, in one line."""
        found = _PROGRESS.findall(self.log)
        if not found:
            return f"{self.name:18} ended with {self.code}"
        rounds, edges, inputs = found[-1]
        return f"{self.name:18} {rounds:>9} rounds {edges:>6} branches {inputs:>5} inputs"

    @property
    def story(self) -> str:
        """What went wrong, and how to see it again."""
        lines = [line for line in self.log.splitlines() if not line.startswith(("#", "INFO"))]
        story = f"FOUND {self.name}:\n" + "\n".join(lines)[-_STORY_LENGTH_MAX:]
        if self.input_path is not None:
            story += f"\nreplay: python -m tests.fuzz --only {self.name} --input {self.input_path}"
        return story

    @property
    def input_path(self) -> Path | None:
        """The file that breaks the rule."""
        found = re.findall(r"Test unit written to (\S+)", self.log)
        return Path(found[-1]) if found else None


def run_guided(
    fuzzers: Sequence[Fuzzer], *, seconds: float, seed: int, jobs: int, arguments: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Run each fuzzer for its share of `seconds`, `jobs` at a time; yield the outcome of each that has ended."""
    share = max(1, round(seconds * jobs / len(fuzzers)))
    waiting = list(fuzzers)
    running: dict[int, Fuzzer] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            fuzzer = waiting.pop(0)
            running[_start(fuzzer, share, seed, arguments)] = fuzzer
        process, status = os.wait()
        if process not in running:
            continue
        yield _outcome(running.pop(process), os.waitstatus_to_exitcode(status))


def find_canary(canary: Fuzzer, *, seed: int) -> bool:
    """Return whether coverage leads to the planted bug."""
    found = CACHE / "found" / canary.name
    for path in found.glob("*"):  # whoever starts from what an earlier run knew proves nothing
        path.unlink()
    _, status = os.waitpid(_start(canary, CANARY_SECONDS, seed, ()), 0)
    outcome = _outcome(canary, os.waitstatus_to_exitcode(status))
    if outcome.input_path is not None:
        outcome.input_path.unlink(missing_ok=True)
    return outcome.code != 0 and PLANTED in outcome.log


def _log_path(fuzzer: Fuzzer) -> Path:
    return CACHE / "logs" / f"{fuzzer.name}.log"


def _outcome(fuzzer: Fuzzer, code: int) -> Outcome:
    return Outcome(fuzzer.name, code, _log_path(fuzzer).read_text(errors="replace"))


def _start(fuzzer: Fuzzer, seconds: int, seed: int, arguments: Sequence[str]) -> int:
    for folder in (FINDINGS, _log_path(fuzzer).parent, CACHE / "found" / fuzzer.name):
        folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        try:
            _child(fuzzer, seconds, seed, arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(3)
    return process


def _child(fuzzer: Fuzzer, seconds: int, seed: int, arguments: Sequence[str]) -> NoReturn:
    """Become libFuzzer for one target."""
    log = os.open(_log_path(fuzzer), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES_MAX, ADDRESS_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + _GRACE_SECONDS, seconds + _GRACE_SECONDS + 5))
    atheris: Any = importlib.import_module("atheris")
    seeds = fuzzer.seeds()
    folder = CACHE / "seeds" / fuzzer.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds):
        (folder / f"{number:04}").write_bytes(data)
    folders = [CACHE / "found" / fuzzer.name, folder]
    folders += [CORPUS / fuzzer.name] if (CORPUS / fuzzer.name).is_dir() else []
    allowed = fuzzer.allowed
    attack = fuzzer.target

    def target(data: bytes) -> None:
        try:
            attack(data)
        except allowed:
            pass
        except Exception:
            # Here and not by libFuzzer, whose way of ending would unwind what the fork took over.
            _end_with_finding(fuzzer, data)

    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed & 0x7FFFFFFF or 1}",
        f"-timeout={ROUND_SECONDS_MAX}",
        f"-rss_limit_mb={RESIDENT_MIB_MAX}",
        f"-max_len={max(4096, 2 * max(map(len, seeds), default=0))}",
        f"-artifact_prefix={FINDINGS}/{fuzzer.name}-",
        *arguments,
        *map(str, folders),
    ]
    extra = {} if fuzzer.repair is None else {"custom_mutator": _mutator(atheris, fuzzer)}
    atheris.Setup([sys.argv[0], *options], target, **extra)
    atheris.Fuzz()
    os._exit(0)


def _end_with_finding(fuzzer: Fuzzer, data: bytes) -> NoReturn:
    path = FINDINGS / f"{fuzzer.name}-crash-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    traceback.print_exc()
    sys.stderr.write(f"Test unit written to {path}\n")
    sys.stderr.flush()
    os._exit(_FOUND)


def _mutator(atheris: Any, fuzzer: Fuzzer) -> Any:
    """Return libFuzzer's mutation with the checksums set right in more than half of the inputs."""
    repair = fuzzer.repair

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        changed: bytes = atheris.Mutate(data, size_max)
        if repair is not None and random.Random(seed).random() < 0.6:
            changed = repair(changed)
        return changed[:size_max]

    return mutate


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what atheris says of each module that it instruments."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
