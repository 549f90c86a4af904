"""The intent journal under many threads: they share their syncs and failures, and meet resizes and settles."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import FieldOutOfRange
from hvreplica.units import GIB, MIB, TIB
from tests.support.journals import (
    IDENTITY,
    bitmap,
    bits,
    in_file,
    marked,
    new_files,
    new_journal,
    of_regions,
    opened,
    syncs,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hvreplica.tracking.journal import IntentJournal
    from tests.support.faultfile import FaultFiles


def hold_first(
    files: FaultFiles, waiting: threading.Event, go: threading.Event, operation: str = "sync"
) -> None:
    def hook(called: str, path: Path) -> None:
        del path
        if called == operation and not waiting.is_set():
            waiting.set()
            go.wait(30)

    files.hook = hook


def run_beside_a_held_sync(
    files: FaultFiles,
    journal: IntentJournal,
    regions: list[list[int]],
    *,
    members: int,
    operation: str = "sync",
) -> list[OSError]:
    """Arm regions[0] and hold it until the others, of whom `members` need the next sync, have arrived."""
    waiting, go = threading.Event(), threading.Event()
    hold_first(files, waiting, go, operation)
    failed: list[OSError] = []

    def work(mine: list[int]) -> None:
        try:
            journal.arm(of_regions(mine))
            assert bits(journal.armed) >= set(mine)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in regions]
    threads[0].start()
    assert waiting.wait(30)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 30
    while len(journal._next.places) < members and time.monotonic() < deadline:
        pass
    assert len(journal._next.places) == members
    go.set()
    for thread in threads:
        thread.join(30)
    files.hook = None
    return failed


def test_threads_share_one_sync() -> None:
    files = new_files()
    journal = new_journal(files)
    files.settle()
    regions = [[0], *([number, number * 100] for number in range(1, 9))]
    assert not run_beside_a_held_sync(files, journal, regions, members=8)
    assert syncs(files) == 2
    assert bits(journal.armed) == in_file(files) == {region for mine in regions for region in mine}


def test_threads_that_want_what_is_on_its_way_wait_for_that() -> None:
    files = new_files()
    journal = new_journal(files)
    files.settle()
    assert not run_beside_a_held_sync(files, journal, [[0, 1], [0], [1, 0], [5]], members=1)
    assert syncs(files) == 2


def test_failed_sync_fails_all_who_wait() -> None:
    files = new_files()
    journal = new_journal(files)
    files.fail("sync")
    failed = run_beside_a_held_sync(files, journal, [[0], [1], [2]], members=2)
    assert len(failed) == 3
    assert not journal.armed.any()
    assert marked(journal) == set()


def test_failed_write_fails_its_own_members_alone() -> None:
    files = new_files()
    journal = new_journal(files)
    files.fail("write", at=2)
    failed = run_beside_a_held_sync(files, journal, [[0], [1], [1, 2]], members=2)
    assert len(failed) == 2
    assert bits(journal.armed) == marked(journal) == {0}
    journal.arm(of_regions([2]))
    assert bits(journal.armed) == {0, 2}


def test_failed_write_takes_nothing_from_those_behind_it() -> None:
    files = new_files()
    journal = new_journal(files)
    files.fail("write")
    failed = run_beside_a_held_sync(files, journal, [[0, 1], [1, 2]], members=1, operation="write")
    assert len(failed) == 1
    assert bits(journal.armed) == marked(journal) == in_file(files) == {1, 2}


def test_cleared_takes_nothing_from_what_is_on_its_way() -> None:
    files = new_files()
    journal = new_journal(files)
    waiting, go = threading.Event(), threading.Event()
    hold_first(files, waiting, go)
    thread = threading.Thread(target=journal.arm, args=(of_regions([5]),))
    thread.start()
    assert waiting.wait(30)
    journal.cleared(bitmap([5]))
    go.set()
    thread.join(30)
    journal.settle()
    journal.settle()
    assert bits(journal.armed) == marked(journal) == {5}


@pytest.mark.parametrize("verb", ["settle", "record", "resize"])
def test_one_at_a_time_writes_to_the_file(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    journal = new_journal(new_files())
    waited = []

    def wait() -> None:
        waited.append(1)
        journal._busy = False

    monkeypatch.setattr(journal._turn, "wait", wait)
    journal._busy = True
    if verb == "settle":
        journal.settle()
    elif verb == "record":
        journal.record(IDENTITY, clean=True)
    else:
        journal.resize(GIB)
    assert waited
    assert not journal._busy


def test_arm_that_a_resize_overtakes_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = new_journal(new_files())
    plain = journal._window

    def overtaken(extents: NDArray[np.int64]) -> object:
        found = plain(extents)
        monkeypatch.undo()
        journal.resize(9 * MIB)
        return found

    monkeypatch.setattr(journal, "_window", overtaken)
    with pytest.raises(FieldOutOfRange):
        journal.arm(of_regions([16_383]))
    assert not journal.armed.any()


def test_batch_that_a_resize_overtakes_arms_nothing_behind_the_end() -> None:
    files = new_files()
    journal = new_journal(files)
    window = journal._window(of_regions([1, 16_383]))
    assert window is not None
    with journal._turn:
        batch = journal._admit(window)
    assert batch is not None
    journal.resize(9 * MIB)
    with journal._turn:
        journal._lead(batch)
    assert bits(journal.armed) == marked(journal) == {1}
    journal.resize(64 * GIB)
    journal.arm(of_regions([16_383]))
    assert marked(opened(files)) == {1, 16_383}


@pytest.mark.parametrize("size", [9 * MIB, 32 * TIB])
def test_resize_meets_arms_that_wait(size: int) -> None:
    """They hold regions of the old size; what the disk has no more is not armed, lest growth finds it so."""
    files = new_files()
    journal = new_journal(files)
    waiting, go = threading.Event(), threading.Event()
    hold_first(files, waiting, go)
    threads = [threading.Thread(target=journal.arm, args=(of_regions([0]),))]
    threads[0].start()
    assert waiting.wait(30)

    def late() -> None:
        with contextlib.suppress(FieldOutOfRange):
            journal.arm(of_regions([1, 16_383]))

    threads += [threading.Thread(target=journal.resize, args=(size,)), threading.Thread(target=late)]
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(30)
    kept = {0, 1, 16_383} if size > 64 * GIB else {0, 1}
    assert bits(journal.armed) <= kept
    assert bits(journal.armed) <= marked(opened(files, size)) <= kept
    if size > 64 * GIB:
        journal.arm(of_regions([8_000_000]))
        assert bits(journal.armed) == {*kept, 8_000_000}
