"""Every fuzzer runs a little in every test run; a canary proves that they would find something."""

from __future__ import annotations

import pytest

from tests.fuzz import FUZZERS
from tests.fuzz.registry import MEMORY_BYTES_MAX, Fuzzer, attempt, canary, make_input, peak_bytes, run

SMOKE_SECONDS = 1.0
NAMES = [fuzzer.name for fuzzer in FUZZERS]


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=NAMES)
def test_any_bytes_give_a_value_or_an_error_of_ours(fuzzer: Fuzzer, seed: int) -> None:
    rounds, finding = run(fuzzer, seed=seed, seconds=SMOKE_SECONDS)
    assert finding is None, str(finding)
    assert rounds > 10


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=NAMES)
def test_seeds_are_valid(fuzzer: Fuzzer) -> None:
    """A seed that its own parser refuses would let the mutations test nothing."""
    accepted = 0
    for data in fuzzer.seeds():
        try:
            fuzzer.target(data)
        except fuzzer.allowed:
            continue
        accepted += 1
    assert accepted


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=NAMES)
def test_memory_stays_in_proportion(fuzzer: Fuzzer, seed: int) -> None:
    assert peak_bytes(fuzzer, seed=seed, rounds=25) < MEMORY_BYTES_MAX


@pytest.mark.parametrize("seed_of_canary", range(3))
def test_canary_is_found(seed_of_canary: int) -> None:
    rounds, finding = run(canary(), seed=seed_of_canary, rounds=20_000)
    assert finding is not None, f"{rounds} rounds found nothing"
    assert isinstance(finding.error, IndexError)
    again = make_input(canary(), canary().seeds(), finding.seed, finding.round)
    assert again == finding.data
    assert attempt(canary(), again) is not None


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)
