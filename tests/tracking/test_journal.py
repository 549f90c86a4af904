"""The intent journal: what is armed is durable, what is forgotten was removable, and threads share their syncs."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.errors import ChecksumMismatch, FieldOutOfRange
from hvreplica.formats.journal import (
    BITMAP_OFFSET,
    SECTOR_BYTES,
    SECTOR_REGIONS,
    DiskIdentity,
    JournalState,
    choose_header,
    file_bytes_of,
    unpack_sectors,
)
from hvreplica.tracking.journal import AHEAD_REGIONS_MAX, IntentJournal, read_regions
from hvreplica.units import GIB, MIB, TIB
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

PATH = Path("/state/journal/0.ij")
REGION = IntentJournal.REGION_BYTES
IDENTITY = DiskIdentity(None, file_bytes=1000, mtime_ns=50, inode=7, device=1)


def new_files() -> FaultFiles:
    return FaultFiles(PATH.parent)


def new_journal(files: FaultFiles, virtual_bytes: int = 64 * GIB) -> IntentJournal:
    return IntentJournal.create(files, PATH, disk_index=3, virtual_bytes=virtual_bytes, clock=FakeClock())


def opened(files: FaultFiles, virtual_bytes: int = 64 * GIB) -> IntentJournal:
    return IntentJournal.open(files, PATH, virtual_bytes=virtual_bytes)


def rows(*extents: tuple[int, int]) -> NDArray[np.int64]:
    return np.array(extents, np.int64).reshape(-1, 2)


def of_regions(regions: Iterable[int]) -> NDArray[np.int64]:
    return rows(*((region * REGION, 1) for region in regions))


def bits(bitmap: NDArray[np.uint8]) -> set[int]:
    bitmap = bitmap.copy()  # numpy refuses to count what another thread changes meanwhile
    used = np.flatnonzero(bitmap)
    places, bits = np.nonzero(np.unpackbits(bitmap[used], bitorder="little").reshape(-1, 8))
    return set((used[places] * 8 + bits).tolist())


def bitmap(regions: Iterable[int]) -> NDArray[np.uint8]:
    found = np.zeros(2 * MIB, np.uint8)
    for region in regions:
        found[region // 8] |= 1 << region % 8
    return found


def marked(journal: IntentJournal) -> set[int]:
    return {
        region
        for offset, length in journal.regions().tolist()
        for region in range(offset // REGION, -(-(offset + length) // REGION))
    }


def remove(journal: IntentJournal, regions: Iterable[int]) -> None:
    """Do what native code and the owner do at a cut."""
    removed = journal.armed & bitmap(regions)
    journal.armed &= ~removed
    journal.cleared(removed)


def in_file(files: FaultFiles) -> set[int]:
    content = files.content_of(PATH)
    count = choose_header(content[:BITMAP_OFFSET]).region_count
    return bits(unpack_sectors(content[BITMAP_OFFSET:], count).bitmap)


def syncs(files: FaultFiles) -> int:
    return sum(event.kind == "sync" for event in files.trace().events)


def writes(files: FaultFiles) -> list[int]:
    return [event.offset for event in files.trace().events if event.kind == "write"]


def test_new_journal_has_no_marks_and_knows_no_disk() -> None:
    files = new_files()
    journal = new_journal(files)
    assert not len(journal.regions())
    assert not journal.armed.any()
    assert len(journal.armed) == 2 * MIB
    assert journal.identity is None
    assert not journal.is_clean
    assert (journal.disk_index, journal.virtual_bytes, journal.path) == (3, 64 * GIB, PATH)
    assert len(files.content_of(PATH)) == file_bytes_of(16_384)


def test_arm_marks_every_region_that_an_extent_touches() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(rows((REGION - 1, 2), (10 * REGION, REGION), (12 * REGION + 5, 0), (64 * GIB - 1, 1)))
    assert bits(journal.armed) == {0, 1, 10, 16_383}
    assert journal.regions().tolist() == [
        [0, 2 * REGION],
        [10 * REGION, REGION],
        [64 * GIB - REGION, REGION],
    ]
    assert journal.region_count() == 4
    assert marked(opened(files)) == {0, 1, 10, 16_383}


def test_arm_is_durable_when_it_returns() -> None:
    files = new_files()
    journal = new_journal(files)
    files.settle()
    journal.arm(rows((SECTOR_REGIONS * REGION - 1, 2)))
    worlds = [
        world for at, world in crash_states(files.trace(), subsets_per_prefix=9) if at == len(files.trace())
    ]
    assert worlds
    for world in worlds:
        assert marked(opened(world)) == {SECTOR_REGIONS - 1, SECTOR_REGIONS}


def test_arm_of_what_is_armed_does_nothing() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(rows((0, 100 * REGION)))
    files.settle()
    journal.arm(rows((5 * REGION, 7 * REGION), (99 * REGION, 1)))
    journal.arm(rows())
    journal.arm(rows((64 * GIB, 0)))
    assert not len(files.trace())


def test_arm_of_a_whole_disk_of_the_largest_size_is_one_write() -> None:
    files = new_files()
    journal = new_journal(files, 64 * TIB)
    files.settle()
    journal.arm(rows((0, 64 * TIB)))
    assert syncs(files) == 1
    assert len(writes(files)) == 1
    assert journal.region_count() == 1 << 24
    assert journal.regions().tolist() == [[0, 64 * TIB]]
    assert journal.armed.all()


def test_arm_in_sequence_runs_ahead_as_far_as_it_came() -> None:
    files = new_files()
    journal = new_journal(files)
    files.settle()
    ends = []
    for region in range(400, 1000):
        journal.arm(of_regions([region]))
        ends.append(max(bits(journal.armed)) + 1)
    assert ends[:8] == [401, 403, 403, 407, 407, 407, 407, 415]
    assert bits(journal.armed) == marked(journal) == set(range(400, ends[-1]))
    assert ends[-1] <= 1000 + AHEAD_REGIONS_MAX
    assert syncs(files) <= 600 / AHEAD_REGIONS_MAX + 6


def test_arm_ahead_stops_at_the_end_of_the_disk() -> None:
    files = new_files()
    journal = new_journal(files, 100 * REGION - 512)
    for region in (96, 97, 98, 99):
        journal.arm(of_regions([region]))
    assert bits(journal.armed) == in_file(files) == {96, 97, 98, 99}


@pytest.mark.parametrize("armed", [0, 8, 31, 32, 33, 40, 64])
@pytest.mark.parametrize("behind", range(9))
def test_arm_ahead_counts_what_lies_right_before(armed: int, behind: int) -> None:
    journal = new_journal(new_files())
    journal.arm(rows(((100 + behind) * REGION, armed * REGION)))
    first = 100 + behind + armed
    journal.arm(of_regions([first]))
    assert bits(journal.armed) == set(range(100 + behind, first + 1 + min(armed, AHEAD_REGIONS_MAX)))


def test_arm_ahead_leaves_alone_what_lapsed() -> None:
    """Arming it too would need to be told to settle(), which would forget it else."""
    journal = new_journal(new_files())
    journal.arm(of_regions([5]))
    remove(journal, {5})
    journal.arm(of_regions([2, 3]))
    journal.arm(of_regions([4]))
    assert bits(journal.armed) == {2, 3, 4, 6}
    journal.settle()
    journal.settle()
    assert marked(journal) == {2, 3, 4, 6}


def test_arm_at_random_places_hardly_runs_ahead(seed: int) -> None:
    journal = new_journal(new_files(), TIB // 8)
    touched = random.Random(seed).sample(range(TIB // 8 // REGION), 2500)  # 8 % of all
    for region in touched:
        journal.arm(of_regions([region]))
    assert set(touched) <= bits(journal.armed)
    assert journal.region_count() < 1.1 * len(touched)


def test_arm_beyond_the_end_is_refused() -> None:
    journal = new_journal(new_files())
    for extent in ((64 * GIB - 1, 2), (-1, 1), (64 * GIB + 1, 0)):
        with pytest.raises(FieldOutOfRange, match="beyond the end"):
            journal.arm(rows(extent))
    assert not journal.armed.any()


def test_last_region_is_clipped_to_the_disk() -> None:
    journal = new_journal(new_files(), 9 * MIB + 512)
    journal.arm(rows((9 * MIB, 512)))
    assert journal.regions().tolist() == [[8 * MIB, MIB + 512]]


def test_cleared_is_in_memory_and_settle_forgets_what_stayed_so() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions(range(10)))
    files.settle()
    remove(journal, {1, 2, 3})
    assert not len(files.trace())
    assert marked(journal) == set(range(10))  # the file still says so
    journal.settle()
    assert not len(files.trace())
    journal.settle()
    assert marked(journal) == in_file(files) == set(range(10)) - {1, 2, 3}
    assert syncs(files) == 0
    assert bits(journal.armed) == set(range(10)) - {1, 2, 3}


def test_region_that_is_armed_between_all_cuts_costs_one_sync() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([5]))
    files.settle()
    for _ in range(20):
        remove(journal, {5})
        journal.settle()
        journal.arm(of_regions([5]))
        assert bits(journal.armed) == {5}
    assert not len(files.trace())


def test_settle_forgets_nothing_that_is_armed_again() -> None:
    journal = new_journal(new_files())
    journal.arm(of_regions([5]))
    remove(journal, {5})
    journal.arm(of_regions([5]))
    journal.settle()
    journal.settle()
    assert bits(journal.armed) == marked(journal) == {5}


def test_region_that_is_forgotten_needs_a_sync_again() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([5]))
    remove(journal, {5})
    journal.settle()
    journal.settle()
    assert in_file(files) == set()
    files.settle()
    journal.arm(of_regions([5]))
    assert syncs(files) == 1
    assert in_file(files) == {5}


def test_forgotten_sector_that_could_not_be_written_is_written_later() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([5]))
    remove(journal, {5})
    journal.settle()
    files.fail("write")
    with pytest.raises(OSError):
        journal.settle()
    assert marked(journal) == set()
    journal.settle()
    assert in_file(files) == set()


def test_cleared_leaves_what_was_armed_since_the_cut() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([1, 2]))
    removed = journal.armed.copy()
    journal.armed[:] = 0
    journal.arm(of_regions([2]))  # the gate is open, the owner comes later
    journal.cleared(removed)
    journal.settle()
    journal.settle()
    assert marked(journal) == {2}


def test_cleared_of_what_was_never_armed_takes_nothing_from_others() -> None:
    journal = new_journal(new_files())
    journal.arm(of_regions([1]))
    journal.cleared(bitmap([1, 20, 30]))
    journal.settle()
    journal.settle()
    journal.arm(of_regions([20]))
    assert bits(journal.armed) == marked(journal) == {1, 20}


def test_record_is_durable_and_forgets_what_lapsed() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([1, 2, 3]))
    remove(journal, {1})
    journal.settle()
    remove(journal, {2})
    journal.record(IDENTITY, clean=True)
    assert journal.is_clean
    files.acknowledge("clean")
    for _, world in crash_states(files.trace(), subsets_per_prefix=9, limit=200):
        if world.acknowledged:
            again = opened(world)
            assert again.identity == IDENTITY
            assert again.is_clean
            assert marked(again) == {3}
    journal.record(IDENTITY, clean=False)
    assert not opened(files).is_clean
    assert opened(files).identity == IDENTITY


def test_open_arms_what_it_finds_and_makes_it_durable() -> None:
    """A sync that failed leaves marks in the cache alone; whoever reads them there must not believe them."""
    files = new_files()
    journal = new_journal(files)
    files.fail("sync")
    with pytest.raises(OSError):
        journal.arm(of_regions([7]))
    assert in_file(files) == {7}
    again = opened(files)
    assert bits(again.armed) == {7}
    files.acknowledge(7)
    for _, world in crash_states(files.trace(), subsets_per_prefix=9):
        if world.acknowledged:
            assert 7 in marked(opened(world))


def test_open_makes_the_identity_durable_that_it_tells() -> None:
    files = new_files()
    journal = new_journal(files)
    files.fail("sync")
    with pytest.raises(OSError):
        journal.record(IDENTITY, clean=True)
    assert opened(files).identity == IDENTITY
    files.acknowledge("told")
    worlds = [world for _, world in crash_states(files.trace(), subsets_per_prefix=9) if world.acknowledged]
    assert worlds
    for world in worlds:
        assert read_regions(world, PATH)[0].identity == IDENTITY


def test_damaged_sector_is_marked_whole_and_mended_at_the_next_open() -> None:
    files = new_files()
    new_journal(files).arm(of_regions([0]))
    with files.open(PATH, writable=True) as file:
        file.write(b"damage", BITMAP_OFFSET + SECTOR_BYTES + 100)
    journal = opened(files)
    expected = {0, *range(SECTOR_REGIONS, 2 * SECTOR_REGIONS)}
    assert marked(journal) == bits(journal.armed) == expected
    assert in_file(files) == expected
    found = unpack_sectors(files.content_of(PATH)[BITMAP_OFFSET:], 16_384)
    assert not len(found.damaged)
    remove(journal, range(SECTOR_REGIONS, 2 * SECTOR_REGIONS))
    journal.settle()
    journal.settle()
    assert marked(opened(files)) == {0}


@pytest.mark.parametrize("length", [BITMAP_OFFSET, BITMAP_OFFSET + 700, BITMAP_OFFSET + 2 * SECTOR_BYTES])
def test_missing_sectors_are_marked_whole(length: int) -> None:
    files = new_files()
    new_journal(files)
    files.open(PATH, writable=True).resize(length)
    whole = (length - BITMAP_OFFSET) // SECTOR_BYTES
    assert marked(opened(files)) == set(range(whole * SECTOR_REGIONS, 16_384))
    assert len(files.content_of(PATH)) == file_bytes_of(16_384)


def test_journal_without_a_whole_header_is_refused_by_name() -> None:
    files = new_files()
    new_journal(files)
    with files.open(PATH, writable=True) as file:
        file.write(b"x", 200)
        opened(files)
        file.write(b"x", 4096 + 200)
    with pytest.raises(ChecksumMismatch, match=r"/state/journal/0\.ij.*") as caught:
        opened(files)
    assert "compare" in str(caught.value.hint)


def test_read_regions_changes_nothing() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([3]))
    journal.record(IDENTITY, clean=False)
    files.settle()
    header, found = read_regions(files, PATH)
    assert not len(files.trace())
    assert (header.state, header.identity, header.disk_index) == (JournalState.IN_USE, IDENTITY, 3)
    assert found.tolist() == [[3 * REGION, REGION]]


def test_growth_keeps_marks_and_the_place_of_armed() -> None:
    files = new_files()
    journal = new_journal(files, 9 * MIB)
    journal.arm(rows((8 * MIB, 1)))
    place = journal.armed.ctypes.data
    journal.resize(64 * GIB)
    assert journal.armed.ctypes.data == place
    assert journal.regions().tolist() == [[8 * MIB, REGION]]
    journal.arm(of_regions([16_383]))
    assert marked(opened(files)) == {2, 16_383}


def test_growth_that_is_cut_marks_nothing_new() -> None:
    files = new_files()
    new_journal(files, 9 * MIB).resize(64 * GIB)
    sizes = set()
    for _, world in crash_states(files.trace(), subsets_per_prefix=9):
        if world.exists(PATH):
            header, found = read_regions(world, PATH)
            assert not len(found), world.story
            sizes.add(header.virtual_bytes)
    assert sizes == {9 * MIB, 64 * GIB}


def test_shrinking_drops_the_marks_behind_the_end() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([0, 4, 5, 16_383]))
    journal.resize(5 * REGION - 512)
    assert bits(journal.armed) == marked(journal) == {0, 4}
    assert journal.regions().tolist()[-1] == [4 * REGION, REGION - 512]
    assert len(files.content_of(PATH)) == file_bytes_of(5)
    journal.resize(64 * GIB)
    assert bits(journal.armed) == marked(journal) == {0, 4}
    with pytest.raises(FieldOutOfRange):
        journal.resize(64 * TIB + 512)


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


def test_open_follows_a_disk_that_was_resized_meanwhile() -> None:
    files = new_files()
    new_journal(files).arm(of_regions([0, 16_383]))
    assert marked(opened(files, 128 * GIB)) == {0, 16_383}
    assert marked(opened(files, 32 * GIB)) == {0}
    assert read_regions(files, PATH)[0].virtual_bytes == 32 * GIB


def test_failed_write_leaves_nothing_armed_and_may_be_tried_again() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([1]))
    files.fail("write", error=errno.ENOSPC, written_bytes=100)
    with pytest.raises(OSError, match="No space") as caught:
        journal.arm(of_regions([1, 2]))
    assert "0.ij" in str(caught.value.__notes__)
    assert bits(journal.armed) == marked(journal) == {1}
    journal.arm(of_regions([3]))
    assert bits(journal.armed) == {1, 3}
    journal.arm(of_regions([2]))
    assert in_file(files) == bits(journal.armed) == {1, 2, 3}


def test_failed_sync_ends_the_journal() -> None:
    files = new_files()
    journal = new_journal(files)
    journal.arm(of_regions([1]))
    fault = files.fail("sync")
    with pytest.raises(OSError, match="Input/output"):
        journal.arm(of_regions([2]))
    assert fault.hits == 1
    for call in (
        lambda: journal.arm(of_regions([2])),
        lambda: journal.arm(of_regions([1])),
        journal.settle,
        lambda: journal.record(IDENTITY, clean=True),
        lambda: journal.resize(GIB),
    ):
        with pytest.raises(OSError, match="Input/output"):
            call()
    assert bits(journal.armed) == {1}
    journal.close()
    journal.close()


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
