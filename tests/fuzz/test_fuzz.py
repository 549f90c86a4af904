"""Every fuzzer runs a little in every test run; a canary proves that they would find something."""

from __future__ import annotations

import os

import pytest

from hvreplica.units import KIB
from tests.fuzz import registry
from tests.fuzz.canary import canary
from tests.fuzz.fuzzers import FUZZERS
from tests.fuzz.guided import CORPUS, Outcome
from tests.fuzz.registry import MEMORY_BYTES_MAX, Fuzzer, attempt, make_input, peak_bytes, run

DEEP = os.environ.get("HVREPLICA_PROFILE") == "deep"
SMOKE_SECONDS, MEMORY_ROUNDS = (5.0, 100) if DEEP else (0.4, 12)
NAMES = [fuzzer.name for fuzzer in FUZZERS]


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=NAMES)
def test_any_bytes_give_a_value_or_an_error_of_ours(fuzzer: Fuzzer, seed: int) -> None:
    # Seeds come first in a run; they have a test of their own.
    rounds, finding = run(fuzzer, seed=seed, seconds=SMOKE_SECONDS, first=len(fuzzer.seeds()))
    assert finding is None, str(finding)
    assert rounds > 2


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
    assert peak_bytes(fuzzer, seed=seed, rounds=MEMORY_ROUNDS) < MEMORY_BYTES_MAX


def test_corpus_is_kept(fuzzer_with_corpus: Fuzzer) -> None:
    """Each input reached something new once, or was a bug."""
    for path in sorted((CORPUS / fuzzer_with_corpus.name).iterdir()):
        error = attempt(fuzzer_with_corpus, path.read_bytes())
        assert error is None, f"{path}: {error!r}"


@pytest.fixture(
    params=[fuzzer for fuzzer in FUZZERS if (CORPUS / fuzzer.name).is_dir()], ids=lambda each: each.name
)
def fuzzer_with_corpus(request: pytest.FixtureRequest) -> Fuzzer:
    fuzzer: Fuzzer = request.param
    return fuzzer


def test_corpus_is_small_and_belongs_to_fuzzers() -> None:
    folders = sorted(CORPUS.iterdir())
    assert {folder.name for folder in folders} <= set(NAMES)
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 256 * KIB


def test_guided_outcome_tells_what_was_done_and_how_to_replay() -> None:
    log = "INFO: seed\n#99\tDONE   cov: 54 ft: 79 corp: 7/386Kb lim: 9 exec/s: 716 rss: 60Mb\n"
    assert Outcome("words", 0, log).summary.split() == [
        "words",
        "99",
        "rounds",
        "54",
        "branches",
        "7",
        "inputs",
    ]
    broken = Outcome(
        "words", 77, "KeyError: 'x'\n#9 NEW\nTest unit written to .cache/fuzz/findings/words-crash-1\n"
    )
    assert "ended with 77" in broken.summary
    assert "KeyError" in broken.story
    assert "#9" not in broken.story
    assert broken.story.endswith("--only words --input .cache/fuzz/findings/words-crash-1")


def test_a_target_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(data: bytes) -> None:
        while data:
            try:
                sum(range(1000))
            except Exception:
                continue

    monkeypatch.setattr(registry, "ROUND_SECONDS_MAX", 0.05)
    assert isinstance(attempt(Fuzzer("spin", lambda: [b"x"], spin), b"x"), registry.TooLong)


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
