"""What a fuzzer is, and how one is run: by rounds from a seed, so that every finding can be replayed.

The rule for all: any bytes give a value or an error of the allowed kinds; nothing else is raised, nothing
hangs, and memory stays in proportion to the input.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hvreplica.errors import HvReplicaError
from tests.fuzz.mutate import mutate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROUND_SECONDS_MAX = 5.0
MEMORY_BYTES_MAX = 96 << 20  # more than any parser here may need for the inputs of these seeds


@dataclass(frozen=True, slots=True)
class Fuzzer:
    """One parser under attack.

    seeds: makes valid inputs, the start of every mutation. target: takes any bytes. repair: gives damaged
    bytes their checksums back, so that half of the rounds reach what lies behind those. allowed: what the
    target may raise.
    hot: where the structures of an input begin.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    target: Callable[[bytes], None]
    repair: Callable[[bytes], bytes] | None = None
    allowed: tuple[type[Exception], ...] = (HvReplicaError,)
    hot: Callable[[], Sequence[int]] = lambda: (0,)


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken rule and what replays it."""

    fuzzer: str
    seed: int
    round: int
    data: bytes = field(repr=False)
    error: BaseException

    def __str__(self) -> str:
        return (
            f"{self.fuzzer}: {type(self.error).__name__}: {self.error}\n"
            f"replay: python -m tests.fuzz --only {self.fuzzer} --seed {self.seed} --round {self.round}"
        )


def make_input(fuzzer: Fuzzer, seeds: list[bytes], seed: int, number: int) -> bytes:
    """Return the input of one round."""
    rng = random.Random(f"{fuzzer.name}/{seed}/{number}")
    if number < len(seeds):
        return seeds[number]
    data = mutate(rng.choice(seeds), rng, seeds, fuzzer.hot())
    if fuzzer.repair is not None and rng.random() < 0.6:
        data = fuzzer.repair(data)
    return data


def attempt(fuzzer: Fuzzer, data: bytes) -> BaseException | None:
    """Run the target once; return what broke the rule, if anything."""
    start = time.monotonic()
    try:
        fuzzer.target(data)
    except fuzzer.allowed:
        pass
    except Exception as error:
        return error
    seconds = time.monotonic() - start
    if seconds > ROUND_SECONDS_MAX:
        return TimeoutError(f"{seconds:.1f} s for {len(data)} bytes")
    return None


def run(
    fuzzer: Fuzzer, *, seed: int, rounds: int | None = None, seconds: float | None = None, first: int = 0
) -> tuple[int, Finding | None]:
    """Run until a finding, `rounds` or `seconds`; return the rounds done and the finding."""
    seeds = fuzzer.seeds()
    end = None if seconds is None else time.monotonic() + seconds
    number = first
    while (rounds is None or number < first + rounds) and (end is None or time.monotonic() < end):
        data = make_input(fuzzer, seeds, seed, number)
        error = attempt(fuzzer, data)
        if error is not None:
            return number - first + 1, Finding(fuzzer.name, seed, number, data, error)
        number += 1
    return number - first, None


def peak_bytes(fuzzer: Fuzzer, *, seed: int, rounds: int) -> int:
    """Return the most memory that Python and numpy held at once during the rounds, above the start."""
    seeds = fuzzer.seeds()
    inputs = [make_input(fuzzer, seeds, seed, number) for number in range(rounds)]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for data in inputs:
            attempt(fuzzer, data)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def canary() -> Fuzzer:
    """Return a fuzzer with a bug of the kind that fuzzing must find: a length that is trusted."""

    def target(data: bytes) -> None:
        if data[:4] == b"CANA" and len(data) >= 16:
            length = int.from_bytes(data[8:12], "little")
            _ = data[12 + length - 1] if length < 1 << 16 else 0

    return Fuzzer("canary", lambda: [b"CANARY..\x04\0\0\0data", bytes(32)], target)
