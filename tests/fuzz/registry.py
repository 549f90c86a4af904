"""What a fuzzer is, and how one is run: by rounds from a seed, so that every finding can be replayed.

The rule for all: any bytes give a value or an error of the allowed kinds; nothing else is raised, nothing
hangs, and memory stays in proportion to the input.
"""

from __future__ import annotations

import random
import signal
import time
import tracemalloc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hvreplica.errors import HvReplicaError
from tests.fuzz.mutate import mutate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import NoReturn

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


class TooLong(BaseException):
    """A target that takes longer than its input deserves; no handler of the target may swallow it."""


def attempt(fuzzer: Fuzzer, data: bytes) -> BaseException | None:
    """Run the target once, for ROUND_SECONDS_MAX at most; return what broke the rule, if anything."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise TooLong(f"more than {ROUND_SECONDS_MAX} s for {len(data)} bytes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, ROUND_SECONDS_MAX)
    try:
        fuzzer.target(data)
    except fuzzer.allowed:
        return None
    except (Exception, TooLong) as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
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
