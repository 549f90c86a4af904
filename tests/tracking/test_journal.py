"""The intent journal: what is armed is durable, what is forgotten was removable."""

from __future__ import annotations

import errno
import random

import pytest

from hvreplica.errors import ChecksumMismatch, FieldOutOfRange
from hvreplica.formats.journal import (
    BITMAP_OFFSET,
    SECTOR_BYTES,
    SECTOR_REGIONS,
    JournalState,
    file_bytes_of,
    unpack_sectors,
)
from hvreplica.tracking.journal import AHEAD_REGIONS_MAX, read_regions
from hvreplica.units import GIB, MIB, TIB
from tests.support.faultfile import crash_states
from tests.support.journals import (
    IDENTITY,
    PATH,
    REGION,
    bitmap,
    bits,
    in_file,
    marked,
    new_files,
    new_journal,
    of_regions,
    opened,
    remove,
    rows,
    syncs,
    writes,
)


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
