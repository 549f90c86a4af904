"""Coverage proves that every byte came once: against a model of single grains."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import Overlap, ProtocolViolation, ResumeRefused
from hvreplica.store import coverage as module
from hvreplica.store.coverage import Coverage

TOTAL = 64
WINDOWS = st.tuples(st.integers(0, TOTAL - 1), st.integers(1, TOTAL), st.booleans())


@given(st.integers(0, TOTAL), st.lists(WINDOWS, max_size=60))
def test_coverage_equals_a_set_of_bytes(position: int, windows: list[tuple[int, int, bool]]) -> None:
    coverage = Coverage(TOTAL)
    coverage.resume(position)
    model = set(range(position))
    for offset, length, written in windows:
        wanted = set(range(offset, min(offset + length, TOTAL)))
        if wanted & model:
            with pytest.raises(Overlap):
                coverage.reserve(offset, len(wanted))
            continue
        coverage.reserve(offset, len(wanted))
        coverage.finish(offset, written=written)
        model |= wanted if written else set()
        assert coverage.covered_bytes == len(model)
        missing = [byte for byte in range(TOTAL) if byte not in model]
        assert coverage.prefix_bytes == (missing[0] if missing else TOTAL)
        gap = coverage.first_gap()
        if not missing:
            assert gap is None
        else:
            assert gap is not None
            assert gap[0] == missing[0]
            assert not model & set(range(*gap))
            assert gap[1] == TOTAL or gap[1] in model


def test_reserved_window_is_not_done_and_not_given_twice() -> None:
    coverage = Coverage(100)
    coverage.reserve(10, 20)
    assert coverage.covered_bytes == 0
    for offset, length in ((10, 20), (0, 11), (29, 1), (15, 2)):
        with pytest.raises(Overlap):
            coverage.reserve(offset, length)
    coverage.finish(10, written=False)
    coverage.reserve(10, 20)
    coverage.finish(10, written=True)
    assert coverage.covered_bytes == 20


def test_resume_comes_before_the_first_window() -> None:
    coverage = Coverage(100)
    coverage.reserve(50, 10)
    with pytest.raises(ResumeRefused):
        coverage.resume(50)
    coverage.finish(50, written=True)
    with pytest.raises(ResumeRefused):
        coverage.resume(50)


def test_too_many_gaps_are_refused_and_filling_them_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVALS_MAX", 8)
    coverage = Coverage(100)
    for offset in range(0, 32, 4):
        coverage.reserve(offset, 2)
        coverage.finish(offset, written=True)
    with pytest.raises(ProtocolViolation):
        coverage.reserve(90, 2)


def test_windows_from_many_threads_add_up() -> None:
    coverage = Coverage(4000)

    def work(first: int) -> None:
        for offset in range(first * 10, 4000, 40):
            coverage.reserve(offset, 10)
            coverage.finish(offset, written=True)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert coverage.first_gap() is None
    assert coverage.covered_bytes == coverage.prefix_bytes == 4000
